"""What the preprocess server can be told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from pollard.services.common.settings import ServiceSettings
from pollard.services.preprocess.fetching import FetchRules
from pollard.services.preprocess.worker import WorkerLimits


class PreprocessSettings(ServiceSettings):
    """Settings of `pollard serve preprocess`."""

    section: ClassVar[str] = "preprocess"

    port: int = Field(8011, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    unix_socket: str | None = Field(None, description="Also listen on this Unix socket.")
    manager: str = Field(
        "127.0.0.1:8021",
        description="gRPC target of the manager, or of several on one database, with commas "
        "between; empty serves from the cache alone.",
    )
    cache_dir: Path = Field(
        Path("var/preprocess"), description="Folder for manifests and the last desired state."
    )
    server_id: str = Field(
        "",
        max_length=128,
        description="Name in the fleet; empty makes one up and keeps it in the cache.",
    )
    advertise: str = Field(
        "", description="gRPC target under which others reach this server; empty derives it."
    )
    decode_workers: int = Field(
        0, ge=0, description="Processes that decode images; 0 means one for each usable core."
    )
    decode_timeout_seconds: float = Field(
        10.0, gt=0, description="Longest time to decode and transform one image."
    )
    decode_memory_bytes: int = Field(
        2 * 1024**3, ge=256 * 1024**2, description="Largest address space of a decode worker."
    )
    max_image_bytes: int = Field(32 * 1024**2, ge=1, description="Largest encoded image, in bytes.")
    max_image_pixels: int = Field(
        36_000_000,
        ge=1,
        description="Most pixels of an image; each takes 8 to 16 bytes while it is decoded.",
    )
    max_pixels_per_byte: int = Field(
        10_000,
        ge=1,
        description="Most pixels for each byte of an image file, beyond one megapixel.",
    )
    max_waiting_bytes: int = Field(
        512 * 1024**2,
        ge=1,
        description="Largest sum of the sizes of the images that wait for a decoder, in bytes.",
    )
    max_request_seconds: float = Field(
        30.0, gt=0, description="Longest that a request may take, whatever its deadline."
    )

    uri_hosts: tuple[str, ...] = Field(
        (),
        description="Hosts that images are fetched from when a request names a URI: "
        '"images.example.org", "*.example.org", "host:8443", or "*" for any public one. Empty '
        "fetches nothing. Addresses that are not public are never connected to.",
    )
    uri_allow_http: bool = Field(False, description="Fetch over unencrypted connections, too.")
    uri_timeout_seconds: float = Field(10.0, gt=0, description="Longest time to fetch one image.")
    explain_masks: int = Field(
        400,
        ge=16,
        le=20_000,
        description="Partly covered copies of an image that a model is asked about to explain "
        "an answer; more give a smoother map and take longer.",
    )

    @property
    def fetch_rules(self) -> FetchRules:
        """The part that is about URIs."""
        return FetchRules(
            hosts=self.uri_hosts,
            allow_http=self.uri_allow_http,
            timeout_seconds=self.uri_timeout_seconds,
            max_bytes=self.max_image_bytes,
        )

    @property
    def worker_limits(self) -> WorkerLimits:
        """The part that is about decoding."""
        return WorkerLimits(
            max_image_bytes=self.max_image_bytes,
            max_image_pixels=self.max_image_pixels,
            max_pixels_per_byte=self.max_pixels_per_byte,
            timeout_seconds=self.decode_timeout_seconds,
            memory_bytes=self.decode_memory_bytes,
        )
