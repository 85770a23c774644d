"""Pollard's inference server on bundles laid into its cache, as after a restart without manager."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from google.protobuf import json_format

from bench.models import BuiltModel
from bench.peers.fetch import BUILD
from bench.process import ServerProcess, free_port, pollard_command
from pollard.bundle.v1 import bundle_pb2
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.bundle import Bundle, write_bundle

_LONGEST_MEASUREMENT_SECONDS = 30.0
"""On a machine that does nothing else it takes some tenths of a second a model."""


def make_bundle(model: BuiltModel) -> Bundle:
    """Return the model as a bundle, without figures: the server measures for itself."""
    folder = BUILD / "bundles" / model.name
    shutil.rmtree(folder, ignore_errors=True)
    file = f"{model.target}/model.onnx"
    manifest = bundle_pb2.Manifest(
        schema_version=1,
        name=model.name,
        task=bundle_pb2.TASK_RAW,
        variants=[
            bundle_pb2.Variant(
                name=model.target,
                target=model.target,
                model_file=file,
                max_batch_size=model.max_batch,
            )
        ],
        inputs=[tensor(model.input, model.input_shape)],
        outputs=[tensor(model.output, model.output_shape)],
    )
    return write_bundle(folder, manifest, {file: model.onnx})


def tensor(name: str, shape: Sequence[int]) -> bundle_pb2.TensorSpec:
    """Return the declaration of a float32 tensor with a batch before `shape`."""
    return bundle_pb2.TensorSpec(name=name, data_type=bundle_pb2.DATA_TYPE_FP32, shape=[-1, *shape])


def desired_state(bundles: Mapping[str, Bundle]) -> fleet_pb.DesiredState:
    """Return the state in which each bundle is revision 1 and production of its model."""
    return fleet_pb.DesiredState(
        version=1,
        models=[
            fleet_pb.DesiredModel(
                model=name,
                revisions=[
                    fleet_pb.DesiredRevision(
                        revision=1, bundle_sha256=bundle.digest, size_bytes=bundle.size_bytes
                    )
                ],
                routes=[
                    fleet_pb.Route(
                        alias="production",
                        targets=[fleet_pb.WeightedRevision(revision=1, weight=1)],
                    )
                ],
            )
            for name, bundle in bundles.items()
        ],
    )


def start_pollard(
    models: Sequence[BuiltModel],
    *flags: str,
    name: str = "Pollard",
    ca: Path | None = None,
    access: fleet_pb.AccessList | None = None,
) -> ServerProcess:
    """Start the inference server with `models` and wait until it is ready.

    Args:
        models: What it serves.
        flags: Further options of `pollard serve inference`.
        name: For tables and for the names of its folders.
        ca: Authority of its certificate, where it speaks TLS.
        access: Tokens that it knows.

    Raises:
        RuntimeError: it ended or did not become ready; the message has the end of its log.
    """
    label = "".join(character if character.isalnum() else "-" for character in name.lower())
    cache = BUILD / f"cache-{label}"
    bundles = {model.name: make_bundle(model) for model in models}
    for bundle in bundles.values():
        place = cache / "bundles" / bundle.digest
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(bundle.path, place)
    state = json_format.MessageToJson(desired_state(bundles), preserving_proto_field_name=True)
    (cache / "state.json").write_text(state)
    if access is not None:
        (cache / "access.bin").write_bytes(access.SerializeToString())
    port = free_port()
    line = [
        *pollard_command(),
        *("serve", "inference"),
        *("--port", str(port), "--manager", "", "--cache-dir", str(cache)),
        *flags,
    ]
    server = ServerProcess.start(name, line, port, BUILD / f"{label}.log", ca=ca)
    if "--measure" not in flags:
        _until_measured(cache / "tuning.json", bundles.values())
    return server


def _until_measured(file: Path, bundles: Iterable[Bundle]) -> None:
    """Wait until the idle server has measured its models: the load would hold that up."""
    until = time.monotonic() + _LONGEST_MEASUREMENT_SECONDS
    while time.monotonic() < until:
        kept = file.read_text() if file.exists() else ""
        if all(bundle.digest in kept for bundle in bundles):
            return
        time.sleep(0.2)
