"""Hold the reasons that errors give against what `docs/troubleshooting.md` says of them.

    python docs/reasons.py    print the rows that the page lacks, and the names that it has too many

A reason is what travels as `google.rpc.ErrorInfo.reason`. They are found in the syntax of the
sources: whatever is given for a parameter, a field or a class attribute called `reason`. The status
is that of the error class that carries it, by the table of `pollard.services.common.status`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from pollard.services.common import status

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = ("services/src", "runtime/src", "clients/python/src")
_REASON = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")


@dataclass
class Reason:
    """One reason, and what the sources say of it."""

    name: str
    statuses: set[str] = field(default_factory=set)
    """gRPC statuses that it leaves with; empty where only the running program knows."""
    where: list[str] = field(default_factory=list)
    """Files and lines."""

    def row(self) -> str:
        """Return the row of the page, to be filled in."""
        statuses = ", ".join(sorted(self.statuses)) or "STATUS"
        return f"| `{self.name}` | {statuses} | What it means. | What to do. |"


def in_sources() -> dict[str, Reason]:
    """Return every reason that the sources can give, by name."""
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for folder in SOURCES
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    trees = {
        path: ast.parse(text)
        for path, text in texts.items()
        if "reason" in text or path.endswith("errors.py")
    }
    classes = _Classes(trees)
    places = dict(_parameters(trees))
    found: dict[str, Reason] = {}
    for path, tree in trees.items():
        for name, carrier, line in _Finder(places).run(tree):
            reason = found.setdefault(name, Reason(name))
            reason.where.append(f"{path}:{line}")
            code = classes.status(carrier)
            if code is not None:
                reason.statuses.add(code.name)
    return found


def on_page(text: str) -> dict[str, set[str]]:
    """Return the statuses that the page gives for each reason."""
    tables = re.findall(r"^\| reason \|.*\n((?:\|.*\n)+)", text, re.M)
    rows = re.findall(r"^\| `(\w+)` \| ([A-Z_, ]+) \|", "".join(tables), re.M)
    named = [name for name, _ in rows]
    twice = {name for name in named if named.count(name) > 1}
    if twice:
        raise ValueError(f"on the page twice: {', '.join(sorted(twice))}")
    return {name: set(statuses.split(", ")) for name, statuses in rows}


def _parameters(trees: Mapping[str, ast.Module]) -> Iterator[tuple[str, int]]:
    """Yield functions and dataclasses that take a `reason` by position, and which it is."""
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [argument.arg for argument in node.args.args]
                names = names[1:] if names[:1] in (["self"], ["cls"]) else names
            elif isinstance(node, ast.ClassDef) and node.decorator_list:
                names = [
                    line.target.id
                    for line in node.body
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                ]
            else:
                continue
            if "reason" in names:
                yield node.name, names.index("reason")


class _Classes:
    """The classes of errors, by name, and the status of each."""

    def __init__(self, trees: Mapping[str, ast.Module]) -> None:
        # Two distributions may have a class of the same name; then all its bases are looked at.
        self._bases: defaultdict[str, list[str]] = defaultdict(list)
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self._bases[node.name] += [_last_name(base) for base in node.bases]
        self._codes = {kind.__name__: code for kind, code in status._TABLE}

    def status(self, name: str) -> grpc.StatusCode | None:
        """Return the status of a class, or of its nearest base that has one."""
        if name in self._codes:
            return self._codes[name]
        codes = (self.status(base) for base in self._bases.get(name, ()))
        return next((code for code in codes if code is not None), None)


class _Finder(ast.NodeVisitor):
    """Finds the reasons of one file: (reason, name of the class that carries it, line)."""

    def __init__(self, places: Mapping[str, int]) -> None:
        self._places = places
        self._within = ""
        self._found: list[tuple[str, str, int]] = []

    def run(self, tree: ast.Module) -> list[tuple[str, str, int]]:
        self.visit(tree)
        return self._found

    def _take(self, value: ast.expr | None, carrier: str) -> None:
        for node in ast.walk(value) if value is not None else ():
            text = getattr(node, "value", None)
            if isinstance(node, ast.Constant) and _REASON.fullmatch(str(text)):
                self._found.append((str(text), carrier, node.lineno))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._within = self._within, node.name
        self.generic_visit(node)
        self._within = outer

    def visit_Call(self, node: ast.Call) -> None:
        called = _last_name(node.func)
        carrier = self._within if called == "__init__" else called
        for keyword in node.keywords:
            if keyword.arg == "reason":
                self._take(keyword.value, carrier)
        place = self._places.get(called)
        if place is not None and place < len(node.args):
            self._take(node.args[place], carrier)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        both = (*node.args.posonlyargs, *node.args.args)
        defaults = [*zip(both[::-1], node.args.defaults[::-1], strict=False)]
        for argument, default in (
            *defaults,
            *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
        ):
            if argument.arg == "reason":
                self._take(default, self._within)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            if any(isinstance(each, ast.Name) and each.id == "reason" for each in targets):
                self._take(node.value, self._within)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name) and node.target.id == "reason":
            self._take(node.value, self._within)
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "reason":
                self._take(value, "")
        self.generic_visit(node)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def main() -> int:
    """Print what differs; return the exit code."""
    known = on_page(PAGE.read_text() if PAGE.exists() else "")
    there = in_sources()
    for name in sorted(there.keys() - known.keys()):
        print(there[name].row(), "  <-", ", ".join(there[name].where[:3]))
    for name in sorted(known.keys() - there.keys()):
        print(f"{name} is on the page, and nothing in the sources gives it.")
    return int(there.keys() != known.keys())


if __name__ == "__main__":
    sys.exit(main())
