"""What the tables say at one moment of a step: one query a table, whatever the number of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models.fleet_view import Key
from pollard.services.models.rollout_rows import running
from pollard.services.models.schema import Alias, Bundle, Draining, Revision, Rollout

# Made once: to make a statement costs about as much as to run it.
_ALIASES = select(Alias).order_by(Alias.model, Alias.name)
_DRAINING = select(Draining)
_REVISIONS = select(
    Revision.model,
    Revision.number,
    Revision.removed_version,
    Bundle.sha256,
    Bundle.size_bytes,
).join(Bundle, Bundle.sha256 == Revision.bundle_sha256)

_KEYS_AT_ONCE = 5_000
"""Of revisions in a query: databases limit the number of values."""


@dataclass(frozen=True)
class Stored:
    """What is kept of a revision."""

    bundle_sha256: str
    size_bytes: int
    removed_version: int
    """Of the desired state that it was taken out of last."""


@dataclass(frozen=True)
class Standing:
    """The rows that decide what servers should run.

    They are the session's own: what a step changes in them shows at once. A row that it adds does
    not.
    """

    aliases: Sequence[Alias]
    """By model and name."""
    draining: Sequence[Draining]
    rollouts: Sequence[Rollout]
    """Those that ran when this was read, by model and number."""
    stored: Mapping[Key, Stored]
    """Of each revision that is wanted, or that a route leads to."""

    @classmethod
    def read(cls, session: Session) -> Standing:
        """Return what the tables say."""
        aliases = session.scalars(_ALIASES).all()
        draining = session.scalars(_DRAINING).all()
        rollouts = running(session)
        keys = {(row.model, row.revision) for row in aliases}
        keys |= {(row.model, row.pending_revision) for row in aliases}
        keys |= {(row.model, row.revision) for row in draining}
        keys |= {(row.model, row.revision) for row in rollouts}
        return cls(aliases, draining, rollouts, _stored(session, keys))

    def running(self) -> list[Rollout]:
        """Return the rollouts that have not ended."""
        return [row for row in self.rollouts if row.end_time is None]

    def routed(self) -> set[Key]:
        """Return the revisions that routes lead to."""
        found = {(row.model, row.revision) for row in self.aliases if row.revision}
        found.update((row.model, row.revision) for row in self.running() if row.loaded)
        return found


def _stored(session: Session, keys: set[Key]) -> dict[Key, Stored]:
    """Return what is kept of some revisions."""
    columns = tuple_(Revision.model, Revision.number)
    return {
        (model, number): Stored(sha256, size, removed)
        for some in _in_portions(keys)
        for model, number, removed, sha256, size in session.execute(
            _REVISIONS.where(columns.in_(some))
        )
    }


def _in_portions(keys: set[Key]) -> Iterator[list[Key]]:
    """Return keys, sorted, in portions that fit into a query."""
    ordered = sorted(keys)
    for begin in range(0, len(ordered), _KEYS_AT_ONCE):
        yield ordered[begin : begin + _KEYS_AT_ONCE]


def not_ready(session: Session, keys: set[Key]) -> dict[Key, Revision]:
    """Return those of some revisions that no server has loaded yet."""
    columns = tuple_(Revision.model, Revision.number)
    return {
        (row.model, row.number): row
        for some in _in_portions(keys)
        for row in session.scalars(
            select(Revision).where(columns.in_(some), Revision.state != pb.Revision.STATE_READY)
        )
    }
