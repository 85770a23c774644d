"""Search: what latency costs what accuracy, tried out, and the point that the gate chooses.

A trial cuts the parent for a share of its latency, measures the batch norms anew, recovers
for at most a third of an epoch, and is then ranked: without that, one-shot accuracy says
little. Trials are proposed by Optuna (a multi-objective tree-structured Parzen estimator,
Ozaki et al., 2020) and run in processes of their own; every proposal follows from the seed
and the trials before it, so that a search that was killed goes on as it would have.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pollard.compress.errors import CompressionError, PruneFailed
from pollard.compress.progress import Reporter
from pollard.compress.recipe import IMPORTANCES, Importance, Recipe

if TYPE_CHECKING:
    import optuna

# Tried first, so that the front is spanned before anything is learned from it.
_FIRST = (0.5, 0.3, 0.7, 0.2)
_LEAST, _MOST = 0.08, 0.9

# Of the training images, what a trial is recovered on, once.
TRIAL_SHARE = 0.3

# Of the time that is given to a run, what stays for compressing to the point that is chosen.
_AFTERWARDS = 0.5

_STUDY = "search"


@dataclass(frozen=True)
class Point:
    """What a trial tries."""

    latency: float
    """Share of the latency of the parent's float file."""
    importance: Importance
    remove_blocks: bool

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe that compresses to this point."""
        return replace(
            recipe,
            search=0,
            budget=(f"latency={self.latency:.4f}",),
            importance=self.importance,
            remove_blocks=self.remove_blocks,
        )


@dataclass(frozen=True)
class Outcome:
    """What a trial found."""

    file: str
    """The faster of its files, "pruned-fp32" or "pruned-int8"."""
    latency: float
    """Measured, as a share of the parent's float file."""
    drop_points: float
    """Accuracy lost, on images of the choosing part, recovered only shortly."""
    macs: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True)
