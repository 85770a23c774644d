"""Bundles in the registry: what revisions consist of, each once. In the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.signing import Signature
from pollard.runtime.tensors import protocol_name
from pollard.services.common.errors import NotFound
from pollard.services.models.schema import Bundle, BundleFile, Revision
from pollard.services.models.store import now_us


@dataclass(frozen=True)
class StoredFile:
    """A file of a bundle whose content is a blob."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class NewBundle:
    """A bundle that was checked and whose blobs are on disk."""

    sha256: str
    size_bytes: int
    signature: str
    files: tuple[StoredFile, ...]
    """The manifest first."""
    signed: Signature | None = None
    """Who has signed it; the file is then among ``files``."""


def input_signature(manifest: bundle_pb2.Manifest) -> str:
    """Return the inputs in a form that is equal for equal signatures."""
    return json.dumps(
        sorted([spec.name, protocol_name(spec.data_type), *spec.shape] for spec in manifest.inputs)
    )


def signed_by(signature: Signature | None) -> str:
    """Return who has signed a bundle, in words."""
    if signature is None:
        return "not signed"
    unknown = "" if signature.trusted else "unknown "
    return f"signed with the {unknown}key {signature.fingerprint}"


def add(session: Session, bundle: NewBundle, actor: str) -> None:
    """Note a bundle and its files, unless they are known."""
    if session.get(Bundle, bundle.sha256) is not None:
        return
    row = Bundle(sha256=bundle.sha256, size_bytes=bundle.size_bytes, signature=bundle.signature)
    if bundle.signed is not None:
        row.signer_key = bundle.signed.fingerprint
        row.signer_trusted = bundle.signed.trusted
        row.signed_by, row.signed_time = actor, now_us()
    session.add(row)
    session.flush()
    for position, file in enumerate(bundle.files):
        session.add(
            BundleFile(
                bundle_sha256=bundle.sha256,
                path=file.path,
                position=position,
                sha256=file.sha256,
                size_bytes=file.size_bytes,
            )
        )


def files_of(session: Session, bundle_sha256: str) -> list[BundleFile]:
    """Return the files of a bundle in the order of sending; the manifest is the first.

    Raises:
        NotFound: no revision has such a bundle.
    """
    alive = session.scalar(
        select(func.count()).where(
            Revision.bundle_sha256 == bundle_sha256, Revision.delete_time.is_(None)
        )
    )
    if not alive:
        raise NotFound(
            f"no revision has the bundle {bundle_sha256}",
            reason="BUNDLE_NOT_FOUND",
            bundle_sha256=bundle_sha256,
        )
    return list(
        session.scalars(
            select(BundleFile)
            .where(BundleFile.bundle_sha256 == bundle_sha256)
            .order_by(BundleFile.position)
        )
    )


def bundles_of(session: Session, revisions: Sequence[Revision]) -> dict[str, Bundle]:
    """Return the bundles of the revisions, by digest."""
    digests = {revision.bundle_sha256 for revision in revisions}
    statement = select(Bundle).where(Bundle.sha256.in_(digests))
    return {bundle.sha256: bundle for bundle in session.scalars(statement)}
