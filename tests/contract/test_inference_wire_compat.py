"""The `inference` contracts are, field by field, those that Triton's client was built with."""

from collections.abc import Iterator

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor
from tritonclient.grpc import model_config_pb2 as triton_model_config_pb2
from tritonclient.grpc import service_pb2 as triton_service_pb2

from pollard.inference import grpc_service_pb2, model_config_pb2

ADDITIONS = {
    # In the Open Inference Protocol, but not in Triton's copy of it.
    "ModelMetadataResponse.properties",
    "ModelMetadataResponse.PropertiesEntry",
    "ModelMetadataResponse.PropertiesEntry.key",
    "ModelMetadataResponse.PropertiesEntry.value",
}

PAIRS = [
    pytest.param(grpc_service_pb2, triton_service_pb2, id="grpc_service"),
    pytest.param(model_config_pb2, triton_model_config_pb2, id="model_config"),
]


def facts_of(file: FileDescriptor) -> dict[str, tuple[object, ...]]:
    """Everything about a file that shows on the wire or in JSON, by the name that it is about."""
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    facts: dict[str, tuple[object, ...]] = {"": (proto.package, proto.syntax)}
    for enum in proto.enum_type:
        facts.update(_enum_facts(enum, ""))
    for message in proto.message_type:
        facts.update(_message_facts(message, ""))
    for service in proto.service:
        for method in service.method:
            facts[f"{service.name}.{method.name}"] = (
                method.input_type,
                method.output_type,
                method.client_streaming,
                method.server_streaming,
            )
    return facts


def _message_facts(
    message: descriptor_pb2.DescriptorProto, prefix: str
) -> Iterator[tuple[str, tuple[object, ...]]]:
    name = prefix + message.name
    yield name, (message.options.map_entry,)
    for enum in message.enum_type:
        yield from _enum_facts(enum, name + ".")
    for nested in message.nested_type:
        yield from _message_facts(nested, name + ".")
    for field in message.field:
        oneof = ""
        if field.HasField("oneof_index"):
            oneof = message.oneof_decl[field.oneof_index].name
        yield (
            f"{name}.{field.name}",
            (
                field.number,
                field.type,
                field.label,
                field.type_name,
                field.json_name,
                oneof,
                field.proto3_optional,
                field.options.packed if field.options.HasField("packed") else None,
            ),
        )


def _enum_facts(
    enum: descriptor_pb2.EnumDescriptorProto, prefix: str
) -> Iterator[tuple[str, tuple[object, ...]]]:
    yield prefix + enum.name, ("enum",)
    for value in enum.value:
        yield f"{prefix}{enum.name}.{value.name}", (value.number,)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_everything_in_tritons_contract_is_the_same_in_ours(ours, theirs) -> None:
    our_facts, their_facts = facts_of(ours.DESCRIPTOR), facts_of(theirs.DESCRIPTOR)
    assert {name: our_facts.get(name) for name in their_facts} == their_facts


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_ours_adds_nothing_but_what_is_documented(ours, theirs) -> None:
    extra = facts_of(ours.DESCRIPTOR).keys() - facts_of(theirs.DESCRIPTOR).keys()
    assert extra <= ADDITIONS


def test_a_message_survives_the_trip_through_tritons_classes() -> None:
    request = grpc_service_pb2.ModelInferRequest(
        model_name="m",
        model_version="3",
        id="7",
        inputs=[
            grpc_service_pb2.ModelInferRequest.InferInputTensor(
                name="x",
                datatype="FP32",
                shape=[1, 2],
                parameters={"p": grpc_service_pb2.InferParameter(double_param=0.5)},
            )
        ],
        raw_input_contents=[b"\x00" * 8],
    )
    theirs = triton_service_pb2.ModelInferRequest.FromString(request.SerializeToString())
    assert theirs.inputs[0].parameters["p"].double_param == 0.5
    back = grpc_service_pb2.ModelInferRequest.FromString(theirs.SerializeToString())
    assert back == request
