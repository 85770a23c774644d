from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.services.common.desired import follow_routes, follow_shadows, tell_model
from pollard.services.common.shadows import ShadowRule

numbers = st.integers(1, 6)
routes = st.dictionaries(
    st.sampled_from(["production", "canary", "next"]),
    st.lists(st.tuples(numbers, st.integers(0, 100)), min_size=1, max_size=3).map(tuple),
)


def wanted(led: dict[str, tuple[tuple[int, int], ...]]) -> fleet_pb.DesiredModel:
    return tell_model("m", [], led, {})


def test_an_alias_follows_once_all_its_targets_run_here():
    desired = wanted({"production": ((1, 95), (2, 5)), "next": ((3, 1),)})
    followed, served = follow_routes(desired, {1: "one", 2: "two"}, {}, {})
    assert followed == {"production": ((1, 95), (2, 5))}
    assert served == {1: "one", 2: "two"}


def test_an_alias_whose_target_does_not_run_stays_and_keeps_what_it_leads_to():
    desired = wanted({"production": ((3, 1),), "canary": ((2, 1),)})
    before = {"production": ((1, 1),), "canary": ((1, 1),)}
    followed, served = follow_routes(desired, {2: "two"}, before, {1: "one"})
    assert followed == {"production": ((1, 1),), "canary": ((2, 1),)}
    assert list(served.items()) == [(1, "one"), (2, "two")]


def test_an_alias_that_is_wanted_no_more_is_gone_with_what_only_it_led_to():
    followed, served = follow_routes(
        wanted({}), {2: "two"}, {"production": ((1, 1),)}, {1: "one", 2: "two"}
    )
    assert followed == {}
    assert served == {2: "two"}


@given(routes, st.sets(numbers), routes)
def test_whatever_is_wanted_every_alias_leads_to_what_is_served(desired, running, before):
    ran = {number: f"old-{number}" for targets in before.values() for number, _ in targets}
    available = {number: f"new-{number}" for number in running}
    followed, served = follow_routes(wanted(desired), available, before, ran)
    assert followed.keys() <= desired.keys()
    assert followed.keys() >= desired.keys() & before.keys()  # no alias that led somewhere is lost
    for alias, targets in followed.items():
        assert targets in (desired[alias], before.get(alias))
        assert {number for number, _ in targets} <= served.keys()
    assert available.items() <= served.items()  # a newer one of the same number wins
    used = {number for targets in followed.values() for number, _ in targets}
    assert served.keys() <= available.keys() | used
    assert list(served) == sorted(served)


def shadowed(alias: str, *, revision: int, base: int) -> fleet_pb.Route:
    shadow = fleet_pb.Shadow(revision=revision, base_revision=base, share_ppm=100_000)
    return fleet_pb.Route(
        alias=alias,
        targets=[fleet_pb.WeightedRevision(revision=base, weight=1)],
        shadow=shadow,
    )


def test_a_shadow_begins_once_both_revisions_are_served_and_its_alias_leads_somewhere():
    desired = fleet_pb.DesiredModel(
        model="m", routes=[shadowed("production", revision=2, base=1), *wanted({"next": ()}).routes]
    )
    rule = ShadowRule.of(desired.routes[0].shadow)
    assert follow_shadows(desired, {"production"}, {1, 2}) == {"production": rule}
    assert follow_shadows(desired, {"production"}, {1}) == {}
    assert follow_shadows(desired, {"production"}, {2}) == {}
    assert follow_shadows(desired, {"next"}, {1, 2}) == {}


@given(routes)
def test_what_is_told_can_be_desired(led):
    rule = ShadowRule.of(fleet_pb.Shadow(revision=2, base_revision=1, share_ppm=100_000))
    revisions = [fleet_pb.DesiredRevision(revision=number) for number in range(1, 7)]
    told = tell_model("m", revisions, led, {"production": rule})
    assert told.model == "m"
    assert list(told.revisions) == revisions
    everything = dict.fromkeys(range(1, 7), "")
    assert follow_routes(told, everything, {}, {})[0] == led
    shadows = follow_shadows(told, led, everything)
    assert shadows == ({"production": rule} if "production" in led else {})
