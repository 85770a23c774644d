"""Write the reference pages (`docs/reference/`) from the code and the contracts, or check them.

    python docs/generate.py            write what is not current
    python docs/generate.py --check    write nothing; 1, with a diff, if a page is not current

- commands.md: every command and option, from the command itself
- settings.md: every setting of the services, from the settings classes
- roles.md: who may call which method, from the table that the services ask
- protocol.md: every service, method, message and enum, from the comments of the contracts

Run in an environment that has all five distributions and `buf` (`make reference` does).
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

from pollard.client.cli._main import build_app
from pollard.services.common.auth import ACCESS
from pollard.services.common.settings import ServiceSettings
from pollard.services.inference.settings import InferenceSettings
from pollard.services.models.settings import ModelsSettings
from pollard.services.preprocess.settings import PreprocessSettings
from pollard.services.up.serve import service_app

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "docs" / "reference"
NOTE = "<!-- Written by `make reference`; changes belong into {origin}. -->\n\n"
WIDTH = 100
"""Columns that the help texts are set for, whatever terminal this runs in."""


def main() -> int:
    """Write or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if a page is not current")
    check = parser.parse_args().check
    stale = False
    for name, page in pages().items():
        path = OUTPUT / name
        old = path.read_text() if path.exists() else ""
        if old == page:
            continue
        stale = True
        if check:
            diff = difflib.unified_diff(old.splitlines(), page.splitlines(), name, "fresh", n=1)
            print("\n".join(diff))
        else:
            OUTPUT.mkdir(exist_ok=True)
            path.write_text(page)
            print(f"wrote {path.relative_to(ROOT)}")
    if check and stale:
        print("The reference is not current; run `make reference` and commit the result.")
    return int(check and stale)


def pages() -> dict[str, str]:
    """Return every page by its file name."""
    return {
        "commands.md": NOTE.format(origin="the commands' help texts") + commands(),
        "settings.md": NOTE.format(origin="the settings classes") + settings(),
        "roles.md": NOTE.format(origin="services/.../common/auth/roles.py") + roles(),
        "protocol.md": NOTE.format(origin="the comments in protos/") + protocol(),
    }


# Commands


def commands() -> str:
    """Return the page about the commands."""
    os.environ["COLUMNS"] = str(WIDTH)
    command: Any = typer.main.get_command(build_app())
    services = command.commands["serve"].commands
    for service in services:  # Only when it runs does each of them read what it can be told.
        services[service] = typer.main.get_command(service_app(service))
        services[service].name = service
    context = typer.Context(command, info_name="pollard")
    text = get_docs_for_click(obj=command, ctx=context, name="pollard")
    # The lists of commands cut their summaries after 45 characters; here is room for a sentence.
    sections = re.split(r"^(?=#+ `)", text, flags=re.M)
    filled = [_with_whole_summaries(section, command) for section in sections]
    return "# Commands\n\n" + re.sub(r"^#", "##", "".join(filled), flags=re.M).strip() + "\n"


def _with_whole_summaries(section: str, command: Any) -> str:
    title = re.match(r"#+ `pollard ?(.*)`", section)
    for name in title[1].split() if title else ():
        command = command.commands[name]
    for name, child in getattr(command, "commands", {}).items():
        summary = " ".join((child.help or "").strip().partition("\n\n")[0].split())
        line = f"* `{name}`: {summary}"
        section = re.sub(
            rf"^\* `{re.escape(name)}`: .*$", lambda _, to=line: to, section, flags=re.M
        )
    return section


# Settings


