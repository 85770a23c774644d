"""Settings of the model management service."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from pollard.services.common.lifecycle import is_loopback
from pollard.services.common.settings import ServiceSettings
from pollard.services.models.blobs import UrlRules


class ModelsSettings(ServiceSettings):
    """What ``pollard serve models`` can be told."""

    section: ClassVar[str] = "models"

    port: int = Field(8021, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    store: Path = Field(
        Path.home() / ".local" / "share" / "pollard" / "models",
        description="Directory of the registry and the bundles. One manager at a time; managers "
        "that share a --database-url have one each.",
    )
    database_url: str = Field(
        "",
        description="PostgreSQL that holds the registry and that several managers may share, such "
        "as postgresql://USER:PASSWORD@HOST/DATABASE; empty keeps it in the store, with SQLite.",
    )
    advertise: str = Field(
        "",
        description="gRPC target under which the other managers on the database reach this one; "
        "empty derives it.",
    )
    blobs: str = Field(
        "",
        description="Where the files of the bundles are kept: s3://BUCKET/PREFIX, or a directory; "
        "empty keeps them in the store. Managers that share a --database-url can fetch each "
        "other's bundles only from S3, or from a directory that all of them see. What is still "
        "arriving always lies in the store.",
    )
    blobs_endpoint: str = Field(
        "",
        description="URL of an S3 that is not Amazon's; keys and region come from where AWS tools "
        "look for them.",
    )
    blobs_direct: bool = Field(
        True,
        description="With --blobs s3://…: have servers fetch bundles from S3 themselves, by URLs "
        "that are good for --blobs-url-seconds. Where that fails, and to servers of an older "
        "version, the manager sends them.",
    )
    blobs_public_endpoint: str = Field(
        "",
        description="URL under which servers reach the S3, where they know it by another name than "
        "the manager.",
    )
    blobs_url_seconds: float = Field(
        300.0,
        ge=10,
        le=604_800,
        description="How long a URL by which a server fetches a file is good, in seconds.",
    )
    initial_tokens: Path | None = Field(
        None,
        description="With --tokens: directory of admin.token and server.token, which are let in at "
        "the start and, where there never was a token, made; default is tokens/ in the store.",
    )
    drain_seconds: float = Field(
        30.0,
        ge=0,
        description="How long an old revision stays loaded after the last server has acknowledged "
        "the new routes: the longest deadline that a request in flight can have.",
    )
    server_lease_seconds: float = Field(
        10.0,
        ge=0,
        description="How long a switch waits for a server whose stream broke.",
    )
    load_timeout_seconds: float = Field(
        300.0, gt=0, description="Longest time for all servers to load a revision."
    )
    report_interval_seconds: float = Field(
        5.0,
        gt=0,
        description="Longest time between two reports of a server; longer where more than "
        "200 would come in a second.",
    )
    max_bundle_bytes: int = Field(
        16 * 1024**3, gt=0, description="Largest bundle that can be pushed, in bytes."
    )
    check_timeout_seconds: float = Field(
        120.0, gt=0, description="Longest time to unpack and check a bundle."
    )
    check_memory_bytes: int = Field(
        8 * 1024**3,
        gt=0,
        description="Address space of the process that checks a bundle; a graph takes a few times "
        "its size.",
    )
    signatures: Literal["auto", "allow", "warn", "require"] = Field(
        "auto",
        description="Bundles that no trusted key has signed are taken in (allow), with a warning "
        "(warn), or refused (require); auto allows them on loopback and warns elsewhere. A wrong "
        "signature is always refused.",
    )
    trusted_keys: Path | None = Field(
        None,
        description="Directory of the public keys (*.pub, *.pem) whose signatures count; read at "
        "the start.",
    )
    parallel_checks: int = Field(2, ge=1, description="Bundles that are checked at the same time.")
    event_retention_days: float = Field(
        400.0,
        ge=0,
        description="How long events of the audit log are kept; 0 keeps them for ever. A watch "
        "that begins before the oldest one kept is refused.",
    )

    vision_address: str = Field(
        "",
        description="gRPC target of the vision service that the web page asks about images that "
        "are dropped in; empty takes any preprocess server that has joined.",
    )
    page_hosts: str = Field(
        "",
        description="Names, with commas between, under which browsers reach the web page, beside "
        "localhost, this machine's name and addresses. Where nobody has to sign in, the page "
        "answers under no other.",
    )

    @model_validator(mode="after")
    def _check_blobs(self) -> Self:
        where = self.blobs_public_endpoint
        if where and not self.blobs.startswith("s3://"):
            raise ValueError("blobs_public_endpoint is for a --blobs s3://BUCKET/PREFIX")
        for name, url in (("endpoint", self.blobs_endpoint), ("public_endpoint", where)):
            if url and not url.startswith(("http://", "https://")):
                raise ValueError(
                    f"blobs_{name} is a URL, as https://HOST or http://HOST:PORT, and not {url!r}"
                )
        return self

    @property
    def url_rules(self) -> UrlRules | None:
        """How URLs of blobs are made for servers; None for not at all."""
        if not self.blobs_direct:
            return None
        return UrlRules(self.blobs_url_seconds, self.blobs_public_endpoint)

    @property
    def first_tokens(self) -> Path | None:
        """Where the first tokens lie; None where tokens do not count."""
        return (self.initial_tokens or self.store / "tokens") if self.tokens else None

    @property
    def signature_mode(self) -> Literal["allow", "warn", "require"]:
        """What is asked of signatures, with ``auto`` decided."""
        if self.signatures != "auto":
            return self.signatures
        return "allow" if is_loopback(self.host) else "warn"
