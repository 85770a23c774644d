"""Build the clients in other languages, and say what is missing for it.

    python clients/build.py                    build every language whose toolchain is there
    python clients/build.py go java            build these; a missing toolchain is an error
    python clients/build.py --missing go       say what is missing; exit with 1 if anything is
    python clients/build.py --packages go      print the Debian packages of the toolchain
    python clients/build.py --names            print the languages there are

Everything lands below `build/clients`, except TypeScript's `dist`. Only the standard library is
used here, and nothing is downloaded: TypeScript wants `npm ci` in `clients/typescript` first.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = ROOT / "clients"
BUILD = ROOT / "build" / "clients"
PROTOS = ROOT / "protos"


class Language(ABC):
    """One language: what it needs, how its client is built, how its contract runner is started."""

    name = ""
    packages: Sequence[str] = ()
    """Debian packages that bring the toolchain."""
    programs: Sequence[str] = ()
    files: Sequence[Path] = ()
    hint = ""
    """What to do beside installing the packages."""

    def missing(self) -> str:
        """Say what is missing and what to do about it; empty when nothing is."""
        lacking = [program for program in self.programs if shutil.which(program) is None]
        lacking += [str(path) for path in self.files if not path.exists()]
        if not lacking:
            return ""
        todo = [f"apt-get install {' '.join(self.packages)}"] if self.packages else []
        todo += [self.hint] if self.hint else []
        return f"{self.name}: {', '.join(lacking)} not found ({'; '.join(todo)})"

    def build(self) -> None:
        """Build the client and its contract runner; quick when nothing has changed.

        Whoever builds the same at the same time waits.
        """
        BUILD.mkdir(parents=True, exist_ok=True)
        with (BUILD / f".{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.make()

    @abstractmethod
    def make(self) -> None:
        """Build, with nobody else at it."""

    @abstractmethod
    def runner(self) -> list[str]:
        """Return the command that runs the contract vectors."""

    @abstractmethod
    def example(self) -> list[str]:
        """Return the command of the example program, which takes a model and images."""

    def environment(self) -> Mapping[str, str]:
        """Return what the programs need in their environment."""
        return {}

    def run(self, *command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
        """Run a command of the build; show what it says when it fails."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BuildFailed(f"{self.name}: {' '.join(map(str, command))}\n{done.stdout}")

    def once(self, result: Path, sources: Sequence[Path], *commands: Sequence[str | Path]) -> None:
        """Run the commands of a build, unless `result` came from the same sources by the same."""
        digest = hashlib.sha256(str(commands).encode())
        for source in sources:
            for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
                if path.is_file():
                    digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
        stamp = BUILD / f"{self.name}-{result.name}.sha256"
        if result.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest():
            return
        for command in commands:
            self.run(*command)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest.hexdigest())


class BuildFailed(Exception):
    """A toolchain is there, but the client does not build with it."""


class Python(Language):
    """The Python clients, sync."""

    name = "python"

    def make(self) -> None:
        """There is nothing to build."""

    def runner(self) -> list[str]:
        return [sys.executable, str(ROOT / "tests" / "contract" / "runner.py"), "sync"]

    def example(self) -> list[str]:
        return [sys.executable, str(ROOT / "examples" / "classify_images.py")]

    def environment(self) -> Mapping[str, str]:
        return {"GRPC_VERBOSITY": "NONE"}


class PythonAsyncio(Python):
    """The Python clients, asyncio."""

    name = "python-asyncio"

    def runner(self) -> list[str]:
        return [sys.executable, str(ROOT / "tests" / "contract" / "runner.py"), "asyncio"]


class TypeScript(Language):
    """The client for Node, as an ES module and for `require`."""

    name = "typescript"
    packages = ("nodejs", "npm")
    programs = ("node",)
    files = (CLIENTS / "typescript" / "node_modules" / "typescript",)
    hint = "npm ci in clients/typescript"

    def make(self) -> None:
        folder = CLIENTS / "typescript"
        sources = [folder / "src", folder / "package-lock.json", folder / "build.mjs"]
        self.once(folder / "dist", sources, ["node", folder / "build.mjs"])

    def runner(self) -> list[str]:
        # Node warns of an IP address as the name of a TLS server, which is all that the tests have.
        return [
            "node",
            "--no-deprecation",
            str(CLIENTS / "typescript" / "contract" / "runner.mjs"),
        ]

    def example(self) -> list[str]:
        return ["node", str(CLIENTS / "typescript" / "examples" / "classify.mjs")]


