"""Who vouches for a bundle: the policy of this manager, and signatures in the registry.

A signature belongs to a bundle, not to a revision: it says that a key vouches
for the content that the digest names. Pushing a stored bundle again, now
signed, signs every revision that has it.

A wrong signature is refused whatever the policy says; that is the work of the
child that checks an upload (:mod:`.check_child`).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from pollard.runtime.bundle import SIGNATURE
from pollard.runtime.errors import KeyInvalid, SignatureInvalid
from pollard.runtime.keys import TrustedKeys
from pollard.runtime.signing import Signature, check_signature_file
from pollard.services.common.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidRequest,
    StartupError,
)
from pollard.services.models import bundle_rows, registry
from pollard.services.models.blobs import Blobs
from pollard.services.models.events import MANAGER, record
from pollard.services.models.schema import Bundle, BundleFile, Revision
from pollard.services.models.store import Store, now_us

_log = structlog.get_logger("pollard.signatures")


@dataclass(frozen=True)
class SignaturePolicy:
    """What this manager asks of bundles."""

    mode: Literal["allow", "warn", "require"] = "allow"
    """What happens to a bundle that no trusted key has signed."""
    trusted: TrustedKeys | None = None
    """Keys whose signatures count; None for none."""

    @classmethod
    def load(
        cls, mode: Literal["allow", "warn", "require"], directory: Path | None
    ) -> SignaturePolicy:
        """Read the trusted keys.

        Raises:
            StartupError: they cannot be read, or are needed and not given.
        """
        if directory is None:
            if mode == "require":
                raise StartupError(
                    "signatures are required, and no key is trusted; give --trusted-keys DIR"
                )
            return cls(mode)
        try:
            return cls(mode, TrustedKeys.load(directory))
        except (KeyInvalid, OSError) as error:
            raise StartupError(f"the trusted keys cannot be used: {error}") from error

    def judge(self, signature: Signature | None) -> tuple[str, ...]:
        """Return the warnings that an upload with this signature deserves.

        Raises:
            InvalidRequest: it is refused.
        """
        if signature is not None and signature.trusted:
            return ()
        if signature is None:
            what, reason = "the bundle is not signed", "SIGNATURE_REQUIRED"
            key = ""
        else:
            key, reason = signature.fingerprint, "SIGNATURE_UNTRUSTED"
            what = f"the bundle is signed with the key {key}, which is not trusted here"
        if self.mode == "require":
            raise InvalidRequest(
                f"{what}, and this manager takes only bundles signed by a trusted key. Sign it "
                "(`pollard models push --sign KEY`) with one of those",
                reason=reason,
                key=key,
            )
        return (what,) if self.mode == "warn" else ()

    def check_served(self, session: Session, model: str, number: int) -> None:
        """Refuse to serve a revision that this policy would not take in now.

        Raises:
            NotFound: there is no such revision.
            FailedPrecondition: it needs a signature of a trusted key.
        """
        if self.mode != "require":
            return
        revision = registry.find_revision(session, model, number)
        bundle = session.get_one(Bundle, revision.bundle_sha256)
        if not bundle.signer_trusted:
            name = registry.revision_name(model, number)
            how = (
                f"is signed with the key {bundle.signer_key}, which is not trusted here"
                if bundle.signer_key
                else "is not signed"
            )
            raise FailedPrecondition(
                f"{name} {how}, and this manager serves only what a trusted key has signed. Push "
                "its bundle again with --sign",
                reason="SIGNATURE_REQUIRED",
                revision=name,
            )


def attach(session: Session, bundle: bundle_rows.NewBundle, actor: str) -> bool:
    """Give a stored bundle the signature that came with it, unless what it has is better.

    A signature of a trusted key is never replaced by one of an unknown key, and
    nothing is replaced by nothing.

    Returns:
        Whether it has another signature now.
    """
    new = bundle.signed
    row = session.get_one(Bundle, bundle.sha256)
    if new is None or (row.signer_trusted and not new.trusted):
        return False
    if row.signer_key == new.fingerprint and row.signer_trusted == new.trusted:
        return False
    incoming = next(file for file in bundle.files if file.path == SIGNATURE)
    file = session.get(BundleFile, (bundle.sha256, SIGNATURE))
    if file is None:
        last = session.scalar(
            select(func.max(BundleFile.position)).where(BundleFile.bundle_sha256 == bundle.sha256)
        )
        file = BundleFile(bundle_sha256=bundle.sha256, path=SIGNATURE, position=(last or 0) + 1)
        session.add(file)
    file.sha256, file.size_bytes = incoming.sha256, incoming.size_bytes
    row.signer_key, row.signer_trusted = new.fingerprint, new.trusted
    row.signed_by, row.signed_time = actor, now_us()
    _tell(session, row, actor, "BUNDLE_SIGNED", f"signed with the key {new.fingerprint}")
    return True


def review(store: Store, blobs: Blobs, trusted: TrustedKeys | None) -> None:
    """Compare what is known of the stored signatures with the keys that are trusted now.

    Keys may have been added or taken away since the last start.
    """
    for row in store.read_now(
        lambda session: list(session.scalars(select(Bundle).where(Bundle.signer_key != "")))
    ):
        counts = trusted is not None and row.signer_key in trusted
        if counts == row.signer_trusted:
            continue
        if counts and not _holds(store, blobs, row, trusted):
            continue
        _mark(store, row.sha256, trusted=counts)


def _holds(store: Store, blobs: Blobs, row: Bundle, trusted: TrustedKeys | None) -> bool:
    files = {
        file.path: file.sha256
        for file in store.read_now(
            lambda session: list(
                session.scalars(select(BundleFile).where(BundleFile.bundle_sha256 == row.sha256))
            )
        )
    }
    blob = files.pop(SIGNATURE)
    try:
        with tempfile.TemporaryDirectory(prefix="pollard-signature-") as folder:
            path = Path(folder) / SIGNATURE
            path.write_bytes(blobs.read(blob))
            return check_signature_file(path, files, trusted).trusted
    except (SignatureInvalid, DataLoss) as error:
        _log.error("a stored signature is wrong", bundle=row.sha256, why=error.message)
        return False


def _mark(store: Store, sha256: str, *, trusted: bool) -> None:
    def work(session: Session) -> None:
        row = session.get(Bundle, sha256)
        if row is None:
            return
        row.signer_trusted = trusted
        action = "SIGNATURE_TRUSTED" if trusted else "SIGNATURE_NOT_TRUSTED"
        known = "is trusted now" if trusted else "is not trusted any more"
        _tell(session, row, MANAGER, action, f"the key {row.signer_key} {known}")

    store.write_now(work)


def _tell(session: Session, row: Bundle, actor: str, action: str, detail: str) -> None:
    for revision in session.scalars(select(Revision).where(Revision.bundle_sha256 == row.sha256)):
        name = registry.revision_name(revision.model, revision.number)
        revision.etag = record(session, actor, action, name, detail, model=revision.model)
