"""How soon a bad revision is taken back: `python -m bench.rollout`.

Starts `pollard up`, pushes a good revision and a bad one (one request in five fails, or it takes
about three times as long), keeps clients busy, and begins a rollout at 5 %. Time counts from the
200th request to the bad revision, or from its first one if it was taken back before, both as the
manager hears of them: servers report once a second.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper

from bench.environment import environment, heading
from bench.peers.fetch import ROOT
from bench.process import pollard_command
from pollard.bundle.v1 import bundle_pb2
from pollard.client import AsyncInferenceClient, AsyncModelsClient, RequestFailed
from pollard.runtime.bundle import Bundle, write_bundle

_WIDTH = 256
_ALLOWED_SECONDS = 10.0
_FIRST = 200


def _bundle(folder: Path, *, layers: int, failing: bool = False) -> Bundle:
    """Write a bundle of dense layers; `failing` ones fail where the first number is 0.8 or more."""
    chance = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer in range(layers):
        values = chance.normal(0, _WIDTH**-0.5, (_WIDTH, _WIDTH)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"h{layer}"]))
        last = f"h{layer}"
    if failing:
        weights += [
            numpy_helper.from_array(np.int64([0]), "first"),
            numpy_helper.from_array(np.float32([5]), "five"),
            numpy_helper.from_array(np.zeros(4, np.float32), "table"),
        ]
        nodes += [
            helper.make_node("Gather", ["x", "first"], ["head"], axis=1),
            helper.make_node("Mul", ["head", "five"], ["scaled"]),
            helper.make_node("Cast", ["scaled"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["zero"]),
            helper.make_node("Add", [last, "zero"], ["y"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", [last], ["y"]))
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "dense",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", _WIDTH])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", _WIDTH])],
            weights,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.checker.check_model(model)

    def spec(name: str) -> bundle_pb2.TensorSpec:
        kind = bundle_pb2.DATA_TYPE_FP32
        return bundle_pb2.TensorSpec(name=name, data_type=kind, shape=[-1, _WIDTH])

    manifest = bundle_pb2.Manifest(
        schema_version=1,
        name="dense",
        task=bundle_pb2.TASK_RAW,
        variants=[
            bundle_pb2.Variant(
                name="cpu-fp32", target="cpu-fp32", model_file="model.onnx", max_batch_size=8
            )
        ],
        inputs=[spec("x")],
        outputs=[spec("y")],
    )
    return write_bundle(folder, manifest, {"model.onnx": model.SerializeToString()})


class _Traffic:
    """Clients that send random numbers until they are stopped."""

    def __init__(self, address: str, clients: int) -> None:
        self._address = address
        self._clients = clients
        self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> _Traffic:
        self._tasks = [asyncio.create_task(self._run(seed)) for seed in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)

    async def _run(self, seed: int) -> None:
        chance = np.random.default_rng(seed)
        async with AsyncInferenceClient(self._address) as client:
            while not self._stopped:
                values = chance.random((1, _WIDTH), np.float32)
                try:
                    await client.infer("dense", {"x": values})
                except RequestFailed:
                    continue


async def _one(up: dict[str, Any], kind: str, good: Bundle, bad: Bundle) -> dict[str, Any]:
    services = up["services"]
    async with AsyncModelsClient(services["models"]["address"]) as models:
        await models.push(good.path, "dense", alias="production")
        pushed = await models.push(bad.path, "dense")
        async with _Traffic(services["inference"]["address"], clients=4):
            started = await models.start_rollout(
                "dense", pushed.revision.revision, steps=[5, 100], hold=120
            )
            first = enough = None
            while True:
                found = await models.rollout("dense", started.number)
                now = time.perf_counter()
                seen = found.evidence.revision.requests if found.evidence else 0
                first = first or (now if seen else None)
                enough = enough or (now if seen >= _FIRST else None)
                if found.end_time is not None:
                    break
                await asyncio.sleep(0.02)
    since = enough or first or now
    return {
        "kind": kind,
        "state": found.state,
        "seconds_since_the_200th": now - since,
        "seconds_since_the_first": now - (first or now),
        "requests": seen,
        "error": found.error,
    }


async def _measure(rounds: int, folder: Path) -> list[dict[str, Any]]:
    good = _bundle(folder / "good", layers=24)
    bad = {
        "20 % of the requests fail": _bundle(folder / "failing", layers=24, failing=True),
        "about three times the latency": _bundle(folder / "slow", layers=80),
    }
    ready = folder / "ready.json"
    command = [*pollard_command(), "up", "--port-base", "0", "--data-dir", str(folder / "data")]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--ready-file", str(ready), "--stop-with-parent"], stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + 60
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((folder / "log.txt").read_text(errors="replace")[-3000:])
            await asyncio.sleep(0.1)
        up = json.loads(ready.read_text())
        rows = []
        for _ in range(rounds):
            for kind, bundle in bad.items():
                rows.append(await _one(up, kind, good, bundle))
                print(
                    f"{kind}: {rows[-1]['state']} {rows[-1]['seconds_since_the_first']:.2f} s "
                    f"after its first request, {rows[-1]['requests']} requests: "
                    f"{rows[-1]['error']}",
                    flush=True,
                )
        return rows
    finally:
        process.terminate()
        process.wait(30)


def main(
    rounds: Annotated[int, typer.Option(help="Rollouts of each kind.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Roll bad revisions out; exit with 1 unless all are taken back in time."""
    before = environment()
    with tempfile.TemporaryDirectory(prefix="pollard-rollout-") as folder:
        rows = asyncio.run(_measure(rounds, Path(folder)))
    lines = [
        "# How soon a bad revision is taken back",
        "",
        heading(before),
        "",
        "At 5 % of the requests of four clients; allowed are "
        f"{_ALLOWED_SECONDS:g} s after its first {_FIRST} requests.",
        "",
        "| revision | taken back | after the 200th request, s | after the first, s | requests |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        back = sum(row["state"] == "ROLLED_BACK" for row in of_kind)
        late = [row["seconds_since_the_200th"] for row in of_kind if row["requests"] >= _FIRST]
        after = f"{max(late):.2f} at most" if late else "always before it"
        first = max(row["seconds_since_the_first"] for row in of_kind)
        requests = sorted(row["requests"] for row in of_kind)
        lines.append(
            f"| {kind} | {back} of {len(of_kind)} | {after} | {first:.2f} at most | "
            f"{requests[0]} to {requests[-1]} |"
        )
    text = "\n".join([*lines, ""])
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"rollout-{time.strftime('%Y-%m-%d')}"
    file.with_suffix(".md").write_text(text)
    content = {"environment": before, "rollouts": rows}
    file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    late = [row for row in rows if row["seconds_since_the_200th"] > _ALLOWED_SECONDS]
    if late or any(row["state"] != "ROLLED_BACK" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
