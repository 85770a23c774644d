"""Keys that sign bundles: elliptic curve P-256, as PEM files.

``NAME.key`` is the private key (PKCS #8, readable by its owner alone) and
``NAME.pub`` the public one, which goes to whoever checks. A key's fingerprint
is the SHA-256 of its public key's PEM text as model-signing writes it into
signatures, so ``sha256sum NAME.pub`` gives it too.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pollard.runtime.bundle import sync_directory
from pollard.runtime.errors import KeyInvalid

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )

_MAX_KEY_BYTES = 64 * 1024
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_PUBLIC_SUFFIXES = (".pub", ".pem")

INSTALL_HINT = (
    "signatures need the extra [signing]: pip install 'pollard-runtime[signing]', or "
    "'pollard-client[signing]'"
)


@dataclass(frozen=True)
class KeyPair:
    """A new pair of keys on disk."""

    private: Path
    public: Path
    fingerprint: str


class TrustedKeys:
    """The public keys whose signatures count, by fingerprint."""

    def __init__(self, keys: dict[str, Path]) -> None:
        self._keys = keys

    @classmethod
    def load(cls, directory: Path | str) -> TrustedKeys:
        """Read every ``*.pub`` and ``*.pem`` of a directory.

        Raises:
            KeyInvalid: it cannot be read, holds no key, or a file in it is no
                public key.
        """
        directory = Path(directory)
        try:
            paths = sorted(p for p in directory.iterdir() if p.suffix in _PUBLIC_SUFFIXES)
        except OSError as error:
            raise KeyInvalid(
                f"the directory of trusted keys {directory} cannot be read: {error.strerror}",
                path=directory,
            ) from error
        if not paths:
            raise KeyInvalid(
                f"{directory} holds no public key (*.pub or *.pem); put the .pub file of each key "
                "that is trusted there",
                path=directory,
            )
        for path in paths:
            if b"PRIVATE KEY" in _read(path):
                raise KeyInvalid(
                    f"{path} is a private key; only public keys belong in a directory of trusted "
                    "keys. Move it away",
                    path=path,
                )
        return cls({public_fingerprint(path): path for path in paths})

    def __contains__(self, fingerprint: object) -> bool:
        return fingerprint in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def path(self, fingerprint: str) -> Path:
        """Return the file of a trusted key."""
        return self._keys[fingerprint]

    def paths(self) -> dict[str, str]:
        """Return the file of every key by fingerprint, to hand them to another process."""
        return {fingerprint: str(path.absolute()) for fingerprint, path in self._keys.items()}


def create_key_pair(name: Path | str, passphrase: bytes | None = None) -> KeyPair:
    """Make ``NAME.key`` and ``NAME.pub``; neither may exist.

    Args:
        name: Path without suffix; directories that are missing are not made.
        passphrase: Encrypts the private key; None leaves it plain, protected
            by its permissions alone.

    Raises:
        KeyInvalid: the passphrase is empty, or model-signing is not installed.
        FileExistsError: one of the files exists; nothing was changed.
        OSError: they cannot be written; none is left.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if passphrase is not None and not passphrase:
        raise KeyInvalid("the passphrase is empty; give one, or leave the key without")
    name = Path(name)
    private, public = name.with_name(name.name + ".key"), name.with_name(name.name + ".pub")
    key = ec.generate_private_key(ec.SECP256R1())
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    raw = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    for path in (private, public):
        if path.exists() or path.is_symlink():
            raise FileExistsError(
                f"{path} exists; a key is never overwritten, because what it signed could then "
                "not be checked any more. Choose another name"
            )
    _write_new(private, raw, 0o600)
    try:
        _write_new(public, _public_pem(key.public_key()), 0o644)
    except BaseException:
        private.unlink()
        raise
    sync_directory(private.parent)
    return KeyPair(private, public, _fingerprint(key.public_key()))


def public_fingerprint(path: Path | str) -> str:
    """Return the fingerprint of the public key in a file.

    Raises:
        KeyInvalid: it is not the public key of a curve that model-signing
            knows, or model-signing is not installed.
        OSError: the file cannot be read.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    path = Path(path)
    try:
        key = serialization.load_pem_public_key(_read(path))
    except Exception as error:  # ValueError, TypeError, and cryptography's own
        raise KeyInvalid(f"{path} is not a public key in PEM form: {error}", path=path) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise KeyInvalid(f"{path} is not a key of an elliptic curve", path=path)
    _check_curve(path, key)
    return _fingerprint(key)


def private_fingerprint(path: Path | str, passphrase: bytes | None = None) -> str:
    """Return the fingerprint of the public half of a private key.

    Raises:
        KeyInvalid: it cannot be read with this passphrase, or is another kind
            of key, or model-signing is not installed.
        OSError: the file cannot be read.
    """
    return _fingerprint(_load_private(Path(path), passphrase).public_key())


def is_encrypted(path: Path | str) -> bool:
    """Tell whether a private key asks for a passphrase."""
    raw = _read(Path(path))
    return b"ENCRYPTED PRIVATE KEY" in raw or b"Proc-Type: 4,ENCRYPTED" in raw


def is_private(path: Path | str) -> bool:
    """Tell whether a file holds a private key."""
    return b"PRIVATE KEY" in _read(Path(path))


def _load_private(path: Path, passphrase: bytes | None) -> EllipticCurvePrivateKey:
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    raw = _read(path)
    if b"PRIVATE KEY" not in raw:
        raise KeyInvalid(f"{path} is not a private key in PEM form", path=path)
    if is_encrypted(path) and not passphrase:
        raise KeyInvalid(
            f"{path} is protected by a passphrase; give it in POLLARD_KEY_PASSPHRASE or type it "
            "when asked",
            path=path,
        )
    try:
        # A passphrase for a key that has none is an error of the library, and none of ours.
        key = serialization.load_pem_private_key(raw, passphrase if is_encrypted(path) else None)
    except Exception as error:  # ValueError, TypeError, and cryptography's own
        why = "the passphrase is wrong or the file is damaged" if passphrase else str(error)
        raise KeyInvalid(f"the private key {path} cannot be read: {why}", path=path) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyInvalid(f"{path} is not a key of an elliptic curve", path=path)
    _check_curve(path, key.public_key())
    return key


def _check_curve(path: Path, key: EllipticCurvePublicKey) -> None:
    if key.curve.name not in _CURVES:
        raise KeyInvalid(
            f"{path} is a key of the curve {key.curve.name}; known are {', '.join(_CURVES)}",
            path=path,
            curve=key.curve.name,
        )


def _public_pem(key: EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _fingerprint(key: EllipticCurvePublicKey) -> str:
    return hashlib.sha256(_public_pem(key)).hexdigest()


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        raw = file.read(_MAX_KEY_BYTES + 1)
    if len(raw) > _MAX_KEY_BYTES:
        raise KeyInvalid(f"{path} is longer than {_MAX_KEY_BYTES} bytes, so not a key", path=path)
    return raw


def _write_new(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # The umask may only have taken rights away; the owner must keep them.
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise KeyInvalid(INSTALL_HINT) from error
