"""The inference service as processes, with float16 bundles laid into their caches."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format

from bench.gpu.sessions import Array, make_session, random_feeds
from bench.gpu.setup import Setup
from bench.pollard_server import desired_state
from bench.process import ServerProcess, free_port
from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.bundle import Bundle, write_bundle

COMMAND = (sys.executable, "-m", "bench.pollard")
"""The `pollard` command of the source tree: a bare machine has no other."""

_TYPES = {
    "tensor(uint8)": bundle_pb2.DATA_TYPE_UINT8,
    "tensor(float)": bundle_pb2.DATA_TYPE_FP32,
}

_GOLDEN_SHARE = 0.05
"""Difference from the CPU's float16 that golden outputs may have, relative to their range."""


def make_bundle(setup: Setup, name: str, file: Path, max_batch: int) -> Bundle:
    """Write a bundle of an ONNX file for the provider; its golden outputs are the CPU's."""
    session = make_session(file, "cpu")
    feeds = random_feeds(session, 1)
    outputs = answers(session, feeds)
    span = max(float(np.ptp(array)) for array in outputs.values())
    target = "cuda-fp16" if setup.provider == "cuda" else "cpu-fp32"
    manifest = bundle_pb2.Manifest(
        schema_version=1,
        name=name,
        task=bundle_pb2.TASK_RAW,
        variants=[
            bundle_pb2.Variant(
                name=target,
                target=target,
                model_file=f"{target}/model.onnx",
                max_batch_size=max_batch,
                golden_file=f"{target}/golden.npz",
                golden_tolerance=bundle_pb2.Tolerance(
                    absolute=_GOLDEN_SHARE * span, relative=_GOLDEN_SHARE
                ),
            )
        ],
        inputs=[_spec(node) for node in session.get_inputs()],
        outputs=[_spec(node) for node in session.get_outputs()],
    )
    golden = setup.work / f"{name}-golden.npz"
    arrays = {f"input/{key}": array for key, array in feeds.items()}
    arrays |= {f"output/{key}": array for key, array in outputs.items()}
    np.savez(golden, **arrays)  # type: ignore[arg-type]  # the keys are array names, not options
    folder = setup.work / "bundles" / name
    shutil.rmtree(folder, ignore_errors=True)
    return write_bundle(
        folder, manifest, {f"{target}/model.onnx": file, f"{target}/golden.npz": golden}
    )


def answers(session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return what a session of ONNX Runtime answers, by name."""
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _spec(node: Any) -> bundle_pb2.TensorSpec:
    return bundle_pb2.TensorSpec(
        name=node.name, data_type=_TYPES[node.type], shape=[-1, *node.shape[1:]]
    )


def flags(setup: Setup, joined_batch: int) -> list[str]:
    """Return what the server is told so that it runs on the provider."""
    return ["--joined-batch", str(joined_batch), "--no-measure", "--provider", setup.provider]


@contextlib.contextmanager
def servers(
    setup: Setup, bundles: Mapping[str, Bundle], named: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, ServerProcess]]:
    """Start servers side by side, by name with their flags, and stop them at the end.

    Raises:
        RuntimeError: one of them did not become ready; the message has the end of its log.
    """

    def start(name: str) -> ServerProcess:
        cache = setup.work / f"cache-{name}"
        shutil.rmtree(cache, ignore_errors=True)
        for bundle in bundles.values():
            shutil.copytree(bundle.path, cache / "bundles" / bundle.digest)
        state = json_format.MessageToJson(desired_state(bundles), preserving_proto_field_name=True)
        (cache / "state.json").write_text(state)
        port = free_port()
        line = [
            *COMMAND,
            *("serve", "inference", "--port", str(port), "--manager", ""),
            *("--cache-dir", str(cache), *named[name]),
        ]
        return ServerProcess.start(name, line, port, setup.work / f"{name}.log")

    running: dict[str, ServerProcess] = {}
    try:
        with ThreadPoolExecutor(len(named)) as pool:
            starting = {name: pool.submit(start, name) for name in named}
            problems = []
            for name, future in starting.items():
                try:
                    running[name] = future.result()
                except RuntimeError as error:
                    problems.append(str(error))
        if problems:
            raise RuntimeError("\n".join(problems))
        yield running
    finally:
        for server in running.values():
            server.process.terminate()
        for server in running.values():
            server.stop()
