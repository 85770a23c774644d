"""Damage to what a server keeps in its cache is found, wherever it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import token_service_pb2 as token_pb
from pollard.services.common.bundle_cache import BundleCache
from pollard.services.common.sealed import FileDamaged

State = fleet_pb.DesiredState | fleet_pb.AccessList


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BundleCache]:
    cache = BundleCache(tmp_path)
    yield cache
    cache.close()


def desired() -> fleet_pb.DesiredState:
    state = fleet_pb.DesiredState(version=7)
    model = state.models.add(model="m")
    model.revisions.add(revision=1, bundle_sha256="a" * 64, size_bytes=5)
    model.routes.add(alias="production").targets.add(revision=1, weight=1)
    return state


def known() -> fleet_pb.AccessList:
    access = fleet_pb.AccessList(version=3)
    for number, role in enumerate((token_pb.ROLE_PREDICTOR, token_pb.ROLE_ADMIN)):
        digest = hashlib.sha256(bytes([number])).digest()
        token = access.tokens.add(token_id=f"token{number}", display_name="somebody", role=role)
        token.sha256, token.revoked = digest, bool(number)
        token.expire_time.seconds = 2_000_000_000
    return access


Kept = tuple[Path, bytes, Callable[[], State | None], State]


@pytest.fixture(params=["state", "access"])
def kept(request: pytest.FixtureRequest, cache: BundleCache) -> Kept:
    """A file in the cache, what is in it, what reads it, and what was saved."""
    if request.param == "state":
        state = desired()
        cache.save_state(state)
        path, load = cache.root / "state.json", cache.load_state
        return path, path.read_bytes(), load, state
    access = known()
    cache.save_access(access)
    path = cache.root / "access.bin"
    return path, path.read_bytes(), cache.load_access, access


def read(path: Path, data: bytes, load: Callable[[], State | None]) -> State | FileDamaged | None:
    path.write_bytes(data)
    try:
        return load()
    except FileDamaged as error:
        return error


def test_a_byte_that_is_another_is_found_or_changes_nothing(kept: Kept) -> None:
    path, whole, load, saved = kept
    assert load() == saved
    harmless = set()
    for place in range(len(whole)):
        others = {whole[place] ^ 1 << bit for bit in range(8)} | {0, 255, *b"\x08\x12 0\"',}z"}
        for other in others - {whole[place]}:
            found = read(path, whole[:place] + bytes([other]) + whole[place + 1 :], load)
            if not isinstance(found, FileDamaged):
                assert found == saved, (place, other)
                harmless.add(place)
    # What says that there is a digest may differ; it and the content must not.
    assert harmless <= set(range(whole.index(hashlib.sha256(rest_of(whole)).hexdigest().encode())))


def rest_of(whole: bytes) -> bytes:
    """Return what follows the 64 digits of the digest."""
    start = next(
        place
        for place in range(16)
        if all(digit in b"0123456789abcdef" for digit in whole[place : place + 64])
    )
    return whole[start + 64 :]


def test_a_file_that_is_cut_off_or_longer_is_found(kept: Kept) -> None:
    path, whole, load, _ = kept
    for length in range(len(whole)):
        assert isinstance(read(path, whole[:length], load), FileDamaged), length
    for more in (b"\0", b" ", b"\n{}", whole):
        assert isinstance(read(path, whole + more, load), FileDamaged)
    assert isinstance(read(path, bytes(len(whole)), load), FileDamaged)


def test_files_of_versions_that_had_no_digest_are_read(cache: BundleCache) -> None:
    state, access = desired(), known()
    text = json_format.MessageToJson(state, preserving_proto_field_name=True)
    (cache.root / "state.json").write_text(text)
    (cache.root / "access.bin").write_bytes(access.SerializeToString())
    assert cache.load_state() == state
    assert cache.load_access() == access


def test_versions_that_know_no_digest_read_the_files(cache: BundleCache) -> None:
    for state in (desired(), fleet_pb.DesiredState()):
        cache.save_state(state)
        text = (cache.root / "state.json").read_text()
        found = json_format.Parse(text, fleet_pb.DesiredState(), ignore_unknown_fields=True)
        assert found == state
        assert "sha256" in json.loads(text)
    cache.save_access(known())
    access = fleet_pb.AccessList.FromString((cache.root / "access.bin").read_bytes())
    access.DiscardUnknownFields()
    assert access == known()


@pytest.mark.parametrize("text", ["[]", '"models"', "null", "7", '["models"]', "[" * 100_000])
def test_json_that_is_no_object_is_no_state(cache: BundleCache, text: str) -> None:
    (cache.root / "state.json").write_text(text)
    with pytest.raises(FileDamaged):
        cache.load_state()


@pytest.mark.parametrize("text", ["{}", '{"a": 1}'])
def test_a_state_that_says_nothing_is_none(cache: BundleCache, text: str) -> None:
    (cache.root / "state.json").write_text(text)
    assert cache.load_state() is None


def test_a_server_id_of_rubbish_is_made_anew(cache: BundleCache) -> None:
    (cache.root / "server_id").write_bytes(b"inference-\xff\0")
    made = cache.server_id("inference")
    assert made.isascii()
    (cache.root / "server_id").write_bytes(b"a\x01b")
    assert cache.server_id("inference").isprintable()
