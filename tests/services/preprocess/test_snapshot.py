"""Routes and revisions belong together, and what is not there is named."""

from types import MappingProxyType

import pytest

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import StepsInvalid
from pollard.services.preprocess.errors import (
    ModelTakesNoImages,
    RequestInvalid,
    RevisionNotReady,
    RevisionUnknown,
)
from pollard.services.preprocess.snapshot import Selector, ServedModel, ServedRevision, Snapshot


@pytest.fixture
def snapshot(make_bundle) -> Snapshot:
    bundle = make_bundle()
    revisions = {
        number: ServedRevision.build(
            "linear", number, bundle.digest, 1, bundle.manifest, bundle.labels
        )
        for number in (1, 2)
    }
    routes = {"production": ((1, 3), (2, 1)), "canary": ((2, 100),), "nowhere": ((1, 0),)}
    model = ServedModel("linear", MappingProxyType(revisions), MappingProxyType(routes))
    return Snapshot(MappingProxyType({"linear": model}))


def test_revision_alias_and_default(snapshot):
    assert snapshot.choose(Selector("linear", revision=2)).revision == 2
    assert snapshot.choose(Selector("linear", alias="canary")).revision == 2
    chosen = [snapshot.choose(Selector("linear")).revision for _ in range(400)]
    assert 200 < chosen.count(1) < 400


def test_a_sticky_key_always_gets_the_same_revision(snapshot):
    for key in ("a", "b", "c", "d", "e"):
        chosen = {snapshot.choose(Selector("linear", sticky_key=key)).revision for _ in range(20)}
        assert len(chosen) == 1


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        (Selector("other"), "no model 'other'; models are linear"),
        (Selector("linear", revision=7), "no revision 7 that is served; revisions are 1, 2"),
        (Selector("linear", alias="x"), "no alias 'x'; aliases are canary, nowhere, production"),
    ],
)
def test_what_is_unknown_is_said_with_what_there_is(snapshot, selector, words):
    with pytest.raises(RevisionUnknown, match=words):
        snapshot.choose(selector)


def test_an_empty_server_says_so():
    with pytest.raises(RevisionUnknown, match="there are no models here"):
        Snapshot().choose(Selector("linear"))


def test_an_alias_without_weight_is_not_ready(snapshot):
    with pytest.raises(RevisionNotReady):
        snapshot.choose(Selector("linear", alias="nowhere"))


@pytest.mark.parametrize(
    "fields",
    [
        {"model": ""},
        {"model": "linear", "revision": 0},
        {"model": "linear", "revision": -3},
        {"model": "linear", "alias": ""},
        {"model": "linear", "sticky_key": "k" * 2000},
    ],
)
def test_a_selector_that_can_never_be_found_is_refused(fields):
    with pytest.raises(RequestInvalid):
        Selector(**fields)


def build(bundle) -> ServedRevision:
    return ServedRevision.build("m", 1, bundle.digest, 1, bundle.manifest, bundle.labels)


def test_steps_that_do_not_give_what_the_model_takes_are_refused(make_bundle):
    def enlarge(manifest: bundle_pb2.Manifest) -> None:
        manifest.preprocess[1].resize.width = 9

    with pytest.raises(StepsInvalid, match="takes"):
        build(make_bundle(edit=enlarge))


def test_a_model_for_tensors_is_kept_and_takes_no_images(make_bundle):
    def strip(manifest: bundle_pb2.Manifest) -> None:
        manifest.task = bundle_pb2.TASK_RAW
        del manifest.preprocess[:]
        manifest.postprocess.ClearField("classification")

    with pytest.raises(ModelTakesNoImages, match="ModelInfer"):
        build(make_bundle(edit=strip)).image_pipeline()
