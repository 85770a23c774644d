"""The way of a bundle: pushed, listed, switched to, followed by servers, downloaded."""

from __future__ import annotations

from typing import Any

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb


async def test_a_bundle_goes_from_upload_to_the_fleet_and_back(
    suite: Any, bundles: Any, helpers: Any
) -> None:
    inference = await suite.join("infer-1")
    preprocess = await suite.join("pre-1", kind=fleet_pb.SERVER_KIND_PREPROCESS)
    bundle = bundles.make(1)

    pushed = await suite.client.push(helpers.packed(bundle), notes="first", labels={"a": "b"})
    assert not pushed.existed
    revision = pushed.revision
    assert revision.name == "models/m/revisions/1"
    assert revision.bundle_sha256 == bundle.digest
    assert revision.state == pb.Revision.STATE_CHECKED
    assert revision.manifest == bundle.manifest
    assert (revision.notes, dict(revision.labels)) == ("first", {"a": "b"})

    listed = await suite.client.models.ListModels(pb.ListModelsRequest())
    assert [model.name for model in listed.models] == ["models/m"]
    assert listed.models[0].latest_revision == 1

    alias = await suite.client.set_alias(1)
    assert alias.state == pb.Alias.STATE_LOADING
    assert (alias.revision, alias.pending_revision) == (0, 1)
    alias = await suite.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)
    assert (alias.revision, alias.pending_revision, alias.previous_revision) == (1, 0, 0)
    for server in (inference, preprocess):
        loading = await server.state_when(lambda s: helpers.revisions_of(s) == [1])
        assert loading.models[0].revisions[0].bundle_sha256 == bundle.digest
        assert loading.models[0].revisions[0].size_bytes == bundle.size_bytes
        routed = await server.state_when(lambda s: helpers.route_of(s) == 1)
        assert routed.version > loading.version
    assert not inference.states[-1].inference_endpoints
    assert [e.address for e in preprocess.states[-1].inference_endpoints] == ["infer-1:1"]

    got = (
        await suite.client.models.GetRevision(
            pb.GetRevisionRequest(name="models/m/aliases/production")
        )
    ).revision
    assert got.state == pb.Revision.STATE_READY
    assert list(got.aliases) == ["production"]

    files = await suite.client.download(name="models/m/aliases/production")
    assert next(iter(files)) == "manifest.json"
    assert files == {
        path: (bundle.path / path).read_bytes() for path in ("manifest.json", "cpu-fp32/model.onnx")
    }
