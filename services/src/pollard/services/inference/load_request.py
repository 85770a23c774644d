"""What a RepositoryModelLoad request may bring: a configuration, and the files of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pollard.services.inference.catalogue import LoadParameter
from pollard.services.inference.errors import RequestInvalid


def read_parameters(
    model: str, parameters: Mapping[str, LoadParameter]
) -> tuple[str | None, dict[str, bytes]]:
    """Return the configuration and the files that a load request brings.

    Raises:
        RequestInvalid: a parameter is unknown or wrong.
    """
    config: str | None = None
    files: dict[str, bytes] = {}
    for name, value in parameters.items():
        if name == "config":
            if not isinstance(value, str):
                raise RequestInvalid("'config' must be a string of JSON", parameter=name)
            config = value
        elif name.startswith("file:"):
            path = PurePosixPath(name.removeprefix("file:"))
            if not isinstance(value, bytes):
                raise RequestInvalid(f"'{name}' must be the bytes of a file", parameter=name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in str(path):
                raise RequestInvalid(
                    f"'{name}' must be a path within the model's folder, such as "
                    "'file:1/model.onnx'",
                    parameter=name,
                )
            files[str(path)] = value
        else:
            raise RequestInvalid(f"unrecognized parameter '{name}' in load", parameter=name)
    if files and config is None:
        raise RequestInvalid(
            f"override model directory of '{model}' requires also the parameter 'config'",
            model=model,
        )
    return config, files


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a request into an empty folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
