"""Figures as people read them."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from markupsafe import Markup

from pollard.bundle.v1 import bundle_pb2
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb

_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")

MINUS = "\u2212"
THIN = "\u202f"


def size(count: int) -> str:
    """Return a number of bytes in decimal units, such as "883 kB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            return f"{_three(value)}{THIN}{unit}" if unit != "B" else f"{count}{THIN}B"
        value /= 1000
    raise AssertionError("unreachable")


def amount(count: float) -> str:
    """Return a large number in short, such as "4.04 M"."""
    value = float(count)
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{_three(value)}{THIN}{unit}".strip(THIN) if unit else f"{value:g}"
        value /= 1000
    return f"{_three(value)}{THIN}T"


def whole(count: int) -> str:
    """Return a number with its thousands set apart."""
    return f"{count:,}".replace(",", THIN)


def micros(value: float) -> str:
    """Return a time in microseconds in the unit that suits it; a dash for none."""
    if value <= 0:
        return "–"
    if value < 999.5:
        return f"{_three(value)}{THIN}µs"
    if value < 999_500:
        return f"{_three(value / 1000)}{THIN}ms"
    return f"{_three(value / 1e6)}{THIN}s"


def millis(value: float) -> str:
    """Return a time in milliseconds in the unit that suits it; a dash for none."""
    return micros(value * 1000)


def percent(share: float, digits: int = 2) -> str:
    """Return a share of 1 in percent."""
    return f"{share * 100:.{digits}f}{THIN}%"


def steps(value: float) -> str:
    """Return a percentage without needless digits."""
    return f"{value:g}{THIN}%"


def points(change: float) -> str:
    """Return a difference of two shares in percentage points, with its sign."""
    value = round(change * 100, 2)
    if value == 0:
        return f"±0{THIN}pt"
    return f"{'+' if value > 0 else MINUS}{abs(value):.2f}{THIN}pt"


def times(factor: float) -> str:
    """Return a factor, such as "3.3 ×"."""
    return f"{_three(factor)}{THIN}×"


def seconds(span: float) -> str:
    """Return a span of time, such as "1 min 30 s"."""
    if span < 0.9995:
        return micros(span * 1e6) if span > 0 else f"0{THIN}s"
    if span < 60:
        return f"{span:.3g}{THIN}s"
    whole_seconds = round(span)
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, whole_seconds = divmod(whole_seconds, length)
        if number:
            parts.append(f"{number}{THIN}{unit}")
    return " ".join(parts[:2])


def duration(message: Duration) -> str:
    """Return a span of time."""
    return seconds(message.seconds + message.nanos / 1e9)


def moment(stamp: Timestamp) -> Markup:
    """Return a moment as an element; the page's script turns it into an age."""
    at = datetime.fromtimestamp(stamp.seconds + stamp.nanos / 1e9, UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        at.isoformat(timespec="seconds").replace("+00:00", "Z"),
        at.strftime("%-d %b %Y %H:%M:%S UTC"),
    )


def target(name: str) -> str:
    """Return the last part of a resource name."""
    return name.rpartition("/")[2]


def short(digest: str) -> str:
    """Return the beginning of a digest."""
    return digest[:12]


def brief(text: str) -> str:
    """Return a sentence with its digests cut short."""
    return _DIGEST.sub(lambda found: found[0][:12], text)


def detail(event: pb.Event) -> str:
    """Return what an event tells beside its action; empty when that is the same again."""
    words = brief(event.detail)
    return "" if event.action.endswith("_" + words.upper()) else words


def who(actor: str) -> str:
    """Return an actor as people know it."""
    for prefix in ("ipv4:", "ipv6:", "servers/"):
        actor = actor.removeprefix(prefix)
    return actor


def action(name: str) -> str:
    """Return the action of an event as words."""
    return name.replace("_", " ").lower().capitalize()


_ROLLOUT = {
    pb.Rollout.STATE_SHADOW: ("go", "Shadow"),
    pb.Rollout.STATE_CANARY: ("go", "Canary"),
    pb.Rollout.STATE_PAUSED: ("warn", "Paused"),
    pb.Rollout.STATE_PROMOTED: ("good", "Promoted"),
    pb.Rollout.STATE_ROLLED_BACK: ("bad", "Rolled back"),
}

_ALIAS = {
    pb.Alias.STATE_ACTIVE: ("good", "Active"),
    pb.Alias.STATE_LOADING: ("go", "Loading"),
    pb.Alias.STATE_SWITCHING: ("go", "Switching"),
    pb.Alias.STATE_FAILED: ("bad", "Switch failed"),
}

