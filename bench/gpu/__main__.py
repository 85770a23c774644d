"""`python -m bench.gpu`: every section in a process of its own, with a share of the time.

A section that fails, hangs or is killed takes nothing from the others: what it kept so far is in
the results, and the next one begins.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.gpu.setup import STARTED, Setup, Table, say
from bench.gpu.wheels import instructions

ROOT = Path(__file__).resolve().parents[2]

SECTIONS = {
    "environment": 25.0,
    "models": 100.0,
    "correctness": 45.0,
    "raw": 60.0,
    "compressed": 45.0,
    "service": 100.0,
    "swap": 45.0,
    "gate": 40.0,
    "memory": 60.0,
    "replicas": 60.0,
    "shared_memory": 40.0,
    "training": 60.0,
    "compress": 90.0,
}
"""Sections in their order, with the seconds that each may take."""

_WITH_MODELS = frozenset(SECTIONS) - {
    "environment", "models", "replicas", "training", "compress"
}  # fmt: skip
_WITH_ZOO = frozenset({"models", "correctness", "gate"})
"""Sections that measure the models that `models` makes, and those that need the zoo's, too."""

_SOURCES = ("protos/python", "runtime", "clients/python", "services", "compression")

_UNHURRIED_SECONDS = 600.0
"""For a section on the CPU, where only the benchmark itself is tried."""

_LEAST_SECONDS = 5.0
"""A section for which less is left is not begun."""


