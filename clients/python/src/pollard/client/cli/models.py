"""`pollard models`: what is in the registry."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pollard.client import InvalidBundle, ModelsClient, NotFound, types
from pollard.client._names import checked_alias, checked_model
from pollard.client.cli import copy, edit, event_view, models_view, rollout, watch
from pollard.client.cli._common import (
    MODELS_SERVER,
    AliasOption,
    EtagOption,
    JsonOption,
    ModelArgument,
    ModelsServerOption,
    QuorumOption,
    RequestIdOption,
    RevisionOption,
    SignatureOption,
    TimeoutOption,
    TransferBar,
    WaitOption,
    WaitTimeoutOption,
    checked_by,
    fail,
    plain,
    print_json,
    say,
    show_picture,
    show_table,
    size,
    warn,
)
from pollard.client.cli.signing import SignOption, signer
from pollard.client.cli.tuning import known_servers, runs_of, show_runs
from pollard.client.environment import connection

app = typer.Typer(
    help="Put models into the registry, and decide which revision is served.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Server = ModelsServerOption
_TIMEOUT = 30.0
_WAIT = 120.0


@app.command()
def push(
    source: Annotated[
        Path,
        typer.Argument(metavar="DIR|FILE", help="Directory of the bundle, or a plain ONNX file."),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="MODEL", help="Model name.", callback=checked_by(checked_model)
        ),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labels of the classes, one a line; makes a plain ONNX file a classifier.",
        ),
    ] = None,
    alias: AliasOption = None,
    notes: Annotated[str, typer.Option(help="Free text kept with the revision.")] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=VALUE]",
            help="Set this label of the revision; may be given again. Not to be mixed up with "
            "--labels, the names of the classes.",
        ),
    ] = None,
    sign: SignOption = None,
    allow_signature_change: SignatureOption = False,
    wait: WaitOption = True,
    wait_timeout: WaitTimeoutOption = _WAIT,
    as_json: JsonOption = False,
    server: Server = MODELS_SERVER,
    timeout: TimeoutOption = _TIMEOUT,
) -> None:
    """Store a bundle as the next revision of a model.

    The first revision of a model becomes `production`; later ones move an alias only when --alias
    names one. Of a plain ONNX file a manifest is derived from its graph, and shown. With --sign the
    bundle's file `signature` is written first; pushing a bundle again, now signed, signs its
    revision.
    """
    make_signature = signer(sign)
    with (
        _as_bundle(source, labels, quiet=as_json) as directory,
        ModelsClient(server, timeout=timeout, **connection()) as client,
    ):
        if make_signature is not None:
            make_signature(directory)
        first = _is_first(client, model)
        chosen = alias or ("production" if first else None)
        with TransferBar(f"pushing to {model}") as moved:
            pushed = client.push(
                directory,
                model,
                notes=notes,
                labels=dict(edit.label_pair(text) for text in label or ()),
                alias=chosen,
                allow_signature_change=allow_signature_change,
                wait=False,
                progress=moved,
            )
        number = pushed.revision.revision
        for text in pushed.warnings:
            warn(text)
        if not as_json:
            known = " (the registry already had this bundle)" if pushed.existed else ""
            say(
                f"{model} revision {number}: {size(pushed.revision.size_bytes)}, "
                f"bundle {pushed.revision.bundle_sha256[:12]}{known}"
            )
            if chosen and not alias:
                say(f"It is the first revision of {model}, so it becomes {chosen!r}.")
        moved_alias = None
        if chosen and wait:
            moved_alias = client.wait_alias(model, chosen, number, wait_timeout=wait_timeout)
        if as_json:
            print_json(types.Pushed(pushed.revision, pushed.existed, moved_alias, pushed.warnings))
            return
        if moved_alias is not None:
            models_view.say_alias(moved_alias)
        elif chosen:
            say(f"{chosen} is moving to revision {number}; see `pollard models show {model}`.")
        else:
            leading = _leading(client, model, number) if pushed.existed else []
            say(
                f"It is served already, as {', '.join(leading)}."
                if leading
                else f"To serve it: pollard models alias {model} production {number}"
            )


def _leading(client: ModelsClient, model: str, revision: int) -> list[str]:
    """Return the aliases that lead to a revision."""
    aliases = client.model(model).aliases
    return [repr(alias.name) for alias in aliases if alias.revision == revision]


@contextmanager
def _as_bundle(source: Path, labels: Path | None, *, quiet: bool) -> Iterator[Path]:
    """Yield the directory of the bundle; for a plain ONNX file, of one that is derived."""
    if source.is_dir() or source.suffix != ".onnx":
        if labels is not None:
            raise typer.BadParameter("a bundle has its own labels", param_hint="--labels")
        if source.is_file():
            raise InvalidBundle(f"{source} is neither the directory of a bundle nor a .onnx file")
        yield source
        return
    try:
        # Not of this distribution, which runs without onnxruntime.
        derive = importlib.import_module("pollard.runtime.derive")
        importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InvalidBundle(
            f"a plain ONNX file needs the runtime, which is not here ({error}); install it with "
            "`pip install 'pollard-runtime[cpu]'`, or push a bundle"
        ) from error
    with tempfile.TemporaryDirectory(prefix="pollard-push-") as folder:
        bundle = derive.derive_bundle(source, Path(folder) / "bundle", labels=labels)
        if not quiet:
            say(f"The manifest derived from {source.name}:\n{derive.describe_derived(bundle)}")
        yield bundle.path


@app.command("list")
def list_models(
    where: Annotated[
        str,
        typer.Option(
            "--filter",
            metavar="FILTER",
            help="Only these: comparisons of `name` and `labels` joined by AND, such as "
            "'labels.team = \"eyes\" AND labels:reviewed'.",
        ),
    ] = "",
    order_by: Annotated[
        str,
        typer.Option(
            metavar="FIELD",
            help='name, create_time or update_time, with " desc" for the other way.',
        ),
    ] = "name",
    deleted: Annotated[
        bool, typer.Option("--deleted", help="Also those that can be brought back.")
    ] = False,
    as_json: JsonOption = False,
    server: Server = MODELS_SERVER,
    timeout: TimeoutOption = _TIMEOUT,
) -> None:
    """List the models."""
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        found = client.models(where=where, order_by=order_by, deleted=deleted)
    if as_json:
        print_json(found)
        return
    if not found and where:
        say(f"No model is such that {where}.")
        return
    if not found:
        say("There are no models yet; `pollard models push DIR --model NAME` adds one.")
        return
    show_table(
        ["MODEL", "REVISIONS", "ALIASES", "CHANGED"],
        [
            [
                model.name,
                str(model.latest_revision),
                ", ".join(models_view.alias_text(item) for item in model.aliases) or "–",
                models_view.when(model.update_time, model.delete_time),
            ]
            for model in found
        ],
    )


@app.command()
def show(
    model: ModelArgument,
    revision: RevisionOption = None,
    where: Annotated[
        str,
        typer.Option(
            "--filter",
            metavar="FILTER",
            help="Only these revisions: comparisons of `state`, `creator`, `bundle_sha256` and "
            "`labels` joined by AND, such as 'state = READY AND labels:reviewed'.",
        ),
    ] = "",
    deleted: Annotated[
        bool, typer.Option("--deleted", help="Also revisions that can be brought back.")
    ] = False,
    as_json: JsonOption = False,
    server: Server = MODELS_SERVER,
    timeout: TimeoutOption = _TIMEOUT,
) -> None:
    """Show a model, or one revision of it.

    A model with its aliases and revisions; a revision with its variants and where it came from.

    Both with how each inference server runs them: workers, threads and joined batches. For one
    revision also what the server measured to choose these.
    """
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        if revision is not None:
            found = client.revision(model, revision=revision)
            servers = known_servers(server, timeout)
            if as_json:
                runs = runs_of(servers, model, revision)
                print_json({**plain(found), "servers": plain(runs)})
                return
            models_view.show_revision(found)
            show_runs(servers, model, revision)
            return
        parent = client.model(model)
        revisions = client.revisions(model, where=where, deleted=deleted)
    servers = known_servers(server, timeout)
    if as_json:
        runs = runs_of(servers, model)
        print_json({"model": parent, "revisions": revisions, "servers": runs})
        return
    models_view.show_model(parent, revisions)
    show_runs(servers, model)


@app.command()
def alias(
    model: ModelArgument,
    name: Annotated[
        str,
        typer.Argument(
            metavar="ALIAS", help="Alias, such as production.", callback=checked_by(checked_alias)
        ),
    ],
    revision: Annotated[
        int | None, typer.Argument(metavar="REVISION", min=1, help="Revision to point it at.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the alias.")] = False,
    allow_signature_change: SignatureOption = False,
    quorum: QuorumOption = None,
    etag: EtagOption = "",
    request_id: RequestIdOption = None,
    wait: WaitOption = True,
    wait_timeout: WaitTimeoutOption = _WAIT,
    server: Server = MODELS_SERVER,
    timeout: TimeoutOption = _TIMEOUT,
) -> None:
    """Point an alias at a revision, or remove it. Requests go on while it moves."""
    if delete == (revision is not None):
        raise typer.BadParameter("give either a REVISION or --delete")
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        if revision is None:
            client.delete_alias(model, name, etag=etag, request_id=request_id)
            say(f"{model}: {name} is removed.")
            return
        found = client.set_alias(
            model,
            name,
            revision,
            etag=etag,
            request_id=request_id,
            allow_signature_change=allow_signature_change,
            quorum=quorum,
            wait=wait,
            wait_timeout=wait_timeout,
        )
    models_view.say_alias(found)


@app.command()
def rollback(
    model: ModelArgument,
    alias: AliasOption = None,
    quorum: QuorumOption = None,
    etag: EtagOption = "",
    request_id: RequestIdOption = None,
    wait: WaitOption = True,
    wait_timeout: WaitTimeoutOption = _WAIT,
    server: Server = MODELS_SERVER,
    timeout: TimeoutOption = _TIMEOUT,
) -> None:
    """Point an alias back at the revision before.

    By default production. Requests go on while it moves.
    """
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        found = client.rollback(
            model,
            alias or "production",
            etag=etag,
            request_id=request_id,
            quorum=quorum,
            wait=wait,
            wait_timeout=wait_timeout,
        )
    models_view.say_alias(found)


rollout.register(app)
edit.register(app)


@app.command()
def pull(
    model: ModelArgument,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to put the bundle; new or empty.")
    ],
    revision: RevisionOption = None,
    alias: AliasOption = None,
    server: Server = MODELS_SERVER,
    timeout: TimeoutOption = _TIMEOUT,
) -> None:
    """Fetch the bundle of a revision.

    By default of the one that production points at.
    """
    if revision is not None and alias is not None:
        raise typer.BadParameter("give --revision or --alias, not both")
    with (
        ModelsClient(server, timeout=timeout, **connection()) as client,
        TransferBar(f"pulling {model}") as moved,
    ):
        found = client.pull(model, directory, revision=revision, alias=alias, progress=moved)
    say(f"{model} revision {found.revision} ({size(found.size_bytes)}) is in {directory}")


copy.register(app)


@app.command()
def delete(
    model: ModelArgument,
    revision: RevisionOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Stop serving the model first; for a whole model.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    etag: EtagOption = "",
    request_id: RequestIdOption = None,
    server: Server = MODELS_SERVER,
    timeout: TimeoutOption = _TIMEOUT,
) -> None:
    """Delete a revision, or a whole model.

    For 30 days `pollard models undelete` brings it back.
    """
    if revision is not None and force:
        raise typer.BadParameter("--force is for a whole model; move the alias away first")
    what = f"revision {revision} of {model}" if revision else f"{model} with all its revisions"
    if not yes and not _confirmed(f"Delete {what}?"):
        fail("nothing was deleted; --yes deletes without asking")
        raise typer.Exit(1)
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        client.delete(model, revision=revision, force=force, etag=etag, request_id=request_id)
    again = f"{model} --revision {revision}" if revision else model
    say(f"Deleted {what}. For 30 days, to bring it back: pollard models undelete {again}")


@app.command()
def undelete(
    model: ModelArgument,
    revision: RevisionOption = None,
    request_id: RequestIdOption = None,
    server: Server = MODELS_SERVER,
    timeout: TimeoutOption = _TIMEOUT,
) -> None:
    """Bring a deleted revision or model back, for 30 days.

    A model comes back with the revisions that were deleted with it, and without its aliases:
    `pollard models alias` serves it again.
    """
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        client.undelete(model, revision=revision, request_id=request_id)
    what = f"revision {revision} of {model}" if revision else model
    say(f"{what} is back. To serve it: pollard models alias {model} production {revision or 'N'}")


@app.command()
def events(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Only this model.",
            callback=checked_by(checked_model),
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most events shown.")] = 20,
    as_json: JsonOption = False,
    server: Server = MODELS_SERVER,
    timeout: TimeoutOption = _TIMEOUT,
) -> None:
    """List the newest changes in the registry."""
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        found = client.events(model, limit=limit)
    if as_json:
        print_json(found)
        return
    if found:
        show_picture(event_view.table(found))
    else:
        say("Nothing has happened yet.")


watch.register(app)


@app.command()
def verify(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Only this model.",
            callback=lambda value: value and checked_model(value),
        ),
    ] = None,
    as_json: JsonOption = False,
    server: Server = MODELS_SERVER,
    timeout: TimeoutOption = _TIMEOUT,
) -> None:
    """Read every stored file again, and name what is damaged.

    Exits with 1 if something is. Nothing is changed. Push the bundle of a damaged file again to
    make it whole.
    """
    with (
        ModelsClient(server, timeout=timeout, **connection()) as client,
        TransferBar("verifying") as moved,
    ):
        found = client.verify(model, progress=moved)
    if as_json:
        print_json(found)
    else:
        for file in found.damaged:
            say(f"The file {file.sha256} is damaged: {file.message}. It belongs to")
            for use in file.uses:
                say(f"  {use}")
        say(
            f"{found.checked_files} files read, {size(found.checked_bytes)}: "
            + (f"{len(found.damaged)} damaged." if found.damaged else "all as they should be.")
        )
        if found.damaged:
            say("Push those bundles again, or restore the files from a backup.")
    if found.damaged:
        raise typer.Exit(1)


def _confirmed(question: str) -> bool:
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:  # there is nobody to ask
        return False


def _is_first(client: ModelsClient, model: str) -> bool:
    try:
        return client.model(model).latest_revision == 0
    except NotFound:
        return True
