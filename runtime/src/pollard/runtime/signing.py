"""Signatures of bundles, in OpenSSF's model-signing format.

The file ``signature`` of a bundle is a Sigstore bundle with a DSSE envelope: it
lists every other file of the bundle, `manifest.json` included, with its SHA-256,
and is made with an elliptic-curve key of one's own. The command
``model_signing verify key`` checks it too.

The signature is not in the manifest, so that signing does not change a bundle's
digest: it says who vouches for the content that the digest names.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pollard.runtime.bundle import (
    MANIFEST,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    Bundle,
    write_durably,
)
from pollard.runtime.errors import KeyInvalid, SignatureInvalid, SignatureUntrusted
from pollard.runtime.keys import INSTALL_HINT, TrustedKeys, is_encrypted, private_fingerprint

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PREDICATE = "https://model_signing/signature/v1.0"
_SERIALIZATION = {
    "method": "files",
    "hash_type": "sha256",
    "allow_symlinks": False,
    "ignore_paths": [SIGNATURE],
}


@dataclass(frozen=True)
class Signature:
    """A signature whose list of files is the bundle's."""

    fingerprint: str
    """Of the key that it names."""
    trusted: bool
    """Whether that key is trusted and really made it. False: nobody here knows the key."""


def sign_bundle(
    directory: Path | str, private_key: Path | str, passphrase: bytes | None = None
) -> str:
    """Sign the bundle in ``directory``: write its file ``signature``, replacing an older one.

    Every file is compared with the manifest first, so that what is signed is
    what the manifest says.

    Returns:
        The fingerprint of the key.

    Raises:
        BundleError: it is no bundle, or a file of it is damaged.
        KeyInvalid: the key cannot be used, or model-signing is not installed.
        OSError: the signature cannot be written.
    """
    library = _library()
    private_key = Path(private_key)
    fingerprint = private_fingerprint(private_key, passphrase)
    bundle = Bundle.open(directory)
    config = library.signing.Config().use_elliptic_key_signer(
        private_key=private_key, password=passphrase if is_encrypted(private_key) else None
    )
    config.set_hashing_config(_listed(bundle.manifest.name or "bundle", listed_files(bundle)))
    with tempfile.TemporaryDirectory(prefix="pollard-sign-") as folder:
        made = Path(folder) / SIGNATURE
        config.sign(bundle.path, made)
        write_durably(bundle.path / SIGNATURE, made.read_bytes())
    return fingerprint


def listed_files(bundle: Bundle) -> dict[str, str]:
    """Return what a signature of the bundle must list: SHA-256 by path."""
    return {MANIFEST: bundle.digest} | {file.path: file.sha256 for file in bundle.manifest.files}


def read_signature(bundle: Bundle, trusted: TrustedKeys | None = None) -> Signature | None:
    """Check the signature of an open bundle; None when it has none.

    The files themselves are not read: that they are what the manifest says is
    for :meth:`Bundle.verify`.

    Args:
        bundle: The bundle.
        trusted: Keys that are trusted; None for none.

    Raises:
        SignatureInvalid: it is damaged, lists other files, or was not made by
            the trusted key that it names.
    """
    path = bundle.path / SIGNATURE
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise SignatureInvalid(f"{SIGNATURE} is not a regular file", path=SIGNATURE)
    if not path.exists():
        return None
    return check_signature_file(path, listed_files(bundle), trusted)


