"""What `pollard models` prints of models, revisions and aliases."""

from __future__ import annotations

from datetime import datetime

from pollard.client import Alias, Model, Revision, types
from pollard.client.cli import copy, edit
from pollard.client.cli._common import ago, say, show_table, size


def when(changed: datetime | None, deleted: datetime | None) -> str:
    """Return when something was changed last, or deleted."""
    return ago(changed) if deleted is None else f"deleted {ago(deleted)}"


def alias_text(alias: Alias) -> str:
    """Return where an alias leads, and how far it is with what it shall lead to."""
    if alias.state == "ACTIVE":
        return f"{alias.name} → {alias.revision}"
    if alias.pending_revision:
        return f"{alias.name} → {alias.revision or '–'} ({alias.state.lower()} {alias.pending_revision})"  # noqa: E501 - reads best in one piece
    return f"{alias.name} → {alias.revision or '–'} ({alias.state.lower()})"


def say_alias(alias: Alias) -> None:
    """Print what came of a change of an alias."""
    if alias.state == "ACTIVE":
        say(f"{alias.model}: {alias.name} now serves revision {alias.revision}.")
        for failure in alias.failures:
            say(f"  not on {failure.server_id}, which refused it: {failure.message}")
    else:
        say(f"{alias.model}: {alias_text(alias)}")


def show_model(model: Model, revisions: list[Revision]) -> None:
    """Print a model and its revisions."""
    say(f"{model.name}  {model.description}".rstrip())
    if model.delete_time is not None:
        say(f"  deleted {ago(model.delete_time)}; to bring it back: pollard models undelete")
    if model.labels:
        say(f"  labels {edit.label_text(model.labels)}")
    for alias in model.aliases:
        before = f", before it {alias.previous_revision}" if alias.previous_revision else ""
        say(f"  {alias_text(alias)}{before}")
        for failure in alias.failures:
            say(f"    {failure.server_id} refused: {failure.message}")
    show_table(
        ["REVISION", "STATE", "SIZE", "ALIASES", "STORED", "BUNDLE", "SIGNED", "NOTES"],
        [
            [
                str(revision.revision),
                revision.state,
                size(revision.size_bytes),
                ", ".join(revision.aliases) or "–",
                when(revision.create_time, revision.delete_time),
                revision.bundle_sha256[:12],
                _signed(revision, short=True),
                revision.notes or revision.error,
            ]
            for revision in revisions
        ],
    )


def show_revision(revision: Revision) -> None:
    """Print all that is known of a revision."""
    say(f"{revision.model} revision {revision.revision}")
    say(f"  state    {revision.state} {revision.error}")
    say(f"  aliases  {', '.join(revision.aliases) or '–'}")
    say(f"  bundle   {revision.bundle_sha256}, {size(revision.size_bytes)}")
    say(f"  signed   {_signed(revision)}")
    by = f" by {revision.creator}" if revision.creator else ""
    say(f"  stored   {ago(revision.create_time)}{by}")
    for line in copy.origin_lines(revision.origin):
        say(f"  origin   {line}")
    if revision.delete_time is not None:
        say(f"  deleted  {ago(revision.delete_time)}")
    if revision.labels:
        say(f"  labels   {edit.label_text(revision.labels)}")
    if revision.notes:
        say(f"  notes    {revision.notes}")
    show_table(
        ["VARIANT", "TARGET", "SIZE", "ACCURACY", "LATENCY"],
        [_variant_row(variant) for variant in revision.variants],
    )


def _signed(revision: Revision, *, short: bool = False) -> str:
    signature = revision.signature
    if signature is None:
        return "no"
    key = signature.key_sha256[:12] if short else f"with the key {signature.key_sha256}"
    if signature.state == "TRUSTED":
        return key
    return f"{key} (unknown)" if short else f"{key}, which the manager does not know"


def _variant_row(variant: types.Variant) -> list[str]:
    accuracy = "–"
    if (found := variant.accuracy) is not None:
        accuracy = (
            f"{found.name} {found.value:.2%} ({found.lower:.2%}–{found.upper:.2%}, "
            f"n={found.samples})"
        )
    latency = "–" if variant.latency_p50_us is None else f"{variant.latency_p50_us:.0f} µs"
    return [variant.name, variant.target, size(variant.size_bytes), accuracy, latency]
