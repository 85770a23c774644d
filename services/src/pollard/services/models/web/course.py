"""How far a rollout is, as the page draws it: its steps, its gates, the share of each revision."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models.web import words

_RUNNING = (pb.Rollout.STATE_SHADOW, pb.Rollout.STATE_CANARY, pb.Rollout.STATE_PAUSED)


@dataclass(frozen=True)
class Step:
    """One step on the way."""

    label: str
    state: str
    """ "done", "now", "failed" or "next"."""
    progress: float = 0.0
    """How much of what the step asks for is there, in percent."""


@dataclass(frozen=True)
class Need:
    """One thing that a step asks for."""

    label: str
    has: str
    of: str
    progress: float
    """In percent, at most 100."""


@dataclass(frozen=True)
class Gate:
    """One gate with its figure beside its limit."""

    label: str
    tone: str
    word: str
    words: str
    figure: str = ""
    limit: str = ""
    at: float | None = None
    """Where the figure lies on the scale, in percent; None where there is none."""
    limit_at: float = 50.0
    """Where the limit lies on the scale."""
    above_is_bad: bool = True


@dataclass(frozen=True)
class Course:
    """A rollout as it is drawn."""

    rollout: pb.Rollout
    model: str
    number: int
    running: bool
    steps: list[Step]
    needs: list[Need]
    gates: list[Gate]
    share: float
    """Share of the requests that go to the new revision, in percent."""

    @property
    def summary(self) -> str:
        """How it stands, in a few words."""
        rollout = self.rollout
        word = words.rollout_state(rollout.state)[1]
        if not self.running:
            return word
        if not rollout.HasField("evidence"):
            return "Loading"
        if rollout.step < 0:
            return f"{word}, {words.steps(rollout.shadow_percent)} copied"
        return f"{word}, {words.steps(self.share)}"


def course(rollout: pb.Rollout) -> Course:
    """Return how a rollout is drawn."""
    _, model, _, number = rollout.name.split("/")
    running = rollout.state in _RUNNING
    has_begun = rollout.HasField("evidence")
    needs = _needs(rollout) if running and has_begun else []
    share = 0.0
    if rollout.state == pb.Rollout.STATE_PROMOTED:
        share = 100.0
    elif running and has_begun and rollout.step >= 0:
        share = rollout.steps[rollout.step]
    return Course(
        rollout=rollout,
        model=model,
        number=int(number),
        running=running,
        steps=_steps(rollout, running, has_begun, needs),
        needs=needs,
        gates=[_gate(rollout, gate) for gate in rollout.evidence.gates],
        share=share,
    )


def _steps(rollout: pb.Rollout, running: bool, has_begun: bool, needs: list[Need]) -> list[Step]:
    labels = ["Load", *(["Shadow"] if rollout.shadow_percent else [])]
    first = len(labels)
    labels += [words.steps(step) for step in rollout.steps]
    now = first + rollout.step if has_begun or not running else 0
    progress = min((need.progress for need in needs), default=0.0)
    promoted = rollout.state == pb.Rollout.STATE_PROMOTED
    found = []
    for index, label in enumerate(labels):
        if promoted or index < now:
            found.append(Step(label, "done", 100.0))
        elif index > now:
            found.append(Step(label, "next"))
        elif running:
            found.append(Step(label, "now", progress))
        else:
            found.append(Step(label, "failed", 100.0))
    return found


def _needs(rollout: pb.Rollout) -> list[Need]:
    evidence = rollout.evidence
    in_shadow = rollout.step < 0
    seen = evidence.shadow.compared if in_shadow else evidence.revision.requests
    wanted = rollout.gates.min_requests
    held, hold = _seconds(evidence.held), _seconds(rollout.hold)
    return [
        Need(
            "Held",
            words.seconds(round(held)),
            words.seconds(hold),
            100.0 if not hold else min(100.0, 100.0 * held / hold),
        ),
        Need(
            "Copies compared" if in_shadow else "Requests",
            words.whole(seen),
            words.whole(wanted),
            100.0 if not wanted else min(100.0, 100.0 * seen / wanted),
        ),
    ]


def _gate(rollout: pb.Rollout, gate: pb.GateEvidence) -> Gate:
    tone, word = words.gate_state(gate.state)
    label = words.gate_name(gate.gate)
    evidence, limits = rollout.evidence, rollout.gates
    ours, theirs = evidence.revision, evidence.base
    if gate.gate == "max_error_rate" and ours.requests and limits.max_error_rate:
        rate = ours.failed / ours.requests
        return Gate(
            label,
            tone,
            word,
            gate.words,
            words.percent(rate),
            words.percent(limits.max_error_rate),
            min(100.0, 50.0 * rate / limits.max_error_rate),
        )
    if gate.gate == "max_p99_ratio" and ours.p99_ms and theirs.p99_ms and limits.max_p99_ratio:
        ratio = ours.p99_ms / theirs.p99_ms
        return Gate(
            label,
            tone,
            word,
            gate.words,
            words.times(ratio),
            words.times(limits.max_p99_ratio),
            min(100.0, 50.0 * ratio / limits.max_p99_ratio),
        )
    if gate.gate == "min_agreement" and evidence.shadow.items and limits.min_agreement:
        agreement = evidence.shadow.agreed / evidence.shadow.items
        # The limit is close to 1, and so is what matters: the scale ends at 1 and has the limit
        # in its middle.
        span = max(1.0 - limits.min_agreement, 0.005)
        at = 100.0 - 50.0 * (1.0 - agreement) / span
        return Gate(
            label,
            tone,
            word,
            gate.words,
            words.percent(agreement),
            words.percent(limits.min_agreement),
            max(0.0, at),
            above_is_bad=False,
        )
    return Gate(label, tone, word, gate.words)


def _seconds(span: Duration) -> float:
    return float(span.seconds + span.nanos / 1e9)
