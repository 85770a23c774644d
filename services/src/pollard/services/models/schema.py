"""Tables of the registry.

Times are microseconds since the epoch in UTC: whole numbers sort and compare
alike in every database.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite numbers rows by itself only for columns of the type INTEGER.
_Sequence = BigInteger().with_variant(Integer(), "sqlite")

# Sorted byte by byte everywhere, as page tokens need it, whatever the database's language.
_Name = String(63).with_variant(String(63, collation="C"), "postgresql")
_ServerId = String(128).with_variant(String(128, collation="C"), "postgresql")


class Base(DeclarativeBase):
    """Root of the tables."""


class Meta(Base):
    """Single values: version and content of the desired state."""

    __tablename__ = "meta"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, default=0)
    content: Mapped[bytes] = mapped_column(LargeBinary, default=b"")


class Model(Base):
    """A name under which revisions are kept."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(_Name, primary_key=True)
    description: Mapped[str] = mapped_column(Text, default="")
    labels: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    create_time: Mapped[int] = mapped_column(BigInteger)
    update_time: Mapped[int] = mapped_column(BigInteger)
    delete_time: Mapped[int | None] = mapped_column(BigInteger)
    latest_revision: Mapped[int] = mapped_column(BigInteger, default=0)
    """Highest number ever given; numbers are never given twice."""
    etag: Mapped[int] = mapped_column(BigInteger)


class Bundle(Base):
    """One stored bundle; several revisions may have it."""

    __tablename__ = "bundles"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    signature: Mapped[str] = mapped_column(Text)
    """The input tensors in a canonical form, to compare revisions by."""
    signer_key: Mapped[str] = mapped_column(String(64), default="")
    """Fingerprint of the key that its signature names; empty when it is not signed."""
    signer_trusted: Mapped[bool] = mapped_column(default=False)
    """Whether that key is trusted and was seen to have made it."""
    signed_by: Mapped[str] = mapped_column(String(255), default="")
    """Who stored the signature."""
    signed_time: Mapped[int] = mapped_column(BigInteger, default=0)


class BundleFile(Base):
    """One file of a bundle and the blob that holds it."""

    __tablename__ = "bundle_files"

    bundle_sha256: Mapped[str] = mapped_column(
        ForeignKey("bundles.sha256", ondelete="CASCADE"), primary_key=True
    )
    path: Mapped[str] = mapped_column(String(255), primary_key=True)
    position: Mapped[int] = mapped_column(Integer)
    """Order of sending; the manifest is 0."""
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)


