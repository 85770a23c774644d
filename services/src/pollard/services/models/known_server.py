"""What the fleet keeps of one server, in memory and on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import Insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as pb
from pollard.services.models.fleet_view import Key, RevisionReport, ServerView
from pollard.services.models.schema import Server as ServerRow

if TYPE_CHECKING:
    from pollard.services.models.fleet import Connection

Row = dict[str, Any]
"""Values of a row of the table of servers, by column."""


@dataclass(eq=False)
class KnownServer:
    """What is known of one server."""

    hello: pb.Hello
    present: bool = True
    serving: bool = False
    last_seen_us: int = 0
    written_us: int = 0
    """When it was last seen, as the disk has it."""
    acked_version: int = 0
    last_nack: pb.Nack | None = None
    lease_ends: float = 0.0
    connection: Connection | None = None
    report: pb.Report | None = None
    revisions: dict[Key, RevisionReport] = field(default_factory=dict)
    """Replaced by each report, never changed: views of earlier moments have it, too."""
    # Of the present stream only:
    acked: int = 0
    nacked: int = 0
    answered_before_report: int = 0
    _view: ServerView | None = None

    @classmethod
    def of_row(cls, row: ServerRow, lease_ends: float) -> KnownServer:
        """Return a server as it is remembered: not connected, and waited for until then."""
        return cls(
            hello=pb.Hello.FromString(row.hello),
            present=row.present,
            serving=row.serving,
            last_seen_us=row.last_seen_time,
            written_us=row.last_seen_time,
            acked_version=row.acked_version,
            last_nack=pb.Nack.FromString(row.last_nack) if row.last_nack else None,
            lease_ends=lease_ends,
        )

    def changed(self) -> None:
        """Make the view anew: something that it shows is another."""
        self._view = None

    def disconnected(self) -> None:
        """Forget what was said on the present stream."""
        self.connection = None
        self.acked = self.nacked = self.answered_before_report = 0
        self.revisions = {}
        self.changed()

    def view(self) -> ServerView:
        """Return it as the steps see it: the same one until it has changed.

        Thousands of servers are looked at in each step, of which few have said anything new.
        """
        if self._view is None:
            nack = self.last_nack.status if self.last_nack and self.nacked else None
            self._view = ServerView(
                server_id=self.hello.server_id,
                kind=self.hello.kind,
                address=self.hello.address,
                connected=self.connection is not None,
                serving=self.serving,
                applied_version=self.hello.applied_version,
                acked=self.acked,
                nacked=self.nacked,
                nack=nack,
                answered_before_report=self.answered_before_report,
                revisions=self.revisions,
            )
        return self._view

    def to_proto(self) -> pb.Server:
        """Return it as clients are told."""
        last_seen = Timestamp()
        last_seen.FromMicroseconds(self.last_seen_us)
        return pb.Server(
            name=f"servers/{self.hello.server_id}",
            hello=self.hello,
            connected=self.connection is not None,
            last_seen_time=last_seen,
            acked_version=self.acked_version,
            last_nack=self.last_nack,
            report=self.report,
        )

    def row(self) -> Row:
        """Return it as it is remembered across a restart; it is about to be written."""
        self.written_us = self.last_seen_us
        return {
            "server_id": self.hello.server_id,
            "hello": self.hello.SerializeToString(),
            "present": self.present,
            "serving": self.serving,
            "last_seen_time": self.last_seen_us,
            "acked_version": self.acked_version,
            "last_nack": self.last_nack.SerializeToString() if self.last_nack else b"",
        }


def save(session: Session, rows: Sequence[Row]) -> None:
    """Write servers down, whether they are there already or not."""
    if rows:
        session.connection().execute(_UPSERT[session.get_bind().dialect.name], rows)


def _upsert(dialect: Any) -> Insert:
    # One statement for all: a row at a time through the mapper takes a thousand servers a second.
    statement = dialect.insert(ServerRow.__table__)
    columns = [column.name for column in ServerRow.__table__.columns if not column.primary_key]
    made: Insert = statement.on_conflict_do_update(
        index_elements=["server_id"], set_={name: statement.excluded[name] for name in columns}
    )
    return made


_UPSERT = {"sqlite": _upsert(sqlite), "postgresql": _upsert(postgresql)}