def check_signature_file(
    path: Path, files: Mapping[str, str], trusted: TrustedKeys | None = None
) -> Signature:
    """Check a signature against the files that it must list.

    Args:
        path: The signature; the file may have any name.
        files: SHA-256 by path, of every file of the bundle but the signature.
        trusted: Keys that are trusted; None for none.

    Raises:
        SignatureInvalid: as :func:`read_signature`.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_SIGNATURE_BYTES + 1)
    fingerprint, signed = _parse(raw)
    _compare(signed, files)
    if trusted is None or fingerprint not in trusted:
        return Signature(fingerprint, trusted=False)
    _check_maker(path, files, trusted, fingerprint)
    return Signature(fingerprint, trusted=True)


def require_signature(bundle: Bundle, trusted: TrustedKeys) -> Signature:
    """Check that a trusted key has signed the bundle.

    Raises:
        SignatureInvalid: the signature is wrong.
        SignatureUntrusted: there is none, or nobody here knows its key.
    """
    found = read_signature(bundle, trusted)
    if found is None:
        raise SignatureUntrusted(
            f"the bundle {bundle.digest} is not signed, and only signed ones are accepted here; "
            "sign it with `pollard keys sign`",
            digest=bundle.digest,
        )
    if not found.trusted:
        raise SignatureUntrusted(
            f"the bundle {bundle.digest} is signed with the key {found.fingerprint}, which is not "
            "among the trusted keys here",
            digest=bundle.digest,
            key=found.fingerprint,
        )
    return found


def _parse(raw: bytes) -> tuple[str, dict[str, str]]:
    """Return the fingerprint that a signature names, and what it lists."""
    if len(raw) > MAX_SIGNATURE_BYTES:
        raise SignatureInvalid(
            f"{SIGNATURE} is longer than {MAX_SIGNATURE_BYTES} bytes", path=SIGNATURE
        )
    try:
        outer = json.loads(raw)
        if outer["mediaType"] != _MEDIA_TYPE:
            raise ValueError(f"its media type is {str(outer['mediaType'])[:100]!r}")
        fingerprint = outer["verificationMaterial"]["publicKey"]["hint"]
        payload = json.loads(base64.b64decode(outer["dsseEnvelope"]["payload"], validate=True))
        if payload["predicateType"] != _PREDICATE:
            raise ValueError(f"it states {str(payload['predicateType'])[:100]!r}")
        predicate = payload["predicate"]
        how = predicate["serialization"]
        if how["method"] != "files" or how["hash_type"] != "sha256":
            raise ValueError("it does not list whole files with their SHA-256")
        resources = predicate["resources"]
        signed = {str(entry["name"]): str(entry["digest"]) for entry in resources}
        if len(signed) != len(resources):
            raise ValueError("it lists a file twice")
        if not isinstance(fingerprint, str) or len(fingerprint) != 64:
            raise ValueError("it does not name its key")
    # What a hostile file can make of the lines above; a KeyError's words are only the key.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise SignatureInvalid(
            f"{SIGNATURE} is not a signature of the model-signing format made with a key: {why}",
            path=SIGNATURE,
        ) from error
    return fingerprint, signed


def _compare(signed: Mapping[str, str], files: Mapping[str, str]) -> None:
    for name in sorted(signed.keys() | files.keys()):
        if signed.get(name) == files.get(name):
            continue
        if name not in signed:
            why = f"{name!r} is not among the files that were signed"
        elif name not in files:
            why = f"{name[:255]!r} was signed and is not in the bundle"
        else:
            why = (
                f"{name!r} is not what was signed: its SHA-256 is {files[name]}, the signature "
                f"says {signed[name][:64]}"
            )
        raise SignatureInvalid(
            f"the bundle was changed after it was signed, or {SIGNATURE} is of another bundle: "
            f"{why}",
            path=name[:255],
        )


def _check_maker(
    path: Path, files: Mapping[str, str], trusted: TrustedKeys, fingerprint: str
) -> None:
    library = _library()
    config = library.verifying.Config().use_elliptic_key_verifier(
        public_key=trusted.path(fingerprint)
    )
    config.set_hashing_config(_listed("bundle", files))
    try:
        config.verify(path.parent, path)
    except Exception as error:  # ValueError, and those of cryptography, pydantic and json
        raise SignatureInvalid(
            f"{SIGNATURE} names the key {fingerprint} and was not made with it: it is damaged or "
            "forged",
            path=SIGNATURE,
            key=fingerprint,
        ) from error


@cache
def _library() -> Any:
    """Return model-signing, which is large: about a second of imports, and only here.

    Raises:
        KeyInvalid: it is not installed.
    """
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise KeyInvalid(f"{INSTALL_HINT} ({error})") from error
    return model_signing


def prepare() -> None:
    """Import what checking needs, so that the first check does not wait for it.

    Raises:
        KeyInvalid: model-signing is not installed.
    """
    _library()


def _listed(name: str, files: Mapping[str, str]) -> Any:
    """Return a way of hashing for model-signing: the digests that are known already.

    Without it every file would be read a second time.
    """
    import model_signing.hashing
    import model_signing.manifest

    # The only name of the library that is not public; pinned below its next minor version.
    from model_signing._hashing.hashing import Digest

    serialization = model_signing.manifest.SerializationType.from_args(_SERIALIZATION)
    items = [
        serialization.new_item(path, Digest("sha256", bytes.fromhex(sha256)))
        for path, sha256 in files.items()
    ]
    listed = model_signing.manifest.Manifest(name, items, serialization)

    class Listed(model_signing.hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            return listed

    made: Any = Listed
    return made()
