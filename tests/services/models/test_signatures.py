"""Signed bundles in the manager: policy, storage, and keys that come and go."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.models.v1 import model_service_pb2 as pb
from pollard.runtime.bundle import SIGNATURE
from pollard.runtime.keys import KeyPair, TrustedKeys, create_key_pair
from pollard.runtime.signing import require_signature, sign_bundle
from pollard.services.common.errors import StartupError
from pollard.services.models.settings import ModelsSettings

Signature = pb.BundleSignature


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KeyPair]:
    root = tmp_path_factory.mktemp("keys")
    return {name: create_key_pair(root / name) for name in ("team", "other")}


@pytest.fixture
def trusted(tmp_path: Path, keys: dict[str, KeyPair]) -> Path:
    """A directory in which the team's key is trusted."""
    directory = tmp_path / "trusted"
    directory.mkdir()
    shutil.copy(keys["team"].public, directory)
    return directory


def signed(bundles: Any, helpers: Any, key: KeyPair, seed: int = 1) -> tuple[Any, bytes]:
    bundle = bundles.make(seed)
    sign_bundle(bundle.path, key.private)
    return bundle, helpers.packed(bundle)


async def actions(client: Any) -> list[str]:
    answer = await client.models.ListEvents(pb.ListEventsRequest())
    return [event.action for event in answer.events]


async def revision(client: Any, number: int, model: str = "m") -> pb.Revision:
    request = pb.GetRevisionRequest(name=f"models/{model}/revisions/{number}")
    return (await client.models.GetRevision(request)).revision


async def test_a_signature_travels_with_the_bundle_and_is_shown(
    suite_with: Any, bundles: Any, helpers: Any, keys: dict[str, KeyPair], trusted: Path, tmp_path
) -> None:
    bundle, tar = signed(bundles, helpers, keys["team"])
    async with suite_with(trusted_keys=trusted, signatures="require") as suite:
        pushed = await suite.client.push(tar)
        assert pushed.revision.signature.state == Signature.STATE_TRUSTED
        assert pushed.revision.signature.key_sha256 == keys["team"].fingerprint
        assert pushed.revision.signature.creator == pushed.revision.creator
        assert not pushed.warnings
        files = await suite.client.download(name="models/m/revisions/1")
        assert files[SIGNATURE] == (bundle.path / SIGNATURE).read_bytes()
        listed = await suite.client.models.ListRevisions(pb.ListRevisionsRequest(parent="models/m"))
        assert listed.revisions[0].signature.state == Signature.STATE_TRUSTED


@pytest.mark.parametrize("mode", ["allow", "warn", "require"])
async def test_what_no_trusted_key_has_signed(
    suite_with: Any,
    bundles: Any,
    helpers: Any,
    keys: dict[str, KeyPair],
    trusted: Path,
    mode: str,
) -> None:
    _, foreign = signed(bundles, helpers, keys["other"], 2)
    cases = [(bundles.tar(1), "SIGNATURE_REQUIRED", "not signed")]
    cases.append((foreign, "SIGNATURE_UNTRUSTED", keys["other"].fingerprint))
    async with suite_with(trusted_keys=trusted, signatures=mode) as suite:
        for tar, reason, words in cases:
            if mode == "require":
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await suite.client.push(tar)
                assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert helpers.info_of(raised.value).reason == reason
                assert words in raised.value.details()
                continue
            pushed = await suite.client.push(tar)
            assert [words in warning for warning in pushed.warnings] == [True] * (mode == "warn")
        if mode == "require":
            assert not list(suite.service.blobs)
            return
        assert not (await revision(suite.client, 1)).HasField("signature")
        foreign_state = (await revision(suite.client, 2)).signature.state
        assert foreign_state == Signature.STATE_UNKNOWN_KEY


def test_unsigned_bundles_are_allowed_on_loopback_and_warned_of_elsewhere() -> None:
    assert ModelsSettings().signature_mode == "allow"
    assert ModelsSettings(host="0.0.0.0", insecure=True).signature_mode == "warn"
    assert ModelsSettings(host="0.0.0.0", signatures="allow").signature_mode == "allow"


async def test_a_manager_that_requires_signatures_needs_keys(
    suite_with: Any, tmp_path: Path, keys: dict[str, KeyPair]
) -> None:
    with pytest.raises(StartupError, match="--trusted-keys"):
        async with suite_with(signatures="require"):
            pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(StartupError, match="no public key"):
        async with suite_with(trusted_keys=tmp_path / "empty"):
            pass


