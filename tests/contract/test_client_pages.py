"""What the pages of the clients in other languages show compiles, as it stands."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.timeout(1200), pytest.mark.long]

CLIENTS = Path(__file__).resolve().parents[2] / "clients"

GO = """\
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
)

IMPORTS

func run(ctx context.Context, pixels []uint8) error {
BODY
	_ = []any{scores, models}
	return err
}

func main() { log.Fatal(run(context.Background(), nil)) }
"""

JAVA = """\
IMPORTS
import java.nio.file.Path;
import java.util.List;

class Page {
  static void run(byte[] pixels) throws java.io.IOException {
BODY
  }
}
"""

CPP = """\
IMPORTS
#include <cstdint>
#include <iostream>
#include <vector>

int main() {
BODY
  return scores.empty();
}
"""


def block(language: str, name: str) -> tuple[str, str]:
    """Return the imports of a page's one block in a language, and what comes after them."""
    page = (CLIENTS / language / "README.md").read_text()
    (found,) = re.findall(rf"^```{name}\n(.*?)^```$", page, re.M | re.S)
    imports = re.compile(r"^(?:import|#include) .*\n", re.M)
    return "".join(imports.findall(found)), imports.sub("", found)


@pytest.fixture
def built(builds: ModuleType) -> Callable[[str], Any]:
    """Builds a language's client, and returns how it is used."""

    def get(name: str) -> Any:
        language = builds.LANGUAGES[name]
        if words := language.missing():
            pytest.skip(words)
        language.build()
        return language

    return get


def compiles(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_typescript(built: Callable[[str], Any], tmp_path: Path) -> None:
    built("typescript")
    imports, body = block("typescript", "ts")
    (tmp_path / "page.mts").write_text(imports + body)
    folder = CLIENTS / "typescript"
    options = {
        "module": "nodenext",
        "target": "es2022",
        "strict": True,
        "noEmit": True,
        "typeRoots": [str(folder / "node_modules" / "@types")],
        "paths": {"@pollard-ai/client": [str(folder / "dist" / "esm" / "index.d.ts")]},
    }
    config = {"compilerOptions": options, "files": ["page.mts"]}
    (tmp_path / "tsconfig.json").write_text(json.dumps(config))
    compiles(folder / "node_modules" / ".bin" / "tsc", "-p", ".", cwd=tmp_path)


def test_go(built: Callable[[str], Any], tmp_path: Path) -> None:
    go = built("go")
    imports, body = block("go", "go")
    (tmp_path / "main.go").write_text(GO.replace("IMPORTS", imports).replace("BODY", body))
    go.go("build", "-o", tmp_path / "page", tmp_path / "main.go")


def test_java(built: Callable[[str], Any], tmp_path: Path) -> None:
    java = built("java")
    imports, body = block("java", "java")
    (tmp_path / "Page.java").write_text(JAVA.replace("IMPORTS", imports).replace("BODY", body))
    compiles("javac", "-d", tmp_path, "-cp", java.path(), "Page.java", cwd=tmp_path)


def test_cpp(built: Callable[[str], Any], tmp_path: Path) -> None:
    built("cpp")
    imports, body = block("cpp", "cpp")
    (tmp_path / "page.cc").write_text(CPP.replace("IMPORTS", imports).replace("BODY", body))
    include = CLIENTS / "cpp" / "include"
    compiles("g++", "-std=c++17", "-fsyntax-only", f"-I{include}", "page.cc", cwd=tmp_path)
