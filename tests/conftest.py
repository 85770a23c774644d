"""Fixtures for every test: small real models and bundles."""

from __future__ import annotations

import datetime
import gc
import importlib.util
import io
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when PyTorch's and onnxruntime's libraries are loaded, so before anything imports them. Tests
# share the machine, and threads that spin while they wait starve each other; and nobody else is to
# hear what is tested.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.bundle import Bundle, write_bundle
from pollard.runtime.reference import Sample

# Runs alone, with settings of its own: it makes a device known to PyTorch, for good.
collect_ignore = ["accelerator"]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As in a shell's background job. What tests start and interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def beside(path: str, name: str) -> Any:
    """Import a file of the repository that lies on no import path, by its path from here."""
    described = importlib.util.spec_from_file_location(name, Path(__file__).parent / path)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module
    described.loader.exec_module(module)
    return module


COLLECT = "POLLARD_TESTS_COLLECT"
"""Set, it has garbage collected after each test: what a test leaves open fails it, and not another
one, by chance, later."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    if os.environ.get(COLLECT):
        gc.collect()


def pytest_configure(config: pytest.Config) -> None:
    for path in ("schedule.py", "services/models/s3.py"):
        name = f"pollard_tests_{Path(path).stem}"
        config.pluginmanager.register(beside(path, name), name)


def linear_model(*, size: int = 8, channels: int = 1, classes: int = 3, seed: int = 0) -> bytes:
    """An ONNX model: uint8 NHWC images, a flat linear layer, float32 scores.

    Different seeds give different answers for the same image.
    """
    generator = np.random.default_rng(seed)
    features = size * size * channels
    weights = generator.normal(0, 0.02, (features, classes)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["float"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
        ],
        "linear",
        [
            helper.make_tensor_value_info(
                "image", TensorProto.UINT8, ["batch", size, size, channels]
            )
        ],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model.SerializeToString()


def linear_manifest(
    *, size: int = 8, channels: int = 1, classes: int = 3, target: str = "cpu-fp32"
) -> bundle_pb2.Manifest:
    """The manifest of :func:`linear_model`, without files."""
    manifest = bundle_pb2.Manifest(
        schema_version=1, name="linear", task=bundle_pb2.TASK_CLASSIFICATION
    )
    manifest.inputs.add(
        name="image",
        data_type=bundle_pb2.DATA_TYPE_UINT8,
        shape=[-1, size, size, channels],
        layout="NHWC",
    )
    manifest.outputs.add(
        name="scores", data_type=bundle_pb2.DATA_TYPE_FP32, shape=[-1, classes], layout="NC"
    )
    color = bundle_pb2.COLOR_MODE_GRAY if channels == 1 else bundle_pb2.COLOR_MODE_RGB
    manifest.preprocess.add().decode.CopyFrom(
        bundle_pb2.Decode(color_mode=color, apply_exif_orientation=True)
    )
    manifest.preprocess.add().resize.CopyFrom(
        bundle_pb2.Resize(
            mode=bundle_pb2.RESIZE_MODE_EXACT,
            width=size,
            height=size,
            interpolation=bundle_pb2.INTERPOLATION_BILINEAR,
        )
    )
    manifest.postprocess.classification.output = "scores"
    manifest.postprocess.classification.activation = bundle_pb2.ACTIVATION_SOFTMAX
    manifest.postprocess.labels_file = "labels.txt"
    variant = manifest.variants.add(
        name=target,
        target=target,
        model_file=f"{target}/model.onnx",
        golden_file=f"{target}/golden.npz",
        max_batch_size=32,
    )
    variant.golden_tolerance.absolute = 1e-3
    variant.golden_tolerance.relative = 1e-3
    variant.requirements.execution_provider = "CPUExecutionProvider"
    variant.requirements.opset = 18
    return manifest


def golden_archive(model: bytes, *, size: int = 8, channels: int = 1, seed: int = 1) -> bytes:
    """Golden inputs and the outputs that ``model`` gives for them."""
    import onnxruntime

    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (2, size, size, channels), dtype=np.uint8)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    scores = session.run(["scores"], {"image": images})[0]
    buffer = io.BytesIO()
    np.savez(buffer, **{"input/image": images, "output/scores": scores})
    return buffer.getvalue()


BundleMaker = Callable[..., Bundle]


@pytest.fixture
def make_bundle(tmp_path: Path) -> BundleMaker:
    """A function that writes a small real bundle and opens it.

    Arguments, all optional: ``name`` (of the directory), ``size``, ``channels``,
    ``classes``, ``seed`` (another seed gives other answers), ``target``,
    ``edit`` (called with the manifest before it is written), ``files`` (more
    files, or other content for those there are).
    """
    count = 0

    def make(
        *,
        name: str | None = None,
        size: int = 8,
        channels: int = 1,
        classes: int = 3,
        seed: int = 0,
        target: str = "cpu-fp32",
        edit: Callable[[bundle_pb2.Manifest], None] | None = None,
        files: dict[str, bytes] | None = None,
    ) -> Bundle:
        nonlocal count
        count += 1
        model = linear_model(size=size, channels=channels, classes=classes, seed=seed)
        manifest = linear_manifest(size=size, channels=channels, classes=classes, target=target)
        content: dict[str, bytes | Path] = {
            f"{target}/model.onnx": model,
            f"{target}/golden.npz": golden_archive(model, size=size, channels=channels),
            "labels.txt": "".join(f"class {index}\n" for index in range(classes)).encode(),
        }
        content.update(files or {})
        if edit is not None:
            edit(manifest)
        return write_bundle(tmp_path / "bundles" / (name or f"b{count}"), manifest, content)

    return make


@pytest.fixture
def make_linear_model() -> Callable[..., bytes]:
    """:func:`linear_model`: an ONNX file with uint8 NHWC input."""
    return linear_model


@pytest.fixture
def make_golden() -> Callable[..., bytes]:
    """:func:`golden_archive`: what an ONNX file answers for some images."""
    return golden_archive


def samples_of(count: int) -> list[Sample]:
    """Random pictures of 8 × 8 pixels, the same every time."""
    generator = np.random.default_rng(7)
    samples = []
    for _ in range(count):
        pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        samples.append(Sample(buffer.getvalue(), pixels[None, :, :, None], 0))
    return samples


@pytest.fixture
def make_samples() -> Callable[[int], list[Sample]]:
    """A function that makes so many pictures to be asked about."""
    return samples_of


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server for all tests of the session; see `bench/postgres.py`."""
    module = beside("../bench/postgres.py", "pollard_tests_postgres")
    if module.binaries() is None:
        pytest.skip(module.MISSING)
    pytest.importorskip("psycopg", reason="pip install 'pollard-services[postgres]'")
    server = module.Postgres()
    yield server
    server.close()