@pytest.mark.parametrize(
    ("mode", "trusting"),
    [("allow", False), ("allow", True), ("require", True)],
    ids=["unknown key", "known key", "required"],
)
async def test_a_wrong_signature_is_refused_whatever_the_policy(
    suite_with: Any,
    bundles: Any,
    helpers: Any,
    keys: dict[str, KeyPair],
    trusted: Path,
    mode: str,
    trusting: bool,
) -> None:
    first, _ = signed(bundles, helpers, keys["team"], 1)
    second = bundles.make(2)
    shutil.copy(first.path / SIGNATURE, second.path / SIGNATURE)
    async with suite_with(trusted_keys=trusted if trusting else None, signatures=mode) as suite:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await suite.client.push(helpers.packed(second))
        assert helpers.info_of(raised.value).reason == "SIGNATURE_INVALID"
        assert "cpu-fp32/model.onnx" in raised.value.details()
        assert not list(suite.service.blobs)


async def test_a_forged_signature_of_a_trusted_key_is_refused(
    suite_with: Any, bundles: Any, helpers: Any, keys: dict[str, KeyPair], trusted: Path
) -> None:
    bundle, _ = signed(bundles, helpers, keys["team"])
    path = bundle.path / SIGNATURE
    content = json.loads(path.read_bytes())
    mark = content["dsseEnvelope"]["signatures"][0]
    raw = bytearray(base64.b64decode(mark["sig"]))
    raw[-1] ^= 1
    mark["sig"] = base64.b64encode(bytes(raw)).decode()
    path.write_text(json.dumps(content))
    async with suite_with(trusted_keys=trusted) as suite:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await suite.client.push(helpers.packed(bundle))
        assert helpers.info_of(raised.value).reason == "SIGNATURE_INVALID"
        assert SIGNATURE in raised.value.details()


async def test_pushing_a_stored_bundle_again_signs_it(
    suite_with: Any, bundles: Any, helpers: Any, keys: dict[str, KeyPair], trusted: Path
) -> None:
    bundle = bundles.make(1)
    async with suite_with(trusted_keys=trusted) as suite:
        client = suite.client
        unsigned = helpers.packed(bundle)
        before = (await client.push(unsigned)).revision
        await client.push(unsigned, model="other")
        sign_bundle(bundle.path, keys["team"].private)
        again = await client.push(helpers.packed(bundle))
        assert again.existed
        assert again.revision.name == before.name
        assert again.revision.bundle_sha256 == before.bundle_sha256
        assert again.revision.etag != before.etag
        # It belongs to the bundle, so to the other model's revision too.
        for model in ("m", "other"):
            found = await revision(client, 1, model)
            assert found.signature.state == Signature.STATE_TRUSTED
        files = await client.download(bundle_sha256=bundle.digest)
        assert files[SIGNATURE] == (bundle.path / SIGNATURE).read_bytes()
        assert next(iter(files)) == "manifest.json"
        assert "BUNDLE_SIGNED" in await actions(client)
        # Nothing takes the signature away, and an unknown key does not replace a trusted one.
        etag = (await revision(client, 1)).etag
        await client.push(unsigned)
        sign_bundle(bundle.path, keys["other"].private)
        await client.push(helpers.packed(bundle))
        found = await revision(client, 1)
        assert found.signature.key_sha256 == keys["team"].fingerprint
        assert found.etag == etag
        assert (await client.download(bundle_sha256=bundle.digest))[SIGNATURE] == files[SIGNATURE]


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"], indirect=True)
async def test_of_a_signed_and_an_unsigned_push_at_once_the_signature_stays(
    suite_with: Any, bundles: Any, helpers: Any, keys: dict[str, KeyPair], trusted: Path
) -> None:
    async with suite_with(trusted_keys=trusted) as suite:
        for seed in range(2):
            bundle = bundles.make(seed)
            unsigned = helpers.packed(bundle)
            sign_bundle(bundle.path, keys["team"].private)
            tars = [unsigned, helpers.packed(bundle), unsigned]
            answers = await asyncio.gather(*(suite.client.push(tar) for tar in tars))
            assert {answer.revision.revision for answer in answers} == {seed + 1}
            assert sorted(answer.existed for answer in answers) == [False, True, True]
            found = await revision(suite.client, seed + 1)
            assert found.signature.state == Signature.STATE_TRUSTED
            files = await suite.client.download(bundle_sha256=bundle.digest)
            assert files[SIGNATURE] == (bundle.path / SIGNATURE).read_bytes()
            assert suite.service.collector.collect() == []


