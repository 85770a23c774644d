"""The file with settings that `--config` names: a table for each service."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pollard.services.common.errors import StartupError

SECTIONS = ("inference", "preprocess", "models")
"""The services, which are the tables of a settings file."""


def read_tables(file: Path) -> dict[str, dict[str, Any]]:
    """Read a settings file: the keys of each service's table.

    Raises:
        StartupError: it is not there, is no TOML, or holds something else.
    """
    if not file.is_file():
        raise StartupError(f"there is no settings file {file}")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"settings file {file} cannot be read: {error}") from error
    tables = ", ".join(f"[{section}]" for section in SECTIONS)
    for name, value in content.items():
        if not isinstance(value, dict):
            raise StartupError(
                f"settings file {file}: {name!r} stands in no table; settings stand in one of "
                f"{tables}"
            )
        if name not in SECTIONS:
            raise StartupError(
                f"settings file {file}: there is no table [{name}]{meant(name, SECTIONS)}; the "
                f"tables are {tables}"
            )
    return content


def meant(name: str, names: Iterable[str], likeness: float = 0.5) -> str:
    """Return words that ask whether the name is meant that is the most like one; or none.

    Args:
        name: What was given.
        names: What there is.
        likeness: Least that a name must be like it, 0 to 1.
    """
    near = difflib.get_close_matches(name, sorted(names), 1, cutoff=likeness)
    return f"; is {near[0]!r} meant?" if near else ""