class Revision(Base):
    """An immutable bundle of a model."""

    __tablename__ = "revisions"

    model: Mapped[str] = mapped_column(
        ForeignKey("models.name", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    bundle_sha256: Mapped[str] = mapped_column(ForeignKey("bundles.sha256"), index=True)
    state: Mapped[int] = mapped_column(Integer)
    """``Revision.State`` of the contract."""
    error: Mapped[bytes] = mapped_column(LargeBinary, default=b"")
    """Serialised ``google.rpc.Status``; empty for none."""
    notes: Mapped[str] = mapped_column(Text, default="")
    labels: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    creator: Mapped[str] = mapped_column(String(255))
    create_time: Mapped[int] = mapped_column(BigInteger)
    delete_time: Mapped[int | None] = mapped_column(BigInteger)
    removed_version: Mapped[int] = mapped_column(BigInteger, default=0)
    """Desired state in which servers were last told to free it; 0 for never.
    What a server says of it before it has answered that state is old news."""
    origin: Mapped[bytes | None] = mapped_column(LargeBinary)
    """Serialised ``Origin`` of the contract; None for none."""
    etag: Mapped[int] = mapped_column(BigInteger)


class Alias(Base):
    """A name that points at a revision, and the state of its switch."""

    __tablename__ = "aliases"

    model: Mapped[str] = mapped_column(
        ForeignKey("models.name", ondelete="CASCADE"), primary_key=True
    )
    name: Mapped[str] = mapped_column(_Name, primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger, default=0)
    """Where requests go; 0 before the first switch is done."""
    pending_revision: Mapped[int] = mapped_column(BigInteger, default=0)
    previous_revision: Mapped[int] = mapped_column(BigInteger, default=0)
    state: Mapped[int] = mapped_column(Integer)
    """``Alias.State`` of the contract."""
    pending_version: Mapped[int | None] = mapped_column(BigInteger)
    """First desired state that holds the pending revision; None until it is made."""
    routes_version: Mapped[int | None] = mapped_column(BigInteger)
    """First desired state with the current route; None until it is made."""
    error: Mapped[bytes] = mapped_column(LargeBinary, default=b"")
    """Serialised ``google.rpc.Status``; empty for none."""
    failures: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    """``{"server_id": …, "status": hexadecimal}`` for each server that refused."""
    quorum: Mapped[dict[str, float]] = mapped_column(JSON, default=dict)
    """How many inference servers are enough, as :class:`.quorum.Quorum` stores it."""
    update_time: Mapped[int] = mapped_column(BigInteger)
    etag: Mapped[int] = mapped_column(BigInteger)


class Rollout(Base):
    """The way of an alias to a revision in steps, with gates."""

    __tablename__ = "rollouts"

    model: Mapped[str] = mapped_column(
        ForeignKey("models.name", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    """Counts 1, 2, 3… in each model."""
    alias: Mapped[str] = mapped_column(_Name)
    revision: Mapped[int] = mapped_column(BigInteger)
    base_revision: Mapped[int] = mapped_column(BigInteger)
    steps: Mapped[list[float]] = mapped_column(JSON)
    """Shares in percent; the last is 100."""
    hold_us: Mapped[int] = mapped_column(BigInteger)
    min_requests: Mapped[int] = mapped_column(BigInteger)
    max_error_rate: Mapped[float]
    max_p99_ratio: Mapped[float]
    shadow_ppm: Mapped[int] = mapped_column(Integer, default=0)
    """Share of the base revision's requests that are copied, in millionths; 0 for none."""
    shadow_output: Mapped[str] = mapped_column(Text, default="")
    """Output that is compared."""
    shadow_transforms: Mapped[bool] = mapped_column(default=False)
    """Whether the revisions prepare images differently, so that tensors cannot be copied."""
    min_agreement: Mapped[float] = mapped_column(default=0.0)
    """Smallest share of items that agree; 0 does not judge it."""
    state: Mapped[int] = mapped_column(Integer)
    """``Rollout.State`` of the contract."""
    loaded: Mapped[bool] = mapped_column(default=False)
    """Whether every expected server had the revision; no request goes to it before."""
    step: Mapped[int] = mapped_column(Integer, default=0)
    """Index in ``steps``; -1 while only copies go to the revision."""
    pending_version: Mapped[int | None] = mapped_column(BigInteger)
    """First desired state that holds the revision; None until it is made."""
    routes_version: Mapped[int | None] = mapped_column(BigInteger)
    """First desired state with the weights of this step; None until it is made."""
    quorum: Mapped[dict[str, float]] = mapped_column(JSON, default=dict)
    """How many inference servers are enough, as :class:`.quorum.Quorum` stores it."""
    failures: Mapped[list[dict[str, str]]] = mapped_column(JSON, default=list)
    """Servers that refuse the revision and are excused, as :func:`.refusals.encoded` keeps them."""
    error: Mapped[bytes] = mapped_column(LargeBinary, default=b"")
    """Serialised ``google.rpc.Status``; empty for none."""
    creator: Mapped[str] = mapped_column(String(255))
    create_time: Mapped[int] = mapped_column(BigInteger)
    end_time: Mapped[int | None] = mapped_column(BigInteger, index=True)
    etag: Mapped[int] = mapped_column(BigInteger)


class RolloutEvidence(Base):
    """What was seen in the present step of a rollout; the last one's once it has ended."""

    __tablename__ = "rollout_evidence"
    __table_args__ = (
        ForeignKeyConstraint(
            ["model", "number"], ["rollouts.model", "rollouts.number"], ondelete="CASCADE"
        ),
    )

    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    step: Mapped[int] = mapped_column(Integer)
    held_us: Mapped[int] = mapped_column(BigInteger, default=0)
    """How long the step has lasted, by the clocks of the managers that were there."""
    seen: Mapped[dict[str, Any]] = mapped_column(JSON)
    """What the judge has seen, in its own form."""


class RolloutBaseline(Base):
    """Where a server's counters of one revision stood when they were looked at last."""

    __tablename__ = "rollout_baselines"
    __table_args__ = (
        ForeignKeyConstraint(
            ["model", "number"], ["rollouts.model", "rollouts.number"], ondelete="CASCADE"
        ),
    )

    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    server_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    run_id: Mapped[str] = mapped_column(String(64), default="")
    """Which run of the server counted; empty if it does not say."""
    counters: Mapped[bytes] = mapped_column(LargeBinary, default=b"")
    """Serialised ``Counters`` of the contract."""


class Draining(Base):
    """A revision that no route leads to any more, while requests may be in flight."""

    __tablename__ = "draining"

    model: Mapped[str] = mapped_column(_Name, primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    routes_version: Mapped[int | None] = mapped_column(BigInteger)
    """First desired state without the route; None until it is made."""


class Server(Base):
    """A server of the fleet, as it is remembered across a restart."""

    __tablename__ = "servers"

    server_id: Mapped[str] = mapped_column(_ServerId, primary_key=True)
    hello: Mapped[bytes] = mapped_column(LargeBinary)
    present: Mapped[bool] = mapped_column(default=True)
    """Connected, or its lease has not run out."""
    serving: Mapped[bool] = mapped_column(default=False)
    """Has answered a desired state, so that requests may be sent to it."""
    last_seen_time: Mapped[int] = mapped_column(BigInteger)
    acked_version: Mapped[int] = mapped_column(BigInteger, default=0)
    last_nack: Mapped[bytes] = mapped_column(LargeBinary, default=b"")


class Lease(Base):
    """Which of the managers on one database leads; unused on SQLite."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64), default="")
    """Manager that leads; empty after it stopped in good order."""
    address: Mapped[str] = mapped_column(String(255), default="")
    """gRPC target under which it is reached."""
    term: Mapped[int] = mapped_column(BigInteger, default=0)
    """Grows whenever another manager begins to lead."""
    renewals: Mapped[int] = mapped_column(BigInteger, default=0)
    """Grows while it lives. No clock is compared with another machine's."""


class Token(Base):
    """What is kept of a token; the token itself is not."""

    __tablename__ = "tokens"

    token_id: Mapped[str] = mapped_column(_Name, primary_key=True)
    """Part of the token that is no secret."""
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(String(63))
    role: Mapped[str] = mapped_column(String(16))
    limits: Mapped[dict[str, float]] = mapped_column(JSON, default=dict)
    """By the names of the contract's fields; what is not in it is the server's."""
    creator: Mapped[str] = mapped_column(String(255))
    create_time: Mapped[int] = mapped_column(BigInteger)
    expire_time: Mapped[int | None] = mapped_column(BigInteger)
    revoke_time: Mapped[int | None] = mapped_column(BigInteger)


class Event(Base):
    """One change; the audit log."""

    __tablename__ = "events"
    __table_args__ = (
        Index("ix_events_model", "model", "sequence"),
        {"sqlite_autoincrement": True},  # numbers are never used again
    )

    sequence: Mapped[int] = mapped_column(_Sequence, primary_key=True, autoincrement=True)
    time: Mapped[int] = mapped_column(BigInteger)
    actor: Mapped[str] = mapped_column(String(255))
    action: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(_Name, default="")
    resource: Mapped[str] = mapped_column(String(255))
    detail: Mapped[str] = mapped_column(Text, default="")


class Answered(Base):
    """The answer to a request that carried a request id."""

    __tablename__ = "answered"

    request_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    method: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(String(64))
    response: Mapped[bytes] = mapped_column(LargeBinary)
    create_time: Mapped[int] = mapped_column(BigInteger, index=True)


class Upload(Base):
    """An upload that is under way, or that ended less than a day ago."""

    __tablename__ = "uploads"

    upload_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    model: Mapped[str] = mapped_column(_Name)
    total_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    create_time: Mapped[int] = mapped_column(BigInteger)
    revision: Mapped[int] = mapped_column(BigInteger, default=0)
    """The revision that came of it; 0 while it is under way."""
    existed: Mapped[bool] = mapped_column(default=False)


class BlobHold(Base):
    """A blob that must not be deleted, because an upload is about to refer to it; or, held by
    a collector, one that is being deleted."""

    __tablename__ = "blob_holds"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(36), primary_key=True)
    """Attempt at an upload, or the collectors."""
    manager: Mapped[str] = mapped_column(String(64))
    """Whose upload or collector it is: what it held when it died is let go when it starts."""
    time: Mapped[int] = mapped_column(BigInteger)
