"""`pollard models edit`: description, notes and labels of what is in the registry."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import typer

from pollard.client import Aborted, Model, ModelsClient, Revision
from pollard.client.cli._common import (
    MODELS_SERVER,
    EtagOption,
    JsonOption,
    ModelArgument,
    ModelsServerOption,
    RequestIdOption,
    RevisionOption,
    TimeoutOption,
    print_json,
    say,
)
from pollard.client.environment import connection

T = TypeVar("T")

_ATTEMPTS = 10
_PAUSE_SECONDS = 0.05


def register(app: typer.Typer) -> None:
    """Add the command to `pollard models`."""
    app.command()(edit)


def label_text(labels: Mapping[str, str]) -> str:
    """Return labels for people."""
    return ", ".join(f"{key}={value}" if value else key for key, value in sorted(labels.items()))


def edit(
    model: ModelArgument,
    revision: RevisionOption = None,
    description: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is; of a model.")
    ] = None,
    notes: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Free text; of a revision.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY[=VALUE]", help="Set this label; may be given again."),
    ] = None,
    remove_label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Take this label away; may be given again."),
    ] = None,
    etag: EtagOption = "",
    request_id: RequestIdOption = None,
    as_json: JsonOption = False,
    server: ModelsServerOption = MODELS_SERVER,
    timeout: TimeoutOption = 30.0,
) -> None:
    """Change what is said of a model, or of one revision of it.

    Nothing else of a revision ever changes. Labels that are not named stay as they are, also those
    that somebody else changes at the same time.
    """
    if revision is None and notes is not None:
        raise typer.BadParameter("--notes are of a revision; say which with --revision")
    if revision is not None and description is not None:
        raise typer.BadParameter("--description is of a whole model; leave --revision out")
    added = dict(label_pair(text) for text in label or ())
    removed = set(remove_label or ())
    if twice := added.keys() & removed:
        raise typer.BadParameter(f"label {min(twice)!r} is both set and taken away")
    changes_labels = bool(added or removed)
    if description is None and notes is None and not changes_labels:
        raise typer.BadParameter(
            "nothing is to change: give --description, --notes, --label or --remove-label"
        )
    if changes_labels and request_id is not None and not etag:
        raise typer.BadParameter(
            "labels are read and written back; with --request-id give the --etag that they had"
        )
    with ModelsClient(server, timeout=timeout, **connection()) as client:

        def once() -> Model | Revision:
            labels, guard = None, etag
            if changes_labels:
                before = _find(client, model, revision)
                labels = _merged(before.labels, added, removed)
                guard = etag or before.etag
            how: dict[str, Any] = {"labels": labels, "etag": guard, "request_id": request_id}
            if revision is None:
                return client.update_model(model, description=description, **how)
            return client.update_revision(model, revision, notes=notes, **how)

        found = once() if etag else _although_others_write(once)
    if as_json:
        print_json(found)
    elif isinstance(found, Revision):
        say(f"{model} revision {found.revision}: {found.notes or 'no notes'}")
        _say_labels(found.labels)
    else:
        say(f"{model}: {found.description or 'no description'}")
        _say_labels(found.labels)


def _find(client: ModelsClient, model: str, revision: int | None) -> Model | Revision:
    return client.model(model) if revision is None else client.revision(model, revision=revision)


def _although_others_write(change: Callable[[], T]) -> T:
    """Read and write again when somebody was quicker: what they wrote is to stay."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return change()
        except Aborted:
            time.sleep(_PAUSE_SECONDS)
    return change()


def _merged(
    before: Mapping[str, str], added: Mapping[str, str], removed: set[str]
) -> dict[str, str]:
    return {key: value for key, value in before.items() if key not in removed} | dict(added)


def label_pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not key:
        raise typer.BadParameter(f"label {text!r} has no key; write KEY=VALUE or KEY")
    return key, value


def _say_labels(labels: Mapping[str, str]) -> None:
    if labels:
        say(f"  labels {label_text(labels)}")
