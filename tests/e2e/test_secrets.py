"""Marked secrets are planted wherever an operator or a client puts one; nothing tells them."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import grpc
import numpy as np
import pytest

from pollard.client import ModelsClient, PollardError, RetryPolicy, VisionClient
from pollard.inference import grpc_service_pb2 as pb

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8)

METHODS = {
    "models": "/pollard.models.v1.ModelService/ListModels",
    "preprocess": "/pollard.vision.v1.VisionService/Predict",
    "inference": "/inference.GRPCInferenceService/ModelInfer",
}

PASSWORDS = {
    "database": "Plantd/b@se1",
    "keys": "Plantjwks2",
    "query": "Plantquery3",
    "s3": "Plants3cret4",
    "passphrase": "Plantphrase5",
}


class Collector:
    """Keeps what is sent to it over OTLP, as it came."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        handler = grpc.unary_unary_rpc_method_handler(self._take)
        self._server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    "opentelemetry.proto.collector.trace.v1.TraceService", {"Export": handler}
                )
            ]
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def _take(self, request: bytes, _: Any) -> bytes:
        self.received.append(request)
        return b""

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")
    made = Collector()
    yield made
    made.stop()


@pytest.fixture
def keys_url(make_issuer: Any) -> Iterator[tuple[str, Any, list[str]]]:
    """URL of a JWKS that asks for a password, who signs, and what was shown."""
    issuer, shown = make_issuer("login"), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers.get("Authorization", ""))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(issuer.file.read_bytes())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}/keys?token={PASSWORDS['query']}"
        yield f"http://reader:{PASSWORDS['keys']}@{place}", issuer, shown
        server.shutdown()


@pytest.fixture
def database(postgres: Any) -> Iterator[str]:
    """URL of a database, with a password that nobody asks for."""
    name = postgres.new_database()
    parts = urlsplit(postgres.url(name))
    user = (parts.username or "postgres") + ":" + quote(PASSWORDS["database"], safe="")
    place = parts.netloc.rpartition("@")[2]
    yield parts._replace(netloc=f"{user}@{place}").geturl()
    postgres.drop_database(name)


def call(address: str, path: str, shown: str, message: bytes = b"") -> str:
    """Call with a header; return what came back, error or answer, in words."""
    with grpc.insecure_channel(address) as channel:
        try:
            metadata = (("authorization", shown), ("pollard-on-behalf-of", shown))
            answer = channel.unary_unary(path)(message, timeout=20, metadata=metadata)
            return repr(answer)
        except grpc.RpcError as error:
            return str(error) + repr(error.trailing_metadata())