_OTHER_USES = (
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "encipher_only",
    "decipher_only",
)
"""Of a key, beside signing."""


class Authority:
    """An authority for certificates, and what it signs."""

    def __init__(self, folder: Path) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.ca = folder / "ca.pem"
        self._name = self._named(folder.name)
        signs = dict.fromkeys(("key_cert_sign", "crl_sign", "digital_signature"), True)
        extensions = [
            x509.BasicConstraints(ca=True, path_length=None),
            x509.KeyUsage(**dict.fromkeys(_OTHER_USES, False), **signs),
        ]
        self._write(self.ca, self._sign(self._name, self._key, extensions, critical=True))

    def issue(self, name: str, host: str = "127.0.0.1", days: float = 30) -> tuple[Path, Path]:
        """Return the files of a certificate for an address and of its key."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        certificate, key_file = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        address = (
            x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
        )
        names = x509.SubjectAlternativeName([address])
        self._write(certificate, self._sign(self._named(name), key, [names], days=days))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate, key_file

    @staticmethod
    def _named(name: str) -> Any:
        from cryptography import x509
        from cryptography.x509.oid import NameOID

        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def _sign(
        self,
        name: Any,
        key: Any,
        extensions: list[Any],
        *,
        critical: bool = False,
        days: float = 30,
    ) -> Any:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=60))
            .not_valid_after(now + datetime.timedelta(days=days))
        )
        # Python from 3.13 on trusts none without them (RFC 5280).
        identifiers = [
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
        ]
        for extension in identifiers:
            made = made.add_extension(extension, critical=False)
        for extension in extensions:
            made = made.add_extension(extension, critical=critical)
        return made.sign(self._key, hashes.SHA256())

    @staticmethod
    def _write(file: Path, certificate: Any) -> None:
        from cryptography.hazmat.primitives import serialization

        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


@pytest.fixture
def make_authority(tmp_path: Path) -> Callable[[str], Authority]:
    """Returns a function that makes an authority of a name."""
    return lambda name: Authority(tmp_path / "authorities" / name)


class Issuer:
    """Somebody who signs JSON Web Tokens."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "keys.json"
        self._keys: dict[str, Any] = {}
        self.add("first")

    def add(self, key_id: str, kind: str = "EC") -> None:
        from cryptography.hazmat.primitives.asymmetric import ec, rsa

        made = (
            ec.generate_private_key(ec.SECP256R1())
            if kind == "EC"
            else rsa.generate_private_key(65537, 2048)
        )
        self._keys[key_id] = made
        self.write()

    def write(self, *more: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        entries = [
            {**json.loads(_algorithm(key).to_jwk(key.public_key())), "kid": key_id}
            for key_id, key in self._keys.items()
        ]
        self.file.write_text(json.dumps({"keys": [*entries, *more]}))

    def sign(self, key_id: str = "first", **claims: Any) -> str:
        import jwt

        given = {
            "sub": "alice",
            "aud": "pollard",
            "iss": "https://login.example.org",
            "exp": time.time() + 600,
            "pollard_role": "predictor",
        } | claims
        kept = {name: value for name, value in given.items() if value is not None}
        key = self._keys[key_id]
        algorithm = "ES256" if hasattr(key, "curve") else "RS256"
        token: str = jwt.encode(kept, key, algorithm=algorithm, headers={"kid": key_id})
        return token

    def public(self, key_id: str = "first") -> Any:
        return self._keys[key_id].public_key()


def _algorithm(key: Any) -> Any:
    from jwt import algorithms

    return algorithms.ECAlgorithm if hasattr(key, "curve") else algorithms.RSAAlgorithm


@pytest.fixture(scope="session")
def make_issuer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Issuer]:
    """Returns a function that makes an issuer of a name."""
    return lambda name: Issuer(tmp_path_factory.mktemp(name))


