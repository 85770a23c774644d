"""One model of the fleet's desired state, as inference and preprocess servers carry it out: where
its aliases lead, which requests are copied, and what a server tells of it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import TypeVar

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.services.common.shadows import ShadowRule

Route = tuple[tuple[int, int], ...]
"""Pairs of revision and weight."""

Revision = TypeVar("Revision")


def follow_routes(
    desired: fleet_pb.DesiredModel,
    available: Mapping[int, Revision],
    routes: Mapping[str, Route],
    revisions: Mapping[int, Revision],
) -> tuple[dict[str, Route], dict[int, Revision]]:
    """Return where the aliases lead from now on, and the revisions that are served.

    An alias whose new targets do not all run here stays where it was, and keeps what it leads to.

    Args:
        desired: What the manager wants.
        available: Of the wanted revisions, those that run here, by number.
        routes: Where aliases led until now.
        revisions: What was served until now, by number.
    """
    followed: dict[str, Route] = {}
    for route in desired.routes:
        targets = tuple((target.revision, target.weight) for target in route.targets)
        if all(number in available for number, _ in targets):
            followed[route.alias] = targets
        elif route.alias in routes:
            followed[route.alias] = routes[route.alias]
    needed = {number for targets in followed.values() for number, _ in targets}
    kept = {number: revisions[number] for number in needed - available.keys()}
    return followed, dict(sorted({**kept, **available}.items()))


def follow_shadows(
    desired: fleet_pb.DesiredModel, routes: Container[str], revisions: Container[int]
) -> dict[str, ShadowRule]:
    """Return the shadows that can be carried out, by alias; each order looks again.

    Args:
        desired: What the manager wants.
        routes: The aliases that lead somewhere here.
        revisions: What is served here: both revisions of a rule have to be.
    """
    rules = {
        route.alias: ShadowRule.of(route.shadow)
        for route in desired.routes
        if route.HasField("shadow") and route.alias in routes
    }
    return {
        alias: rule
        for alias, rule in rules.items()
        if rule.revision in revisions and rule.base_revision in revisions
    }


def tell_model(
    name: str,
    revisions: Iterable[fleet_pb.DesiredRevision],
    routes: Mapping[str, Route],
    shadows: Mapping[str, ShadowRule],
) -> fleet_pb.DesiredModel:
    """Return what is served of a model in the form in which it is desired."""
    return fleet_pb.DesiredModel(
        model=name,
        revisions=revisions,
        routes=[
            fleet_pb.Route(
                alias=alias,
                targets=[
                    fleet_pb.WeightedRevision(revision=number, weight=weight)
                    for number, weight in targets
                ],
                shadow=shadows[alias].to_proto() if alias in shadows else None,
            )
            for alias, targets in routes.items()
        ],
    )