async def test_a_trusted_signature_replaces_one_of_an_unknown_key(
    suite_with: Any, bundles: Any, helpers: Any, keys: dict[str, KeyPair], trusted: Path
) -> None:
    bundle, foreign = signed(bundles, helpers, keys["other"])
    async with suite_with(trusted_keys=trusted) as suite:
        await suite.client.push(foreign)
        sign_bundle(bundle.path, keys["team"].private)
        found = (await suite.client.push(helpers.packed(bundle))).revision
        assert found.signature.state == Signature.STATE_TRUSTED
        files = await suite.client.download(bundle_sha256=bundle.digest)
        assert files[SIGNATURE] == (bundle.path / SIGNATURE).read_bytes()
        # The replaced one is of no use to anybody.
        await asyncio.to_thread(suite.service.uploads.clean)
        assert len(list(suite.service.blobs)) == 3


async def test_only_trusted_revisions_are_served_where_signatures_are_required(
    suite_with: Any, bundles: Any, helpers: Any, keys: dict[str, KeyPair], trusted: Path
) -> None:
    bundle = bundles.make(1)
    async with suite_with(trusted_keys=trusted) as suite:
        await suite.client.push(helpers.packed(bundle))
        await suite.client.push(bundles.tar(2))
        await suite.client.set_alias(2)
        await suite.client.alias_when(lambda alias: alias.state == pb.Alias.STATE_ACTIVE)
    async with suite_with(trusted_keys=trusted, signatures="require") as suite:
        client = suite.client
        # What is served goes on being served.
        assert (await client.alias()).revision == 2
        requests = [
            lambda: client.set_alias(1),
            lambda: client.models.CreateRollout(
                pb.CreateRolloutRequest(
                    parent="models/m", rollout=pb.Rollout(alias="production", revision=1)
                )
            ),
        ]
        for request in requests:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await request()
            assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert helpers.info_of(raised.value).reason == "SIGNATURE_REQUIRED"
        sign_bundle(bundle.path, keys["team"].private)
        await client.push(helpers.packed(bundle))
        await client.set_alias(1)
        await client.alias_when(
            lambda alias: alias.state == pb.Alias.STATE_ACTIVE and alias.revision == 1
        )
        # Going back must always be possible.
        await client.models.RollbackAlias(
            pb.RollbackAliasRequest(name="models/m/aliases/production")
        )
        await client.alias_when(
            lambda alias: alias.state == pb.Alias.STATE_ACTIVE and alias.revision == 2
        )


async def test_keys_that_are_taken_away_or_added_count_from_the_next_start(
    suite_with: Any, bundles: Any, helpers: Any, keys: dict[str, KeyPair], trusted: Path
) -> None:
    _, tar = signed(bundles, helpers, keys["other"])
    states = []
    async with suite_with(trusted_keys=trusted) as suite:
        states.append((await suite.client.push(tar)).revision.signature.state)
    shutil.copy(keys["other"].public, trusted)
    async with suite_with(trusted_keys=trusted) as suite:
        states.append((await revision(suite.client, 1)).signature.state)
        assert (await actions(suite.client))[0] == "SIGNATURE_TRUSTED"
    (trusted / "other.pub").unlink()
    async with suite_with(trusted_keys=trusted) as suite:
        states.append((await revision(suite.client, 1)).signature.state)
        assert (await actions(suite.client))[0] == "SIGNATURE_NOT_TRUSTED"
    assert states == [
        Signature.STATE_UNKNOWN_KEY,
        Signature.STATE_TRUSTED,
        Signature.STATE_UNKNOWN_KEY,
    ]


async def test_a_key_added_later_does_not_make_a_forgery_trusted(
    suite_with: Any, bundles: Any, helpers: Any, keys: dict[str, KeyPair], trusted: Path
) -> None:
    bundle, _ = signed(bundles, helpers, keys["other"])
    path = bundle.path / SIGNATURE
    content = json.loads(path.read_bytes())
    content["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(bytes(70)).decode()
    path.write_text(json.dumps(content))
    async with suite_with(trusted_keys=trusted) as suite:
        await suite.client.push(helpers.packed(bundle))
    shutil.copy(keys["other"].public, trusted)
    async with suite_with(trusted_keys=trusted) as suite:
        found = (await revision(suite.client, 1)).signature
        assert found.state == Signature.STATE_UNKNOWN_KEY


async def test_what_comes_back_out_can_be_checked(
    suite_with: Any,
    bundles: Any,
    helpers: Any,
    keys: dict[str, KeyPair],
    trusted: Path,
    tmp_path: Path,
) -> None:
    from pollard.client import AsyncModelsClient
    from pollard.runtime.bundle import Bundle

    _, tar = signed(bundles, helpers, keys["team"])
    async with suite_with() as suite:
        await suite.client.push(tar)
        async with AsyncModelsClient(suite.client.address) as client:
            await client.pull("m", tmp_path / "out", revision=1)
    assert require_signature(Bundle.open(tmp_path / "out"), TrustedKeys.load(trusted))
