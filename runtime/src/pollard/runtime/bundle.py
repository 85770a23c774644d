"""Read, write and check bundles on disk.

A bundle is a directory whose `manifest.json` is the proto3 JSON of
``pollard.bundle.v1.Manifest`` and lists every other file with its SHA-256. The
bundle's name is the SHA-256 of the bytes of `manifest.json` as written, so the
file is never serialised a second time.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime._postprocess_check import check_postprocess
from pollard.runtime.digests import sha256_bytes, sha256_file
from pollard.runtime.errors import BundleCorrupt, ManifestInvalid

MANIFEST = "manifest.json"
SIGNATURE = "signature"
SCHEMA_VERSION = 1

# Far above any real manifest; a longer one is an attack on the parser.
MAX_MANIFEST_BYTES = 4 * 1024 * 1024

# Far above the signature of the largest bundle, for the same reason.
MAX_SIGNATURE_BYTES = 8 * 1024 * 1024

# Golden inputs and outputs are a few images; more is an attack on the memory.
MAX_GOLDEN_BYTES = 1024**3

# gRPC carries no larger message, so no request could hold a larger batch.
MAX_BATCH_BYTES = 2**31

TARGETS = ("cpu-fp32", "cpu-int8", "cuda-fp16", "tensorrt-int8")


@dataclass(frozen=True)
class Golden:
    """Synthetic inputs and the outputs they gave, by tensor name."""

    inputs: dict[str, NDArray[np.generic]]
    outputs: dict[str, NDArray[np.generic]]


class Bundle:
    """One bundle on disk. Immutable; nothing is read before it is asked for."""

    def __init__(self, path: Path, manifest_bytes: bytes) -> None:
        self.path = path
        self.digest = sha256_bytes(manifest_bytes)
        self.manifest = parse_manifest(manifest_bytes)

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True, expect: str | None = None) -> Bundle:
        """Open the bundle in the directory ``path``.

        Args:
            path: The directory.
            verify: Hash every file and compare it with the manifest.
            expect: Digest that the bundle must have.

        Raises:
            ManifestInvalid: there is no readable manifest, or it says
                something impossible.
            BundleCorrupt: a file or the bundle differs from its digest.
        """
        path = Path(path)
        try:
            with (path / MANIFEST).open("rb") as file:
                raw = file.read(MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError:
            raise ManifestInvalid(
                f"{path} is not a bundle: it holds no {MANIFEST}", path=path
            ) from None
        except NotADirectoryError:
            raise ManifestInvalid(
                f"{path} is not a bundle: it is not a directory", path=path
            ) from None
        if expect is not None and sha256_bytes(raw) != expect:
            raise BundleCorrupt(
                f"{path}: the manifest's SHA-256 is {sha256_bytes(raw)}, expected {expect}",
                path=path,
                expected=expect,
            )
        bundle = cls(path, raw)
        if verify:
            bundle.verify()
        return bundle

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of all files, the manifest excluded."""
        return sum(file.size_bytes for file in self.manifest.files)

    @cached_property
    def labels(self) -> list[str]:
        """Labels in the order of the classes; empty when the bundle has none."""
        name = self.manifest.postprocess.labels_file
        if not name:
            return []
        return read_labels((self.path / name).read_bytes())

    def variant(self, name: str) -> bundle_pb2.Variant:
        """Return the variant called ``name``.

        Raises:
            ManifestInvalid: there is none.
        """
        for variant in self.manifest.variants:
            if variant.name == name:
                return variant
        have = ", ".join(variant.name for variant in self.manifest.variants)
        raise ManifestInvalid(f"the bundle has no variant {name!r}; it has {have}", variant=name)

    def model_path(self, variant: bundle_pb2.Variant | str) -> Path:
        """Return the path of a variant's ONNX file."""
        if isinstance(variant, str):
            variant = self.variant(variant)
        return self.path / variant.model_file

    def golden(self, variant: bundle_pb2.Variant | str) -> Golden | None:
        """Return a variant's golden inputs and outputs, or None when it has none.

        Raises:
            BundleCorrupt: the file is not a NumPy archive of plain arrays.
        """
        if isinstance(variant, str):
            variant = self.variant(variant)
        if not variant.golden_file:
            return None
        inputs: dict[str, NDArray[np.generic]] = {}
        outputs: dict[str, NDArray[np.generic]] = {}
        try:
            _refuse_bomb(self.path / variant.golden_file)
            with np.load(self.path / variant.golden_file, allow_pickle=False) as archive:
                for key in archive.files:
                    side, _, name = key.partition("/")
                    if side == "input":
                        inputs[name] = archive[key]
                    elif side == "output":
                        outputs[name] = archive[key]
        # A pickle is a ValueError; a shape that is not true may be a MemoryError.
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            MemoryError,
            AttributeError,
            NotImplementedError,
            RuntimeError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise BundleCorrupt(
                f"{variant.golden_file} is not a readable NumPy archive: {error}",
                path=variant.golden_file,
            ) from error
        if not inputs or not outputs:
            raise BundleCorrupt(
                f"{variant.golden_file} holds no golden inputs or no outputs",
                path=variant.golden_file,
            )
        return Golden(inputs, outputs)

    def verify(self, digests: Mapping[str, str] | None = None) -> None:
        """Compare every file with the manifest.

        Args:
            digests: SHA-256 of files by path, of who has just written and hashed
                them; those are not read again.

        Raises:
            BundleCorrupt: a file is missing, differs, is not listed, or is
                not a regular file.
        """
        listed = {file.path for file in self.manifest.files}
        for found in _files_below(self.path):
            if found not in listed and found not in (MANIFEST, SIGNATURE):
                raise BundleCorrupt(f"{found} is not listed in the manifest", path=found)
        for file in self.manifest.files:
            check_file(self.path, file, (digests or {}).get(file.path))