def settings() -> str:
    """Return the page about the settings of the services."""
    lines = [
        "# Settings",
        "",
        "Each is given by a flag of the command, a variable of the environment, or a line in the "
        "table of the service in a TOML file (`--config`); the first of these that is given "
        "counts. `--print-config` shows what is in force. Other tables and keys in the file are an "
        "error, which says what may be meant; of variables that begin so and that nobody reads the "
        "log warns at the start, since they may be another program's.",
    ]
    common = ServiceSettings.model_fields
    services = (InferenceSettings, PreprocessSettings, ModelsSettings)
    lines += ["", "## All services", "", "Variables begin with the service's own prefix."]
    lines += _settings_table({n: f for n, f in common.items() if n != "port"}, "POLLARD_…_")
    for service in services:
        own = {
            name: field
            for name, field in service.model_fields.items()
            if name == "port" or name not in common
        }
        lines += ["", f"## `pollard serve {service.section}`", "", f"Table `[{service.section}]`."]
        lines += _settings_table(own, f"POLLARD_{service.section.upper()}_")
    return "\n".join(lines) + "\n"


def _settings_table(fields: dict[str, FieldInfo], prefix: str) -> list[str]:
    rows = ["", "| setting | value | default | |", "|---|---|---|---|"]
    for name, field in fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(
            f"| `{name}`<br>`{prefix}{name.upper()}` | {_kind(field.annotation)} "
            f"| {_default(field)} | {meaning} |"
        )
    return rows


def _kind(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        return " or ".join(_kind(kind) for kind in kinds)
    if origin is tuple:
        return f"list of {_kind(get_args(annotation)[0])}"
    names = {
        "str": "text",
        "int": "number",
        "float": "number",
        "bool": "`true`, `false`",
        "Path": "path",
        "SecretStr": "text, kept secret",
    }
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value in ("", ()):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int) and value >= 1024 * 1024 and value % (1024 * 1024) == 0:
        return f"`{value}` ({value // (1024 * 1024)} MiB)"
    return f"`{value}`" if isinstance(value, str | int | float | PurePath) else f"`{value!r}`"


# Roles


def roles() -> str:
    """Return the page about who may call what."""
    lines = [
        "# Roles",
        "",
        "Where callers must be known ([security](../security.md)), each method needs a role. "
        "viewer, predictor, publisher and admin each may do what those before them may; server is "
        "what Pollard's services are to each other. A method that is not here, nobody may call.",
    ]
    service = ""
    for path, access in ACCESS.items():
        _, of, method = path.split("/")
        if of != service:
            service = of
            lines += ["", f"## {service}", "", "| method | who |", "|---|---|"]
        lines.append(f"| `{method}` | {access.words} |")
    return "\n".join(lines) + "\n"


# Protocol

_SERVICE, _MESSAGE, _ENUM = 6, 4, 5  # fields of FileDescriptorProto
_METHOD, _FIELD, _VALUE, _NESTED, _NESTED_ENUM = 2, 2, 2, 3, 4  # fields below these
_KINDS = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in FieldDescriptorProto.Type.items()
    if name not in ("TYPE_MESSAGE", "TYPE_ENUM", "TYPE_GROUP")
}


def protocol() -> str:
    """Return the page about the contracts."""
    with tempfile.TemporaryDirectory(prefix="pollard-docs-") as folder:
        image = Path(folder) / "contracts.binpb"
        # buf lies beside this environment's Python, which need not be on the PATH.
        buf = Path(sys.executable).parent / "buf"
        subprocess.run([buf, "build", "-o", image], cwd=ROOT, check=True)
        files = FileDescriptorSet.FromString(image.read_bytes()).file
    ours = [file for file in files if file.package.partition(".")[0] in ("inference", "pollard")]
    ours.sort(key=lambda file: (not file.package.startswith("pollard"), file.name))
    lines = ["# Protocol", "", "The contracts lie in [`protos/`](../../protos)."]
    for file in ours:
        lines += [f"- [`{file.name}`](#{_anchor(file.name)})"]
    lines.insert(3, "")
    for file in ours:
        lines += _File(file).page()
    return "\n".join(lines) + "\n"


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


