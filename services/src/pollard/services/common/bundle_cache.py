"""A server's bundles on disk, by digest, and the last desired state that it ran.

::

    <cache>/lock                    held while a server uses the cache
    <cache>/server_id               the name under which the manager knows the server
    <cache>/state.json              the last desired state that ran, proto3 JSON, with its SHA-256
    <cache>/access.bin              the tokens known last, by their hashes: an AccessList, likewise
    <cache>/bundles/<digest>/       whole bundles
    <cache>/descriptions/<digest>/  manifest and labels only, for servers that run no models
    <cache>/tmp/                    what is being fetched; emptied at the start

A folder appears under its digest by one rename, after everything in it has been checked and is on
disk. Nothing here knows gRPC.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path

import structlog
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from pollard.bundle.v1 import bundle_pb2
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    Bundle,
    check_file,
    is_safe_path,
    parse_manifest,
    sync_directory,
    write_durably,
)
from pollard.runtime.digests import sha256_bytes
from pollard.runtime.errors import BundleCorrupt, BundleError
from pollard.services.common import sealed
from pollard.services.common.cache_room import CacheRoom
from pollard.services.common.errors import StartupError
from pollard.services.common.folder_lock import FolderInUse, FolderLock
from pollard.services.common.sealed import FileDamaged

_log = structlog.get_logger("pollard.cache")


class BundleCache:
    """The cache folder of one server. May be used from any thread."""

    def __init__(self, root: Path, max_bytes: int = 0) -> None:
        """Take the folder, which is created; what a crash left half-written is removed.

        Args:
            root: The folder.
            max_bytes: Most that bundles take together, those that are being fetched among them; 0
                for no limit.

        Raises:
            StartupError: another server uses it, or it cannot be written.
        """
        self.root = root
        self._room = CacheRoom(self, max_bytes) if max_bytes else None
        self._protected: frozenset[str] = frozenset()
        self._tmp = root / "tmp"
        try:
            for folder in (root / "bundles", root / "descriptions", self._tmp):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(root)
        except FolderInUse as error:
            raise StartupError(
                f"the cache {root} is in use by another server (process {error.holder}); give this "
                "one its own --cache-dir"
            ) from error
        except OSError as error:
            raise StartupError(f"the cache {root} cannot be written: {error}") from error
        for leftover in self._tmp.iterdir():
            shutil.rmtree(leftover, ignore_errors=True)

    def close(self) -> None:
        """Let another server have the folder."""
        self._lock.close()

    def bundle_path(self, digest: str) -> Path:
        """Return where the whole bundle is or would be."""
        return self.root / "bundles" / _checked(digest)

    def description_path(self, digest: str) -> Path:
        """Return where manifest and labels are or would be."""
        return self.root / "descriptions" / _checked(digest)

    def discard(self, digest: str) -> None:
        """Remove a bundle, because it is damaged or no longer wanted."""
        for path in (self.bundle_path(digest), self.description_path(digest)):
            if path.exists():
                self.discard_folder(path)

    def discard_folder(self, path: Path) -> None:
        """Remove one of the folders of a bundle."""
        # Renamed first: a folder under its digest is whole at any moment.
        doomed = self._tmp / uuid.uuid4().hex
        self._tmp.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def protect(self, digests: Collection[str], *, also: bool = False) -> None:
        """Say what is in use or about to be: it is not removed to make room.

        Args:
            digests: The bundles.
            also: Beside those that were said before, rather than in their place.
        """
        before = self._protected
        self._protected = frozenset(digests) | (before if also else frozenset())
        for digest in before - self._protected:
            # It was in use until now.
            self.used(digest)

    def used(self, digest: str) -> None:
        """Note that a bundle is used: it is then not the first to go."""
        for path in (self.bundle_path(digest), self.description_path(digest)):
            # One that may only be read serves all the same.
            with contextlib.suppress(OSError):
                os.utime(path)

    def unused(self) -> list[Path]:
        """Return the folders of bundles that are not protected, those used last at the end."""
        found = []
        for path in self.folders():
            if path.name not in self._protected:
                with contextlib.suppress(FileNotFoundError):
                    found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def folders(self) -> list[Path]:
        """Return the folders of all bundles; none if somebody has removed the cache."""
        found: list[Path] = []
        for folder in (self.root / "bundles", self.root / "descriptions"):
            with contextlib.suppress(FileNotFoundError):
                found += folder.iterdir()
        return found

    def discard_unused(self, *, keep: int) -> None:
        """Remove bundles that are not protected.

        With a limit on their size, those used longest ago go until the rest is within it; without,
        all but the `keep` used last.
        """
        if self._room is not None:
            self._room.trim()
            return
        for name in ("bundles", "descriptions"):
            unused = [path for path in self.unused() if path.parent.name == name]
            for path in unused[: max(0, len(unused) - keep)]:
                _log.info("removing a bundle that is no longer used", digest=path.name)
                self.discard(path.name)

    def stage(self, digest: str, *, whole: bool) -> Staging:
        """Begin to receive a bundle."""
        target = self.bundle_path(digest) if whole else self.description_path(digest)
        folder = self._tmp / uuid.uuid4().hex
        return Staging(folder, target, digest, whole=whole, room=self._room)

    def server_id(self, prefix: str) -> str:
        """Return the server's id, made up and kept at the first call."""
        path = self.root / "server_id"
        known = ""
        # One that is damaged is made anew.
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            known = path.read_text(encoding="utf-8").strip()
        if not known.isprintable() or not known:
            known = f"{prefix}-{uuid.uuid4().hex[:12]}"
            write_durably(path, known.encode("utf-8"))
        return known

    @property
    def state_path(self) -> Path:
        """Where the state that runs is saved."""
        return self.root / "state.json"

    @property
    def access_path(self) -> Path:
        """Where the tokens that are known are saved."""
        return self.root / "access.bin"

    def load_state(self) -> fleet_pb.DesiredState | None:
        """Return the last state saved; None if there is none, or nothing in it.

        Raises:
            FileDamaged: there is one, and it cannot be read or is not what was saved.
        """
        try:
            state = json_format.ParseDict(
                sealed.read_json(self.state_path),
                fleet_pb.DesiredState(),
                ignore_unknown_fields=True,
            )
        except FileNotFoundError:
            return None
        except json_format.ParseError as error:
            raise FileDamaged(str(error)) from error
        return state if state.ListFields() else None

    def save_state(self, state: fleet_pb.DesiredState) -> None:
        """Save the state that runs, so that a restart begins with it.

        Raises:
            OSError: it cannot be written.
        """
        text = json_format.MessageToJson(state, preserving_proto_field_name=True)
        sealed.write_json(self.state_path, text)

    def load_access(self) -> fleet_pb.AccessList | None:
        """Return the tokens that were known last; None if there are none.

        Raises:
            FileDamaged: there are some, and they cannot be read or are not what was saved.
        """
        try:
            return fleet_pb.AccessList.FromString(sealed.read_message(self.access_path))
        except FileNotFoundError:
            return None
        except DecodeError as error:
            raise FileDamaged(str(error)) from error

    def save_access(self, access: fleet_pb.AccessList) -> None:
        """Save the tokens that are known, so that a restart knows them without the manager.

        Raises:
            OSError: they cannot be written.
        """
        sealed.write_message(self.access_path, access.SerializeToString())


