"""Load from processes of their own: each sends the same bytes again and again, and notes times.

A request is serialised once and answers stay bytes, so that the generators take as little of the
machine from the server as they can.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.gpu.sessions import Array
from bench.process import ServerProcess

METHOD = "/inference.GRPCInferenceService/ModelInfer"

_START_SECONDS = 30.0
"""The longest that all generators may take to connect and get a first answer."""


@dataclass(frozen=True)
class Load:
    """What the generators do."""

    addresses: tuple[str, ...]
    """Servers; each generator uses all of them in turn."""
    request: Path
    """File with the request's bytes."""
    processes: int
    in_flight: int
    """Requests that each process has under way."""
    rows: int
    """Images of a request."""
    answers: Path | None = None
    """File with the logits that revisions of even and of odd number give, "even" and "odd"; each
    answer is compared with them."""


@dataclass
class Seen:
    """What came of it."""

    sent: Array = field(repr=False)
    """When each answered request was sent, on the clock of `time.monotonic`."""
    took: Array = field(repr=False)
    """Seconds that each took."""
    failed: int
    wrong: int
    """Answers that are those of another revision than they name."""
    errors: list[str]
    rows: int

    def between(self, start: float, end: float) -> dict[str, float]:
        """Return rates and latencies of what was answered in that time."""
        done = self.sent + self.took
        took = self.took[(done >= start) & (done < end)]
        if not took.size:
            return {"images_per_second": 0.0, "p50_ms": 0.0, "p99_ms": 0.0, "requests": 0}
        return {
            "images_per_second": round(self.rows * took.size / (end - start), 1),
            "p50_ms": round(1e3 * float(np.median(took)), 3),
            "p99_ms": round(1e3 * float(np.percentile(took, 99)), 3),
            "requests": int(took.size),
        }


class Generators:
    """Processes that make load from when all are ready until they are stopped."""

    def __init__(self, load: Load, folder: Path) -> None:
        """Start them, and wait until each has got a first answer.

        Raises:
            RuntimeError: one of them got none; the message has its words.
        """
        self._load = load
        self._processes: list[subprocess.Popen[str]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / f"seen-{number}.npz" for number in range(load.processes)]
        for file in self._files:
            file.unlink(missing_ok=True)
            told = {
                "addresses": load.addresses,
                "request": str(load.request),
                "in_flight": load.in_flight,
                "answers": None if load.answers is None else str(load.answers),
                "out": str(file),
            }
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "bench.gpu.callers", json.dumps(told)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if line != "ready":
                self.kill()
                raise RuntimeError(f"a load generator could not begin: {line or 'it ended'}")
        for process in self._processes:
            self._tell(process, "go")

    def stop(self) -> Seen:
        """End them after their last answers, and return what they saw."""
        for process in self._processes:
            self._tell(process, "stop")
        for process in self._processes:
            process.wait(40)
        parts = []
        for file in self._files:
            with np.load(file) as kept:
                parts.append({name: kept[name] for name in kept.files})
        return Seen(
            sent=np.concatenate([part["sent"] for part in parts]),
            took=np.concatenate([part["took"] for part in parts]),
            failed=sum(int(part["failed"]) for part in parts),
            wrong=sum(int(part["wrong"]) for part in parts),
            errors=sorted({str(text) for part in parts for text in part["errors"]})[:5],
            rows=self._load.rows,
        )

    def cpu_seconds(self) -> float:
        """Return the processor time that they have taken so far."""
        times = [psutil.Process(process.pid).cpu_times() for process in self._processes]
        return float(sum(each.user + each.system for each in times))

    def kill(self) -> None:
        """End them at once."""
        for process in self._processes:
            process.kill()
            process.wait()

    @staticmethod
    def _tell(process: subprocess.Popen[str], word: str) -> None:
        assert process.stdin is not None
        process.stdin.write(word + "\n")
        process.stdin.flush()


