"""Search: what latency costs what accuracy, tried out, and the point that the gate chooses.

A trial cuts the parent for a share of its latency, measures the batch norms anew, recovers
for at most a third of an epoch, and is then ranked: without that, one-shot accuracy says
little. Trials are proposed by Optuna (a multi-objective tree-structured Parzen estimator,
Ozaki et al., 2020) and run somewhere else (:mod:`pollard.compress.trials`).

A proposal follows from the seed and from the trials that lie a window before it, and from
nothing else. So a search that was killed goes on as it would have, and one that runs two
trials at a time tries the same points as one that runs twenty.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pollard.compress.errors import CompressionError, PruneFailed
from pollard.compress.progress import Reporter
from pollard.compress.recipe import IMPORTANCES, Importance, Recipe
from pollard.compress.trials import Trials, TrialsLost

if TYPE_CHECKING:
    import optuna

# Tried first, so that the front is spanned before anything is learned from it.
_FIRST = (0.5, 0.3, 0.7, 0.2)
_LEAST, _MOST = 0.08, 0.9

# Of the training images, what a trial is recovered on, once.
TRIAL_SHARE = 0.3

# Trials that may run at a time, whoever runs them: a share of all, and at least so many. What
# is proposed does not know the results of that many trials before it.
_WINDOW_SHARE, _LEAST_WINDOW = 0.25, 4

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


def search(
    count: int,
    seed: int,
    max_drop: float,
    storage: Path,
    runs: Trials,
    *,
    reporter: Reporter | None = None,
) -> Found:
    """Try ``count`` points and choose one by the gate.

    Args:
        count: Trials.
        seed: Of the proposals.
        max_drop: The gate, in points.
        storage: SQLite file of the trials; one that is there is gone on with.
        runs: Runs them.
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
    book = _Book(study, seed, window(count))
    running: dict[Future[Outcome], optuna.Trial] = {}
    upcoming = iter([number for number in range(count) if number not in book.ended])
    number = next(upcoming, None)
    with reporter.step("Searching", count) as step, runs:
        step.advance(len(book.ended))
        try:
            while number is not None or running:
                if book.ended and reporter.left <= reserve:
                    number = None
                while number is not None and book.may(number) and len(running) < runs.at_once:
                    trial, point = book.propose(number)
                    running[runs.submit(point)] = trial
                    number = next(upcoming, None)
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    book.keep(running.pop(future), future)
                    step.advance()
        except TrialsLost as error:
            raise CompressionError(
                f"{error}; the same command goes on with the trials that are left"
            ) from error
        except BrokenExecutor as error:
            raise CompressionError(
                "a process of the search was ended from outside, perhaps for want of memory; the "
                "same command goes on with the trials that are left"
            ) from error
    trials = [_trial(trial) for trial in study.trials if trial.number in book.ended]
    chosen, why = choose(trials, max_drop)
    if len(trials) < count:
        why += f"; {len(trials)} of {count} trials fitted into the time that was given"
    return Found(trials, chosen, why)


def window(count: int) -> int:
    """Return how many of ``count`` trials may run at a time."""
    return max(_LEAST_WINDOW, round(_WINDOW_SHARE * count))


class _Book:
    """The trials of a search, kept in a study.

    What came of a trial is written down at once. The sampler is told only when a trial is
    proposed that may know it, in the order of the numbers: otherwise what it proposes would
    depend on which trial happened to end first.
    """

    def __init__(self, study: optuna.Study, seed: int, size: int) -> None:
        self._study, self._seed, self._window = study, seed, size
        self.ended = {trial.number for trial in study.trials if _has_ended(trial)}
        """Numbers of the trials that need not be run any more."""

    def may(self, number: int) -> bool:
        """Tell whether everything has ended that the proposal of a trial depends on."""
        return self.ended.issuperset(range(number - self._window + 1))

    def propose(self, number: int) -> tuple[optuna.Trial, Point]:
        """Return a trial and its point; one that was begun and has not ended is taken up again."""
        for earlier in self._study.trials[: max(0, number - self._window + 1)]:
            if not earlier.state.is_finished():
                self._tell(earlier)
        return _propose(self._study, self._seed, number)

    def keep(self, trial: optuna.Trial, future: Future[Outcome]) -> None:
        """Write down what came of a trial."""
        try:
            trial.set_user_attr("outcome", asdict(future.result()))
        except CompressionError as error:
            trial.set_user_attr("problem", str(error))
        self.ended.add(trial.number)

    def _tell(self, trial: optuna.trial.FrozenTrial) -> None:
        import optuna

        told = trial.user_attrs.get("outcome")
        if told is None:
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial.number, (told["latency"], told["drop_points"]))


def _has_ended(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state.is_finished() or not {"outcome", "problem"}.isdisjoint(trial.user_attrs)


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
