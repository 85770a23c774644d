"""A look through an ONNX file before anything parses it.

Walks protobuf's wire format over the mapped file and touches only what it needs:
weights are skipped, so a look at a large model takes milliseconds and no memory.
It finds what a graph may use to hurt whoever loads it: files outside the bundle,
lengths that are not true, deep nesting, and more nodes or dimensions than any
network has.
"""

from __future__ import annotations

import mmap
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pollard.runtime.bundle import is_safe_path
from pollard.runtime.errors import ModelLoadFailed

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Messages by name: which fields hold which messages. Field numbers are those of onnx.proto.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute", 9: "opset"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "opset": {},
    "entry": {},
}

_BITS = {2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 1: 32}
"""Bits of an element by ``TensorProto.DataType``, where raw data is a plain array of them."""


@dataclass(frozen=True)
class ScanLimits:
    """What a graph may hold."""

    max_nodes: int = 200_000
    """Most nodes, those of functions and branches included."""
    max_depth: int = 64
    """Deepest nesting of messages; a branch within a branch takes three."""
    max_weight_bytes: int = 16 * 1024**3
    """Largest sum of what the weights say that they take."""


@dataclass
class Graph:
    """What a look found."""

    opsets: dict[str, int] = field(default_factory=dict)
    """Version by domain; the domain of ONNX itself is empty."""
    nodes: int = 0
    tensors: int = 0
    weight_bytes: int = 0
    """What the weights take by their own dimensions."""
    external: list[tuple[str, int, int]] = field(default_factory=list)
    """Location, offset and length (-1: to the end) of data in other files."""


