"""What a server takes into its cache, and what it refuses."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.bundle import MANIFEST, SIGNATURE, Bundle
from pollard.runtime.errors import BundleCorrupt, BundleError
from pollard.services.common.bundle_cache import BundleCache
from pollard.services.common.errors import ResourceExhausted, StartupError


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
    cache.protect({bundles[0].digest})
    cache.discard_unused(keep=1)
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


BALLAST = 100_000


@pytest.fixture
def heavy(make_bundle):
    """Bundles that take a little more than 100,000 bytes each."""
    return [make_bundle(seed=seed, files={"ballast.bin": bytes(BALLAST)}) for seed in range(5)]


def put(cache: BundleCache, bundle: Bundle) -> None:
    staging = cache.stage(bundle.digest, whole=True)
    try:
        receive(staging, bundle)
        staging.commit()
    except BaseException:
        staging.abort()
        raise


def age(cache: BundleCache, bundles: list[Bundle]) -> None:
    """Let them have been used in this order, and long ago."""
    for number, bundle in enumerate(bundles):
        os.utime(cache.bundle_path(bundle.digest), (number, number))


def kept(cache: BundleCache) -> set[str]:
    return {path.name for path in (cache.root / "bundles").iterdir()}


@pytest.fixture
def small_cache(tmp_path: Path):
    """A cache with room for three of the heavy bundles."""
    cache = BundleCache(tmp_path / "small", max_bytes=3 * BALLAST + BALLAST // 2)
    yield cache
    cache.close()


def test_room_is_made_by_what_was_used_longest_ago(small_cache, heavy) -> None:
    for bundle in heavy[:3]:
        put(small_cache, bundle)
    age(small_cache, heavy[:3])
    small_cache.used(heavy[0].digest)
    put(small_cache, heavy[3])
    assert kept(small_cache) == {heavy[index].digest for index in (0, 2, 3)}


def test_what_is_in_use_stays_even_if_it_is_the_oldest(small_cache, heavy) -> None:
    for bundle in heavy[:3]:
        put(small_cache, bundle)
    age(small_cache, heavy[:3])
    small_cache.protect({heavy[0].digest, heavy[1].digest})
    small_cache.protect({heavy[3].digest}, also=True)
    put(small_cache, heavy[3])
    assert kept(small_cache) == {heavy[index].digest for index in (0, 1, 3)}
    with pytest.raises(ResourceExhausted, match="in use or being fetched") as caught:
        put(small_cache, heavy[4])
    assert caught.value.reason == "CACHE_LIMIT"
    assert kept(small_cache) == {heavy[index].digest for index in (0, 1, 3)}
    assert not list((small_cache.root / "tmp").iterdir())
    # What was in use until a moment ago goes last.
    small_cache.protect({heavy[1].digest})
    os.utime(small_cache.bundle_path(heavy[3].digest), (1, 1))
    put(small_cache, heavy[4])
    assert kept(small_cache) == {heavy[index].digest for index in (0, 1, 4)}


def test_a_bundle_above_the_limit_is_refused_before_its_files_come(
    small_cache, make_bundle
) -> None:
    bundle = make_bundle(files={"ballast.bin": bytes(4 * BALLAST)})
    staging = small_cache.stage(bundle.digest, whole=True)
    with pytest.raises(ResourceExhausted, match=f"limited to {3 * BALLAST + BALLAST // 2}"):
        receive(staging, bundle, [MANIFEST])
    staging.abort()
    # Its description is small, and that is all that some servers want.
    staging = small_cache.stage(bundle.digest, whole=False)
    receive(staging, bundle, [MANIFEST, "labels.txt"])
    staging.commit()


def test_what_is_being_fetched_counts_already(small_cache, heavy) -> None:
    stagings = [small_cache.stage(bundle.digest, whole=True) for bundle in heavy[:4]]
    for staging, bundle in zip(stagings[:3], heavy, strict=False):
        receive(staging, bundle, [MANIFEST])
    with pytest.raises(ResourceExhausted):
        receive(stagings[3], heavy[3], [MANIFEST])
    stagings[3].abort()
    # One that is given up leaves its room to others.
    stagings[0].abort()
    put(small_cache, heavy[3])
    for staging in stagings[1:3]:
        staging.abort()


def test_fetches_at_the_same_time_keep_within_the_limit(small_cache, heavy) -> None:
    def fetch(bundle: Bundle) -> bool:
        try:
            put(small_cache, bundle)
        except ResourceExhausted:
            return False
        return True

    with ThreadPoolExecutor(5) as threads:
        assert sum(threads.map(fetch, heavy * 3)) >= 3
    size = sum(path.stat().st_size for path in small_cache.root.rglob("*") if path.is_file())
    assert size <= 3 * BALLAST + BALLAST // 2
    assert not list((small_cache.root / "tmp").iterdir())


def test_copies_that_come_at_the_same_time_replace_each_other(cache, make_bundle) -> None:
    bundle = make_bundle()
    with ThreadPoolExecutor(5) as threads:
        list(threads.map(lambda _: put(cache, bundle), range(40)))
    assert Bundle.open(cache.bundle_path(bundle.digest), verify=True).digest == bundle.digest
    assert not list((cache.root / "tmp").iterdir())


def test_a_lower_limit_is_kept_once_it_is_known_what_is_wanted(tmp_path: Path, heavy) -> None:
    cache = BundleCache(tmp_path / "cache")
    for bundle in heavy:
        put(cache, bundle)
    age(cache, heavy)
    cache.close()
    lower = BundleCache(tmp_path / "cache", max_bytes=2 * BALLAST + BALLAST // 2)
    assert len(kept(lower)) == 5
    lower.protect({heavy[0].digest})
    lower.discard_unused(keep=4)
    assert kept(lower) == {heavy[0].digest, heavy[4].digest}
    lower.close()


DYING = """
import os, pathlib, shutil, signal, sys
from pollard.services.common.bundle_cache import BundleCache

root, moment, limit, digest = sys.argv[1:]
cache = BundleCache(pathlib.Path(root), max_bytes=int(limit))

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(path, **_):
    next(pathlib.Path(path).rglob("model.onnx")).unlink()
    die()

if moment == "renaming":
    pathlib.Path.rename = die
else:
    shutil.rmtree = half
cache.protect({digest})
cache.discard_unused(keep=0)
"""


@pytest.mark.parametrize("moment", ["renaming", "removing"])
def test_a_kill_while_room_is_made_leaves_whole_bundles(tmp_path: Path, heavy, moment) -> None:
    cache = BundleCache(tmp_path / "cache")
    for bundle in heavy:
        put(cache, bundle)
    cache.close()
    command = [sys.executable, "-c", DYING, str(tmp_path / "cache"), moment, str(2 * BALLAST)]
    died = subprocess.run([*command, heavy[0].digest], check=False, timeout=60)
    assert died.returncode == -signal.SIGKILL
    again = BundleCache(tmp_path / "cache", max_bytes=2 * BALLAST)
    assert not list((again.root / "tmp").iterdir())
    left = kept(again)
    assert len(left) == (5 if moment == "renaming" else 4)
    for digest in left:
        Bundle.open(again.bundle_path(digest), verify=True, expect=digest)
    again.protect({heavy[0].digest})
    again.discard_unused(keep=0)
    assert kept(again) == {heavy[0].digest}
    again.close()
