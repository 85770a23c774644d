"""Settings: flag > environment (``POLLARD_…``) > file (TOML) > default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from pollard.services.common.errors import StartupError


class ServiceSettings(BaseSettings):
    """What every service can be told. Subclasses set ``section`` and defaults."""

    section: ClassVar[str]
    """Table of the TOML file, such as ``inference``."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(0, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    insecure: bool = Field(
        False, description="Allow an address that is not loopback without TLS and a token."
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

    def prepare_process(self) -> None:
        """Set what libraries read from the environment; called before they are imported."""

    @classmethod
    def load(cls, flags: dict[str, Any] | None = None, file: Path | None = None) -> Self:
        """Put the settings together.

        Args:
            flags: Values given on the command line; None means not given.
            file: TOML file; its table ``section`` is read.

        Raises:
            StartupError: a value is invalid or unknown, or the file unreadable.
        """
        given = {key: value for key, value in (flags or {}).items() if value is not None}
        if file is not None and not file.is_file():
            raise StartupError(f"there is no settings file {file}")

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
                sources = [init_settings, env_settings]
                if file is not None:
                    table = TomlConfigSettingsSource(settings_cls, file)().get(cls.section, {})
                    sources.append(InitSettingsSource(settings_cls, table))
                return tuple(sources)

        try:
            return Sourced(**given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or cls.section
            hint = ""
            if first["type"] == "extra_forbidden":
                known = ", ".join(sorted(cls.model_fields))
                hint = f"; settings of {cls.section} are {known}"
            raise StartupError(f"setting {cls.section}.{where}: {first['msg']}{hint}") from error
        except (OSError, ValueError) as error:
            raise StartupError(f"settings file {file} cannot be read: {error}") from error
