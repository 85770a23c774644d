"""What networks are for: a class, boxes, or a mask, each with its loss, figures and manifest."""

from __future__ import annotations

from pollard.compress.tasks.base import Outputs, Task, Verdict
from pollard.compress.tasks.classification import Classification
from pollard.compress.tasks.detection import Detection
from pollard.compress.tasks.segmentation import Segmentation
from pollard.compress.truth import TaskName

_TASKS: dict[TaskName, Task] = {
    "classification": Classification(),
    "detection": Detection(),
    "segmentation": Segmentation(),
}


def task_of(name: TaskName) -> Task:
    """Return the task of this name."""
    return _TASKS[name]


__all__ = ["Outputs", "Task", "Verdict", "task_of"]
