"""Fuzz one reader with atheris (coverage-guided, over libFuzzer).

Exits with 0 when nothing was found; what made a target fail is kept in `--corpus`/findings and
can be given as `--replay`.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

_LONGEST_SECONDS = 20
"""For one input."""

_MEMORY_MB = 2048


def main(
    target: Annotated[
        str, typer.Argument(help="images, manifest, archive, upload, graph, config or framing.")
    ],
    seconds: Annotated[int, typer.Option(min=0, help="Stop after so long; 0: no limit.")] = 60,
    runs: Annotated[int, typer.Option(min=-1, help="Stop after so many inputs; -1: none.")] = -1,
    seed: Annotated[int, typer.Option(min=1, help="The same one tries the same inputs.")] = 1,
    corpus: Annotated[
        Path | None, typer.Option(help="Folder in which inputs that reach new code are kept.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Run one input and nothing else.", exists=True)
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(help="Without atheris: random damage to the seeds; TARGET may be 'all'."),
    ] = False,
    inside: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Fuzz one reader."""
    if inside:
        _fuzz(target, [*map(str, [seconds, runs, seed])], corpus)
        return
    from bench.fuzz.targets import TARGETS

    if plain:
        _damage(list(TARGETS) if target == "all" else [target], seconds, runs, seed)
        return
    if target not in TARGETS:
        raise typer.BadParameter(f"{target!r} is none of {', '.join(TARGETS)}")
    if replay is not None:
        TARGETS[target].run(replay.read_bytes())
        print("nothing found")
        return
    with _folder(corpus) as folder:
        for index, content in enumerate(TARGETS[target].seeds()):
            (folder / f"seed-{index:03}").write_bytes(content)
        command = [
            *(sys.executable, "-m", "bench.fuzz", target, "--inside"),
            *("--seconds", str(seconds), "--runs", str(runs), "--seed", str(seed)),
            *("--corpus", str(folder)),
        ]
        code = subprocess.run(command, check=False).returncode
        findings = sorted((folder / "findings").iterdir())
        for path in findings:
            print(f"found: {path}")
        if code or findings:
            raise typer.Exit(1)
        print(f"{target}: nothing found; {sum(p.is_file() for p in folder.iterdir())} inputs kept")


def _damage(names: list[str], seconds: int, runs: int, seed: int) -> None:
    """Run each target on damaged seeds until `runs` or `seconds` are over."""
    from bench.fuzz.mutations import damaged
    from bench.fuzz.targets import TARGETS

    warnings.simplefilter("ignore")
    for name in names:
        random_ = random.Random(seed)
        seeds = TARGETS[name].seeds()
        end = time.monotonic() + seconds if seconds else float("inf")
        done = 0
        for content in seeds:
            TARGETS[name].run(content)
        while done != runs and time.monotonic() < end:
            content = damaged(seeds, random_)
            try:
                TARGETS[name].run(content)
            except Exception:
                with tempfile.NamedTemporaryFile(prefix=f"{name}-", delete=False) as file:
                    file.write(content)
                print(f"found: {file.name}")
                raise
            done += 1
        print(f"{name}: nothing found in {done} inputs")


@contextmanager
def _folder(corpus: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        folder = corpus or Path(made)
        (folder / "findings").mkdir(parents=True, exist_ok=True)
        yield folder


def _fuzz(target: str, numbers: list[str], folder: Path | None) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["pollard", "PIL", "tarfile", "google.protobuf"]):
        from bench.fuzz.targets import TARGETS
    seconds, runs, seed = numbers
    arguments = [
        sys.argv[0],
        *(f"-max_total_time={seconds}", f"-runs={runs}", f"-seed={seed}"),
        *(f"-timeout={_LONGEST_SECONDS}", f"-rss_limit_mb={_MEMORY_MB}", "-max_len=65536"),
        *(f"-artifact_prefix={folder}/findings/", "-print_final_stats=1", "-verbosity=0"),
        str(folder),
    ]
    atheris.Setup(arguments, TARGETS[target].run)
    atheris.Fuzz()


if __name__ == "__main__":
    typer.run(main)