def _refuse_bomb(path: Path) -> None:
    """Look what an archive says that it takes unpacked; reading takes no more than that."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_GOLDEN_BYTES:
        raise BundleCorrupt(
            f"{path.name} takes {size} bytes unpacked; golden inputs and outputs may take "
            f"{MAX_GOLDEN_BYTES}",
            path=path.name,
            limit=MAX_GOLDEN_BYTES,
        )


def _files_below(root: Path) -> Iterator[str]:
    for directory, names, files in os.walk(root):
        here = Path(directory)
        for name in files + [name for name in names if (here / name).is_symlink()]:
            yield (here / name).relative_to(root).as_posix()


def check_file(root: Path, file: bundle_pb2.File, actual: str | None = None) -> None:
    """Compare one file of the bundle in ``root`` with its entry.

    Args:
        root: Directory of the bundle.
        file: What the manifest says of it.
        actual: Its SHA-256, if that is known; None to read it.

    Raises:
        BundleCorrupt: it is missing, not a regular file, or differs.
    """
    path = root / file.path
    if path.is_symlink() or not path.is_file():
        raise BundleCorrupt(f"{file.path} is missing or not a regular file", path=file.path)
    size = path.stat().st_size
    if size != file.size_bytes:
        raise BundleCorrupt(
            f"{file.path} has {size} bytes, the manifest says {file.size_bytes}", path=file.path
        )
    actual = actual or sha256_file(path)
    if actual != file.sha256:
        raise BundleCorrupt(
            f"{file.path} is damaged: its SHA-256 is {actual}, the manifest says {file.sha256}",
            path=file.path,
            expected=file.sha256,
            actual=actual,
        )


def read_labels(raw: bytes) -> list[str]:
    """Return the lines of a labels file.

    Raises:
        BundleCorrupt: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BundleCorrupt(f"the labels are not UTF-8: {error}") from error


