"""What the clients of every language are run against: live services, and fronts before them.

A front is a gRPC server that passes calls on to a live service and adds what that service cannot be
made to do on demand: TLS with a good or a bad certificate, a token, failures, silence, a restart.
What it adds is data, from the vectors.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from pollard.client import ModelsClient
from pollard.runtime.bundle import write_bundle

ROOT = Path(__file__).resolve().parents[2]

_RESTART_SECONDS = 1.0

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def load(path: str) -> ModuleType:
    """Import a file of the repository that lies on no import path."""
    name = "pollard_contract_" + path.replace("/", "_").removesuffix(".py")
    described = importlib.util.spec_from_file_location(name, ROOT / path)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module
    described.loader.exec_module(module)
    return module


_SHARED: list[tuple[Any, contextlib.ExitStack]] = []
"""The live services, and what ends them, while tests of this directory run: all share them."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`pollard up` with what the vectors speak of.

    The model "digits" has two revisions that answer differently: 1 is "production", 2 "candidate".
    The rollout 1 of the model "rolled" was taken back by hand. `live.bundle` is the directory of a
    third bundle, which is registered nowhere, `live.bundles` has all three. Tests may add models.
    """
    if not _SHARED:
        stack = contextlib.ExitStack()
        _SHARED.append((stack.enter_context(_started(tmp_path_factory.mktemp("live"))), stack))
    return _SHARED[0][0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """End the services when no test of this directory follows."""
    try:
        yield
    finally:
        if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
            while _SHARED:
                _SHARED.pop()[1].close()


@contextlib.contextmanager
def _started(directory: Path) -> Iterator[Any]:
    models = load("tests/conftest.py")
    up = load("tests/e2e/conftest.py").Up(directory / "up").start()
    try:
        bundles = []
        for seed in range(3):
            model = models.linear_model(seed=seed)
            content = {
                "cpu-fp32/model.onnx": model,
                "cpu-fp32/golden.npz": models.golden_archive(model),
                "labels.txt": b"zero\none\ntwo\n",
            }
            if seed == 2:
                # Sent in several pieces, so that an upload can break between them.
                content["weights.bin"] = random.Random(0).randbytes(3 << 20)
            made = write_bundle(directory / f"bundle{seed}", models.linear_manifest(), content)
            bundles.append(made.path)
        up.wait_ready()
        with ModelsClient(up.address("models")) as manager:
            manager.push(bundles[0], "digits", alias="production")
            manager.push(bundles[1], "digits", alias="candidate")
            manager.push(bundles[0], "rolled", alias="production")
            manager.push(bundles[1], "rolled")
            rollout = manager.start_rollout("rolled", 2)
            manager.abort_rollout("rolled", rollout.number)
        up.bundles = bundles
        up.bundle = bundles[2]
        yield up
    finally:
        up.end()


def credentials(authority: Any, kind: str) -> grpc.ServerCredentials:
    """Return a server's credentials: "good", "expired" or "misnamed" (for another host)."""
    certificate, key = authority.issue(
        kind,
        "192.0.2.1" if kind == "misnamed" else "127.0.0.1",
        days=-1 if kind == "expired" else 30,
    )
    return grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])


