"""From views to HTML: the templates, whole pages, and the parts of a page that change live."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pollard.services.models.web import words
from pollard.services.models.web.asking import Visitor
from pollard.services.models.web.views import View

_HERE = Path(__file__).parent

TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

LIVE = "live_"
"""How the names of the blocks begin that are sent again when they change."""


class Assets:
    """The files beside the pages, in memory, each under the digest of its content."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, str], tuple[bytes, str]] = {}
        self._paths: dict[str, str] = {}
        for file in sorted((_HERE / "assets").iterdir()):
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:16]
            self._files[digest, file.name] = (content, TYPES[file.suffix])
            self._paths[file.name] = f"/assets/{digest}/{file.name}"
        joined = "".join(sorted(self._paths.values()))
        self.version = hashlib.sha256(joined.encode()).hexdigest()[:16]
        """Changes with any of them."""

    def path(self, name: str) -> str:
        """Return where a file is found."""
        return self._paths[name]

    def find(self, digest: str, name: str) -> tuple[bytes, str] | None:
        """Return content and type of a file; None where there is none."""
        return self._files.get((digest, name))


class Renderer:
    """Writes pages. Everything that is not a template is escaped."""

    def __init__(self, assets: Assets) -> None:
        self.assets = assets
        self._environment = Environment(
            loader=FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.filters.update(words.FILTERS)
        self._environment.globals.update(asset=assets.path, version=assets.version)

    def page(self, view: View, visitor: Visitor, **more: Any) -> str:
        """Return a whole page."""
        template = self._environment.get_template(view.template)
        return template.render(self._told(view, visitor) | more)

    def live(self, view: View, visitor: Visitor) -> Iterator[tuple[str, str]]:
        """Yield the live parts of a page, each with the id of its element."""
        template = self._environment.get_template(view.template)
        context = template.new_context(self._told(view, visitor))
        for name, block in template.blocks.items():
            if name.startswith(LIVE):
                yield name.replace("_", "-"), "".join(block(context))

    def part(self, template: str, block: str, visitor: Visitor, **content: Any) -> Markup:
        """Return one block of a template."""
        loaded = self._environment.get_template(template)
        told = {"visitor": visitor, "parts": self._parts(visitor), **content}
        context = loaded.new_context(told)
        return Markup("".join(loaded.blocks[block](context)))  # noqa: S704 - the template escapes

    def _parts(self, visitor: Visitor) -> Any:
        """Return the macros that all templates share, for one visitor."""
        return self._environment.get_template("parts.html").make_module({"visitor": visitor})

    def _told(self, view: View, visitor: Visitor) -> dict[str, Any]:
        return {
            "title": view.title,
            "place": view.place,
            "visitor": visitor,
            "parts": self._parts(visitor),
            "theme": "",
            "path": view.path,
            "said": "",
            **view.content,
        }
