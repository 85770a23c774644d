"""Whose blobs these are: a registry that does not know them would have them deleted."""

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
    """Mark the blobs as those of this installation.

    Raises:
        StartupError: they are another installation's.
        ServiceError: they cannot be read or written.
    """
    own = store.write_now(installation_id)
    if not blobs.shared and blobs.owner() != own and next(iter(blobs), None) is None:
        # Only this manager reaches them, and there are none that could be lost.
        blobs.disown()
    if not blobs.owner():
        blobs.set_owner(own)
    if blobs.owner() == own:
        return
    if blobs.shared:
        raise StartupError(
            f"the blobs in {blobs.name} belong to another installation of Pollard, and would be "
            "deleted there or here as what nobody refers to; choose another prefix in --blobs. If "
            f"that installation is gone for good, delete {OWNER!r} there"
        )
    raise StartupError(
        f"the bundles in {blobs.name} belong to another registry than {store.database.name}, which "
        "does not know them; they would be deleted. Name the --store and the "
        "--database-url that belong together, or restore a backup (pollard store restore). To "
        "begin with an empty registry, choose another --store"
    )