def measure(
    load: Load,
    folder: Path,
    seconds: float,
    warm_seconds: float = 0.5,
    servers: Sequence[ServerProcess] = (),
) -> dict[str, Any]:
    """Make load for so long after a warm-up, and return rates and latencies.

    What the servers and the generators take of the processor is told in cores.
    """
    generators = Generators(load, folder)
    time.sleep(warm_seconds)
    before = [server.cpu_seconds() for server in servers], generators.cpu_seconds()
    start = time.monotonic()
    time.sleep(seconds)
    end = time.monotonic()
    after = [server.cpu_seconds() for server in servers], generators.cpu_seconds()
    seen = generators.stop()
    told: dict[str, Any] = {
        **seen.between(start, end),
        "failed": seen.failed,
        "server_cores": round((sum(after[0]) - sum(before[0])) / (end - start), 2),
        "caller_cores": round((after[1] - before[1]) / (end - start), 2),
    }
    if seen.errors:
        told["errors"] = seen.errors
    return told


def write_request(path: Path, model: str, inputs: Mapping[str, Array]) -> Path:
    """Write a request's bytes to a file."""
    from pollard.inference import grpc_service_pb2 as pb

    kinds = {"uint8": "UINT8", "float32": "FP32"}
    request = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=kinds[str(array.dtype)], shape=array.shape)
        request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(request.SerializeToString())
    return path


class _Caller:
    def __init__(self, told: Mapping[str, Any]) -> None:
        self._request = Path(told["request"]).read_bytes()
        self._in_flight: int = told["in_flight"]
        self._addresses: Sequence[str] = told["addresses"]
        self._out = Path(told["out"])
        self._answers: list[Array] | None = None
        if told["answers"]:
            with np.load(told["answers"]) as kept:
                self._answers = [kept["even"], kept["odd"]]
        self._sent: list[float] = []
        self._took: list[float] = []
        self._failed = 0
        self._wrong = 0
        self._errors: set[str] = set()
        self._stopping = False

    async def run(self) -> None:
        import grpc

        loop = asyncio.get_running_loop()
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        async with contextlib.AsyncExitStack() as stack:
            calls = []
            for address in self._addresses:
                channel = await stack.enter_async_context(
                    grpc.aio.insecure_channel(address, options=options)
                )
                calls.append(channel.unary_unary(METHOD))
            for call in calls:
                await call(self._request, timeout=_START_SECONDS, wait_for_ready=True)
            print("ready", flush=True)
            await loop.run_in_executor(None, sys.stdin.readline)
            sending = [
                asyncio.create_task(self._send(calls[number % len(calls)]))
                for number in range(self._in_flight)
            ]
            await loop.run_in_executor(None, sys.stdin.readline)
            self._stopping = True
            await asyncio.gather(*sending)
        np.savez(
            self._out,
            sent=np.array(self._sent),
            took=np.array(self._took),
            failed=self._failed,
            wrong=self._wrong,
            errors=np.array(sorted(self._errors), str),
        )

    async def _send(self, call: Any) -> None:
        import grpc

        while not self._stopping:
            started = time.monotonic()
            try:
                answer = await call(self._request, timeout=20)
            except grpc.RpcError as error:
                self._failed += 1
                self._errors.add(f"{error.code().name}: {error.details()}"[:300])
                await asyncio.sleep(0.01)
                continue
            self._took.append(time.monotonic() - started)
            self._sent.append(started)
            if self._answers is not None and not self._right(answer):
                self._wrong += 1

    def _right(self, answer: bytes) -> bool:
        """Tell whether the logits are nearer to those of the revision named than to the other's."""
        from pollard.inference import grpc_service_pb2 as pb

        assert self._answers is not None
        got = pb.ModelInferResponse.FromString(answer)
        logits = np.frombuffer(got.raw_output_contents[0], np.float32)
        named = int(got.model_version) % 2
        near, far = (
            np.abs(logits - self._answers[each].ravel()).max() for each in (named, 1 - named)
        )
        return bool(near < far)


def main() -> None:
    """Be one generator."""
    asyncio.run(_Caller(json.loads(sys.argv[1])).run())


if __name__ == "__main__":
    main()
