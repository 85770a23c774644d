"""Reflection answers for services of both descriptor pools."""

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from pollard.inference import grpc_service_pb2_grpc as inference_grpc
from pollard.models.v1 import fleet_service_pb2_grpc as fleet_grpc
from pollard.services.common.reflection import reflection_pool


async def test_every_service_and_its_imports_can_be_asked_for() -> None:
    names = [
        "inference.GRPCInferenceService",
        "pollard.models.v1.FleetService",
        reflection.SERVICE_NAME,
    ]
    server = grpc.aio.server()
    inference_grpc.add_GRPCInferenceServiceServicer_to_server(
        inference_grpc.GRPCInferenceServiceServicer(), server
    )
    fleet_grpc.add_FleetServiceServicer_to_server(fleet_grpc.FleetServiceServicer(), server)
    reflection.enable_server_reflection(names, server, reflection_pool(names))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            requests = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                *(
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
                    for name in names
                ),
                reflection_pb2.ServerReflectionRequest(file_by_filename="google/rpc/status.proto"),
            ]
            answers = [a async for a in stub.ServerReflectionInfo(iter(requests), timeout=10)]
    finally:
        await server.stop(None)
    assert {s.name for s in answers[0].list_services_response.service} == set(names)
    files = [
        FileDescriptorProto.FromString(a.file_descriptor_response.file_descriptor_proto[0]).name
        for a in answers[1:]
    ]
    assert files == [
        "inference/grpc_service.proto",
        "pollard/models/v1/fleet_service.proto",
        "grpc_reflection/v1alpha/reflection.proto",
        "google/rpc/status.proto",
    ]


def test_an_unknown_service_is_an_error() -> None:
    with pytest.raises(KeyError):
        reflection_pool(["no.such.Service"])
