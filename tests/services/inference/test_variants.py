"""A fleet of different machines: each server takes the variant that it can run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pollard.bundle.v1 import bundle_pb2
from pollard.client import AliasSwitchFailed, AsyncModelsClient
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.bundle import Bundle, write_bundle
from pollard.runtime.machine import Machine
from pollard.services.models.main import build_server
from pollard.services.models.settings import ModelsSettings

# Any that is here, whatever the machine: the servers are told to do without it.
FEATURE = sorted(Machine.detect().cpu_features or {"none"})[0]


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[str]:
    """A real manager; its address."""
    service = build_server(ModelsSettings(store=tmp_path / "store", port=0, drain_seconds=0.1))
    await service.start()
    yield service.address
    await service.stop(1.0)


def several(tmp_path: Path, base: Bundle, *needs: tuple[str, ...]) -> Bundle:
    """A bundle with one variant for each of `needs`, all of the same graph."""
    manifest = bundle_pb2.Manifest()
    manifest.CopyFrom(base.manifest)
    plain = bundle_pb2.Variant()
    plain.CopyFrom(manifest.variants[0])
    del manifest.variants[:]
    files: dict[str, bytes | Path] = {"labels.txt": base.path / "labels.txt"}
    for number, features in enumerate(needs):
        variant = manifest.variants.add()
        variant.CopyFrom(plain)
        variant.name = f"v{number}"
        variant.model_file, variant.golden_file = f"v{number}/model.onnx", f"v{number}/golden.npz"
        variant.requirements.cpu_features.extend(features)
        files[variant.model_file] = base.path / plain.model_file
        files[variant.golden_file] = base.path / plain.golden_file
    return write_bundle(tmp_path / f"several-{len(needs)}-{base.digest[:8]}", manifest, files)


async def test_each_server_takes_what_it_can_run_and_a_refusal_stops_the_switch(
    registry, start_server, make_bundle, tmp_path
) -> None:
    able = await start_server(registry, cache_dir=tmp_path / "able", server_id="able")
    unable = await start_server(
        registry,
        cache_dir=tmp_path / "unable",
        server_id="unable",
        without_cpu_features=(FEATURE,),
    )
    async with AsyncModelsClient(registry) as models:
        both = several(tmp_path, make_bundle(1.0), (FEATURE,), ())
        await models.push(both.path, "adder", alias="production")
        chosen = {
            server.server_id: server.revisions[0].variant for server in await models.servers()
        }
        assert chosen == {"able": "v0", "unable": "v1"}

        only = several(tmp_path, make_bundle(2.0), (FEATURE,))
        with pytest.raises(AliasSwitchFailed) as raised:
            await models.push(only.path, "adder", alias="production")
        (failure,) = raised.value.failures
        assert failure.server_id == "unable"
        assert f"needs the processor features {FEATURE}" in failure.message
        assert failure.reason == "REQUIREMENTS_NOT_MET"
        # Neither has moved.
        assert (await models.alias("adder")).revision == 1
        for server in (able, unable):
            assert list(server.engine.table.models["adder"].routes.values()) == [((1, 1),)]


def test_one_kind_of_vnni_is_as_good_as_the_other() -> None:
    variant = bundle_pb2.Variant(target="cpu-int8")
    variant.requirements.cpu_features.append("avx512_vnni")
    found = Machine.detect()
    with_either = Machine(
        found.execution_providers, frozenset({"avx_vnni"}), "", 1, 1 << 40, found.onnxruntime
    )
    assert with_either.why_not(variant) is None
    assert "avx512_vnni" in (with_either.without(["avx512_vnni"]).why_not(variant) or "")


async def test_what_a_later_manager_says_more_is_passed_over(
    manager, start_server, make_bundle
) -> None:
    manager.want("adder", {1: make_bundle(1.0)}, {"production": {1: 1}})
    # A field of number 1000, in a model and in a revision of it.
    unknown = b"\xc2\x3e\x05later"
    manager.models["adder"].MergeFromString(unknown)
    manager.models["adder"].revisions[0].MergeFromString(unknown)
    manager.send()
    server = await start_server(manager.address)
    assert (await manager.answer()).HasField("ack")
    (status,) = server.member.statuses()
    assert status.state == fleet_pb.REVISION_STATE_READY
    # It restarts from what it kept of that state.
    await server.stop(1.0)
    await manager.stop()
    again = await start_server(manager.address)
    await again.agent.settled.wait()
    assert [status.state for status in again.member.statuses()] == [fleet_pb.REVISION_STATE_READY]
