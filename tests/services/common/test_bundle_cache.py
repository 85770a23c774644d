"""What a server takes into its cache, and what it refuses."""

from pathlib import Path

import pytest

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.bundle import MANIFEST, SIGNATURE, Bundle
from pollard.runtime.errors import BundleCorrupt, BundleError
from pollard.services.common.bundle_cache import BundleCache
from pollard.services.common.errors import StartupError


@pytest.fixture
def cache(tmp_path: Path):
    cache = BundleCache(tmp_path / "cache")
    yield cache
    cache.close()


def receive(staging, bundle: Bundle, names: list[str] | None = None) -> None:
    for name in names or [MANIFEST, *(file.path for file in bundle.manifest.files)]:
        data = (bundle.path / name).read_bytes()
        middle = len(data) // 2
        staging.add(name, 0, data[:middle], len(data))
        staging.add(name, middle, data[middle:], len(data))


def test_a_bundle_is_received_in_pieces(cache, make_bundle) -> None:
    bundle = make_bundle()
    staging = cache.stage(bundle.digest, whole=True)
    receive(staging, bundle)
    assert not cache.bundle_path(bundle.digest).exists()
    path = staging.commit()
    assert path == cache.bundle_path(bundle.digest)
    assert Bundle.open(path, expect=bundle.digest).labels == bundle.labels


def test_a_description_is_manifest_and_labels(cache, make_bundle) -> None:
    bundle = make_bundle()
    staging = cache.stage(bundle.digest, whole=False)
    receive(staging, bundle, [MANIFEST, "labels.txt"])
    path = staging.commit()
    assert sorted(p.name for p in path.iterdir()) == ["labels.txt", MANIFEST]


def test_a_signature_comes_with_the_bundle(cache, make_bundle) -> None:
    bundle = make_bundle()
    (bundle.path / SIGNATURE).write_bytes(b"signed")
    staging = cache.stage(bundle.digest, whole=True)
    receive(staging, bundle, [MANIFEST, SIGNATURE, *(file.path for file in bundle.manifest.files)])
    assert (staging.commit() / SIGNATURE).read_bytes() == b"signed"


def test_a_signature_without_end_is_refused(cache, make_bundle) -> None:
    bundle = make_bundle()
    staging = cache.stage(bundle.digest, whole=True)
    staging.add(SIGNATURE, 0, b"x", 2)
    with pytest.raises(BundleCorrupt, match="longer than"):
        staging.add(SIGNATURE, 1, b"x", 1 << 40)
    staging.abort()


def test_what_is_missing_is_noticed(cache, make_bundle) -> None:
    bundle = make_bundle()
    staging = cache.stage(bundle.digest, whole=True)
    receive(staging, bundle, [MANIFEST, "labels.txt"])
    with pytest.raises(BundleCorrupt, match="missing"):
        staging.commit()
    staging.abort()
    assert not list((cache.root / "tmp").iterdir())
    assert not cache.bundle_path(bundle.digest).exists()


def test_pieces_out_of_place_are_refused(cache, make_bundle) -> None:
    bundle, other = make_bundle(), make_bundle(seed=5)
    staging = cache.stage(bundle.digest, whole=True)
    with pytest.raises(BundleCorrupt, match="not in the manifest"):
        staging.add("labels.txt", 0, b"x", 1)
    with pytest.raises(BundleCorrupt, match="SHA-256"):
        receive(staging, other, [MANIFEST])
    staging = cache.stage(bundle.digest, whole=True)
    receive(staging, bundle, [MANIFEST])
    for path in ("../escape", "/etc/escape", "other.txt"):
        with pytest.raises(BundleCorrupt, match="not in the manifest"):
            staging.add(path, 0, b"x", 1)
    with pytest.raises(BundleCorrupt, match="begins at 7"):
        staging.add("labels.txt", 7, b"x", 8)
    with pytest.raises(BundleCorrupt, match="longer than"):
        staging.add("labels.txt", 0, b"x" * 10_000, 10_000)


@pytest.mark.parametrize("digest", ["", "../../etc", "A" * 64, "a" * 63])
def test_a_digest_that_is_none_never_becomes_a_path(cache, digest) -> None:
    with pytest.raises(BundleError):
        cache.bundle_path(digest)


def test_unused_bundles_go_but_for_the_last_ones(cache, make_bundle) -> None:
    bundles = [make_bundle(seed=seed) for seed in range(4)]
    for bundle in bundles:
        staging = cache.stage(bundle.digest, whole=True)
        receive(staging, bundle)
        staging.commit()
    cache.discard_unused({bundles[0].digest}, keep=1)
    left = {path.name for path in (cache.root / "bundles").iterdir()}
    assert left == {bundles[0].digest, bundles[3].digest}


def test_leftovers_of_a_crash_are_removed_and_the_id_stays(tmp_path: Path) -> None:
    first = BundleCache(tmp_path)
    name = first.server_id("inference")
    (tmp_path / "tmp" / "half").mkdir()
    with pytest.raises(StartupError, match="in use"):
        BundleCache(tmp_path)
    first.close()
    second = BundleCache(tmp_path)
    assert not list((tmp_path / "tmp").iterdir())
    assert second.server_id("inference") == name
    second.close()


def test_the_state_survives(cache) -> None:
    assert cache.load_state() is None
    state = fleet_pb.DesiredState(version=7)
    state.models.add(model="m").revisions.add(revision=1, bundle_sha256="a" * 64)
    cache.save_state(state)
    assert cache.load_state() == state