_REVISION = {
    pb.Revision.STATE_UPLOADED: ("quiet", "Uploaded"),
    pb.Revision.STATE_CHECKED: ("quiet", "Checked"),
    pb.Revision.STATE_READY: ("good", "Ready"),
    pb.Revision.STATE_FAILED: ("bad", "Failed"),
}

_SERVED = {
    fleet_pb.REVISION_STATE_PENDING: ("quiet", "Pending"),
    fleet_pb.REVISION_STATE_FETCHING: ("go", "Fetching"),
    fleet_pb.REVISION_STATE_LOADING: ("go", "Loading"),
    fleet_pb.REVISION_STATE_READY: ("good", "Ready"),
    fleet_pb.REVISION_STATE_FAILED: ("bad", "Failed"),
    fleet_pb.REVISION_STATE_DRAINING: ("quiet", "Draining"),
}

_GATE = {
    pb.GateEvidence.STATE_WAITING: ("quiet", "Waiting"),
    pb.GateEvidence.STATE_HOLDS: ("good", "Holds"),
    pb.GateEvidence.STATE_FAILED: ("bad", "Failed"),
}

_KINDS = {
    fleet_pb.SERVER_KIND_INFERENCE: "Inference",
    fleet_pb.SERVER_KIND_PREPROCESS: "Preprocess",
}

_GATES = {
    "max_error_rate": "Errors",
    "max_p99_ratio": "Latency",
    "min_agreement": "Agreement of shadows",
}

_UNKNOWN = ("quiet", "Unknown")


def rollout_state(state: int) -> tuple[str, str]:
    """Return tone and word of a rollout's state."""
    return _ROLLOUT.get(state, _UNKNOWN)  # type: ignore[call-overload, no-any-return]  # an int


def alias_state(state: int) -> tuple[str, str]:
    """Return tone and word of an alias's state."""
    return _ALIAS.get(state, _UNKNOWN)  # type: ignore[call-overload, no-any-return]  # an int


def revision_state(state: int) -> tuple[str, str]:
    """Return tone and word of a revision's state in the registry."""
    return _REVISION.get(state, _UNKNOWN)  # type: ignore[call-overload, no-any-return]  # an int


def served_state(state: int) -> tuple[str, str]:
    """Return tone and word of a revision's state on one server."""
    return _SERVED.get(state, _UNKNOWN)  # type: ignore[call-overload, no-any-return]  # an int


def gate_state(state: int) -> tuple[str, str]:
    """Return tone and word of a gate's state."""
    return _GATE.get(state, _UNKNOWN)  # type: ignore[call-overload, no-any-return]  # an int


def gate_name(gate: str) -> str:
    """Return what a gate looks at."""
    return _GATES.get(gate, gate)


def server_kind(kind: int) -> str:
    """Return what a server does."""
    return _KINDS.get(kind, "Server")  # type: ignore[call-overload, no-any-return]  # an int


def tensor_type(data_type: int) -> str:
    """Return the name of an element type."""
    return bundle_pb2.DataType.Name(data_type).removeprefix("DATA_TYPE_").lower()  # type: ignore[arg-type]  # an int


def shape(spec: bundle_pb2.TensorSpec) -> str:
    """Return the dimensions of a tensor; the letter of one that may have any size."""
    letters = spec.layout if len(spec.layout) == len(spec.shape) else "?" * len(spec.shape)
    sizes = zip(spec.shape, letters, strict=True)
    return " × ".join(letter if size < 0 else str(size) for size, letter in sizes) or "scalar"


def step_name(step: bundle_pb2.PreprocessStep) -> str:
    """Return what a step of the preprocessing does, in a few words."""
    kind = step.WhichOneof("step") or "nothing"
    if kind == "resize":
        resize = step.resize
        if resize.mode == bundle_pb2.RESIZE_MODE_SHORT_SIDE:
            return f"resize to {resize.height} px at the short side"
        how = "letterbox into" if resize.mode == bundle_pb2.RESIZE_MODE_LETTERBOX else "resize to"
        return f"{how} {resize.width} × {resize.height}"
    if kind in ("center_crop", "five_crop"):
        crop = step.center_crop if kind == "center_crop" else step.five_crop
        return f"{kind.replace('_', ' ')} {crop.width} × {crop.height}"
    return kind.replace("_", " ")


FILTERS: dict[str, Any] = {
    name: function
    for name, function in globals().items()
    if callable(function) and getattr(function, "__module__", "") == __name__
}
"""Every function here, by name, for the templates."""


def _three(value: float) -> str:
    """Return a number with three significant digits, never in exponents."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"