class Go(Language):
    """The Go package, with the libraries that Debian packages: without modules, so offline."""

    name = "go"
    packages = (
        "golang-go",
        # Named before what would else bring 1.3, which cannot read what is generated here.
        "golang-github-golang-protobuf-1-5-dev",
        "golang-google-grpc-dev",
        "golang-google-protobuf-dev",
        "golang-google-genproto-dev",
        "protobuf-compiler",
        "protoc-gen-go",
        "protoc-gen-go-grpc",
    )
    programs = ("go",)
    libraries = Path("/usr/share/gocode")
    files = (
        libraries / "src" / "google.golang.org" / "grpc",
        libraries / "src" / "google.golang.org" / "protobuf",
        libraries / "src" / "google.golang.org" / "genproto",
        libraries / "src" / "github.com" / "golang" / "protobuf" / "proto" / "registry.go",
    )
    package = "github.com/pollard-ai/pollard/clients/go"

    def make(self) -> None:
        place = BUILD / "gopath" / "src" / self.package
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_symlink():
            place.unlink()
        place.symlink_to(CLIENTS / "go")
        for program in ("contract", "examples/classify"):
            self.go("build", "-o", self.program(program), f"{self.package}/{program}")

    def go(self, *arguments: str | Path) -> None:
        """Run the go command, which keeps what it compiled by itself."""
        self.run(
            "go",
            *arguments,
            cwd=BUILD,
            GO111MODULE="off",
            GOFLAGS="-p=1",
            GOPATH=f"{BUILD / 'gopath'}:{self.libraries}",
            GOCACHE=str(BUILD / "gocache"),
        )

    def program(self, name: str) -> Path:
        """Where a program of the client lies."""
        return BUILD / "go" / name.rpartition("/")[2]

    def runner(self) -> list[str]:
        return [str(self.program("contract"))]

    def example(self) -> list[str]:
        return [str(self.program("examples/classify"))]

    def environment(self) -> Mapping[str, str]:
        # Debian's gRPC is older than the version that retries without being told to.
        return {"GRPC_GO_RETRY": "on"}


class Cpp(Language):
    """The C++ library, with its contracts compiled by Debian's protoc."""

    name = "cpp"
    packages = ("cmake", "g++", "pkg-config", "libgrpc++-dev", "protobuf-compiler-grpc")
    programs = ("cmake", "c++", "protoc", "grpc_cpp_plugin")
    files = (Path("/usr/include/grpcpp/grpcpp.h"),)

    def make(self) -> None:
        folder = BUILD / "cpp"
        self.run(
            *("cmake", "-S", CLIENTS / "cpp", "-B", folder, "-DCMAKE_BUILD_TYPE=Release"),
            # The compiler's optimisations take a third of its time, and the tests need none.
            *("-DCMAKE_CXX_FLAGS_RELEASE=-O0", "-DCMAKE_CXX_FLAGS=-Wall -Wextra"),
            *("-DPOLLARD_BUILD_EXAMPLES=ON", "-DPOLLARD_BUILD_CONTRACT=ON"),
        )
        self.run("cmake", "--build", folder, "-j", str(len(os.sched_getaffinity(0))))

    def runner(self) -> list[str]:
        return [str(BUILD / "cpp" / "contract")]

    def example(self) -> list[str]:
        return [str(BUILD / "cpp" / "classify")]

    def environment(self) -> Mapping[str, str]:
        return {"GRPC_VERBOSITY": "NONE"}


