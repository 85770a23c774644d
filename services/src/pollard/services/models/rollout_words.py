"""The evidence of a rollout for people and programs: numbers, and how each gate stands."""

from __future__ import annotations

import math

from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from sqlalchemy.orm import Session

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models import rollout_evidence
from pollard.services.models.rollout_gates import P99_FROM, Judge
from pollard.services.models.rollout_steps import seen_in_step
from pollard.services.models.rollout_tallies import Tally
from pollard.services.models.schema import Rollout, RolloutEvidence

_WAITING = pb.GateEvidence.STATE_WAITING
_HOLDS = pb.GateEvidence.STATE_HOLDS
_FAILED = pb.GateEvidence.STATE_FAILED


def describe(session: Session, row: Rollout) -> pb.RolloutEvidence | None:
    """Return what was seen in the present step; None before the first one has begun."""
    evidence = rollout_evidence.find(session, row)
    if evidence is None:
        return None
    judge = rollout_evidence.judge_of(row, evidence)
    held = Duration()
    held.FromMicroseconds(evidence.held_us)
    gates = [_errors(judge), _latency(judge)]
    if row.shadow_ppm:
        gates.append(_agreement(judge))
    failed = _failed_gate(row)
    for gate in gates:
        if gate.gate == failed:
            gate.state = _FAILED
    return pb.RolloutEvidence(
        step=evidence.step,
        revision=_requests(judge.canary, judge.images.canary),
        base=_requests(judge.base, judge.images.base),
        shadow=_shadow(judge) if row.shadow_ppm else None,
        gates=gates,
        held=held,
        waiting_for=_waiting_for(row, evidence, judge),
    )


def _requests(tally: Tally, images: Tally) -> pb.RevisionEvidence:
    return pb.RevisionEvidence(
        requests=tally.requests,
        failed=tally.failed,
        p50_ms=tally.latencies.estimate(0.5) / 1000,
        p99_ms=tally.latencies.estimate(0.99) / 1000,
        images=images.requests,
        images_failed=images.failed,
    )


def _shadow(judge: Judge) -> pb.ShadowEvidence:
    copies = judge.copies
    return pb.ShadowEvidence(
        compared=copies.compared,
        items=copies.items,
        agreed=copies.agreed,
        dropped=copies.dropped,
        failed=copies.failed,
        # What lies in the first bucket is below a millionth, which is none.
        distance_p50=_fraction(copies.distances.estimate(0.5)),
        distance_p99=_fraction(copies.distances.estimate(0.99)),
    )


def _fraction(millionths: float) -> float:
    return millionths / 1e6 if millionths >= 2 else 0.0


def _failed_gate(row: Rollout) -> str:
    for detail in status_pb2.Status.FromString(row.error).details if row.error else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.metadata.get("gate", ""))
    return ""


def _errors(judge: Judge) -> pb.GateEvidence:
    canary, base, copies = judge.canary, judge.base, judge.copies
    parts = []
    if canary.requests or base.requests:
        parts.append(
            f"{_rate(canary)} requests failed, {_rate(base)} of revision {judge.base_revision}"
        )
    images = judge.images
    if images.canary.requests or images.base.requests:
        parts.append(
            f"in the preprocess service {_rate(images.canary)} images, {_rate(images.base)} of "
            f"revision {judge.base_revision}"
        )
    if copies.compared or copies.failed:
        parts.append(f"{copies.failed} of {copies.compared + copies.failed} shadows failed")
    seen = canary.requests or copies.compared or copies.failed
    words = "; ".join(parts) or "no request was seen yet"
    return pb.GateEvidence(
        gate="max_error_rate",
        state=_HOLDS if seen else _WAITING,
        words=f"{words}; the limit is {judge.limits.max_error_rate:.2%}",
    )


def _rate(tally: Tally) -> str:
    return f"{tally.failed} of {tally.requests} ({tally.error_rate:.2%})"


def _latency(judge: Judge) -> pb.GateEvidence:
    canary, base = judge.canary.latencies, judge.base.latencies
    enough = min(canary.total, base.total) >= P99_FROM
    quantile = 0.99 if enough else 0.5
    ours, theirs = canary.estimate(quantile) / 1000, base.estimate(quantile) / 1000
    parts = []
    if ours and theirs:
        parts.append(
            f"p{quantile * 100:g} {ours:.3g} ms, {theirs:.3g} ms of revision "
            f"{judge.base_revision}: {ours / theirs:.2f} times as long"
        )
    if not enough:
        parts.append(
            f"the p99 is judged from {P99_FROM} requests to each on, {canary.total} and "
            f"{base.total} were seen; gross differences are judged before"
        )
    return pb.GateEvidence(
        gate="max_p99_ratio",
        state=_HOLDS if enough else _WAITING,
        words=f"{'; '.join(parts)}; the limit is {judge.limits.max_p99_ratio:g}",
    )


def _agreement(judge: Judge) -> pb.GateEvidence:
    copies, limit = judge.copies, judge.limits.min_agreement
    words = "no shadow was compared yet"
    if copies.items:
        words = f"{copies.agreed} of {copies.items} items agree ({copies.agreement:.2%})"
    words += f"; the limit is {limit:.2%}" if limit else "; it is not judged"
    state = _HOLDS if copies.items and limit else _WAITING
    return pb.GateEvidence(gate="min_agreement", state=state, words=words)


def _waiting_for(row: Rollout, evidence: RolloutEvidence, judge: Judge) -> list[str]:
    if row.end_time is not None:
        return []
    if evidence.step != row.step:
        return ["every server to have the routes of the next step"]
    waiting = []
    if row.state == pb.Rollout.STATE_PAUSED:
        waiting.append("an order to go on: it is paused")
    left = (row.hold_us - evidence.held_us) / 1e6
    if left > 0:
        waiting.append(f"{math.ceil(left)} s more (of {row.hold_us / 1e6:g} s)")
    missing = row.min_requests - seen_in_step(row, judge)
    if missing > 0:
        what = "compared shadows" if row.step < 0 else "requests"
        waiting.append(f"{missing} more {what} (of {row.min_requests})")
    return waiting
