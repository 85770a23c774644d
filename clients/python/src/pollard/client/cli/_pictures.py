"""Where the pictures of `pollard predict --draw` go."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from pollard.client.cli._common import fail
from pollard.client.types import Explanation, Prediction

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Pictures:
    """Writes a picture for each answer."""

    def __init__(self, target: Path, images: Sequence[Path]) -> None:
        """Check that pictures can be made, before anything is asked.

        Args:
            target: A file for one image, a directory for several.
            images: What will be asked about.

        Raises:
            typer.BadParameter: a file was named for several images, or its name says no format.
            typer.Exit: Pillow is not installed.
        """
        try:
            from pollard.client.drawing import draw
        except ImportError:
            fail("--draw needs Pillow; pip install 'pollard-client[draw]'")
            raise typer.Exit(2) from None
        self._draw = draw
        self._target = target
        self._one = len(images) == 1 and not target.is_dir()
        if self._one and target.suffix.lower() not in _SUFFIXES:
            raise typer.BadParameter(
                f"{target}: the name of a picture ends in {', '.join(_SUFFIXES)}",
                param_hint="--draw",
            )
        if not self._one and target.suffix.lower() in _SUFFIXES:
            raise typer.BadParameter(
                f"{target}: several images are painted into a directory, not into a file",
                param_hint="--draw",
            )
        self.written: list[Path] = []
        self.failed = 0

    def add(
        self, image: Path, prediction: Prediction, explanation: Explanation | None = None
    ) -> Path | None:
        """Paint one answer; return the file, or None after saying why there is none."""
        source = image if explanation is None else explanation.overlay_png
        path = self._target if self._one else self._free(f"{image.stem}.png")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._draw(source, prediction).save(path)
        except (OSError, ValueError) as error:
            fail(f"{path}: the picture could not be written: {error}")
            self.failed += 1
            return None
        self.written.append(path)
        return path

    def tell(self) -> None:
        """Say where the pictures are."""
        for path in self.written[:5]:
            print(f"drawn: {path}", file=sys.stderr)
        if len(self.written) > 5:
            print(f"drawn: {len(self.written) - 5} more in {self._target}", file=sys.stderr)

    def _free(self, name: str) -> Path:
        """Return a path in the directory that no other image of this command was painted to."""
        path = self._target / name
        number = 2
        while path in self.written:
            path = self._target / f"{Path(name).stem}-{number}.png"
            number += 1
        return path
