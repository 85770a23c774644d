"""What `--restricted-protocol` takes, and that its secret stays one."""

import pytest

from pollard.inference import grpc_service_pb2 as pb
from pollard.services.common.errors import StartupError
from pollard.services.inference.errors import ProtocolRestricted
from pollard.services.inference.restrictions import PROTOCOLS, parse_restrictions
from pollard.services.inference.settings import InferenceSettings
from pollard.services.up.serve import as_toml


def test_every_method_belongs_to_one_group() -> None:
    methods = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    grouped = [method for group in PROTOCOLS.values() for method in group]
    assert sorted(grouped) == sorted(methods)


def test_a_group_has_the_key_it_was_given() -> None:
    found = parse_restrictions(["logging,trace:Some-Key=a:b=c", "health:other=x"])
    assert {name for name, each in found.items() if each.value == b"a:b=c"} == {
        "LogSettings",
        "TraceSetting",
    }
    restriction = found["LogSettings"]
    restriction.check([("other", b"x"), ("triton-grpc-protocol-some-key", "a:b=c")])
    restriction.check([(b"triton-grpc-protocol-some-key", b"a:b=c")])
    with pytest.raises(ProtocolRestricted, match="'triton-grpc-protocol-some-key'"):
        restriction.check([("triton-grpc-protocol-some-key", "a:b=C")])


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["s3cret"], "must be PROTOCOL"),
        (["logging"], "must be PROTOCOL"),
        (["logging:key"], "must be PROTOCOL"),
        (["logging:key="], "must be PROTOCOL"),
        ([":key=s3cret"], "must be PROTOCOL"),
        (["logging:=s3cret"], "must be PROTOCOL"),
        (["log:key=s3cret"], "no protocol 'log'; there are health, metadata"),
        (["logging,:key=s3cret"], "no protocol ''"),
        (["logging:a b=s3cret"], "the key 'a b' must be"),
        (["logging:a-bin=s3cret"], "not end with -bin"),
        (["logging:key=s3cret "], "without blanks"),
        (["logging:key=s3crét"], "printable ASCII"),
        (["logging:a=s3cret", "trace,logging:b=s3cret"], "'logging' is restricted twice"),
    ],
)
def test_what_is_malformed_is_refused_without_showing_the_value(texts, words) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        InferenceSettings.load({"restricted_protocol": texts})
    assert "s3cr" not in str(caught.value)


def test_the_value_is_not_printed() -> None:
    settings = InferenceSettings.load({"restricted_protocol": ["logging:key=s3cret"]})
    assert settings.restrictions["LogSettings"].value == b"s3cret"
    for text in (repr(settings), as_toml(settings), repr(settings.restrictions)):
        assert "s3cret" not in text
    # The process that serves under Envoy has to know it.
    again = InferenceSettings.load(settings.model_dump(mode="json"))
    assert again.restrictions == settings.restrictions
