"""Write the generated code of the clients that commit theirs (Go and TypeScript), or check it.

    python clients/generate.py            write what the toolchains here can write
    python clients/generate.py --check    compare with what is committed instead; 1 if it differs

A language whose generator is not installed is named and left out. C++ and Java generate their code
while they are built. Only the standard library is used here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = ROOT / "clients"
PROTOS = ROOT / "protos"
OURS = ("inference", "pollard")

VERSIONS = re.compile(
    r"^//(?: versions:|.*\b(?:protoc|protoc-gen-[\w-]+) +\(?(?:v[\d.]+|unknown).*)\n", re.M
)
"""Which compiler wrote a file; another one may write the same code."""


def sources(*packages: str) -> list[str]:
    """Return the contracts of some packages, as paths below the root of the contracts."""
    return sorted(
        path.relative_to(PROTOS).as_posix()
        for package in packages
        for path in (PROTOS / package).rglob("*.proto")
    )


class Generator(ABC):
    """What writes one language's code."""

    name = ""
    output = Path()
    """Directory that holds generated code and nothing else."""

    @abstractmethod
    def missing(self) -> str:
        """Name what is not installed; empty when nothing is missing."""

    @abstractmethod
    def arguments(self, folder: Path) -> Sequence[str]:
        """Return protoc's arguments to write into `folder`."""

    def result(self, folder: Path) -> Path:
        """Return where below `folder` the content of `output` came to lie."""
        return folder

    def generate(self, folder: Path) -> dict[str, str]:
        """Run protoc; return the files by path."""
        command = ["protoc", f"-I{PROTOS}", f"-I{PROTOS / 'third_party'}", *self.arguments(folder)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.name}: {done.stderr}")
        return read(self.result(folder))


class Go(Generator):
    """Messages by protoc-gen-go, services by protoc-gen-go-grpc."""

    name = "go"
    output = CLIENTS / "go" / "gen"
    module = "github.com/pollard-ai/pollard/clients/go"

    versions = (
        ("protoc-gen-go", "protoc-gen-go v1.28.1"),
        ("protoc-gen-go-grpc", "protoc-gen-go-grpc 1.0"),
    )
    """The plugins write other code in other versions, which then asks for newer libraries."""

    def missing(self) -> str:
        if words := lacking("protoc", "protoc-gen-go", "protoc-gen-go-grpc"):
            return words
        for program, wanted in self.versions:
            done = subprocess.run(
                [program, "--version"], capture_output=True, text=True, check=True
            )
            if done.stdout.strip() != wanted:
                return f"{wanted} (but {done.stdout.strip()})"
        return ""

    def arguments(self, folder: Path) -> Sequence[str]:
        options = [f"module={self.module}"]
        options += [f"M{name}={self.module}/gen/inference" for name in sources("inference")]
        joined = ",".join(options)
        return [
            f"--go_out={joined}:{folder}",
            f"--go-grpc_out={joined}:{folder}",
            *sources(*OURS),
        ]

    def result(self, folder: Path) -> Path:
        return folder / "gen"


class TypeScript(Generator):
    """Both by ts-proto, with google's messages, for which there is no package of its kind."""

    name = "typescript"
    output = CLIENTS / "typescript" / "src" / "gen"
    plugin = CLIENTS / "typescript" / "node_modules" / ".bin" / "protoc-gen-ts_proto"
    options = (
        "annotateFilesWithVersion=false,env=node,esModuleInterop=true,exportCommonSymbols=false,"
        "forceLong=number,importSuffix=.js,oneof=unions-value,outputJsonMethods=false,"
        "outputServices=grpc-js,useExactTypes=false"
    )

    def missing(self) -> str:
        if not self.plugin.exists():
            return "ts-proto (npm ci in clients/typescript)"
        return lacking("protoc", "node")

    def arguments(self, folder: Path) -> Sequence[str]:
        return [
            f"--plugin=protoc-gen-ts_proto={self.plugin}",
            f"--ts_proto_out={folder}",
            f"--ts_proto_opt={self.options}",
            *sources(*OURS),
            "google/rpc/error_details.proto",
        ]

    def generate(self, folder: Path) -> dict[str, str]:
        files = super().generate(folder)
        # Annotations of the contracts, and what describes them; no client needs them.
        return {
            name: text
            for name, text in files.items()
            if not name.startswith("google/api/") and name != "google/protobuf/descriptor.ts"
        }


GENERATORS: Sequence[Generator] = (Go(), TypeScript())


def lacking(*programs: str) -> str:
    """Name the programs that are not on the PATH."""
    return ", ".join(program for program in programs if shutil.which(program) is None)


def read(folder: Path) -> dict[str, str]:
    """Return the files below a folder by path, without the versions of their compilers."""
    return {
        path.relative_to(folder).as_posix(): VERSIONS.sub("", path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def main() -> int:
    """Generate or check; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if not current")
    arguments = parser.parse_args()
    stale = False
    for generator in GENERATORS:
        if words := generator.missing():
            print(f"{generator.name}: left out, {words} not found")
            continue
        with tempfile.TemporaryDirectory(prefix="pollard-clients-") as folder:
            fresh = generator.generate(Path(folder))
        committed = read(generator.output)
        differing = sorted(
            name
            for name in fresh.keys() | committed.keys()
            if fresh.get(name) != committed.get(name)
        )
        for name in differing:
            print(f"{generator.name}: {name} {'is not current' if arguments.check else 'written'}")
        if arguments.check:
            stale = stale or bool(differing)
            continue
        shutil.rmtree(generator.output, ignore_errors=True)
        for name, text in fresh.items():
            path = generator.output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        print("The clients' generated code is not current; run `make gen` and commit the result.")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
