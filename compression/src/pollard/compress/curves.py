"""What is seen of training: a table while it runs, a page, TensorBoard's files."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path

from pollard.compress.evaluate import Accuracy
from pollard.compress.progress import Reporter
from pollard.compress.report_parts import card, page, panel
from pollard.compress.report_plots import curves
from pollard.compress.training import History, Observer
from pollard.runtime.bundle import write_durably


class Observers:
    """Passes on what it is told."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Take the loss of a step."""
        for observer in self._observers:
            observer.step(step, loss, learning_rate)

    def epoch(self, epoch: int, loss: float, score: float, best: bool) -> None:
        """Take the figures of an epoch."""
        for observer in self._observers:
            observer.epoch(epoch, loss, score, best)


class EpochTable:
    """A line an epoch, above the progress bar on a terminal."""

    def __init__(self, reporter: Reporter, epochs: int, metric: str = "accuracy") -> None:
        self._reporter, self._epochs, self._metric = reporter, epochs, metric
        self._rate, self._begun, self._headed = 0.0, time.monotonic(), False

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Note the learning rate."""
        self._rate = learning_rate

    def epoch(self, epoch: int, loss: float, score: float, best: bool) -> None:
        """Tell of the epoch."""
        if not self._headed:
            self._reporter.say(f"  epoch      loss {self._metric:>10}   learning rate   seconds")
            self._headed = True
        now = time.monotonic()
        self._reporter.say(
            f"{epoch:>3}/{self._epochs:<3} {loss:>9.4f} {score:>10.2%} {self._rate:>15.2e} "
            f"{now - self._begun:>9.1f}{'  best' if best else ''}"
        )
        self._begun = now


class TensorBoard:
    """Writes files that TensorBoard shows."""

    def __init__(self, directory: Path) -> None:
        # Only where it is wanted: it brings a client of S3, which takes a third of a second.
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]  # it has no types

        self._writer = SummaryWriter(str(directory))
        self._step = 0

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Write the loss and the learning rate of a step."""
        self._step = step
        self._writer.add_scalar("train/loss", loss, step)
        self._writer.add_scalar("train/learning_rate", learning_rate, step)

    def epoch(self, epoch: int, loss: float, score: float, best: bool) -> None:
        """Write the accuracy behind an epoch."""
        self._writer.add_scalar("choose/accuracy", score, self._step)
        self._writer.add_scalar("train/epoch_loss", loss, self._step)

    def close(self, held_out: float) -> None:
        """Write the last figure and the file's end."""
        self._writer.add_scalar("held-out/accuracy", held_out, self._step)
        self._writer.close()


def write_page(path: Path, name: str, history: History, found: Accuracy) -> None:
    """Write a self-contained page with loss and accuracy."""
    stopped = f"<p>{html.escape(history.stopped)}</p>" if history.stopped else ""
    content = {
        "recovery": {
            "choose_accuracy": history.choose_accuracy,
            "start_accuracy": history.start_accuracy,
            "loss": history.loss,
        }
    }
    cards = [
        card(found.metric, f"{found.value:.2%}", f"held out, n = {found.samples}"),
        card("best epoch", str(history.best_epoch), f"of {len(history.loss)}"),
    ]
    sections = [
        f"<h1>Training of {html.escape(name)}</h1>{stopped}",
        f"<div class='cards'>{''.join(cards)}</div>",
        panel(curves(content, found.metric)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, page(f"{name} – Pollard training", sections).encode())
