from __future__ import annotations

import errno
from types import ModuleType

import grpc
import pytest
from google.rpc import error_details_pb2

from pollard.runtime import errors as runtime_errors
from pollard.services.common import errors, status


def _raised(module: ModuleType, root: type) -> list[type]:
    found = [kind for kind in vars(module).values() if isinstance(kind, type)]
    return [kind for kind in found if issubclass(kind, root) and kind is not root]


@pytest.mark.parametrize("kind", _raised(errors, errors.ServiceError))
def test_every_service_error_has_a_status(kind):
    outcome = status.describe(kind("words", reason="REASON", model="m"))
    assert outcome.code is not grpc.StatusCode.UNKNOWN
    assert (outcome.message, outcome.reason, outcome.metadata) == (
        "words",
        "REASON",
        {"model": "m"},
    )


@pytest.mark.parametrize("kind", _raised(runtime_errors, runtime_errors.RuntimeFault))
def test_every_runtime_error_has_a_status_and_its_own_reason(kind):
    outcome = status.describe(kind("words", path="p"))
    assert outcome.code is not grpc.StatusCode.INTERNAL
    assert outcome.reason == kind.reason
    assert outcome.metadata == {"path": "p"}


def test_a_full_disk_is_resource_exhausted():
    outcome = status.describe(OSError(errno.ENOSPC, "No space left on device"))
    assert outcome.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert outcome.reason == "DISK_FULL"


def test_an_unexpected_error_gives_nothing_away():
    outcome = status.describe(RuntimeError("the password is hunter2"))
    assert outcome.code is grpc.StatusCode.INTERNAL
    assert "hunter2" not in outcome.message
    assert outcome.metadata["request_id"] in outcome.message


def test_a_status_carries_exactly_one_error_info():
    proto = status.to_proto(errors.NotFound("no", reason="MODEL_NOT_FOUND", model="m"))
    assert proto.code == grpc.StatusCode.NOT_FOUND.value[0]
    (detail,) = proto.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == (
        "MODEL_NOT_FOUND",
        "pollard.ai",
        {"model": "m"},
    )
