"""Filters and orders of lists: a subset of AIP-160, turned into conditions of SQL.

Comparisons joined by ``AND``: ``field = value``, ``labels.key = value``, and
``labels:key`` or ``labels.key:*`` for having a label. What else AIP-160 knows is
refused rather than guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, exists, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import InvalidRequest
from pollard.services.models import names
from pollard.services.models.schema import Model, Revision

MAX_FILTER_CHARACTERS = 4096
_MAX_TERMS = 32

Condition = ColumnElement[bool]
_Field = Callable[[str], Condition]

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<operator>[<>!]=|[=:<>])
      | (?P<dot>\.)
      | (?P<word>[^\s"'()=<>!:.,]+)
      | (?P<other>\S)
    )""",
    re.VERBOSE | re.DOTALL,
)


class _Pairs(GenericFunction[Any]):
    """The keys and values of a JSON object as rows."""

    name = "json_each"
    inherit_cache = True


@compiles(_Pairs, "postgresql")
def _pairs_on_postgresql(element: _Pairs, compiler: SQLCompiler, **how: Any) -> str:
    return f"json_each_text({compiler.process(element.clauses, **how)})"


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    """As it means: without quotes."""
    start: int
    """Where it begins in the filter."""
    end: int


def model_conditions(text: str) -> list[Condition]:
    """Return the conditions of a filter of models: over ``name`` and ``labels``.

    Raises:
        InvalidRequest: it cannot be parsed, or uses what is not offered.
    """
    return _conditions(text, Model.labels, {"name": lambda value: Model.name == _model_id(value)})


def revision_conditions(text: str) -> list[Condition]:
    """Return the conditions of a filter of revisions: over ``state``, ``creator``,
    ``bundle_sha256`` and ``labels``.

    Raises:
        InvalidRequest: it cannot be parsed, or uses what is not offered.
    """
    return _conditions(
        text,
        Revision.labels,
        {
            "state": lambda value: Revision.state == _state(value),
            "creator": lambda value: Revision.creator == value,
            "bundle_sha256": lambda value: (
                Revision.bundle_sha256 == names.check_sha256(value, "filter: bundle_sha256")
            ),
        },
    )


def parse_order(
    text: str, columns: Mapping[str, InstrumentedAttribute[Any]], default: str
) -> tuple[str, bool]:
    """Return the field to order by, and whether downwards.

    Raises:
        InvalidRequest: it is not one of the fields, with or without a direction.
    """
    words = (text.strip() or default).split()
    field, direction = words[0], " ".join(words[1:])
    if field not in columns or direction not in ("", "asc", "desc"):
        *most, last = columns
        raise InvalidRequest(
            f"order_by {text[:80]!r} is not {', '.join(most)} or {last}, with or without desc",
            reason="ORDER_INVALID",
            order_by=text[:200],
        )
    return field, direction == "desc"


def _model_id(value: str) -> str:
    return names.parse_model(value, "filter: name") if "/" in value else value


def _state(value: str) -> int:
    name = value if value.startswith("STATE_") else f"STATE_{value}"
    if name not in pb.Revision.State.keys() or name == "STATE_UNSPECIFIED":  # noqa: SIM118 - an enum of protobuf is not a mapping
        known = [key for key in pb.Revision.State.keys() if key != "STATE_UNSPECIFIED"]  # noqa: SIM118 - as above
        raise _invalid(f"state {value[:80]!r} is not one of {', '.join(known)}", value)
    return pb.Revision.State.Value(name)


def _invalid(why: str, text: str) -> InvalidRequest:
    return InvalidRequest(f"filter: {why}", reason="FILTER_INVALID", filter=text[:200])


def _conditions(
    text: str, labels: InstrumentedAttribute[dict[str, str]], fields: Mapping[str, _Field]
) -> list[Condition]:
    if len(text) > MAX_FILTER_CHARACTERS:
        raise _invalid(f"longer than {MAX_FILTER_CHARACTERS} characters", text)
    return _Parser(text, labels, fields).parse()


class _Parser:
    """Reads a filter from left to right."""

    def __init__(
        self,
        text: str,
        labels: InstrumentedAttribute[dict[str, str]],
        fields: Mapping[str, _Field],
    ) -> None:
        self._text = text
        self._labels = labels
        self._fields = fields
        self._tokens = [_token(match) for match in _TOKEN.finditer(text.rstrip())]
        self._next = 0

    def parse(self) -> list[Condition]:
        found: list[Condition] = []
        while self._peek() is not None:
            if found:
                self._expect_and()
            found.append(self._comparison())
            if len(found) > _MAX_TERMS:
                raise _invalid(f"more than {_MAX_TERMS} comparisons", self._text)
        return found

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _refuse(self, wanted: str) -> InvalidRequest:
        token = self._peek()
        if token is None:
            where = "the end"
        else:
            where = f"{self._text[token.start : token.end][:40]!r} at character {token.start + 1}"
        return _invalid(
            f"{where}, where {wanted} should be. Offered are comparisons with '=', labels:KEY for "
            f"having a label, and AND; fields are {', '.join(self._fields)} and labels.KEY",
            self._text,
        )

    def _expect_and(self) -> None:
        token = self._peek()
        if token is None or token.kind != "word" or token.text != "AND":
            raise self._refuse("AND")
        self._next += 1

    def _path(self, wanted: str) -> list[_Token]:
        """Take words and texts with dots between them and no blanks."""
        path: list[_Token] = []
        while True:
            token = self._peek()
            attached = not path or token is None or token.start == self._tokens[self._next - 1].end
            if token is None or token.kind not in ("word", "text") or not attached:
                raise self._refuse(wanted)
            path.append(token)
            self._next += 1
            dot = self._peek()
            if dot is None or dot.kind != "dot" or dot.start != token.end:
                return path
            self._next += 1

    def _comparison(self) -> Condition:
        first = self._peek()
        if first is not None and first.text in ("NOT", "OR", "AND") and first.kind == "word":
            raise self._refuse("a field")
        begin = self._next
        path = self._path("a field")
        key = ".".join(token.text for token in path[1:])
        is_label = path[0].text == "labels"
        if not is_label and (key or path[0].text not in self._fields):
            self._next = begin
            raise self._refuse("a field")
        operator = self._peek()
        if operator is None or operator.text not in ("=", ":") or operator.kind != "operator":
            raise self._refuse("'=' or ':'")
        has = operator.text == ":"
        if (has and not is_label) or (not has and is_label and not key):
            raise self._refuse("'='" if has else "':' and a key")
        self._next += 1
        begin = self._next
        value = self._path("a value")
        text = ".".join(token.text for token in value)
        star = len(value) == 1 and value[0].kind == "word" and text == "*"
        if has and key and not star:
            self._next = begin
            raise self._refuse("'*'")
        if star and not (has and key):
            self._next = begin
            raise self._refuse("a value")
        if not is_label:
            return self._fields[path[0].text](text)
        return _has_label(self._labels, key or text, None if has else text)


def _token(match: re.Match[str]) -> _Token:
    kind = match.lastgroup or "other"
    text = match.group(kind)
    if kind == "text":
        text = re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)
    return _Token(kind, text, match.start(kind), match.end(kind))


def _has_label(
    labels: InstrumentedAttribute[dict[str, str]], key: str, value: str | None
) -> Condition:
    # A path into JSON could not hold every key, such as one with a quote.
    each = _Pairs(labels).table_valued("key", "value", name="label")
    query = select(1).select_from(each).where(each.c.key == key)
    if value is not None:
        query = query.where(each.c.value == value)
    return exists(query)