@dataclass(frozen=True)
class CollectedSpan:
    """A span as a collector got it."""

    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    """Empty for the first of its trace."""
    began: int
    ended: int
    attributes: dict[str, Any]
    links: frozenset[str]
    """Ids of the spans that it is linked to."""
    failed: bool


class Collector:
    """A real collector of traces: a gRPC server that speaks OTLP."""

    def __init__(self) -> None:
        from concurrent import futures

        import grpc
        from opentelemetry.proto.collector.trace.v1 import (
            trace_service_pb2,
            trace_service_pb2_grpc,
        )

        self._changed = threading.Condition()
        self.spans: list[CollectedSpan] = []
        self.raw = b""
        """All that came, one after another."""
        collector = self

        class Servicer(trace_service_pb2_grpc.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                collector._take(request)
                return trace_service_pb2.ExportTraceServiceResponse()

        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Servicer(), self._server)
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _take(self, request: Any) -> None:
        with self._changed:
            self.raw += request.SerializeToString()
            for resource in request.resource_spans:
                about = {item.key: item.value for item in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans += [
                        CollectedSpan(
                            service=about["service.name"].string_value,
                            name=span.name,
                            kind=span.kind,
                            trace_id=span.trace_id.hex(),
                            span_id=span.span_id.hex(),
                            parent_id=span.parent_span_id.hex(),
                            began=span.start_time_unix_nano,
                            ended=span.end_time_unix_nano,
                            attributes={
                                item.key: getattr(item.value, item.value.WhichOneof("value"))
                                for item in span.attributes
                            },
                            links=frozenset(link.span_id.hex() for link in span.links),
                            failed=span.status.code == 2,
                        )
                        for span in scope.spans
                    ]
            self._changed.notify_all()

    def trace(self, trace_id: str) -> list[CollectedSpan]:
        """What has come of a trace, in the order in which it began."""
        with self._changed:
            found = [span for span in self.spans if span.trace_id == trace_id]
        return sorted(found, key=lambda span: span.began)

    def wait(self, enough: Callable[[list[CollectedSpan]], bool]) -> list[CollectedSpan]:
        """Wait until what has come is enough, and return it."""
        with self._changed:
            found = self._changed.wait_for(lambda: enough(self.spans), timeout=60)
            assert found, sorted({(span.service, span.name) for span in self.spans})
            return list(self.spans)

    def close(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector of traces; services send there what OTEL_EXPORTER_OTLP_ENDPOINT, or
    `traces_endpoint`, says is its `url`."""
    made = Collector()
    yield made
    made.close()


class NameServer:
    """Answers for every name with one address, which may change."""

    def __init__(self) -> None:
        self.address = "127.0.0.1"
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def target(self, port: int) -> str:
        """Return how gRPC is told to ask this one for a name."""
        return f"dns://127.0.0.1:{self._socket.getsockname()[1]}/server.example:{port}"

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ending:
            ending.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def _answer(self) -> None:
        while True:
            asked, who = self._socket.recvfrom(512)
            if not asked:
                return
            # RFC 1035: a name ends with an empty label, the type of what is wanted follows.
            end = asked.index(b"\0", 12) + 5
            answer = b""
            if asked[end - 4 : end - 2] == b"\0\1":  # A; there are no others
                address = socket.inet_aton(self.address)
                answer = bytes.fromhex("c00c 0001 0001 00000000 0004") + address
            counts = bytes([0, 1, 0, bool(answer), 0, 0, 0, 0])
            self._socket.sendto(asked[:2] + b"\x85\x80" + counts + asked[12:end] + answer, who)


@pytest.fixture
def name_server() -> Iterator[NameServer]:
    """A name server for one test; its `address` is what it answers with."""
    server = NameServer()
    yield server
    server.close()
