"""Whether a switch of an alias has ended, and how."""

from __future__ import annotations

from pollard.client.errors import AliasSwitchFailed
from pollard.client.types import Alias


def has_moved(alias: Alias, revision: int) -> bool:
    """Say whether a switch to a revision has succeeded.

    Raises:
        AliasSwitchFailed: It can no longer succeed: it failed, or another one overtook it.
    """
    if alias.state == "ACTIVE" and alias.revision == revision:
        return True
    if alias.state in ("LOADING", "SWITCHING") and revision in (
        alias.pending_revision,
        alias.revision,
    ):
        return False
    name = f"models/{alias.model}/aliases/{alias.name}"
    serving = (
        f"requests still go to revision {alias.revision}"
        if alias.revision
        else ("requests that name it are not answered yet")
    )
    if alias.state == "FAILED":
        reasons = "; ".join(f"{item.server_id}: {item.message}" for item in alias.failures)
        raise AliasSwitchFailed(
            f"alias {alias.name!r} of {alias.model!r} did not move to revision {revision}, "
            f"{serving}: {reasons or alias.error or 'no reason was given'}",
            alias=name,
            wanted=revision,
            serving=alias.revision,
            failures=alias.failures,
        )
    raise AliasSwitchFailed(
        f"alias {alias.name!r} of {alias.model!r} was moved elsewhere before it reached revision "
        f"{revision}; {serving}",
        alias=name,
        wanted=revision,
        serving=alias.revision,
    )