def page(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, str(answer.headers) + answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


def forms(secret: str) -> list[bytes]:
    """Return the shapes in which a secret may be found."""
    raw = secret.encode()
    found = {raw, quote(secret, safe="").encode(), quote(secret).encode(), raw.hex().encode()}
    found.add(base64.b64encode(raw).rstrip(b"=")[:-1])
    return sorted(found)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_no_planted_secret_is_told_anywhere(
    start_up: Callable[..., Any],
    pollard: Callable[..., Any],
    make_bundle: Any,
    collector: Collector,
    keys_url: tuple[str, Any, list[str]],
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, issuer, shown_to_keys = keys_url
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORDS["s3"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("POLLARD_KEY_PASSPHRASE", PASSWORDS["passphrase"])
    common = (
        f'jwt_keys = "{url}"\njwt_audience = "pollard"\ntraces = "otlp"\ntraces_ratio = 1.0\n'
        f'traces_endpoint = "http://127.0.0.1:{collector.port}"\nlog_level = "debug"\n'
    )
    config = tmp_path / "pollard.toml"
    config.write_text(
        f"[models]\ndatabase_url = '{database}'\n{common}\n[preprocess]\n{common}\n"
        f"[inference]\n{common}\n"
    )
    up = start_up("--tokens", "--config", str(config))
    tokens = up.data_dir / "models" / "tokens"
    admin = (tokens / "admin.token").read_text().strip()
    server = (tokens / "server.token").read_text().strip()
    told: dict[str, bytes] = {}

    def tell(name: str, what: Any) -> None:
        told[name] = told.get(name, b"") + str(what).encode()

    def command(name: str, *arguments: Any, env: dict[str, str] | None = None) -> int:
        done = pollard(*arguments, env=env)
        tell(name, done.stdout + done.stderr)
        return int(done.returncode)

    # Used as they are meant to be.
    signing = tmp_path / "team"
    assert command("keys", "keys", "create", signing, "--passphrase") == 0
    places = {"POLLARD_MODELS_ADDRESS": up.address("models"), "POLLARD_TOKEN": admin}
    bundle = make_bundle(seed=1).path
    signed = ("--sign", signing.with_suffix(".key"))
    assert command("push", "models", "push", bundle, "--model", "m", *signed, env=places) == 0
    with ModelsClient(up.address("models"), token=admin) as models:
        ours = models.create_token("camera", "predictor").secret
        revoked = models.create_token("lost", "predictor")
        models.revoke_token(revoked.token.token_id)
        web_token = issuer.sign(sub="alice")
        for token in (ours, web_token):
            with VisionClient(
                up.address("preprocess"), token=token, retry=RetryPolicy.none()
            ) as client:
                give_up = time.monotonic() + 30
                while True:
                    try:
                        client.predict(PIXELS, "m")
                        break
                    except PollardError as error:
                        tell("errors", f"{error}{error!r}")
                        assert time.monotonic() < give_up
                        time.sleep(0.05)
                tell("repr", repr(client) + repr(client.__dict__))
        tell("audit", [repr(event) for event in models.events()])
        tell("audit", [repr(token) for token in models.tokens(show_ended=True)])
    assert any("Basic " in header for header in shown_to_keys)

    # Shown where they do not count, and broken.
    foreign = "plrd_" + "planted2aa" + "_" + "planted" * 7 + "aaa"
    spoiled = [foreign, revoked.secret, ours[:-3], web_token[:-6], issuer.sign(exp=1.0)]
    spoiled.append(issuer.sign(aud="others"))
    garbage = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"x"]).SerializeToString()
    for service, path in METHODS.items():
        for token in (*spoiled, ours, web_token):
            for text in (f"Bearer {token}", f"Basic {token}", token):
                tell("refusals", call(up.address(service), path, text, garbage))
    for service in up.ready["services"].values():
        for path in ("/metrics", "/nothing", "/", "/fleet", "/log", "/models/m", "/health/ready"):
            for token in (admin, foreign, revoked.secret):
                _, text = page(service["http_port"], path, Authorization=f"Bearer {token}")
                tell("pages", text)
            _, text = page(service["http_port"], f"{path}?token={foreign}", Cookie=f"a={foreign}")
            # The page may hand back the address that was asked for to whoever asked.
            tell("pages", text.replace(foreign, ""))
    up.wait_ready(after=up.kill("inference"))

    # What an operator looks at, or gives to others.
    store = ("--config", config, "--store", up.data_dir / "models")
    assert command("backup", "store", "backup", tmp_path / "backup", *store) == 0
    command("doctor", "doctor", "--json", "--data-dir", up.data_dir)
    shown = ("serve", "models", "--config", config, "--print-config")
    assert command("print-config", *shown) == 0
    assert b"***@" in told["print-config"]
    (tmp_path / "spoiled.key").write_bytes(signing.with_suffix(".key").read_bytes()[:-40])
    assert command("keys", "keys", "sign", bundle, "--key", tmp_path / "spoiled.key") != 0

    up.stop()
    assert collector.received
    assert b"Predict" in b"".join(collector.received)
    told["traces"] = b"".join(collector.received)
    log = up.said()
    # The first start shows the admin's token, once, and nothing else ever does.
    assert log.count(admin) == 1
    told["log"] = log.replace(admin, "").encode()
    assert b"TOKEN_UNKNOWN" in told["log"]
    for folder in (up.data_dir, tmp_path / "backup"):
        for path in folder.rglob("*"):
            if path.is_file() and tokens not in path.parents:
                told[str(path)] = path.read_bytes()

    planted = {f"shown {n}": text for n, text in enumerate(spoiled)} | PASSWORDS
    planted |= {"admin": admin, "server": server, "ours": ours, "jwt": web_token}
    # Of a token cut short, what is left; of a web token, its signature alone is a secret.
    leaks = [
        f"{name} in {where}"
        for name, secret in planted.items()
        for where, content in told.items()
        for form in forms(secret.rpartition(".")[2] or secret)
        if form in content
    ]
    assert leaks == []


def test_a_crash_tells_no_secret_in_its_traceback(tmp_path: Path) -> None:
    """What nobody expected is logged with its traceback, without the values of variables."""
    program = """
import sys
from pollard.services.common.logs import configure_logging
import structlog
configure_logging("models", form=sys.argv[1])
def fail(authorization):
    raise RuntimeError("broken")
try:
    fail("Bearer " + sys.argv[2])
except RuntimeError:
    structlog.get_logger("x").exception("unexpected error")
fail("Bearer " + sys.argv[2])
"""
    for form in ("console", "json"):
        done = subprocess.run(
            [sys.executable, "-c", program, form, PASSWORDS["s3"]],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"COLUMNS": "200"},
        )
        assert "broken" in done.stderr
        assert "Traceback" in done.stderr
        assert PASSWORDS["s3"] not in done.stderr
        if form == "json":
            assert "RuntimeError" in json.loads(done.stderr.splitlines()[0])["exception"]
