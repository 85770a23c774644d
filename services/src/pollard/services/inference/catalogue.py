"""What the protocol needs to know of the models beyond the engine: which there are, and control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

LoadParameter = bool | int | str | bytes
"""Value of a parameter of a load or an unload."""


@dataclass(frozen=True)
class IndexEntry:
    """One version of a model and its state."""

    model: str
    version: str
    """Empty if none is known."""
    state: str
    """READY, LOADING, UNLOADING or UNAVAILABLE."""
    reason: str = ""
    """Why it is not READY."""


class Catalogue(Protocol):
    """Where the models come from."""

    @property
    def ready(self) -> bool:
        """Whether all that the server was told to run was loaded or refused."""

    def index(self) -> list[IndexEntry]:
        """Return the state of every version that is known."""

    async def load_model(self, model: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Load a model, or load it again; what is loaded serves on until it is replaced.

        Raises:
            ControlDisabled: models are not loaded by request here.
            PollFailed: there is no such model, or its configuration cannot be read.
            RequestInvalid: a parameter is unknown or wrong, or the model does not load.
        """

    async def unload_model(self, model: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Unload a model; an unknown one is no error.

        Raises:
            ControlDisabled: models are not unloaded by request here.
            RequestInvalid: a parameter is unknown or wrong.
        """