class Front(grpc.GenericRpcHandler):
    """A server before a live service. Everything it adds is optional.

    Args:
        spec: `tls` ("good", "expired", "misnamed", or "none": the client asks for it in vain),
            `token` (what must be shown), `fail_first` (so many calls fail with `code` first),
            `hang` (no call is answered), `cut_upload_bytes` (the first upload is ended after so
            many bytes), `restart_after` (when so many messages went out on a call, the server
            restarts, once; with 0 in the middle of the first call, before any answer).
            What a server of another version does: `lacks` (methods that it has not), `append` (by
            method, as base64, what comes after the bytes of an answer: fields that nobody knows),
            `set` (by method, as JSON, what an answer says instead: values that nobody knows),
            `details_base64` (goes with the errors of `fail_first`),
            `max_request_bytes` (the largest request that it takes), `away` (nothing listens at its
            port), `unwell` (it says so when it is asked for its health).
        backend: Address of the live service.
        authority: Signs its certificate.
    """

    def __init__(self, spec: dict[str, Any], backend: str, authority: Any) -> None:
        self._spec = spec
        self._backend = grpc.insecure_channel(backend, options=OPTIONS)
        tls = spec.get("tls", "none")
        self._credentials = None if tls == "none" else credentials(authority, tls)
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._restarting: threading.Thread | None = None
        self._kept: socket.socket | None = None
        self.port = 0
        self.reset()
        self._server = self._start()
        if spec.get("away"):
            # The port is kept, so that nobody else gets it, and nobody takes connections there.
            self._server.stop(None).wait()
            self._kept = socket.socket()
            self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._kept.bind(("127.0.0.1", self.port))

    def _start(self) -> grpc.Server:
        largest = self._spec.get("max_request_bytes", -1)
        server = grpc.server(
            futures.ThreadPoolExecutor(8),
            options=[*OPTIONS[1:], ("grpc.max_receive_message_length", largest)],
        )
        server.add_generic_rpc_handlers((self,))
        address = f"127.0.0.1:{self.port}"
        self.port = (
            server.add_secure_port(address, self._credentials)
            if self._credentials is not None
            else server.add_insecure_port(address)
        )
        server.start()
        return server

    def reset(self) -> None:
        """Begin anew, for the next language."""
        with self._lock:
            self.attempts: Counter[str] = Counter()
            self._active = 0
            self._restarted = False

    def wait_quiet(self) -> bool:
        """Wait until no call is open any more; False when one stays."""
        with self._quiet:
            return self._quiet.wait_for(lambda: self._active == 0, timeout=30)

    def close(self) -> None:
        if self._restarting is not None:
            self._restarting.join()
        self._server.stop(None).wait()
        if self._kept is not None:
            self._kept.close()
        self._backend.close()

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method.rpartition("/")[2] in self._spec.get("lacks", ()):
            return None

        def handle(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._handle(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(handle)

    def _handle(
        self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        name = method.rpartition("/")[2]
        over = threading.Event()

        def ended() -> None:
            with self._quiet:
                self._active -= 1
                self._quiet.notify_all()
            over.set()

        with self._lock:
            self.attempts[name] += 1
            number = self.attempts[name]
            self._active += 1
        if not context.add_callback(ended):
            ended()
            return
        shown = dict(context.invocation_metadata())
        token = self._spec.get("token")
        if token is not None and shown.get("authorization") != f"Bearer {token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")
        if number <= self._spec.get("fail_first", 0):
            if "details_base64" in self._spec:
                details = base64.b64decode(self._spec["details_base64"])
                context.set_trailing_metadata((("grpc-status-details-bin", details),))
            context.abort(grpc.StatusCode[self._spec["code"]], "not now")
        if self._maybe_restart(0) or self._spec.get("hang"):
            over.wait()
            return
        cut = name == "UploadBundle" and number == 1 and "cut_upload_bytes" in self._spec
        if cut:
            requests = _some(requests, self._spec["cut_upload_bytes"])
        passed = [
            (key, value) for key, value in shown.items() if key.startswith(("pollard-", "triton"))
        ]
        if self._spec.get("unwell") and method == "/grpc.health.v1.Health/Watch":
            status = health_pb2.HealthCheckResponse.NOT_SERVING
            yield health_pb2.HealthCheckResponse(status=status).SerializeToString()
            over.wait()
            return
        call = self._backend.stream_stream(method)(
            requests,
            metadata=passed,
            timeout=left if (left := context.time_remaining()) < 1e6 else None,
        )
        context.add_callback(call.cancel)
        more = base64.b64decode(self._spec.get("append", {}).get(name, ""))
        other = self._spec.get("set", {}).get(name)
        try:
            for count, answer in enumerate(call, 1):
                yield (answer if other is None else _changed(method, answer, other)) + more
                if self._maybe_restart(count):
                    over.wait()
                    return
        except grpc.RpcError:
            if cut:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
            context.set_trailing_metadata(
                [item for item in call.trailing_metadata() if item[0].startswith("grpc-status-d")]
            )
            context.abort(call.code(), call.details())

    def _maybe_restart(self, messages: int) -> bool:
        """Restart the server if it is time for it; say whether it was."""
        with self._lock:
            if self._restarted or messages < self._spec.get("restart_after", messages + 1):
                return False
            self._restarted = True

        def restart() -> None:
            # The next listens beside the old one before that ends: a client has few attempts. The
            # old one first lets go of its port, and then of the call: a client that connects anew
            # at once may be taken by what is about to close, and older gRPC for Go gives a retry up
            # that meets this.
            old = self._server
            self._server = self._start()
            old.stop(_RESTART_SECONDS).wait()

        self._restarting = threading.Thread(target=restart)
        self._restarting.start()
        return True


def _changed(method: str, answer: bytes, fields: dict[str, Any]) -> bytes:
    """Set fields of an answer; other fields stay, also within those that are messages."""
    service, _, name = method.removeprefix("/").partition("/")
    described = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    message = GetMessageClass(described.output_type).FromString(answer)
    changed: bytes = json_format.ParseDict(fields, message).SerializeToString()
    return changed


def _some(requests: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Pass on at least `limit` bytes of an upload, and then end it as if that were all."""
    sent = 0
    for request in requests:
        yield request
        sent += len(request)
        if sent >= limit:
            return


@pytest.fixture(scope="module")
def fronts(
    live: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[dict[str, Any], str], Front]]:
    """A function that starts a front before one of the live services."""
    with contextlib.ExitStack() as stack:
        authority = load("tests/conftest.py").Authority(tmp_path_factory.mktemp("authority"))

        def start(spec: dict[str, Any], service: str) -> Front:
            made = Front(spec, live.address(service), authority)
            made.ca_file = authority.ca
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture(scope="session")
def builds() -> ModuleType:
    """`clients/build.py`."""
    return load("clients/build.py")
