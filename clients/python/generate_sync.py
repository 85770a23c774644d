"""Make the sync clients (`_sync`) from the asyncio ones (`_async`).

    python clients/python/generate_sync.py          write
    python clients/python/generate_sync.py --check  exit with 1 when something is not current

Only `_io.py` is written by hand in both: it holds what really differs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parent / "src" / "pollard" / "client"
HAND_WRITTEN = {"_io.py"}
HEADER = "# Made by clients/python/generate_sync.py from {source}; change that file instead.\n"

RULES = [
    (r"\basync def\b", "def"),
    (r"\basync (for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"import AsyncIterator, Awaitable, Callable", "import Callable, Iterator"),
    (r"\bAsync(Iterator|Generator)\b", r"\1"),
    (r"(\bGenerator\[\w+), None\]", r"\1, None, None]"),
    (r"\baclosing\b", "closing"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r"\bAsync(\w+Client)\b", r"\1"),
    (r"\bpollard\.client\._async\b", "pollard.client._sync"),
    (
        r"The asyncio clients\. `_sync` is made from this package by",
        "The sync clients, made from `_async` by",
    ),
]


def generate() -> dict[Path, str]:
    """Return the sync sources by path, formatted."""
    made = {}
    for source in sorted((CLIENT / "_async").glob("*.py")):
        if source.name in HAND_WRITTEN:
            continue
        text = source.read_text()
        for pattern, replacement in RULES:
            text = re.sub(pattern, replacement, text)
        target = CLIENT / "_sync" / source.name
        text = HEADER.format(source=f"_async/{source.name}") + text
        made[target] = _ruff(
            ["format"], target, _ruff(["check", "--select=I", "--fix", "--quiet"], target, text)
        )
    return made


def _ruff(command: list[str], target: Path, text: str) -> str:
    """Let ruff sort the imports, which the new names put in another order, and format."""
    return subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(target), "-"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def main() -> int:
    made = generate()
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} is not current; run {Path(__file__).name}", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(made[path])
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