class Trial:
    """A point and what came of it."""

    number: int
    point: Point
    outcome: Outcome | None
    """None where the point cannot be reached."""
    problem: str = ""
    """Why not."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    trials: list[Trial]
    chosen: int
    """Number of the trial whose point is compressed to."""
    why: str


Evaluate = Callable[[Point], Outcome]


def search(
    count: int,
    seed: int,
    max_drop: float,
    storage: Path,
    evaluate: Evaluate,
    *,
    workers: int = 1,
    initializer: Callable[[], None] | None = None,
    reporter: Reporter | None = None,
) -> Found:
    """Try ``count`` points and choose one by the gate.

    Args:
        count: Trials.
        seed: Of the proposals.
        max_drop: The gate, in points.
        storage: SQLite file of the trials; one that is there is gone on with.
        evaluate: Runs a trial; it is called in other processes.
        workers: Trials at a time.
        initializer: Called first in every such process.
        reporter: Told of progress.

    Raises:
        PruneFailed: not one point can be reached.
    """
    import optuna

    reporter = reporter or Reporter()
    reserve = _AFTERWARDS * (reporter.max_seconds or 0.0)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{storage}",
        study_name=_STUDY,
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    # Spawned, not forked: PyTorch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    begin = partial(_begin, os.getpid(), stop, initializer)
    pool = ProcessPoolExecutor(workers, context, begin)
    done = _finished(study)
    with reporter.step("Searching", count) as step, pool:
        step.advance(len(done))
        try:
            while len(done) < count and (not done or reporter.left > reserve):
                # Whole rounds: what is proposed must not depend on which trial ends first.
                size = min(workers - len(done) % workers, count - len(done))
                proposed = [_propose(study, seed, len(done) + index) for index in range(size)]
                running = [(trial, pool.submit(evaluate, point)) for trial, point in proposed]
                for trial, future in running:
                    _tell(study, trial, future)
                    step.advance()
                done = _finished(study)
        except BrokenProcessPool as error:
            raise CompressionError(
                "a process of the search was ended from outside, perhaps for want of memory; the "
                "same command goes on with the trials that are left"
            ) from error
        finally:
            stop.set()  # nobody waits for trials that nobody wants any more
    trials = [_trial(trial) for trial in done]
    chosen, why = choose(trials, max_drop)
    if len(trials) < count:
        why += f"; {len(trials)} of {count} trials fitted into the time that was given"
    return Found(trials, chosen, why)


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.trials if trial.state.is_finished()]


def _propose(study: optuna.Study, seed: int, number: int) -> tuple[optuna.Trial, Point]:
    """Ask for the point of a trial; it follows from seed, number and the trials that are told.

    A trial that was begun and not ended is taken up again.
    """
    import optuna

    study.sampler = optuna.samplers.TPESampler(seed=(seed * 10_007 + number) % 2**32)
    known = {trial.number: trial for trial in study.trials}
    begun = known.get(number)
    if begun is None and number < len(_FIRST):
        study.enqueue_trial({"latency": _FIRST[number], "importance": "l2", "remove_blocks": True})
    if begun is not None and begun.state == optuna.trial.TrialState.RUNNING:
        trial = optuna.Trial(study, begun._trial_id)
    else:
        trial = study.ask()
    importance: Importance = trial.suggest_categorical("importance", IMPORTANCES)  # type: ignore[assignment]
    return trial, Point(
        trial.suggest_float("latency", _LEAST, _MOST),
        importance,
        trial.suggest_categorical("remove_blocks", (True, False)),
    )


def _tell(study: optuna.Study, trial: optuna.Trial, future: Future[Outcome]) -> None:
    import optuna

    try:
        outcome = future.result()
    except CompressionError as error:
        trial.set_user_attr("problem", str(error))
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return
    trial.set_user_attr("outcome", asdict(outcome))
    study.tell(trial.number, (outcome.latency, outcome.drop_points))


def _point(params: dict[str, Any]) -> Point:
    return Point(params["latency"], params["importance"], params["remove_blocks"])


def _trial(trial: optuna.trial.FrozenTrial) -> Trial:
    told = trial.user_attrs.get("outcome")
    outcome = None if told is None else Outcome(**told)
    return Trial(
        trial.number, _point(trial.params), outcome, str(trial.user_attrs.get("problem", ""))
    )


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that no other beats in both latency and accuracy, fastest first."""
    reached = [trial for trial in trials if trial.outcome is not None]
    kept: list[Trial] = []
    for trial in sorted(reached, key=_order):
        if not kept or _drop(trial) < _drop(kept[-1]):
            kept.append(trial)
    return kept


def _order(trial: Trial) -> tuple[float, float]:
    assert trial.outcome is not None  # noqa: S101 - narrows the type
    return (trial.outcome.latency, trial.outcome.drop_points)


def _drop(trial: Trial) -> float:
    return _order(trial)[1]


def choose(trials: Sequence[Trial], max_drop: float) -> tuple[int, str]:
    """Return the number of the trial to compress to, and why.

    The fastest that holds the gate even though it was recovered only shortly; if there
    is none, the most accurate, whose full recovery has the least to win back.

    Raises:
        PruneFailed: not one point was reached.
    """
    best = front(trials)
    if not best:
        told = "; ".join(sorted({trial.problem for trial in trials}))
        raise PruneFailed(f"the search reached none of its {len(trials)} points: {told}")
    holding = [trial for trial in best if _drop(trial) <= max_drop + 1e-9]
    if holding:
        return holding[0].number, "the fastest that holds the gate already"
    return best[-1].number, (
        "none holds the gate after so short a recovery; the most accurate, which loses "
        f"{_drop(best[-1]):.2f} points"
    )


def _begin(parent: int, stop: Event, initializer: Callable[[], None] | None) -> None:
    """Prepare a process for trials; it ends when the one that started it is gone or says so."""

    def watch() -> None:
        while os.getppid() == parent and not stop.wait(0.5):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # Ctrl-C reaches all processes of a terminal; the first of them decides.
    with suppress(ValueError):
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if initializer is not None:
        initializer()
