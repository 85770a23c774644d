"""The table of roles holds every method that there is, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from pollard.inference import grpc_service_pb2
from pollard.models.v1 import fleet_service_pb2, model_service_pb2, token_service_pb2
from pollard.preprocess.v1 import preprocess_service_pb2
from pollard.services.common.auth import ACCESS, OPEN, Caller, Role
from pollard.services.common.auth.gate import STREAMS
from pollard.vision.v1 import vision_service_pb2

CONTRACTS = (
    grpc_service_pb2,
    model_service_pb2,
    fleet_service_pb2,
    token_service_pb2,
    preprocess_service_pb2,
    vision_service_pb2,
    health_pb2,
    reflection_pb2,
)
NOT_INSTALLED = ("/grpc.channelz.v1.Channelz/", "/grpc.health.v1.Health/List")
"""In the table for who adds them, or has a later version."""


def services() -> Iterator[ServiceDescriptor]:
    for contract in CONTRACTS:
        yield from contract.DESCRIPTOR.services_by_name.values()


def methods() -> dict[str, bool]:
    """Every method, and whether one of its sides is a stream."""
    return {
        f"/{service.full_name}/{method.name}": method.client_streaming or method.server_streaming
        for service in services()
        for method in service.methods
    }


def test_every_method_of_every_service_has_a_role() -> None:
    table = {path for path in ACCESS if not path.startswith(NOT_INSTALLED)}
    assert table == set(methods())


def test_the_contracts_looked_at_are_all_that_there_are() -> None:
    import pollard.models.v1 as models

    folder = next(iter(models.__path__))
    from pathlib import Path

    root = Path(folder).parents[1]
    made = {path.stem.removesuffix("_grpc") for path in root.rglob("*_pb2_grpc.py")}
    assert made == {
        contract.__name__.rpartition(".")[2]
        for contract in CONTRACTS
        if contract.__name__.startswith("pollard.")
    }


def test_streams_are_known_as_such() -> None:
    assert {path for path, stream in methods().items() if stream} == set(STREAMS)
    assert {path for path, access in ACCESS.items() if access.metered} <= STREAMS


@pytest.mark.parametrize(
    ("role", "may", "may_not"),
    [
        (Role.VIEWER, ["ModelService/ListModels"], ["VisionService/Predict"]),
        (Role.PREDICTOR, ["VisionService/Predict"], ["ModelService/SetAlias"]),
        (Role.PUBLISHER, ["ModelService/SetAlias"], ["TokenService/CreateToken"]),
        (
            Role.ADMIN,
            ["TokenService/CreateToken", "VisionService/Predict"],
            ["FleetService/Sync"],
        ),
        (
            Role.SERVER,
            ["FleetService/Sync", "ModelService/DownloadBundle", "GRPCInferenceService/ModelInfer"],
            ["ModelService/SetAlias", "TokenService/CreateToken", "VisionService/Predict"],
        ),
    ],
)
def test_who_may_do_what(role: Role, may: list[str], may_not: list[str]) -> None:
    caller = Caller("somebody", role, "token", "token:x")
    by_end = {path.rpartition(".")[2]: access for path, access in ACCESS.items()}
    assert all(by_end[end].allows(caller) for end in may)
    assert not any(by_end[end].allows(caller) for end in may_not)


def test_only_health_is_for_everybody() -> None:
    nobody = {path for path, access in ACCESS.items() if access.role is None}
    assert nobody == {
        *(f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch", "List")),
        *(f"/inference.GRPCInferenceService/Server{name}" for name in ("Live", "Ready")),
    }
    assert all(access.allows(OPEN) for access in ACCESS.values())