class _File:
    """One contract, with the comments of its parts by their path in the descriptor."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = {
            tuple(location.path): location.leading_comments or location.trailing_comments
            for location in file.source_code_info.location
        }

    def page(self) -> list[str]:
        """Return the lines about this contract."""
        lines = ["", f"## {self._file.name}", "", f"Package `{self._file.package}`."]
        for index, service in enumerate(self._file.service):
            lines += self._service(service, (_SERVICE, index))
        for index, message in enumerate(self._file.message_type):
            lines += self._message(message, (_MESSAGE, index), "")
        for index, enum in enumerate(self._file.enum_type):
            lines += self._enum(enum, (_ENUM, index), "")
        return lines

    def _service(self, service: ServiceDescriptorProto, path: tuple[int, ...]) -> list[str]:
        lines = ["", f"### service {service.name}", *self._text(path)]
        for index, method in enumerate(service.method):
            request = ("stream " if method.client_streaming else "") + _short(method.input_type)
            answer = ("stream " if method.server_streaming else "") + _short(method.output_type)
            lines += ["", f"#### {service.name}.{method.name}", "", f"`{request}` → `{answer}`"]
            lines += self._text((*path, _METHOD, index))
        return lines

    def _message(self, message: DescriptorProto, path: tuple[int, ...], outer: str) -> list[str]:
        name = f"{outer}{message.name}"
        maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        lines = ["", f"### {name}", *self._text(path)]
        if message.field:
            lines += ["", "| field | | |", "|---|---|---|"]
        for index, field in enumerate(message.field):
            text = " ".join(self._text((*path, _FIELD, index))).strip().replace("|", "\\|")
            kind, choice = _type(field, maps), ""
            if field.HasField("oneof_index") and not field.proto3_optional:
                choice = f"One of `{message.oneof_decl[field.oneof_index].name}`. "
            lines.append(f"| `{field.name}` = {field.number} | {kind} | {choice}{text} |")
        for index, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                lines += self._message(nested, (*path, _NESTED, index), f"{name}.")
        for index, enum in enumerate(message.enum_type):
            lines += self._enum(enum, (*path, _NESTED_ENUM, index), f"{name}.")
        return lines

    def _enum(self, enum: EnumDescriptorProto, path: tuple[int, ...], outer: str) -> list[str]:
        lines = ["", f"### enum {outer}{enum.name}", *self._text(path)]
        lines += ["", "| value | | |", "|---|---|---|"]
        for index, value in enumerate(enum.value):
            text = " ".join(self._text((*path, _VALUE, index))).strip().replace("|", "\\|")
            lines.append(f"| `{value.name}` | {value.number} | {text} |")
        return lines

    def _text(self, path: tuple[int, ...]) -> list[str]:
        """Return the comment of a part, with an empty line before it; nothing if there is none."""
        comment = self._comments.get(path, "")
        # The Open Inference Protocol's own comments are marked up for another tool.
        lines = [re.sub(r"^ ?(@@ ?)?", "", line).rstrip() for line in comment.splitlines()]
        lines = [re.sub(r"^\.\. cpp:\w+:: *", "", line) for line in lines]
        text = "\n".join(lines).strip()
        # A leading `<` or a lone `[name]` must stay text in Markdown.
        return ["", *text.replace("<", "&lt;").splitlines()] if text else []


def _short(name: str) -> str:
    """Name a type without the package, but keep what tells Google's own types apart."""
    name = name.removeprefix(".")
    if name.startswith("google."):
        return name
    return ".".join(part for part in name.split(".") if part[:1].isupper())


def _type(field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
    kind = _KINDS.get(field.type) or _short(field.type_name)
    entry = maps.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        return f"map of `{_type(entry.field[0], {})}` to `{_type(entry.field[1], {})}`".replace(
            "``", "`"
        )
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated `{kind}`"
    return f"optional `{kind}`" if field.proto3_optional else f"`{kind}`"


if __name__ == "__main__":
    sys.exit(main())