def scan_graph(path: Path, limits: ScanLimits | None = None) -> Graph:
    """Look through an ONNX file.

    Raises:
        ModelLoadFailed: it is not one, is cut off, nested too deep, too large,
            or says something of its weights that is not true.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ModelLoadFailed("the model file is empty", path=path.name) from None
        with data:
            return _Scan(data, limits or ScanLimits()).run()


def check_external(graph: Graph, model_file: str, sizes: dict[str, int]) -> None:
    """Check that data in other files is the bundle's own.

    Args:
        graph: What the look found.
        model_file: Path of the model within the bundle.
        sizes: Size of every file of the bundle by its path.

    Raises:
        ModelLoadFailed: a path leaves the bundle, or a range is not in the file.
    """
    folder = posixpath.dirname(model_file)
    for location, offset, length in graph.external:
        name = posixpath.join(folder, location)
        if not is_safe_path(location) or name not in sizes:
            raise ModelLoadFailed(
                f"the graph keeps weights in {location[:200]!r}, which is not a file of the "
                "bundle; a model may only read files that the manifest lists, below its own folder",
                location=location[:200],
            )
        end = offset + max(length, 0)
        if offset < 0 or length < -1 or end > sizes[name]:
            raise ModelLoadFailed(
                f"the graph reads {name} up to byte {end}, and it has {sizes[name]}", location=name
            )


def check_opset(graph: Graph, declared: int) -> None:
    """Check the opset of ONNX's own operators.

    Raises:
        ModelLoadFailed: there is none, or it is not what the manifest declares
            (0 for nothing).
    """
    own = graph.opsets.get("", graph.opsets.get("ai.onnx", 0))
    if not own:
        raise ModelLoadFailed("the model names no opset of ONNX's own operators")
    if declared and declared != own:
        raise ModelLoadFailed(
            f"the manifest says opset {declared}, and the model uses {own}", opset=own
        )


class _Scan:
    def __init__(self, data: mmap.mmap, limits: ScanLimits) -> None:
        self._data = data
        self._limits = limits
        self._found = Graph()

    def run(self) -> Graph:
        # An own stack: nesting must not exhaust Python's.
        stack = [("model", 0, len(self._data), 0)]
        graphs = 0
        while stack:
            kind, start, end, depth = stack.pop()
            if depth > self._limits.max_depth:
                raise ModelLoadFailed(
                    f"the graph is nested more than {self._limits.max_depth} deep",
                    limit=self._limits.max_depth,
                )
            graphs += kind == "graph"
            self._count(kind)
            if kind == "tensor":
                self._tensor(start, end)
            elif kind == "opset":
                self._opset(start, end)
            inside = _INSIDE[kind]
            for number, wire, first, last in self._fields(start, end):
                if wire == _BYTES and number in inside and inside[number] != "entry":
                    stack.append((inside[number], first, last, depth + 1))
        if not graphs:
            raise ModelLoadFailed("the file holds no graph, so it is not an ONNX model")
        return self._found

    def _count(self, kind: str) -> None:
        if kind == "node":
            self._found.nodes += 1
            if self._found.nodes > self._limits.max_nodes:
                raise ModelLoadFailed(
                    f"the graph has more than {self._limits.max_nodes} nodes",
                    limit=self._limits.max_nodes,
                )

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield number, wire type, and where the value begins and ends (or value, 0)."""
        position = start
        while position < end:
            tag, position = self._varint(position, end)
            number, wire = tag >> 3, tag & 7
            if wire == _VARINT:
                value, position = self._varint(position, end)
                yield number, wire, value, 0
                continue
            if wire == _BYTES:
                size, position = self._varint(position, end)
            elif wire in (_FIXED64, _FIXED32):
                size = 8 if wire == _FIXED64 else 4
            else:
                raise ModelLoadFailed(
                    f"the file is not an ONNX model: a wire type {wire} at byte {position}"
                )
            if size > end - position:
                raise ModelLoadFailed(
                    f"the file is cut off or damaged: at byte {position} it promises {size} bytes "
                    f"and {end - position} are there",
                    position=position,
                )
            yield number, wire, position, position + size
            position += size

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if position >= end:
                break
            byte = self._data[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (2**64 - 1), position
        raise ModelLoadFailed(
            f"the file is cut off or damaged: no number ends at byte {position}", position=position
        )

    def _opset(self, start: int, end: int) -> None:
        domain, version = "", 0
        for number, wire, first, last in self._fields(start, end):
            if number == 1 and wire == _BYTES:
                domain = self._text(first, last)
            elif number == 2 and wire == _VARINT:
                version = first
        self._found.opsets[domain] = max(version, self._found.opsets.get(domain, 0))

    def _tensor(self, start: int, end: int) -> None:
        elements, data_type, raw, name, entries = 1, 0, -1, "", {}
        for number, wire, first, last in self._fields(start, end):
            if number == 1:
                for size in [first] if wire == _VARINT else self._packed(first, last):
                    elements *= size
                    if size >= 2**63 or elements > 2**48:
                        raise ModelLoadFailed("a weight declares impossible dimensions", size=size)
            elif number == 2 and wire == _VARINT:
                data_type = first
            elif number == 8 and wire == _BYTES:
                name = self._text(first, last)
            elif number == 9 and wire == _BYTES:
                raw = last - first
            elif number == 13 and wire == _BYTES:
                key, value = self._entry(first, last)
                entries[key] = value
        size = elements * _BITS.get(data_type, 0) // 8
        self._found.tensors += 1
        self._found.weight_bytes += size
        if self._found.weight_bytes > self._limits.max_weight_bytes:
            raise ModelLoadFailed(
                f"the weights say that they take more than {self._limits.max_weight_bytes} bytes",
                limit=self._limits.max_weight_bytes,
            )
        if raw >= 0 and data_type in _BITS and raw != size:
            raise ModelLoadFailed(
                f"the weight {name[:100]!r} declares {size} bytes and holds {raw}",
                weight=name[:100],
            )
        if entries:
            self._external(name, entries)

    def _external(self, name: str, entries: dict[str, str]) -> None:
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
        except ValueError:
            raise ModelLoadFailed(
                f"the weight {name[:100]!r} names no range of its file", weight=name[:100]
            ) from None
        self._found.external.append((entries.get("location", ""), offset, length))

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        texts: dict[int, Any] = {1: "", 2: ""}
        for number, wire, first, last in self._fields(start, end):
            if wire == _BYTES and number in texts:
                texts[number] = self._text(first, last)
        return texts[1], texts[2]

    def _packed(self, start: int, end: int) -> Iterator[int]:
        while start < end:
            value, start = self._varint(start, end)
            yield value

    def _text(self, start: int, end: int) -> str:
        # What is longer is no path and no name of a domain.
        return self._data[start : min(end, start + 4096)].decode("utf-8", "replace")
