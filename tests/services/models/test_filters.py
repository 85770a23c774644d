"""Lists, filtered and ordered; many writers at once."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from hypothesis import given
from hypothesis import strategies as st

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import InvalidRequest
from pollard.services.models.filters import model_conditions, revision_conditions

ODD = 'it\'s "odd".\\ =é'


@pytest.fixture
async def labelled(suite: Any, bundles: Any) -> Any:
    """Models a, b and c with labels; the client's stub."""
    tar = bundles.tar(1)
    models = suite.client.models
    for name, labels in (
        ("a", {"team": "eyes", "reviewed": ""}),
        ("b", {"team": "ears", "reviewed": "by me"}),
        ("c", {"team": "eyes", "v": "1.2", ODD: ODD}),
    ):
        await suite.client.push(tar, name)
        await models.UpdateModel(
            pb.UpdateModelRequest(model=pb.Model(name=f"models/{name}", labels=labels))
        )
    return models


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


async def names_of(models: Any, **query: Any) -> str:
    found, token = "", ""
    while True:
        page = await models.ListModels(pb.ListModelsRequest(page_size=1, page_token=token, **query))
        found += "".join(model.name.removeprefix("models/") for model in page.models)
        token = page.next_page_token
        if not token:
            return found


async def test_models_are_filtered_over_all_pages(labelled: Any) -> None:
    for text, expected in (
        ("", "abc"),
        ("  ", "abc"),
        ("name = b", "b"),
        ('name="models/b"', "b"),
        ("labels.team = eyes", "ac"),
        ("labels.team='ears'", "b"),
        ("labels:reviewed", "ab"),
        ("labels.reviewed:*", "ab"),
        ('labels.reviewed = ""', "a"),
        ('labels.team = eyes AND labels:reviewed AND name = "models/a"', "a"),
        ("labels.v = 1.2", "c"),
        ("labels:unknown", ""),
        (f"labels.{quoted(ODD)} = {quoted(ODD)}", "c"),
        (f"labels:{quoted(ODD)}", "c"),
        ('labels.team = "eyes\' OR 1=1 --"', ""),
    ):
        assert await names_of(labelled, filter=text) == expected, text
    assert await names_of(labelled, filter="labels.team = eyes", order_by="name desc") == "ca"


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "name =",
        "name = ",
        "= a",
        "name != a",
        "name > a",
        "name:a",
        "name = a OR name = b",
        "name = a name = b",
        "name = a AND",
        "AND name = a",
        "NOT name = a",
        "(name = a)",
        "name = *",
        "labels = a",
        "labels.a",
        "labels.a:b",
        "labels:*",
        "labels. a = b",
        "unknown = a",
        "name.x = a",
        'name = "a',
        "name = models/a/b",
        "description = a",
        "a" * 5000,
        " AND ".join(["labels:a"] * 40),
    ],
)
def test_what_is_not_offered_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"filter:") as caught:
        model_conditions(text)
    assert len(str(caught.value)) < 500


@given(st.text())
def test_any_text_is_either_understood_or_refused(text: str) -> None:
    for conditions in (model_conditions, revision_conditions):
        with contextlib.suppress(InvalidRequest):
            conditions(text)


@given(st.text(), st.text(min_size=1))
def test_quoted_keys_and_values_are_taken_as_they_are(value: str, key: str) -> None:
    (found,) = model_conditions(f"labels.{quoted(key)} = {quoted(value)}")
    assert set(found.compile().params.values()) >= {key, value}


async def test_revisions_are_filtered_and_ordered(suite: Any, bundles: Any, helpers: Any) -> None:
    models = suite.client.models
    pushed = [await suite.client.push(bundles.tar(seed)) for seed in (1, 2, 3)]
    await models.UpdateRevision(
        pb.UpdateRevisionRequest(
            revision=pb.Revision(name="models/m/revisions/2", labels={"good": "yes"})
        )
    )

    async def numbers(**query: Any) -> list[int]:
        found, token = [], ""
        while True:
            request = pb.ListRevisionsRequest(
                parent="models/m", page_size=2, page_token=token, **query
            )
            page = await models.ListRevisions(request)
            found += [each.revision for each in page.revisions]
            token = page.next_page_token
            if not token:
                return found

    assert await numbers() == [3, 2, 1]
    assert await numbers(order_by="revision") == [1, 2, 3]
    assert await numbers(order_by="create_time desc") == [3, 2, 1]
    assert await numbers(filter="labels:good") == [2]
    assert await numbers(filter="state = CHECKED") == [3, 2, 1]
    assert await numbers(filter="state = STATE_FAILED") == []
    digest = pushed[0].revision.bundle_sha256
    assert await numbers(filter=f"bundle_sha256 = {digest} AND state = STATE_CHECKED") == [1]
    for query in ({"filter": "state = FINE"}, {"filter": "name = m"}, {"order_by": "notes"}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await numbers(**query)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    page = await models.ListRevisions(
        pb.ListRevisionsRequest(parent="models/m", page_size=1, filter="state = CHECKED")
    )
    other = pb.ListRevisionsRequest(parent="models/m", page_token=page.next_page_token)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await models.ListRevisions(other)
    assert helpers.info_of(caught.value).reason == "PAGE_TOKEN_INVALID"


@pytest.mark.long
async def test_of_32_writers_that_try_again_none_is_lost(
    suite: Any, bundles: Any, helpers: Any
) -> None:
    """Each reads, adds its own label, and writes back under the etag that it read."""
    await suite.client.push(bundles.tar(1))
    models = suite.client.models

    async def add(writer: int) -> int:
        refusals = 0
        while True:
            got = (await models.GetModel(pb.GetModelRequest(name="models/m"))).model
            got.labels[f"writer-{writer}"] = str(len(got.labels))
            request = pb.UpdateModelRequest(model=got, update_mask=FieldMask(paths=["labels"]))
            try:
                await models.UpdateModel(request)
                return refusals
            except grpc.aio.AioRpcError as error:
                if helpers.info_of(error).reason != "ETAG_MISMATCH":
                    raise
                refusals += 1

    refusals = sum(await asyncio.gather(*map(add, range(32))))
    assert refusals > 0
    labels = (await models.GetModel(pb.GetModelRequest(name="models/m"))).model.labels
    assert sorted(map(int, labels.values())) == list(range(32))
    events = await models.ListEvents(pb.ListEventsRequest(model="models/m", page_size=1000))
    assert [event.action for event in events.events].count("MODEL_UPDATED") == 32
