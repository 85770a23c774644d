"""The page about errors has every reason that the services give, and only what is really said."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
NO_RETRIES = [("grpc.enable_retries", 0)]


def load(path: str) -> ModuleType:
    """Import a file of the repository that lies on no import path."""
    name = "pollard_troubleshooting_" + Path(path).stem
    described = importlib.util.spec_from_file_location(name, ROOT / path)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module
    described.loader.exec_module(module)
    return module


REASONS = load("docs/reasons.py")


def table(section: str) -> list[list[str]]:
    """The rows of a section's one table, by cell, without its head."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 2, section
    return rows[2:]


@pytest.fixture(scope="module")
def there() -> dict[str, Any]:
    """Every reason that the sources give."""
    found: dict[str, Any] = REASONS.in_sources()
    return found


def test_every_reason_in_the_sources_is_on_the_page_and_no_other(there: dict[str, Any]) -> None:
    known = REASONS.on_page(PAGE)
    missing = [there[name].row() for name in sorted(there.keys() - known.keys())]
    assert not missing, "add to docs/troubleshooting.md:\n" + "\n".join(missing)
    assert known.keys() <= there.keys(), "nothing in the sources gives these any more"


def test_the_statuses_on_the_page_are_those_of_the_sources(there: dict[str, Any]) -> None:
    known = REASONS.on_page(PAGE)
    for name, reason in there.items():
        assert reason.statuses <= known.get(name, reason.statuses), name
        for status in known.get(name, ()):
            assert status in grpc.StatusCode.__members__, name


def test_reasons_are_found_however_they_are_written() -> None:
    source = """
class Wrong(InvalidRequest):
    reason = "OF_THE_CLASS"
    def __init__(self, message, reason="BY_DEFAULT"):
        super().__init__(message, reason="OF_THE_BASE")
def judge(limit, reason): ...
def use():
    what, reason = "it", "ASSIGNED"
    judge(1, "BY_POSITION")
    NotFound("no", reason="A" if what else "B_C")
    return {"reason": "IN_A_MAPPING", "code": "NOT_A_REASON"}
"""
    tree = ast.parse(source)
    places = dict(REASONS._parameters({"source.py": tree}))
    found = {(name, carrier) for name, carrier, _ in REASONS._Finder(places).run(tree)}
    assert found == {
        ("OF_THE_CLASS", "Wrong"),
        ("BY_DEFAULT", "Wrong"),
        ("OF_THE_BASE", "Wrong"),
        ("ASSIGNED", ""),
        ("BY_POSITION", "judge"),
        ("A", "NotFound"),
        ("B_C", "NotFound"),
        ("IN_A_MAPPING", ""),
    }


def test_every_option_on_the_page_exists() -> None:
    reference = (ROOT / "docs" / "reference" / "commands.md").read_text()
    known = set(re.findall(r"--[a-z][a-z0-9-]*", reference))
    used = set(re.findall(r"--[a-z][a-z0-9-]*", PAGE))
    assert used <= known


def test_the_messages_of_commands_are_in_the_sources() -> None:
    every = "".join(
        path.read_text()
        for folder in ("clients/python/src", "services/src", "compression/src")
        for path in (ROOT / folder).rglob("*.py")
    )
    every = re.sub(r'"\s*\n\s*f?"', "", every)  # literals that go on in the next line
    for message, *_ in table("Messages of the commands"):
        for words in re.findall(r"`([^`]+)`", message):
            assert words in every or words.startswith("pollard "), words


# The messages of gRPC: each row of the page is made to happen.


class _Handler(grpc.GenericRpcHandler):
    """Three methods: one answers, one never does, one waits until the server stops."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler | None:
        def wait(_: bytes, context: grpc.ServicerContext) -> bytes:
            over = threading.Event()
            context.add_callback(over.set)
            self.reached.set()
            over.wait()
            return b""

        methods = {"/t.T/Echo": lambda request, _: request, "/t.T/Wait": wait}
        method = methods.get(handler_call_details.method)
        return method and grpc.unary_unary_rpc_method_handler(method)


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What gRPC says of each failure, by what the row of the page is about."""
    authority = load("tests/conftest.py").Authority(tmp_path_factory.mktemp("authority"))
    trusted = grpc.ssl_channel_credentials(authority.ca.read_bytes())
    handler = _Handler()
    servers = []

    def serve(kind: str = "", options: Any = ()) -> tuple[grpc.Server, str]:
        server = grpc.server(futures.ThreadPoolExecutor(4), options=list(options))
        server.add_generic_rpc_handlers((handler,))
        if kind:
            host = "192.0.2.1" if kind == "misnamed" else "127.0.0.1"
            chain, key = authority.issue(kind, host, days=-1 if kind == "expired" else 30)
            shown = grpc.ssl_server_credentials([(key.read_bytes(), chain.read_bytes())])
            port = server.add_secure_port("127.0.0.1:0", shown)
        else:
            port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return server, f"127.0.0.1:{port}"

    def ask(
        address: str,
        method: str = "/t.T/Echo",
        credentials: grpc.ChannelCredentials | None = None,
        options: Any = (),
        timeout: float = 20,
    ) -> str:
        chosen = [*NO_RETRIES, *options]
        channel = (
            grpc.insecure_channel(address, chosen)
            if credentials is None
            else grpc.secure_channel(address, credentials, chosen)
        )
        with channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(bytes(64), timeout=timeout)
        return f"{caught.value.code().name}: {caught.value.details()}"

    small = [("grpc.max_receive_message_length", 16)]
    stopping, address = serve()
    _, plain = serve()
    said = {
        "Connection refused": ask("127.0.0.1:1"),
        "Domain name not found": ask("no-such-host.invalid:1"),
        "Deadline Exceeded": ask(plain, "/t.T/Wait", timeout=0.2),
        "Socket closed": ask(serve("good")[1]),
        "Failed to create security handshaker": ask(
            plain, credentials=grpc.ssl_channel_credentials(b"no PEM")
        ),
        "WRONG_VERSION_NUMBER": ask(plain, credentials=trusted),
        "certificate has expired": ask(serve("expired")[1], credentials=trusted),
        "unable to get local issuer certificate": ask(
            serve("good")[1], credentials=grpc.ssl_channel_credentials()
        ),
        "Hostname Verification Check failed": ask(serve("misnamed")[1], credentials=trusted),
        "Received message larger than max": ask(serve(options=small)[1]),
        "Sent message larger than max": ask(plain, options=[("grpc.max_send_message_length", 16)]),
        "Method not found!": ask(plain, "/t.T/Nothing"),
    }
    handler.reached.clear()
    stopper = threading.Thread(target=lambda: (handler.reached.wait(), stopping.stop(None)))
    stopper.start()
    said["Cancelling all calls"] = ask(address, "/t.T/Wait")
    stopper.join()
    yield said
    for server in servers:
        server.stop(None).wait()


@pytest.mark.parametrize("row", table("Messages of gRPC"), ids=lambda row: row[0].strip("`"))
def test_grpc_says_what_the_page_quotes(row: list[str], messages: dict[str, str]) -> None:
    words = row[0].strip("`")
    if words == "Domain name not found" and words not in messages[words]:
        # Where there is no DNS at all its absence is what gRPC tells.
        assert "resol" in messages[words] or "DNS" in messages[words]
        return
    assert words in messages[words]
    assert messages[words].startswith(f"{row[1]}: ")
