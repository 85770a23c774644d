"""A copy on its way from one installation to another."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from pollard.client._upload import ProgressCallback
from pollard.client.types import Progress, Revision


def place(spool: str | os.PathLike[str] | None, source: Revision) -> Path:
    """Return where the bundle lies while it is on its way; the directory above it is made.

    What stands in the name is all that the bundle's directory depends on.
    """
    if spool is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        spool = Path(cache) / "pollard" / "copies"
    directory = Path(spool)
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{source.bundle_sha256[:32]}-{_signature_id(source)}"


def forget(place: Path) -> None:
    """Remove a bundle that has arrived."""
    shutil.rmtree(place, ignore_errors=True)


def upload_id(address: str, model: str, source: Revision) -> str | None:
    """Return the upload's UUID: the same for the same copy, so that another attempt goes on."""
    what = f"{address}/{model}/{source.bundle_sha256}/{_signature_id(source)}"
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"pollard-copy:{what}"))


def is_complete(there: Revision, source: Revision) -> bool:
    """Say whether a revision with the same bundle also has a signature as good as the source's."""
    if source.signature is None or there.signature is None:
        return source.signature is None
    return (
        there.signature.state == "TRUSTED"
        or there.signature.key_sha256 == source.signature.key_sha256
    )


def part(progress: ProgressCallback | None, before: int, total: int) -> ProgressCallback | None:
    """Return a callback for one half of the way."""
    if progress is None:
        return None
    return lambda moved: progress(
        Progress(before + min(moved.done_bytes, max(total - before, 0)), total)
    )


def _signature_id(source: Revision) -> str:
    if source.signature is None:
        return "unsigned"
    made = source.signature.create_time
    text = f"{source.signature.key_sha256}/{made.isoformat() if made else ''}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
