"""The contract runner of the Python clients: python runner.py sync|asyncio PLAN

A contract runner makes every call of a plan through its language's client, and prints for each a
line of JSON: what the client returned, or what it raised. See `README.md` beside this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from pollard import client as pollard

DTYPES = {"UINT8": np.uint8, "FP32": np.float32, "INT64": np.int64}
KINDS = {
    "predict": "VisionClient",
    "infer": "InferenceClient",
    "list_models": "ModelsClient",
    "watch_events": "ModelsClient",
    "watch_rollout": "ModelsClient",
    "push": "ModelsClient",
}


def options(spec: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if "timeout_seconds" in spec:
        made["timeout"] = spec["timeout_seconds"]
    if "max_attempts" in spec:
        made["retry"] = pollard.RetryPolicy(max_attempts=spec["max_attempts"])
    if "max_message_bytes" in spec:
        made["max_message_bytes"] = spec["max_message_bytes"]
    if "ca_file" in spec:
        made["tls"] = pollard.Tls(ca_file=spec["ca_file"])
    if "token" in spec:
        made["token"] = spec["token"]
    return made


def method(call: str, arguments: dict[str, Any]) -> tuple[str, list[Any], dict[str, Any]]:
    """Name of a client's method, and what it is called with."""
    chosen = {key: arguments[key] for key in ("revision", "alias", "top_k") if key in arguments}
    if call == "predict":
        return "predict", [Path(arguments["image_path"]), arguments["model"]], chosen
    if call == "infer":
        inputs = {
            tensor["name"]: np.array(tensor["data"], DTYPES[tensor["datatype"]]).reshape(
                tensor["shape"]
            )
            for tensor in arguments["inputs"]
        }
        chosen = {key: arguments[key] for key in ("version", "alias") if key in arguments}
        chosen["request_id"] = arguments.get("id", "")
        return "infer", [arguments["model"], inputs], chosen
    if call == "list_models":
        return "models", [], {}
    if call == "push":
        return "push", [arguments["bundle"], arguments["model"]], {}
    if call == "watch_events":
        return "watch_events", [arguments.get("model")], {"start": arguments["start"]}
    if call == "watch_rollout":
        return "watch_rollout", [arguments["model"], arguments["rollout"]], {}
    raise ValueError(f"this runner knows no call {call!r}")


def answer(call: str, result: Any) -> dict[str, Any]:
    """What the client returned, in the words of the vectors."""
    if call == "predict":
        labels = [{"index": x.index, "label": x.label, "score": x.score} for x in result.labels]
        return {"model": result.model, "revision": result.revision, "labels": labels}
    if call == "infer":
        outputs = [
            {
                "name": name,
                "datatype": {dtype: key for key, dtype in DTYPES.items()}[value.dtype.type],
                "shape": list(value.shape),
                "data": value.ravel().tolist(),
            }
            for name, value in result.outputs.items()
        ]
        return {
            "model": result.model,
            "version": result.version,
            "id": result.id,
            "outputs": outputs,
        }
    if call == "list_models":
        return {
            "models": [
                {"name": model.name, "latest_revision": model.latest_revision} for model in result
            ]
        }
    if call == "push":
        found = result.revision
        return {"model": found.model, "revision": found.revision, "existed": result.existed}
    if call == "watch_rollout":
        names = ("revision", "base_revision", "state")
        return {"rollouts": [{name: getattr(each, name) for name in names} for each in result]}
    return {
        "events": [
            {"sequence": event.sequence, "action": event.action, "resource": event.resource}
            for event in result
        ]
    }


def failure(error: pollard.RequestFailed) -> dict[str, Any]:
    return {
        "code": error.code.name,
        "message": error.message,
        "reason": error.details.reason,
        "domain": error.details.domain,
        "metadata": dict(error.details.metadata),
    }


class RefusedError(Exception):
    """No client could be made."""


def client_of(case: dict[str, Any], prefix: str = "") -> Any:
    kind = getattr(pollard, prefix + KINDS[case["call"]])
    try:
        return kind(case["address"], **options(case["client"]))
    except ValueError as error:
        raise RefusedError(str(error)) from error


def run_sync(case: dict[str, Any]) -> dict[str, Any]:
    call, arguments = case["call"], case["arguments"]
    name, args, kwargs = method(call, arguments)
    with client_of(case) as made:
        if "cancel_after_seconds" in case:
            # Closing a sync client is how its requests in flight are cancelled.
            threading.Timer(case["cancel_after_seconds"], made.close).start()
        for _ in range(case.get("requests", 1)):
            result = getattr(made, name)(*args, **kwargs)
        if call.startswith("watch_"):
            # Every state of a rollout that ends, or so many events.
            result = list(itertools.islice(result, arguments.get("count")))
    return answer(call, result)


async def run_asyncio(case: dict[str, Any]) -> dict[str, Any]:
    call, arguments = case["call"], case["arguments"]
    name, args, kwargs = method(call, arguments)
    async with client_of(case, "Async") as made:
        if call.startswith("watch_"):
            seen = []
            async with contextlib.aclosing(getattr(made, name)(*args, **kwargs)) as watch:
                async for each in watch:
                    seen.append(each)
                    if len(seen) == arguments.get("count"):
                        break
            return answer(call, seen)
        for _ in range(case.get("requests", 1) - 1):
            await getattr(made, name)(*args, **kwargs)
        task = asyncio.ensure_future(getattr(made, name)(*args, **kwargs))
        if "cancel_after_seconds" in case:
            await asyncio.sleep(case["cancel_after_seconds"])
            task.cancel()
        return answer(call, await task)


def line_of(case: dict[str, Any], answered: dict[str, Any] | BaseException) -> str:
    if isinstance(answered, pollard.RequestFailed):
        return json.dumps({"case": case["case"], "error": failure(answered)})
    if isinstance(answered, RefusedError):
        return json.dumps({"case": case["case"], "refused": {"message": str(answered)}})
    if isinstance(answered, asyncio.CancelledError):
        # What asyncio's callers expect of a task that they cancelled themselves.
        return json.dumps({"case": case["case"], "error": {"code": "CANCELLED"}})
    return json.dumps({"case": case["case"], "answer": answered})


async def all_asyncio(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        try:
            print(line_of(case, await run_asyncio(case)), flush=True)
        except (pollard.RequestFailed, RefusedError, asyncio.CancelledError) as error:
            print(line_of(case, error), flush=True)


def main(kind: str, plan: str) -> None:
    cases = json.loads(Path(plan).read_text())["cases"]
    if kind == "asyncio":
        asyncio.run(all_asyncio(cases))
        return
    for case in cases:
        try:
            print(line_of(case, run_sync(case)), flush=True)
        except (pollard.RequestFailed, RefusedError) as error:
            print(line_of(case, error), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
