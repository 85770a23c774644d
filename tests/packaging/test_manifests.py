"""The manifests of the clients in other languages ask for what their sources import.

Here the clients are built against a distribution's libraries, so nothing else would notice what a
manifest lacks for those who take the usual registries.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

CLIENTS = Path(__file__).resolve().parents[2] / "clients"

BRINGS = {
    "io.grpc.stub.": "grpc-stub",
    "io.grpc.protobuf.": "grpc-protobuf",
    "io.grpc.": "grpc-stub",  # its own dependency, grpc-api
    "com.google.protobuf.": "protobuf-java",
    "com.google.rpc.": "proto-google-common-protos",
    "com.google.api.": "proto-google-common-protos",
    "javax.annotation.": "annotations-api",
}
"""What an import of Java stands for, the longest first."""


def imports(folder: Path, pattern: str, suffix: str) -> set[str]:
    found: set[str] = set()
    for path in folder.rglob(f"*{suffix}"):
        if not {"node_modules", "dist"} & set(path.parts):
            found |= set(re.findall(pattern, path.read_text(), re.M))
    return found


def test_go_mod_requires_every_module_that_is_imported() -> None:
    text = (CLIENTS / "go" / "go.mod").read_text()
    own = re.findall(r"^module (\S+)$", text, re.M)
    required = re.findall(r"^\t(\S+) v\S+$", text, re.M)
    used = imports(CLIENTS / "go", r'^\s*(?:import )?(?:[\w.]+ )?"([\w.-]+\.\w+/[^"]+)"$', ".go")
    assert used
    for name in used:
        assert any(name == module or name.startswith(f"{module}/") for module in own + required), (
            name
        )
    for module in required:
        assert any(name.startswith(module) for name in used), f"{module} is required in vain"


def test_package_json_depends_on_every_package_that_is_imported() -> None:
    package = json.loads((CLIENTS / "typescript" / "package.json").read_text())
    used = imports(CLIENTS / "typescript" / "src", r'from "([^".][^"]*)"', ".ts")
    names = {
        "/".join(name.split("/")[: 2 if name.startswith("@") else 1])
        for name in used
        if not name.startswith("node:")
    }
    names -= {package["name"]}  # the examples in comments
    assert names == set(package["dependencies"])
    # What a user gets is what `exports` names, and it is among the files that are packed.
    for kind in package["exports"]["."].values():
        for path in kind.values():
            assert path.removeprefix("./").split("/")[0] in package["files"]


def test_pom_depends_on_every_library_that_is_imported() -> None:
    space = {"m": "http://maven.apache.org/POM/4.0.0"}
    text = (CLIENTS / "java" / "pom.xml").read_text()
    pom = ElementTree.fromstring(text)  # noqa: S314 - the repository's own file
    wanted = pom.findall("m:dependencies/m:dependency/m:artifactId", space)
    artifacts = {each.text for each in wanted}
    used = imports(CLIENTS / "java" / "src" / "main", r"^import (?:static )?([\w.]+);", ".java")
    assert used
    for name in sorted(used):
        if name.startswith(("java.", "inference.", "pollard.", "ai.pollard.")):
            continue
        matches = [artifact for prefix, artifact in BRINGS.items() if name.startswith(prefix)]
        assert matches, f"nothing is known to bring {name}"
        assert matches[0] in artifacts, name


def test_pom_compiles_the_contracts_with_the_versions_it_depends_on() -> None:
    text = (CLIENTS / "java" / "pom.xml").read_text()
    assert "com.google.protobuf:protoc:${protobuf.version}" in text
    assert "io.grpc:protoc-gen-grpc-java:${grpc.version}" in text
    assert (CLIENTS / "java" / "../../protos" / "pollard").is_dir()
