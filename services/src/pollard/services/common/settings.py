"""Settings: flag > environment (``POLLARD_…``) > file (TOML) > default."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from pollard.services.common.auth.callers import UNLIMITED, Limits, Role
from pollard.services.common.auth.gate import GateRules
from pollard.services.common.auth.jwts import JwtRules
from pollard.services.common.errors import StartupError, UsageFault
from pollard.services.common.http_server import HttpListen
from pollard.services.common.settings_file import SECTIONS, meant, read_tables
from pollard.services.common.tls_files import TlsFiles


def _role_of(text: str) -> tuple[str, Role]:
    name, equals, role = text.rpartition("=")
    if not (name and equals) or role not in set(Role):
        raise ValueError(
            f"certificate_role {text!r} must be NAME=ROLE with a role out of {', '.join(Role)}"
        )
    return name, Role(role)


_OTHER_VARIABLES = frozenset(
    f"POLLARD_{name}"
    for name in (
        "CACHE",
        "DATA_DIR",
        "DEBUG",
        "ENVOY_CONTROL",
        "ENVOY_SETTINGS",
        "KEY_PASSPHRASE",
        "MODELS_ADDRESS",
        "TLS_CA",
        "TLS_CERTIFICATE",
        "TLS_KEY",
        "TOKEN",
        "VISION_ADDRESS",
    )
)
"""What commands and clients read."""

_TOOLS = tuple(
    f"POLLARD_{name}" for name in ("BENCH_", "BUILD_", "GRPC_", "PROTOS", "REQUIRE_", "TEST")
)
"""How the variables begin that builds and tests of Pollard itself read."""


class ServiceSettings(BaseSettings):
    """What every service can be told. Subclasses set ``section`` and defaults."""

    section: ClassVar[str]
    """Table of the TOML file, such as ``inference``."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(0, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    http_port: int | Literal["auto", "off"] = Field(
        "auto",
        description="Port of health and metrics over HTTP: 0 takes a free one, auto the one after "
        "--port, or a free one if that is in use, off opens none.",
    )
    insecure: bool = Field(
        False,
        description="Allow an address that is not loopback though anybody may call, or though "
        "nothing is encrypted; warned about at every start.",
    )
    tls_certificate: Path | None = Field(
        None,
        description="PEM file with the certificate chain that the service shows; TLS is off "
        "without it. It is read again when it changes.",
    )
    tls_key: Path | None = Field(None, description="PEM file with the certificate's key.")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file with the authorities of clients: whoever connects must show a "
        "certificate that one of them has signed.",
    )
    tls_ca: Path | None = Field(
        None,
        description="PEM file with the authorities of the other services, which are then "
        "reached by TLS, and shown this service's certificate if they ask.",
    )
    tls_name: str = Field(
        "",
        description="Name in the certificates of the other services, when they are reached "
        "under another.",
    )
    tokens: bool = Field(
        False,
        description="Let only those in who show a token that the manager has made (pollard tokens "
        "create), and only to what its role allows.",
    )
    token_file: Path | None = Field(
        None,
        description="File with the token that this service shows to the others; its role must be "
        "server. It is read again when it changes.",
    )
    jwt_keys: str = Field(
        "",
        description="Also let in who shows a JSON Web Token signed by a key of this JWKS: a file, "
        "or an https URL that is read now and then.",
    )
    jwt_audience: str = Field(
        "", description="With --jwt-keys: audience (aud) that the tokens must have."
    )
    jwt_issuer: str = Field(
        "", description="With --jwt-keys: issuer (iss) that the tokens must have; empty for any."
    )
    jwt_role_claim: str = Field(
        "pollard_role",
        description="With --jwt-keys: claim with the role, or a list of them; dots lead into "
        "objects, as in realm_access.roles.",
    )
    certificate_role: tuple[str, ...] = Field(
        (),
        description="NAME=ROLE: who shows a certificate with this name (--tls-client-ca) has this "
        'role and needs no token; "*.example.org" and "*" stand for many. May be repeated; the '
        "first that fits decides.",
    )
    max_requests_per_second: float = Field(
        0.0,
        ge=0,
        description="Requests that one caller may send a second, where its token does not say "
        "otherwise; 0 for any number.",
    )
    max_concurrent_requests: int = Field(
        0, ge=0, description="Requests that one caller may have in flight; 0 for any number."
    )
    max_caller_streams: int = Field(
        0, ge=0, description="Streams that one caller may have open; 0 for any number."
    )
    health_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Also answer gRPC health checks, and nothing else, on this port, without TLS: "
        "for probes that cannot speak it. Off by default.",
    )
    max_message_bytes: int = Field(
        64 * 1024 * 1024,
        ge=1024,
        le=2**31 - 1,
        description="Largest gRPC message, both ways, in bytes.",
    )
    grace_seconds: float = Field(
        10.0, ge=0, description="Longest wait for requests in flight when stopping."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level of the log lines written."
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="Log lines for people or for collectors."
    )
    access_log: Literal["off", "failures", "all"] = Field(
        "failures", description="Of which calls the log has a line: none, those that fail, or all."
    )
    access_log_per_second: float = Field(
        20.0,
        gt=0,
        description="Lines of calls that are written a second at most, over five seconds; how many "
        "were left out is told.",
    )
    traces: Literal["auto", "off", "otlp"] = Field(
        "auto",
        description="Whether traces are sent over OTLP/gRPC; auto sends them if the environment "
        "names a collector (OTEL_EXPORTER_OTLP_ENDPOINT). Needs pollard-services[tracing].",
    )
    traces_endpoint: str = Field(
        "",
        description="Collector of the traces, as http://HOST:PORT or https://…; empty for that of "
        "the environment, or http://localhost:4317.",
    )
    traces_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the traces that begin here that is kept, 0 to 1: 0.01, or what "
        "OTEL_TRACES_SAMPLER says. A trace that began elsewhere is kept if it is kept there.",
    )
    traces_details: bool = Field(
        True,
        description="Whether spans name models and revisions, and say how large requests are. "
        "What was sent, and who sent it, they never say.",
    )

    @field_validator("host")
    @classmethod
    def _bare_host(cls, value: str) -> str:
        # As it stands in addresses: "[::1]".
        return value[1:-1] if value.startswith("[") and value.endswith("]") else value

    @field_validator("http_port", mode="before")
    @classmethod
    def _read_http_port(cls, value: object) -> object:
        text = str(value).strip().lower()
        if text in ("auto", "off"):
            return text
        if not text.isascii() or not text.isdigit() or int(text) > 65535:
            raise ValueError(f"{value!r} is neither a port (0 to 65535) nor auto nor off")
        return int(text)

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key are given together or not at all")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        return self

    @model_validator(mode="after")
    def _check_access(self) -> Self:
        rules = self.gate_rules
        if rules.certificates and self.tls_client_ca is None:
            raise ValueError(
                "certificate_role needs tls_client_ca, which says whose names to trust"
            )
        if rules.limits != UNLIMITED and not rules.enforced:
            raise ValueError(
                "limits of callers need callers that are known: tokens, jwt_keys or "
                "certificate_role"
            )
        return self

    @property
    def gate_rules(self) -> GateRules:
        """Whom the service lets in."""
        jwt = None
        if self.jwt_keys:
            jwt = JwtRules(self.jwt_keys, self.jwt_audience, self.jwt_issuer, self.jwt_role_claim)
        return GateRules(
            tokens=self.tokens,
            jwt=jwt,
            certificates=tuple(_role_of(text) for text in self.certificate_role),
            limits=Limits(
                requests_per_second=self.max_requests_per_second,
                concurrent_requests=self.max_concurrent_requests,
                streams=self.max_caller_streams,
            ),
        )

    @property
    def tls(self) -> TlsFiles:
        """The files of TLS."""
        return TlsFiles(
            self.tls_certificate, self.tls_key, self.tls_client_ca, self.tls_ca, self.tls_name
        )

    @property
    def http(self) -> HttpListen:
        """Where and how the HTTP port listens."""
        return HttpListen(
            host=self.host,
            port=self.http_port,
            beside=self.port,
            tls=self.tls,
            max_body_bytes=self.max_message_bytes,
        )

    def prepare_process(self) -> None:
        """Set what libraries read from the environment; called before they are imported."""

    @classmethod
    def load(cls, flags: dict[str, Any] | None = None, file: Path | None = None) -> Self:
        """Put the settings together.

        Args:
            flags: Values given on the command line; None means not given.
            file: TOML file; its table ``section`` is read.

        Raises:
            UsageFault: a flag's value is invalid.
            StartupError: another is invalid or unknown, or the file unreadable.
        """
        given = {key: value for key, value in (flags or {}).items() if value is not None}
        table = read_tables(file).get(cls.section, {}) if file is not None else {}

        class Sourced(cls):  # type: ignore[valid-type,misc]  # the sources depend on the arguments
            model_config = SettingsConfigDict(
                env_prefix=f"POLLARD_{cls.section.upper()}_", extra="forbid", frozen=True
            )

            @classmethod
            def settings_customise_sources(
                inner,  # noqa: N804 - cls is the outer class
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return init_settings, env_settings, InitSettingsSource(settings_cls, table)

        try:
            return Sourced(**given)
        except ValidationError as error:
            first = error.errors()[0]
            what, hint = first["msg"].removeprefix("Value error, "), ""
            if not first["loc"]:
                # Of several settings that do not go together, which it names.
                words = f"settings of {cls.section}: {what}"
                flagged = any(re.search(rf"\b{name}\b", what) for name in given)
                raise (UsageFault if flagged else StartupError)(words) from error
            name = str(first["loc"][0])
            where = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                what, hint = "there is no such setting", cls._alternatives(where)
            words = f"setting {cls.section}.{where}: {what}{cls._place(name, given, file)}{hint}"
            raise (UsageFault if name in given else StartupError)(words) from error
        except SettingsError as error:
            # Lists in the environment are JSON; what is no JSON gets no further than its source.
            prefix = f"POLLARD_{cls.section.upper()}_"
            raise StartupError(
                f"a setting of {cls.section} in the environment ({prefix}…) cannot be read; lists "
                f"are JSON there: {error}"
            ) from error

    @classmethod
    def _alternatives(cls, name: str) -> str:
        return meant(name, cls.model_fields) or (
            f"; settings of {cls.section} are {', '.join(sorted(cls.model_fields))}"
        )

    @classmethod
    def unknown_variables(cls) -> list[str]:
        """Return the variables of the environment that look like Pollard's and that nobody reads.

        Those of other services are left to them. Each comes with the one that may be meant.
        """
        own = f"POLLARD_{cls.section.upper()}_"
        known = {own + name.upper() for name in cls.model_fields} | _OTHER_VARIABLES
        others = [f"POLLARD_{name.upper()}_" for name in SECTIONS if name != cls.section]
        return [
            name + meant(name.upper(), known, 0.8).replace("'", "")
            for name in sorted(os.environ)
            if name.upper().startswith("POLLARD_")
            and name.upper() not in known
            and not name.upper().startswith((*others, *_TOOLS))
        ]

    @classmethod
    def _place(cls, name: str, given: dict[str, Any], file: Path | None) -> str:
        """Say where a setting that is wrong was given: whoever mends it has to find it."""
        if name in given:
            return f" (given by --{name.replace('_', '-')})"
        variable = f"POLLARD_{cls.section}_{name}".upper()
        if variable in {each.upper() for each in os.environ}:
            return f" (given by {variable} in the environment)"
        return f" (given in {file}, table [{cls.section}])" if file is not None else ""
