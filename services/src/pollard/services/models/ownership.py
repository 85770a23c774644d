"""Whose blobs these are: two installations on one bucket would collect each other's."""

from __future__ import annotations

import secrets

from sqlalchemy.orm import Session

from pollard.services.common.errors import StartupError
from pollard.services.models.blobs import OWNER, Blobs
from pollard.services.models.schema import Meta
from pollard.services.models.store import Store

_KEY = "installation"


def installation_id(session: Session) -> str:
    """Return what names the installation whose registry this is; made up the first time."""
    row = session.get(Meta, _KEY)
    if row is None:
        row = Meta(key=_KEY, content=secrets.token_hex(16).encode())
        session.add(row)
    return row.content.decode()


def renew(session: Session) -> None:
    """Make this another installation: a copy must not collect the blobs of the first one."""
    row = session.get(Meta, _KEY)
    if row is not None:
        session.delete(row)


def claim(store: Store, blobs: Blobs) -> None:
    """Mark blobs that others could reach too as those of this installation.

    Raises:
        StartupError: they are another installation's.
        ServiceError: they cannot be read or written.
    """
    if not blobs.shared:
        return
    own = store.write_now(installation_id)
    if not blobs.owner():
        blobs.set_owner(own)
    if blobs.owner() != own:
        raise StartupError(
            f"the blobs in {blobs.name} belong to another installation of Pollard, and would be "
            "deleted there or here as what nobody refers to; choose another prefix in --blobs. If "
            f"that installation is gone for good, delete {OWNER!r} there"
        )