def main(
    provider: Annotated[
        str, typer.Option(help="cuda; or cpu, to see that the benchmark itself runs.")
    ] = "cuda",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only this section; may be repeated. {', '.join(SECTIONS)}. They share all "
            "of the time; models that are missing are made first."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = 6.0,
    full: Annotated[
        bool | None,
        typer.Option("--full/--tiny", help="ResNet-50, or a small network for seconds only."),
    ] = None,
    zoo: Annotated[
        list[str] | None,
        typer.Option(help="Compare only this network of the zoo; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for gpu.json and gpu.md.")] = ROOT
    / "build/bench/gpu/results",
    wheels: Annotated[
        bool, typer.Option("--wheels", help="Print how a bare machine gets what it lacks.")
    ] = False,
    section: Annotated[str | None, typer.Option(hidden=True)] = None,
    setup: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the GPU path: correctness, ONNX Runtime alone, the service, swaps, memory."""
    if wheels:
        print(instructions())
        return
    if section is not None:
        assert setup is not None
        import_module(f"bench.gpu.{section}").run(Setup.read(setup))
        return
    unknown = set(only or ()) - set(SECTIONS)
    if unknown or provider not in ("cuda", "cpu"):
        raise typer.BadParameter(
            f"unknown: {', '.join(sorted(unknown)) or provider}; sections are "
            f"{', '.join(SECTIONS)}, providers cuda and cpu"
        )
    os.environ[STARTED] = str(time.monotonic())
    tiny = provider == "cpu" if full is None else not full
    results = _run(set(only or ()), provider, tiny, 60 * minutes, out, tuple(zoo or ()))
    failed = [name for name, result in results["sections"].items() if result["problem"]]
    say(f"done; results in {out}" + (f"; not whole: {', '.join(failed)}" if failed else ""))
    raise typer.Exit(1 if failed else 0)


def _run(
    only: set[str], provider: str, tiny: bool, seconds: float, out: Path, zoo: tuple[str, ...]
) -> dict[str, Any]:
    asked = only or set(SECTIONS)
    names = [
        name
        for name in SECTIONS
        # Models that are there from before are kept.
        if name in asked or (name == "models" and asked & _WITH_MODELS)
    ]
    out.mkdir(parents=True, exist_ok=True)
    build = ROOT / "build/bench/gpu"
    size = "tiny" if tiny else "full"
    until = time.monotonic() + seconds
    results: dict[str, Any] = {"provider": provider, "size": size, "sections": {}}
    texts: list[str] = ["# The GPU path", ""]
    for number, name in enumerate(names):
        left = until - time.monotonic()
        share = SECTIONS[name] if provider == "cuda" else _UNHURRIED_SECONDS
        if only and provider == "cuda":
            # Of the whole time: fifty swaps, say, take longer than a share of everything.
            share *= max(1.0, left / sum(SECTIONS[each] for each in names[number:]))
        budget = min(share, left)
        if budget < _LEAST_SECONDS:
            say(f"{name}: not begun, the time is used up")
            results["sections"][name] = {"problem": "not begun: the time was used up", "data": {}}
        else:
            setup = Setup(
                provider=provider,
                tiny=tiny,
                models=build / f"models-{size}",
                work=build / f"work-{size}-{provider}",
                result=out / f"{name}.json",
                seconds=budget,
                only_zoo=zoo,
                with_zoo=bool(asked & _WITH_ZOO),
            )
            results["sections"][name] = _run_section(name, setup)
        # After every section: a run that is killed keeps what it had.
        text = _render(name, results["sections"][name])
        print(text, flush=True)
        texts.append(text)
        _write(out / "gpu.json", json.dumps(results, indent=1) + "\n")
        _write(out / "gpu.md", "\n".join(texts))
    for name in names:
        (out / f"{name}.json").unlink(missing_ok=True)
    return results


def _run_section(name: str, setup: Setup) -> dict[str, Any]:
    """Run a section in a process group of its own and return what it kept, and its problem."""
    for folder in (setup.models, setup.work):
        folder.mkdir(parents=True, exist_ok=True)
    setup.result.unlink(missing_ok=True)
    told = setup.work / f"{name}.setup"
    setup.write(told)
    say(f"{name}: begins, for at most {setup.seconds:.0f} s")
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu", "--section", name, "--setup", str(told)],
        cwd=ROOT,
        env=_environment(),
        process_group=0,
    )
    problem = ""
    try:
        # A little more than it was told: it may end by itself in time.
        code = process.wait(setup.seconds + 3)
        if code:
            problem = f"ended with {code}; its words are above"
    except subprocess.TimeoutExpired:
        problem = f"cut off after {setup.seconds:.0f} s"
    finally:
        # Its servers and load generators are of the same group.
        _end_group(process)
    took = time.monotonic() - started
    say(f"{name}: {problem or 'done'} ({took:.1f} s)")
    data = json.loads(setup.result.read_text()) if setup.result.exists() else {}
    return {"seconds": round(took, 1), "problem": problem, "data": data}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        until = time.monotonic() + 2
        while time.monotonic() < until:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except (ProcessLookupError, PermissionError):
                break
            time.sleep(0.05)
    process.wait()


def _environment() -> dict[str, str]:
    """Return the environment of a section: what to import, and where CUDA's libraries are."""
    found = dict(os.environ)
    sources = [str(ROOT), *(str(ROOT / each / "src") for each in _SOURCES)]
    given = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    # What was given goes first: onnxruntime-gpu may lie there in front of an installed onnxruntime.
    found["PYTHONPATH"] = os.pathsep.join([*given, *(s for s in sources if s not in given)])
    # The loader of shared libraries reads its variable once, when a process starts.
    folders = _library_folders()
    if folders:
        given = [each for each in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if each]
        found["LD_LIBRARY_PATH"] = os.pathsep.join([*folders, *given])
    return found


def _library_folders() -> list[str]:
    """Return the folders in which NVIDIA's Python packages keep their libraries."""
    return [
        str(folder)
        for base in dict.fromkeys(sys.path)
        for folder in sorted(Path(base or ".").glob("nvidia/*/lib"))
        if any(folder.glob("*.so*"))
    ]


def _render(name: str, result: dict[str, Any]) -> str:
    lines = [f"\n## {name}\n"]
    if result["problem"]:
        lines.append(f"**Not whole: {result['problem']}.**\n")
    if result["data"]:
        try:
            tables: list[Table] = import_module(f"bench.gpu.{name}").tables(result["data"])
            lines += [f"{table}\n" for table in tables]
        except Exception:
            # Half a section may lack what a table needs; the figures themselves are in the file.
            lines.append("```\n" + traceback.format_exc() + "```\n")
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / each / "src") for each in _SOURCES]
    typer.run(main)
