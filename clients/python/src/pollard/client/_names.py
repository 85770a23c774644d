"""Resource names, checked before anything is sent."""

from __future__ import annotations

import re
import uuid

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def checked_model(model: str) -> str:
    """Return a model name; "models/NAME" is taken too. Raise ValueError when it is none."""
    name = model.removeprefix("models/")
    _check("model name", model, name)
    return name


def checked_token_name(name: str) -> str:
    """Return the name of who will have a token, or raise ValueError when it is none."""
    _check("name", name, name)
    return name


def _check(what: str, given: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} {given!r} is not valid: use 1 to 63 characters out of a-z, 0-9, '-', '_' and "
            "'.', beginning with a letter or digit"
        )


def checked_alias(alias: str) -> str:
    """Return an alias name, or raise ValueError when it is none."""
    if not _NAME.fullmatch(alias) or alias.isdigit():
        raise ValueError(
            f"alias {alias!r} is not valid: use 1 to 63 characters out of a-z, 0-9, '-', '_' and "
            "'.', beginning with a letter or digit, and not only digits"
        )
    return alias


def checked_revision(revision: int) -> int:
    """Return a revision number, or raise ValueError when it is none."""
    if isinstance(revision, bool) or not isinstance(revision, int) or revision < 1:
        raise ValueError(f"revision must be an integer from 1 on, not {revision!r}")
    return revision


def model_name(model: str) -> str:
    """Return "models/{model}"."""
    return f"models/{checked_model(model)}"


def revision_name(model: str, revision: int) -> str:
    """Return "models/{model}/revisions/{n}"."""
    return f"{model_name(model)}/revisions/{checked_revision(revision)}"


def alias_name(model: str, alias: str) -> str:
    """Return "models/{model}/aliases/{alias}"."""
    return f"{model_name(model)}/aliases/{checked_alias(alias)}"


def rollout_name(model: str, rollout: int) -> str:
    """Return "models/{model}/rollouts/{n}"."""
    if isinstance(rollout, bool) or not isinstance(rollout, int) or rollout < 1:
        raise ValueError(f"rollout must be an integer from 1 on, not {rollout!r}")
    return f"{model_name(model)}/rollouts/{rollout}"


def choice_name(model: str, revision: int | None, alias: str | None) -> str:
    """Return the name of a revision, by number or alias; neither means "production"."""
    if revision is not None and alias is not None:
        raise ValueError("give a revision or an alias, not both")
    if revision is not None:
        return revision_name(model, revision)
    return alias_name(model, alias or "production")


def revision_parts(name: str) -> tuple[str, int]:
    """Return model and number of "models/{model}/revisions/{n}"; empty and 0 of anything else."""
    found = re.fullmatch(r"models/([^/]+)/revisions/([0-9]{1,19})", name)
    return (found[1], int(found[2])) if found else ("", 0)


def request_id_of(given: str | None) -> str:
    """Return the UUID of a request, one that was given or a new one; ValueError when it is none."""
    if given is None:
        return str(uuid.uuid4())
    try:
        if len(given) != 36:
            raise ValueError
        return str(uuid.UUID(given))
    except ValueError:
        raise ValueError(
            f"request id {given!r} is no UUID; uuidgen makes one, such as {uuid.uuid4()}"
        ) from None


def last_part(name: str) -> str:
    """Return what stands behind the last slash of a resource name."""
    return name.rpartition("/")[2]