class Java(Language):
    """The Java library, against Debian's libraries; without Maven, so offline."""

    name = "java"
    packages = (
        "default-jdk-headless",
        "libgrpc-java",
        "libprotobuf-java",
        "libnetty-java",
        # Debian's Netty has TLS with ALPN by OpenSSL only.
        "libnetty-tcnative-java",
        "libnetty-tcnative-jni",
        "libperfmark-java",
        "libguava-java",
        "libgoogle-gson-java",
        "liberror-prone-java",
        "libjsr305-java",
        "libgeronimo-annotation-1.3-spec-java",
        "protobuf-compiler-grpc-java-plugin",
        "protobuf-compiler",
    )
    programs = ("java", "javac", "protoc", "grpc_java_plugin")
    jars = (
        *("grpc-api", "grpc-context", "grpc-core", "grpc-netty", "grpc-protobuf"),
        *("grpc-protobuf-lite", "grpc-stub", "protobuf", "protobuf-util"),
        *("netty-buffer", "netty-codec", "netty-codec-http", "netty-codec-http2", "netty-common"),
        *("netty-handler", "netty-handler-proxy", "netty-resolver", "netty-transport"),
        *("netty-tcnative", "netty-transport-native-unix-common", "perfmark-api", "guava", "gson"),
        *("error_prone_annotations", "jsr305", "geronimo-annotation-1.3-spec"),
    )
    files = tuple(Path(f"/usr/share/java/{jar}.jar") for jar in jars)
    native = "lib/*/jni/libnetty-tcnative.so"
    # A program that runs for seconds is not worth a second compiler and several collectors: with
    # them, javac takes twice as much of the processors.
    short = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")

    def missing(self) -> str:
        if next(Path("/usr").glob(self.native), None) is None:
            self.files = (*type(self).files, Path("/usr") / self.native)
        return super().missing()

    def make(self) -> None:
        folder, source = BUILD / "java", CLIENTS / "java" / "src"
        generated, classes = folder / "generated", folder / "classes"
        # Netty takes its library only by another name than Debian gives it, and no link to it.
        (folder / "lib").mkdir(parents=True, exist_ok=True)
        (folder / "logging.properties").write_text(
            "handlers = java.util.logging.ConsoleHandler\n.level = WARNING\n"
        )
        for native in Path("/usr").glob(self.native):
            shutil.copyfile(native, folder / "lib" / "libnetty_tcnative.so")
        shutil.rmtree(generated, ignore_errors=True)
        generated.mkdir(parents=True)
        # Google's messages too: Debian's package of them is older than google.rpc.ErrorInfo.
        names = ["google/api/field_behavior", "google/rpc/status", "google/rpc/error_details"]
        for package in ("inference", "pollard"):
            paths = sorted((PROTOS / package).rglob("*.proto"))
            names += [path.relative_to(PROTOS).with_suffix("").as_posix() for path in paths]
        javac = [
            *("javac", *(f"-J{option}" for option in self.short)),
            # No library on the path is to be searched for processors of annotations.
            *("--release", "17", "-proc:none", "-d", classes, "-cp", self.path()),
        ]
        self.once(
            classes,
            [source, PROTOS / "inference", PROTOS / "pollard", PROTOS / "third_party"],
            [
                *("protoc", f"-I{PROTOS}", f"-I{PROTOS / 'third_party'}"),
                *(f"--java_out={generated}", f"--grpc-java_out={generated}"),
                f"--plugin=protoc-gen-grpc-java={shutil.which('grpc_java_plugin')}",
                *(f"{name}.proto" for name in names),
            ],
            ["sh", "-c", f'find "{generated}" -name "*.java" > "{folder}/generated.txt"'],
            ["sh", "-c", f'find "{source}" -name "*.java" > "{folder}/sources.txt"'],
            [*javac, "-nowarn", f"@{folder / 'generated.txt'}"],
            [*javac, "-Xlint:all,-classfile", "-Werror", f"@{folder / 'sources.txt'}"],
        )

    def path(self) -> str:
        """Where the classes lie."""
        return os.pathsep.join([str(BUILD / "java" / "classes"), *map(str, self.files)])

    def java(self, name: str) -> list[str]:
        """Return the command that runs a class."""
        return [
            "java",
            *self.short,
            f"-Djava.library.path={BUILD / 'java' / 'lib'}",
            f"-Djava.util.logging.config.file={BUILD / 'java' / 'logging.properties'}",
            *("-cp", self.path(), name),
        ]

    def runner(self) -> list[str]:
        return self.java("ai.pollard.contract.ContractRunner")

    def example(self) -> list[str]:
        return self.java("ai.pollard.examples.Classify")


LANGUAGES: Mapping[str, Language] = {
    language.name: language
    for language in (Python(), PythonAsyncio(), TypeScript(), Go(), Cpp(), Java())
}


def main() -> int:
    """Do what the arguments say; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("languages", nargs="*", metavar="LANGUAGE", help=", ".join(LANGUAGES))
    parser.add_argument("--missing", action="store_true", help="only say what is missing")
    parser.add_argument("--packages", action="store_true", help="only print the Debian packages")
    parser.add_argument("--names", action="store_true", help="only print the languages")
    arguments = parser.parse_args()
    if arguments.names:
        print(" ".join(LANGUAGES))
        return 0
    if unknown := [name for name in arguments.languages if name not in LANGUAGES]:
        parser.error(f"unknown language {unknown[0]!r}; there are {', '.join(LANGUAGES)}")
    chosen = [LANGUAGES[name] for name in arguments.languages or LANGUAGES]
    if arguments.packages:
        print(" ".join(package for language in chosen for package in language.packages))
        return 0
    lacking = 0
    for language in chosen:
        if words := language.missing():
            lacking += 1
            print(words, file=sys.stderr)
        elif not arguments.missing:
            try:
                language.build()
            except BuildFailed as error:
                print(error, file=sys.stderr)
                return 1
            print(f"{language.name}: built")
    return 1 if lacking and (arguments.languages or arguments.missing) else 0


if __name__ == "__main__":
    sys.exit(main())
