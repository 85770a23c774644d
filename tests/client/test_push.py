"""Uploads go on where they broke, and aliases are waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.client import (
    AliasSwitchFailed,
    AliasSwitchTimeout,
    DeadlineExceeded,
    InvalidArgument,
    InvalidBundle,
    NotFound,
    Progress,
    Unavailable,
)
from pollard.models.v1 import model_service_pb2
from pollard.runtime.bundle import Bundle

BundleMaker = Callable[..., Bundle]
Alias = model_service_pb2.Alias


class Store:
    """Takes uploads as the contract says, but breaks them where it is told to."""

    def __init__(self, abort: Callable[..., None], breaks: list[tuple[int, grpc.StatusCode]]):
        self.words = "broke"
        self.abort = abort
        self.breaks = breaks
        self.committed = b""
        self.headers: list[model_service_pb2.UploadHeader] = []

    def get_upload(self, request: Any, context: grpc.ServicerContext) -> Any:
        if not self.committed:
            self.abort(context, grpc.StatusCode.NOT_FOUND, "no such upload")
        return model_service_pb2.GetUploadResponse(committed_bytes=len(self.committed))

    def upload(self, requests: Any, context: grpc.ServicerContext) -> Any:
        header = next(requests).header
        self.headers.append(header)
        if header.write_offset != len(self.committed):
            self.abort(context, grpc.StatusCode.OUT_OF_RANGE, "elsewhere")
        limit, code = self.breaks.pop(0) if self.breaks else (None, grpc.StatusCode.OK)
        for request in requests:
            self.committed += request.data
            if limit is not None and len(self.committed) >= limit:
                self.committed = self.committed[:limit]
                self.abort(context, code, self.words)
        assert len(self.committed) == header.total_bytes
        assert header.bundle_sha256 == self.digest
        return model_service_pb2.UploadBundleResponse(revision=self.revision())

    def revision(self) -> model_service_pb2.Revision:
        return model_service_pb2.Revision(
            name="models/m/revisions/1", revision=1, bundle_sha256=self.digest
        )

    digest = ""

    def install(self, scripted: Any, digest: str) -> None:
        self.digest = digest
        scripted.on("GetUpload", self.get_upload)
        scripted.on("UploadBundle", self.upload)


@pytest.fixture
def store(scripted: Any, abort_with: Callable[..., None]) -> Callable[..., Store]:
    def make(bundle: Bundle, *breaks: tuple[int, grpc.StatusCode]) -> Store:
        made = Store(abort_with, list(breaks))
        made.install(scripted, bundle.digest)
        return made

    return make


def test_an_upload_that_breaks_goes_on_from_what_is_on_disk(
    runner: Any, address: str, store: Callable[..., Store], make_bundle: BundleMaker
) -> None:
    bundle = make_bundle()
    made = store(
        bundle,
        (1000, grpc.StatusCode.UNAVAILABLE),
        (3000, grpc.StatusCode.ABORTED),
    )
    seen: list[Progress] = []
    pushed = runner.call(
        "models",
        address,
        "push",
        bundle.path,
        "m",
        notes="first",
        labels={"team": "a"},
        progress=seen.append,
    )
    assert pushed.revision.revision == 1
    assert [header.write_offset for header in made.headers] == [0, 1000, 3000]
    assert len({header.upload_id for header in made.headers}) == 1
    assert {header.notes for header in made.headers} == {"first"}
    assert dict(made.headers[-1].labels) == {"team": "a"}
    assert seen[-1].done_bytes == seen[-1].total_bytes == len(made.committed)


def test_an_upload_that_the_server_refuses_is_not_sent_again(
    runner: Any, address: str, store: Callable[..., Store], make_bundle: BundleMaker
) -> None:
    bundle = make_bundle()
    made = store(bundle, (1000, grpc.StatusCode.INVALID_ARGUMENT))
    with pytest.raises(InvalidArgument, match="broke"):
        runner.call("models", address, "push", bundle.path, "m")
    assert len(made.headers) == 1


def test_a_refusal_that_grpc_has_lost_is_asked_for_again(
    runner: Any, address: str, store: Callable[..., Store], make_bundle: BundleMaker
) -> None:
    bundle = make_bundle()
    made = store(bundle, (1000, grpc.StatusCode.INTERNAL), (3000, grpc.StatusCode.UNAVAILABLE))
    made.words = "Internal error from Core"  # grpc's, where its asyncio client lost the server's
    assert runner.call("models", address, "push", bundle.path, "m").revision.revision == 1
    assert [header.write_offset for header in made.headers] == [0, 1000, 3000]


def test_an_upload_that_never_moves_is_given_up(
    runner: Any, address: str, store: Callable[..., Store], make_bundle: BundleMaker
) -> None:
    bundle = make_bundle()
    made = store(bundle, *[(1, grpc.StatusCode.UNAVAILABLE)] * 100)
    with pytest.raises(Unavailable, match="broke"):
        runner.call("models", address, "push", bundle.path, "m", idle_timeout=0.5)
    assert len(made.headers) > 1


def test_an_upload_that_stalls_goes_on_from_what_is_on_disk(
    runner: Any,
    address: str,
    store: Callable[..., Store],
    scripted: Any,
    make_bundle: BundleMaker,
) -> None:
    bundle = make_bundle()
    made = store(bundle)
    release = threading.Event()

    def upload(requests: Any, context: grpc.ServicerContext) -> Any:
        if not made.headers:
            made.headers.append(next(requests).header)
            made.committed = next(requests).data[:1000]
            release.wait(20)
        return made.upload(requests, context)

    scripted.on("UploadBundle", upload)
    # The bytes of a small bundle all fit into gRPC's own buffers: what stalls is the answer.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pollard.client._upload._CHECK_SECONDS", 1.0)
        try:
            pushed = runner.call("models", address, "push", bundle.path, "m", idle_timeout=1.0)
        finally:
            release.set()
    assert pushed.revision.revision == 1
    assert [header.write_offset for header in made.headers] == [0, 1000]


def test_an_upload_that_always_stalls_is_given_up(
    runner: Any,
    address: str,
    store: Callable[..., Store],
    scripted: Any,
    make_bundle: BundleMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = make_bundle()
    store(bundle)
    release = threading.Event()
    scripted.on("UploadBundle", lambda requests, context: release.wait(20) and None)
    monkeypatch.setattr("pollard.client._upload._CHECK_SECONDS", 0.2)
    try:
        with pytest.raises(DeadlineExceeded, match="nothing of the upload moved"):
            runner.call("models", address, "push", bundle.path, "m", idle_timeout=0.2)
    finally:
        release.set()


def test_a_server_that_is_not_there_is_told_at_once(runner: Any, make_bundle: BundleMaker) -> None:
    with pytest.raises(Unavailable):
        runner.call("models", "127.0.0.1:1", "push", make_bundle().path, "m")


def test_a_damaged_bundle_is_not_sent(
    runner: Any, address: str, scripted: Any, make_bundle: BundleMaker
) -> None:
    bundle = make_bundle()
    (bundle.path / "labels.txt").write_text("others\n")
    with pytest.raises(InvalidBundle, match=r"labels\.txt"):
        runner.call("models", address, "push", bundle.path, "m")
    assert scripted.calls == []


def _alias(state: Any, revision: int, pending: int = 0) -> Any:
    return Alias(
        name="models/m/aliases/production",
        state=state,
        revision=revision,
        pending_revision=pending,
    )


def _answers(scripted: Any, *aliases: Any) -> None:
    left = list(aliases)

    def get_alias(request: Any, context: Any) -> Any:
        found = left.pop(0) if len(left) > 1 else left[0]
        return model_service_pb2.GetAliasResponse(alias=found)

    scripted.on("GetAlias", get_alias)
    scripted.on("SetAlias", lambda r, c: model_service_pb2.SetAliasResponse(alias=aliases[0]))
    scripted.on(
        "RollbackAlias", lambda r, c: model_service_pb2.RollbackAliasResponse(alias=aliases[0])
    )


def test_a_switch_is_waited_for(runner: Any, address: str, scripted: Any) -> None:
    _answers(
        scripted,
        _alias(Alias.STATE_LOADING, 1, 2),
        _alias(Alias.STATE_SWITCHING, 2, 0),
        _alias(Alias.STATE_ACTIVE, 2),
    )
    found = runner.call("models", address, "set_alias", "m", "production", 2)
    assert (found.state, found.revision) == ("ACTIVE", 2)


def test_a_rollback_waits_for_the_revision_that_the_server_chose(
    runner: Any, address: str, scripted: Any
) -> None:
    _answers(scripted, _alias(Alias.STATE_LOADING, 2, 1), _alias(Alias.STATE_ACTIVE, 1))
    assert runner.call("models", address, "rollback", "m").revision == 1


def test_a_refused_switch_says_which_server_and_why(
    runner: Any, address: str, scripted: Any
) -> None:
    failed = _alias(Alias.STATE_FAILED, 1)
    failure = failed.failures.add(server_id="inference-a")
    failure.status.code = 3
    failure.status.message = "golden outputs differ"
    _answers(scripted, _alias(Alias.STATE_LOADING, 1, 2), failed)
    with pytest.raises(AliasSwitchFailed, match="inference-a: golden outputs differ") as caught:
        runner.call("models", address, "set_alias", "m", "production", 2)
    assert (caught.value.wanted, caught.value.serving) == (2, 1)
    assert caught.value.failures[0].code == "INVALID_ARGUMENT"


def test_a_switch_that_was_overtaken_says_so(runner: Any, address: str, scripted: Any) -> None:
    _answers(scripted, _alias(Alias.STATE_LOADING, 1, 2), _alias(Alias.STATE_ACTIVE, 3))
    with pytest.raises(AliasSwitchFailed, match="moved elsewhere"):
        runner.call("models", address, "set_alias", "m", "production", 2)


def test_a_switch_that_takes_too_long_is_left_to_itself(
    runner: Any, address: str, scripted: Any
) -> None:
    _answers(scripted, _alias(Alias.STATE_LOADING, 1, 2))
    with pytest.raises(AliasSwitchTimeout, match="still LOADING"):
        runner.call("models", address, "set_alias", "m", "production", 2, wait_timeout=0.2)


def test_without_waiting_the_first_answer_counts(runner: Any, address: str, scripted: Any) -> None:
    _answers(scripted, _alias(Alias.STATE_LOADING, 1, 2))
    found = runner.call("models", address, "set_alias", "m", "production", 2, wait=False)
    assert (found.state, found.pending_revision) == ("LOADING", 2)


def test_pull_writes_nothing_when_there_is_no_such_model(
    runner: Any,
    address: str,
    scripted: Any,
    abort_with: Callable[..., None],
    tmp_path: Path,
) -> None:
    scripted.on("GetRevision", lambda r, c: abort_with(c, grpc.StatusCode.NOT_FOUND, "none"))
    with pytest.raises(NotFound):
        runner.call("models", address, "pull", "m", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
