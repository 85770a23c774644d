"""Write the Python code of the contracts, or check that what is committed is current.

Run by `make gen`. The generators run in an environment of their own (grpcio-tools and
mypy-protobuf, pinned in the Makefile), because generated code demands at least the protobuf and
grpcio that its generator was built with: an old generator keeps the range of versions wide.

Only the standard library is used here, so any Python can run this file.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
"""Root of the contracts; import paths in .proto files start here."""

OUTPUT = PROTOS / "python" / "src"
"""Where the distribution pollard-protos keeps its sources."""

GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")
"""Names of generated files. Everything else under OUTPUT is written by hand and left alone."""


def main() -> int:
    """Generate or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="Python of the environment that has grpcio-tools and mypy-protobuf",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail with a diff if the committed code is not current",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pollard-protos-") as folder:
        fresh = generate(arguments.python, Path(folder))
    return check(fresh) if arguments.check else write(fresh)


def generate(python: str, folder: Path) -> dict[Path, str]:
    """Run protoc into `folder`; return the text of every generated file by path under OUTPUT."""
    sources = sorted(
        path.relative_to(PROTOS).as_posix()
        for package in ("inference", "pollard")
        for path in (PROTOS / package).rglob("*.proto")
    )
    command = [python, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"-I{PROTOS / 'third_party'}"]
    command += [
        f"--{plugin}_out={folder}" for plugin in ("python", "grpc_python", "mypy", "mypy_grpc")
    ]
    # protoc looks for protoc-gen-mypy on the PATH; it lies beside that environment's Python.
    bin_folder = str(Path(python).absolute().parent)
    environment = {**os.environ, "PATH": bin_folder + os.pathsep + os.environ.get("PATH", "")}
    done = subprocess.run(
        [*command, *sources], env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)

    files: dict[Path, str] = {}
    for path in sorted(p for pattern in GENERATED for p in folder.rglob(pattern)):
        relative = path.relative_to(folder)
        text = path.read_text(encoding="utf-8")
        if "_pb2_grpc" in relative.name and "Stub" not in text:
            continue  # A contract without a service; the file would be empty.
        if relative.parts[0] == "inference":
            relative = Path("pollard") / relative
            text = _own_pool(text, relative)
        files[relative] = text
    return files


def _own_pool(text: str, path: Path) -> str:
    """Move a module of the `inference` package below `pollard` and into its own descriptor pool.

    Other clients of the protocol (tritonclient) register the same symbols in protobuf's default
    pool; two definitions of one symbol in one pool are an error, whichever comes second.
    """
    text = re.sub(r"^from inference import", "from pollard.inference import", text, flags=re.M)
    text = re.sub(r"(?<![\w./])inference\.(?=\w+_pb2)", "pollard.inference.", text)
    if path.name.endswith("_pb2.py"):
        text, count = re.subn(r"_descriptor_pool\.Default\(\)", "_POOL", text)
        if count != 1:
            raise SystemExit(f"{path}: the pool is used {count} times, expected once")
        anchor = "from google.protobuf import descriptor_pool as _descriptor_pool\n"
        if anchor not in text:
            raise SystemExit(f"{path}: the import of descriptor_pool is not where it was")
        text = text.replace(anchor, "from pollard.inference._pool import POOL as _POOL\n")
    return text


def write(fresh: dict[Path, str]) -> int:
    """Write `fresh` under OUTPUT, remove generated files of contracts that are gone."""
    for relative in sorted(_committed() - fresh.keys()):
        (OUTPUT / relative).unlink()
        print(f"removed {relative}")
    for relative, text in fresh.items():
        path = OUTPUT / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {relative}")
    for marker, text in _markers(fresh).items():
        path = OUTPUT / marker
        if not path.exists():
            path.write_text(text, encoding="utf-8")
            print(f"wrote {marker}")
    return 0


def check(fresh: dict[Path, str]) -> int:
    """Compare `fresh` with what is committed; print a diff and return 1 if they differ."""
    stale = False
    for relative in sorted(_committed() | fresh.keys()):
        path = OUTPUT / relative
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = fresh.get(relative, "")
        if old != new:
            stale = True
            diff = difflib.unified_diff(
                old.splitlines(), new.splitlines(), f"committed/{relative}", f"fresh/{relative}"
            )
            print("\n".join(line[:200] for line in diff))
    for marker in _markers(fresh):
        if not (OUTPUT / marker).exists():
            stale = True
            print(f"missing: {marker}")
    if stale:
        print("The generated code is not current; run `make gen` and commit the result.")
    return int(stale)


def _committed() -> set[Path]:
    return {path.relative_to(OUTPUT) for g in GENERATED for path in OUTPUT.rglob(g)}


def _markers(fresh: dict[Path, str]) -> dict[Path, str]:
    """Return the `__init__.py` and `py.typed` that the packages of `fresh` need, with their text.

    `pollard` itself gets none: it is a namespace shared with the other distributions.
    """
    markers: dict[Path, str] = {}
    for relative in fresh:
        package = relative.parts[1]
        markers[Path("pollard", package, "py.typed")] = ""
        for depth in range(2, len(relative.parts)):
            name = ".".join(relative.parts[:depth])
            text = f'"""Generated code of the contracts in package {name}."""\n'
            markers[Path(*relative.parts[:depth], "__init__.py")] = text
    return markers


if __name__ == "__main__":
    sys.exit(main())
