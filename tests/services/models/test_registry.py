"""Models, revisions and their rules, over gRPC."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb

CODE = grpc.StatusCode


@pytest.fixture
def refused(helpers: Any) -> Any:
    """Awaits a call that must fail; gives the reason."""

    async def check(call: Any, code: grpc.StatusCode) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == code, caught.value.details()
        reason: str = helpers.info_of(caught.value).reason
        return reason

    return check


async def test_revisions_count_up_and_a_known_bundle_gives_its_revision_again(
    suite: Any, bundles: Any
) -> None:
    first, second = bundles.tar(1), bundles.tar(2)
    assert (await suite.client.push(first)).revision.revision == 1
    assert (await suite.client.push(second)).revision.revision == 2
    again = await suite.client.push(first)
    assert again.existed
    assert again.revision.revision == 1
    other = await suite.client.push(first, "other")
    assert not other.existed
    assert other.revision.name == "models/other/revisions/1"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "models/",
        "models/UPPER",
        "models/-dash",
        "models/a b",
        "models/../../etc",
        "models/a/b",
        "models/ü",
        "models/" + "a" * 64,
        "models/a\x00b",
        "models/a\n",
        "models/%2e%2e",
        "other/a",
        "models/🦊",
    ],
)
async def test_odd_names_are_refused_everywhere(suite: Any, refused: Any, name: str) -> None:
    models = suite.client.models
    bad = CODE.INVALID_ARGUMENT
    assert await refused(models.GetModel(pb.GetModelRequest(name=name)), bad) == "NAME_INVALID"
    for call in (
        models.DeleteModel(pb.DeleteModelRequest(name=name)),
        models.ListRevisions(pb.ListRevisionsRequest(parent=name)),
        models.GetRevision(pb.GetRevisionRequest(name=f"{name}/revisions/1")),
        models.SetAlias(pb.SetAliasRequest(name=f"{name}/aliases/production", revision=1)),
        models.GetUpload(pb.GetUploadRequest(parent=name, upload_id=str(uuid.uuid4()))),
        suite.client.send(pb.UploadHeader(parent=name, upload_id=str(uuid.uuid4())), b""),
    ):
        await refused(call, bad)


@pytest.mark.parametrize("tail", ["0", "-1", "01", "x", "", "1e3", "9" * 30, "１"])
async def test_odd_revision_numbers_are_refused(suite: Any, refused: Any, tail: str) -> None:
    request = pb.GetRevisionRequest(name=f"models/m/revisions/{tail}")
    assert await refused(suite.client.models.GetRevision(request), CODE.INVALID_ARGUMENT)


async def test_an_alias_of_digits_is_refused(suite: Any, bundles: Any, refused: Any) -> None:
    await suite.client.push(bundles.tar())
    await refused(suite.client.set_alias(1, alias="12"), CODE.INVALID_ARGUMENT)
    await refused(suite.client.push(bundles.tar(), alias="7"), CODE.INVALID_ARGUMENT)


async def test_what_does_not_exist_is_not_found(suite: Any, bundles: Any, refused: Any) -> None:
    models = suite.client.models
    gone = CODE.NOT_FOUND
    name = "models/none"
    assert await refused(models.GetModel(pb.GetModelRequest(name=name)), gone) == "MODEL_NOT_FOUND"
    await suite.client.push(bundles.tar())
    assert await refused(suite.client.set_alias(2), gone) == "REVISION_NOT_FOUND"
    assert await refused(suite.client.alias(), gone) == "ALIAS_NOT_FOUND"
    assert await refused(suite.client.download(name="models/m/revisions/9"), gone)
    assert await refused(suite.client.download(bundle_sha256="0" * 64), gone) == "BUNDLE_NOT_FOUND"
    files = suite.client.download(name="models/m/revisions/1", paths=["nothing"])
    assert await refused(files, gone) == "FILE_NOT_FOUND"
    deleting = models.DeleteAlias(pb.DeleteAliasRequest(name="models/m/aliases/production"))
    assert await refused(deleting, gone) == "ALIAS_NOT_FOUND"


async def test_pages_cover_everything_once_in_order(suite: Any, bundles: Any, refused: Any) -> None:
    tar = bundles.tar()
    for number in range(7):
        await suite.client.push(tar, f"m{number}")

    async def pages(**how: Any) -> list[str]:
        found, token = [], ""
        while True:
            request = pb.ListModelsRequest(page_size=3, page_token=token, **how)
            page = await suite.client.models.ListModels(request)
            assert len(page.models) <= 3
            found += [model.name for model in page.models]
            token = page.next_page_token
            if not token:
                return found

    expected = [f"models/m{number}" for number in range(7)]
    assert await pages() == expected
    assert await pages(order_by="name desc") == expected[::-1]
    assert await pages(order_by="create_time desc") == expected[::-1]
    token = (
        await suite.client.models.ListModels(pb.ListModelsRequest(page_size=1))
    ).next_page_token
    bad = CODE.INVALID_ARGUMENT
    for request in (
        pb.ListModelsRequest(page_size=-1),
        pb.ListModelsRequest(page_token="rubbish"),
        pb.ListModelsRequest(page_token=token, order_by="name desc"),
        pb.ListModelsRequest(order_by="colour"),
    ):
        assert await refused(suite.client.models.ListModels(request), bad)


async def test_revisions_are_listed_newest_first_without_manifests(
    suite: Any, bundles: Any
) -> None:
    for seed in range(4):
        await suite.client.push(bundles.tar(seed))
    request = pb.ListRevisionsRequest(parent="models/m", page_size=3)
    page = await suite.client.models.ListRevisions(request)
    assert [revision.revision for revision in page.revisions] == [4, 3, 2]
    assert not any(revision.HasField("manifest") for revision in page.revisions)
    request.page_token = page.next_page_token
    page = await suite.client.models.ListRevisions(request)
    assert [revision.revision for revision in page.revisions] == [1]
    assert not page.next_page_token


async def test_updates_change_what_the_mask_says(suite: Any, bundles: Any, refused: Any) -> None:
    await suite.client.push(bundles.tar(), notes="old", labels={"k": "v"})
    models = suite.client.models
    changed = await models.UpdateRevision(
        pb.UpdateRevisionRequest(
            revision=pb.Revision(name="models/m/revisions/1", notes="new"),
        )
    )
    assert (changed.revision.notes, dict(changed.revision.labels)) == ("new", {"k": "v"})
    changed = await models.UpdateRevision(
        pb.UpdateRevisionRequest(
            revision=pb.Revision(name="models/m/revisions/1", notes="newer"),
            update_mask=FieldMask(paths=["*"]),
        )
    )
    assert (changed.revision.notes, dict(changed.revision.labels)) == ("newer", {})
    model = (
        await models.UpdateModel(
            pb.UpdateModelRequest(
                model=pb.Model(name="models/m", description="d", labels={"x": "y"}),
                update_mask=FieldMask(paths=["labels"]),
            )
        )
    ).model
    assert (model.description, dict(model.labels)) == ("", {"x": "y"})
    wrong = pb.UpdateModelRequest(
        model=pb.Model(name="models/m"), update_mask=FieldMask(paths=["create_time"])
    )
    assert await refused(models.UpdateModel(wrong), CODE.INVALID_ARGUMENT) == "FIELD_MASK_INVALID"
    many = pb.UpdateModelRequest(
        model=pb.Model(name="models/m", labels={str(number): "" for number in range(65)})
    )
    assert await refused(models.UpdateModel(many), CODE.INVALID_ARGUMENT) == "LABELS_INVALID"


async def test_an_old_etag_is_aborted_and_of_many_writers_one_wins(
    suite: Any, bundles: Any, helpers: Any
) -> None:
    await suite.client.push(bundles.tar())
    etag = (await suite.client.models.GetModel(pb.GetModelRequest(name="models/m"))).model.etag

    async def write(number: int) -> Any:
        request = pb.UpdateModelRequest(
            model=pb.Model(name="models/m", description=f"writer {number}", etag=etag)
        )
        return (await suite.client.models.UpdateModel(request)).model.description

    outcomes = await asyncio.gather(*map(write, range(32)), return_exceptions=True)
    answers = [outcome for outcome in outcomes if isinstance(outcome, str)]
    errors = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert (len(answers), len(errors)) == (1, 31)
    assert {error.code() for error in errors} == {CODE.ABORTED}
    assert {helpers.info_of(error).reason for error in errors} == {"ETAG_MISMATCH"}
    model = (await suite.client.models.GetModel(pb.GetModelRequest(name="models/m"))).model
    assert model.description == answers[0]
    assert model.etag != etag


async def test_every_change_of_an_alias_is_guarded_by_its_etag(
    suite: Any, bundles: Any, refused: Any
) -> None:
    for seed in (1, 2):
        await suite.client.push(bundles.tar(seed))
    await suite.client.set_alias(1)
    active = await suite.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)
    assert await refused(suite.client.set_alias(2, etag="0"), CODE.ABORTED) == "ETAG_MISMATCH"
    await suite.client.set_alias(2, etag=active.etag)
    name = "models/m/aliases/production"
    models = suite.client.models
    rollback = models.RollbackAlias(pb.RollbackAliasRequest(name=name, etag=active.etag))
    assert await refused(rollback, CODE.ABORTED)
    deletion = models.DeleteAlias(pb.DeleteAliasRequest(name=name, etag=active.etag))
    assert await refused(deletion, CODE.ABORTED)
    assert await refused(suite.client.set_alias(1, alias="new", etag="5"), CODE.ABORTED)


async def test_a_request_id_makes_a_change_happen_once(
    suite: Any, bundles: Any, refused: Any
) -> None:
    for seed in (1, 2):
        await suite.client.push(bundles.tar(seed))
    request = pb.SetAliasRequest(
        name="models/m/aliases/production", revision=1, request_id=str(uuid.uuid4())
    )
    first = await suite.client.models.SetAlias(request)
    await suite.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)
    await suite.client.set_alias(2)
    await suite.client.alias_when(lambda a: a.revision == 2)
    assert await suite.client.models.SetAlias(request) == first
    assert (await suite.client.alias()).revision == 2
    request.revision = 2
    call = suite.client.models.SetAlias(request)
    assert await refused(call, CODE.INVALID_ARGUMENT) == "REQUEST_ID_REUSED"
    request.request_id = "not a uuid"
    assert await refused(suite.client.models.SetAlias(request), CODE.INVALID_ARGUMENT)
    delete = pb.DeleteModelRequest(name="models/m", force=True, request_id=str(uuid.uuid4()))
    once = await suite.client.models.DeleteModel(delete)
    await suite.restart()
    assert await suite.client.models.DeleteModel(delete) == once


async def test_a_changed_input_signature_needs_permission(
    suite: Any, bundles: Any, refused: Any
) -> None:
    await suite.client.push(bundles.tar(1, size=4), alias="production")
    await suite.client.alias_when(lambda a: a.revision == 1)
    await suite.client.push(bundles.tar(2, size=6))
    call = suite.client.set_alias(2)
    assert await refused(call, CODE.FAILED_PRECONDITION) == "SIGNATURE_CHANGED"
    assert (await suite.client.alias()).revision == 1
    await suite.client.set_alias(2, allow_signature_change=True)
    await suite.client.alias_when(lambda a: a.revision == 2)
    # Going back needs none: clients could use the earlier one before.
    request = pb.RollbackAliasRequest(name="models/m/aliases/production")
    await suite.client.models.RollbackAlias(request)
    await suite.client.alias_when(lambda a: a.revision == 1)


async def test_an_upload_whose_alias_is_refused_stores_nothing_and_can_be_finished(
    suite: Any, bundles: Any, refused: Any
) -> None:
    await suite.client.push(bundles.tar(1, size=4), alias="production")
    await suite.client.alias_when(lambda a: a.revision == 1)
    tar = bundles.tar(2, size=6)
    header = suite.client.header(tar, alias="production")
    call = suite.client.send(header, tar)
    assert await refused(call, CODE.FAILED_PRECONDITION) == "SIGNATURE_CHANGED"
    listed = await suite.client.models.ListRevisions(pb.ListRevisionsRequest(parent="models/m"))
    assert len(listed.revisions) == 1
    header.write_offset = len(tar)
    header.allow_signature_change = True
    assert (await suite.client.send(header, tar)).revision.revision == 2
    await suite.client.alias_when(lambda a: a.revision == 2)


async def test_what_is_in_use_is_not_deleted(suite: Any, bundles: Any, refused: Any) -> None:
    models = suite.client.models
    for seed in (1, 2):
        await suite.client.push(bundles.tar(seed))
    await suite.client.set_alias(1)
    await suite.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)
    no = CODE.FAILED_PRECONDITION
    first = pb.DeleteRevisionRequest(name="models/m/revisions/1")
    assert await refused(models.DeleteRevision(first), no) == "REVISION_IN_USE"
    deletion = models.DeleteModel(pb.DeleteModelRequest(name="models/m"))
    assert await refused(deletion, no) == "MODEL_IN_USE"
    await models.DeleteAlias(pb.DeleteAliasRequest(name="models/m/aliases/production"))
    assert await refused(models.DeleteRevision(first), no) == "REVISION_DRAINING"
    await models.DeleteRevision(pb.DeleteRevisionRequest(name="models/m/revisions/2"))


async def test_deleted_revisions_and_models_come_back(
    suite: Any, bundles: Any, refused: Any
) -> None:
    models = suite.client.models
    for seed in (1, 2):
        await suite.client.push(bundles.tar(seed))
    gone = (
        await models.DeleteRevision(pb.DeleteRevisionRequest(name="models/m/revisions/1"))
    ).revision
    assert gone.HasField("delete_time")
    listing = pb.ListRevisionsRequest(parent="models/m")
    assert len((await models.ListRevisions(listing)).revisions) == 1
    assert await refused(suite.client.set_alias(1), CODE.NOT_FOUND) == "REVISION_DELETED"
    back = pb.UndeleteRevisionRequest(name="models/m/revisions/1")
    assert not (await models.UndeleteRevision(back)).revision.HasField("delete_time")
    assert await refused(models.UndeleteRevision(back), CODE.FAILED_PRECONDITION) == "NOT_DELETED"

    await models.DeleteRevision(pb.DeleteRevisionRequest(name="models/m/revisions/2"))
    await models.DeleteModel(pb.DeleteModelRequest(name="models/m"))
    assert not (await models.ListModels(pb.ListModelsRequest())).models
    assert (await models.ListModels(pb.ListModelsRequest(show_deleted=True))).models
    assert await refused(models.ListRevisions(listing), CODE.NOT_FOUND) == "MODEL_DELETED"
    await models.UndeleteModel(pb.UndeleteModelRequest(name="models/m"))
    assert [r.revision for r in (await models.ListRevisions(listing)).revisions] == [1]


async def test_pushing_to_a_deleted_model_brings_it_back_and_numbers_go_on(
    suite: Any, bundles: Any
) -> None:
    await suite.client.push(bundles.tar(1))
    await suite.client.models.DeleteModel(pb.DeleteModelRequest(name="models/m"))
    assert (await suite.client.push(bundles.tar(2))).revision.revision == 2
    listing = pb.ListRevisionsRequest(parent="models/m")
    listed = await suite.client.models.ListRevisions(listing)
    assert [r.revision for r in listed.revisions] == [2]
    assert (await suite.client.push(bundles.tar(1))).revision.revision == 1


async def test_force_stops_serving_a_model_and_drains_it(
    suite: Any, bundles: Any, helpers: Any
) -> None:
    server = await suite.join("s")
    await suite.client.push(bundles.tar(1), alias="production")
    await suite.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)
    seen = len(server.states)
    await suite.client.models.DeleteModel(pb.DeleteModelRequest(name="models/m", force=True))
    await server.state_when(lambda s: s in server.states[seen:] and not helpers.revisions_of(s))
    # Requests in flight were first given their time.
    assert helpers.revisions_of(server.states[seen]) == [1]
    assert helpers.route_of(server.states[seen]) is None


async def test_every_change_is_in_the_audit_log(suite: Any, bundles: Any) -> None:
    await suite.client.push(bundles.tar(1), alias="production")
    await suite.client.push(bundles.tar(1), "other")
    await suite.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)
    request = pb.ListEventsRequest(model="models/m")
    events = (await suite.client.models.ListEvents(request)).events
    assert [event.action for event in events] == [
        "ALIAS_ACTIVE",
        "ALIAS_SWITCHED",
        "ALIAS_SET",
        "REVISION_UPLOADED",
        "MODEL_CREATED",
    ]
    assert {event.actor for event in events} == {"ipv4:127.0.0.1", "manager"}
    assert events[3].resource == "models/m/revisions/1"
    page = await suite.client.models.ListEvents(pb.ListEventsRequest(page_size=4))
    assert len(page.events) == 4
    rest = await suite.client.models.ListEvents(
        pb.ListEventsRequest(page_size=100, page_token=page.next_page_token)
    )
    sequences = [event.sequence for event in [*page.events, *rest.events]]
    assert sequences == list(range(len(sequences), 0, -1))


async def test_everything_is_there_after_a_restart(suite: Any, bundles: Any) -> None:
    bundle = bundles.make(1)
    await suite.join("s", kind=fleet_pb.SERVER_KIND_INFERENCE)
    await suite.client.push(bundles.tar(1), alias="production", notes="kept")
    before = await suite.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)
    await suite.restart()
    assert await suite.client.alias() == before
    files = await suite.client.download(bundle_sha256=bundle.digest)
    assert set(files) == {"manifest.json", "cpu-fp32/model.onnx"}