class Staging:
    """One bundle while it is being received. Pieces come in order, the manifest first."""

    def __init__(
        self,
        folder: Path,
        target: Path,
        digest: str,
        *,
        whole: bool,
        room: CacheRoom | None = None,
    ) -> None:
        self._folder = folder
        self._room = room
        self._target = target
        self._digest = digest
        self._whole = whole
        self._manifest_bytes = b""
        self._files: dict[str, bundle_pb2.File] = {}
        self._received: dict[str, int] = {}
        # With its parents: the cache may have been removed beneath a server that runs.
        folder.mkdir(parents=True)
        self.manifest: bundle_pb2.Manifest | None = None

    def add(self, path: str, offset: int, data: bytes, total_bytes: int) -> None:
        """Take the next piece of a file.

        Raises:
            BundleCorrupt: the piece does not belong here: no such file, out of order, too long, or
                the manifest is not the one asked for.
            ManifestInvalid: the manifest says something impossible.
            ResourceExhausted: the cache has no room for the bundle.
            OSError: it cannot be written.
        """
        expected = self._received.get(path, 0)
        if offset != expected:
            raise BundleCorrupt(
                f"{path}: a piece begins at {offset}, {expected} was due", path=path
            )
        if path == MANIFEST:
            self._add_manifest(data, total_bytes)
        elif path == SIGNATURE:
            self._add_signature(data, total_bytes)
        else:
            self._add_file(path, data)
        self._received[path] = offset + len(data)

    def restart(self, path: str) -> None:
        """Forget what was received of a file: it comes again from its first byte.

        Raises:
            OSError: what was written cannot be removed.
        """
        self._received.pop(path, None)
        if path == MANIFEST:
            self._manifest_bytes, self._files, self.manifest = b"", {}, None
        if path in self._files or path in (MANIFEST, SIGNATURE):
            (self._folder / path).unlink(missing_ok=True)

    def commit(self) -> Path:
        """Check everything against the digests, make it durable and visible; return its folder.

        Raises:
            BundleCorrupt: something is missing or differs from its digest.
            OSError: it cannot be written.
        """
        if self.manifest is None:
            raise BundleCorrupt(f"no {MANIFEST} was received", digest=self._digest)
        if self._whole:
            Bundle.open(self._folder, verify=True, expect=self._digest)
        else:
            for path in self._received.keys() - {MANIFEST, SIGNATURE}:
                check_file(self._folder, self._files[path])
        for directory, _, names in os.walk(self._folder):
            for name in names:
                with (Path(directory) / name).open("rb") as file:
                    os.fsync(file.fileno())
            sync_directory(Path(directory))
        self._target.parent.mkdir(parents=True, exist_ok=True)
        # Whatever is there was found wanting, or this one would not have been fetched. Renamed
        # first: a folder under its digest is whole at any moment.
        doomed = self._folder.with_name(uuid.uuid4().hex)
        while True:
            with contextlib.suppress(FileNotFoundError):
                self._target.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
            try:
                self._folder.rename(self._target)
                break
            except OSError as error:
                # Another thread's copy was there first.
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        sync_directory(self._target.parent)
        self._leave_room()
        return self._target

    def abort(self) -> None:
        """Remove what was received."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._leave_room()

    def _leave_room(self) -> None:
        if self._room is not None:
            self._room.release(self._folder.name)

    def _add_manifest(self, data: bytes, total_bytes: int) -> None:
        self._manifest_bytes += data
        if total_bytes > MAX_MANIFEST_BYTES or len(self._manifest_bytes) > MAX_MANIFEST_BYTES:
            raise BundleCorrupt(
                f"the manifest is longer than {MAX_MANIFEST_BYTES} bytes", path=MANIFEST
            )
        if self.manifest is not None or len(self._manifest_bytes) < total_bytes:
            return
        actual = sha256_bytes(self._manifest_bytes)
        if actual != self._digest:
            raise BundleCorrupt(
                f"the manifest received has the SHA-256 {actual}, asked for was {self._digest}",
                expected=self._digest,
                actual=actual,
            )
        self.manifest = parse_manifest(self._manifest_bytes)
        self._files = {file.path: file for file in self.manifest.files}
        if self._room is not None:
            labels = self.manifest.postprocess.labels_file
            coming = sum(
                file.size_bytes
                for file in self.manifest.files
                if self._whole or file.path == labels
            )
            size = coming + len(self._manifest_bytes)
            self._room.reserve(self._folder.name, self._digest, size)
        (self._folder / MANIFEST).write_bytes(self._manifest_bytes)

    def _add_signature(self, data: bytes, total_bytes: int) -> None:
        # No digest tells what it should be; whoever wants it signed checks it.
        if total_bytes > MAX_SIGNATURE_BYTES or self._received.get(SIGNATURE, 0) + len(data) > (
            MAX_SIGNATURE_BYTES
        ):
            raise BundleCorrupt(
                f"{SIGNATURE} is longer than {MAX_SIGNATURE_BYTES} bytes", path=SIGNATURE
            )
        with (self._folder / SIGNATURE).open("ab") as out:
            out.write(data)

    def _add_file(self, path: str, data: bytes) -> None:
        file = self._files.get(path)
        if file is None or not is_safe_path(path):
            raise BundleCorrupt(f"{path!r} was sent and is not in the manifest", path=path)
        if self._received.get(path, 0) + len(data) > file.size_bytes:
            raise BundleCorrupt(
                f"{path} is longer than the {file.size_bytes} bytes that the manifest says",
                path=path,
            )
        where = self._folder / path
        where.parent.mkdir(parents=True, exist_ok=True)
        with where.open("ab") as out:
            out.write(data)


def _checked(digest: str) -> str:
    # It becomes the name of a folder.
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise BundleError(f"{digest!r} is not a SHA-256 in lower-case hexadecimal", digest=digest)
    return digest