def parse_manifest(raw: bytes) -> bundle_pb2.Manifest:
    """Parse and check the bytes of a `manifest.json`.

    Unknown fields are refused: a manifest that says more than this version
    understands could mean something else than what would be served.

    Raises:
        ManifestInvalid: it cannot be parsed or says something impossible.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestInvalid(
            f"the manifest is longer than {MAX_MANIFEST_BYTES} bytes", limit=MAX_MANIFEST_BYTES
        )
    manifest = bundle_pb2.Manifest()
    try:
        json_format.Parse(raw.decode("utf-8"), manifest, max_recursion_depth=32)
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestInvalid(f"the manifest cannot be parsed: {error}") from error
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: bundle_pb2.Manifest) -> None:
    """Check what can be checked without looking at the files.

    Raises:
        ManifestInvalid: with the field and the reason.
    """

    def refuse(field: str, why: str) -> None:
        raise ManifestInvalid(f"manifest: {field}: {why}", field=field)

    if manifest.schema_version == 0 or manifest.schema_version > SCHEMA_VERSION:
        refuse(
            "schema_version",
            f"{manifest.schema_version} is not supported; this version reads 1 to {SCHEMA_VERSION}",
        )
    if not manifest.variants:
        refuse("variants", "there is none")
    if not manifest.inputs:
        refuse("inputs", "there is none")
    if not manifest.outputs:
        refuse("outputs", "there is none")
    for side, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names) or "" in names:
            refuse(side, "names must be set and unique")
        for spec in specs:
            if spec.data_type == bundle_pb2.DATA_TYPE_UNSPECIFIED:
                refuse(f"{side}[{spec.name}].data_type", "not set")
            if any(size == 0 or size < -1 for size in spec.shape):
                refuse(f"{side}[{spec.name}].shape", "dimensions are -1 or positive")
    paths: set[str] = set()
    for file in manifest.files:
        if not is_safe_path(file.path) or file.path in (MANIFEST, SIGNATURE):
            refuse("files", f"{file.path!r} is not a path that a bundle may hold")
        if file.path in paths:
            refuse("files", f"{file.path!r} is listed twice")
        if len(file.sha256) != 64 or set(file.sha256) - set("0123456789abcdef"):
            refuse("files", f"{file.path!r}: sha256 is not 64 lower-case hexadecimal digits")
        paths.add(file.path)
    seen: set[str] = set()
    for variant in manifest.variants:
        if not variant.name or variant.name in seen or not is_safe_path(variant.name):
            refuse("variants", f"name {variant.name!r} is empty, unsafe or used twice")
        seen.add(variant.name)
        if variant.target not in TARGETS:
            refuse(
                f"variants[{variant.name}].target",
                f"{variant.target!r} is unknown; known are {', '.join(TARGETS)}",
            )
        if variant.model_file not in paths:
            refuse(
                f"variants[{variant.name}].model_file", f"{variant.model_file!r} is not in files"
            )
        if variant.golden_file and variant.golden_file not in paths:
            refuse(
                f"variants[{variant.name}].golden_file", f"{variant.golden_file!r} is not in files"
            )
        for spec in manifest.inputs:
            row = math.prod(max(size, 1) for size in spec.shape)
            if row * max(1, variant.max_batch_size) > MAX_BATCH_BYTES:
                refuse(
                    f"variants[{variant.name}].max_batch_size",
                    f"a batch of {max(1, variant.max_batch_size)} of the input {spec.name!r} "
                    f"{list(spec.shape)} is larger than the {MAX_BATCH_BYTES} bytes of the largest "
                    "request",
                )
    labels = manifest.postprocess.labels_file
    if labels and labels not in paths:
        refuse("postprocess.labels_file", f"{labels!r} is not in files")
    check_postprocess(manifest)


def is_safe_path(path: str) -> bool:
    """Tell whether ``path`` is relative, normalised and stays within its root."""
    if not path or len(path) > 255 or "\\" in path or "\0" in path or path.startswith("/"):
        return False
    parts = path.split("/")
    return PurePosixPath(path).as_posix() == path and not {"", ".", ".."} & set(parts)


def write_bundle(
    directory: Path | str, manifest: bundle_pb2.Manifest, files: Mapping[str, bytes | Path]
) -> Bundle:
    """Write a bundle into ``directory``, which is created and must be empty.

    ``manifest.files`` is filled in from ``files``; everything reaches the disk
    before `manifest.json` does, so a bundle that has a manifest is whole.

    Args:
        directory: Where to write.
        manifest: What the bundle says of itself, without ``files``.
        files: Content, or a file to copy, by path within the bundle.

    Raises:
        ManifestInvalid: the manifest does not fit the files.
        FileExistsError: the directory holds something.
        OSError: it cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty")
    complete = bundle_pb2.Manifest()
    complete.CopyFrom(manifest)
    complete.schema_version = complete.schema_version or SCHEMA_VERSION
    del complete.files[:]
    for name in sorted(files):
        content = files[name]
        data = content.read_bytes() if isinstance(content, Path) else content
        complete.files.add(path=name, sha256=sha256_bytes(data), size_bytes=len(data))
    check_manifest(complete)
    for name in sorted(files):
        content = files[name]
        data = content.read_bytes() if isinstance(content, Path) else content
        write_durably(directory / name, data)
    raw = json_format.MessageToJson(
        complete, preserving_proto_field_name=True, indent=2, sort_keys=False
    )
    write_durably(directory / MANIFEST, (raw + "\n").encode("utf-8"))
    return Bundle.open(directory, verify=False)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that it survives a crash: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
