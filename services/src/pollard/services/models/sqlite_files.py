"""Why SQLite cannot open a file: it says only that it could not."""

from __future__ import annotations

import os
from pathlib import Path

from pollard.services.common.open_files import none_left

UNOPENED = "unable to open database file"
"""What SQLite says of whatever keeps it from opening a file."""


def why_unopened(path: Path) -> str:
    """Say why SQLite cannot open a file, which it does not, and what to do; empty if it can be."""
    # Looked at and not opened: to close it would take away the locks of the connections there are.
    folder = path.parent
    user = f"this user ({os.geteuid()})"
    if not folder.is_dir():
        return f"there is no folder {folder}; mount its disk, or restore it from a backup"
    if path.is_dir():
        return f"{path} is a folder; move it away"
    if not os.access(folder, os.W_OK | os.X_OK):
        return (
            f"{user} may not write the folder {folder}, where SQLite keeps its log; give them the "
            "right to, or mount the disk for writing"
        )
    if not path.exists():
        return f"there is no file {path.name} in {folder}; restore it from a backup"
    if not os.access(path, os.R_OK | os.W_OK):
        return f"{user} may not read and write {path}; give them the right to"
    # As many as SQLite needs: the file, its log, and the index of that.
    return none_left(3)
