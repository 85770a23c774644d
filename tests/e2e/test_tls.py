"""The whole suite by TLS, every side of which shows a certificate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from pollard.client import PollardError, Tls, VisionClient
from pollard.client._images import png
from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8)


@pytest.mark.long
def test_a_model_is_pushed_swapped_and_asked_where_all_show_certificates(
    start_up: Callable[..., Any],
    pollard: Callable[..., Any],
    make_bundle: Any,
    make_authority: Any,
    tmp_path: Path,
) -> None:
    ours = make_authority("ours")
    certificate, key = ours.issue("services")
    up = start_up(
        *("--tls-certificate", str(certificate), "--tls-key", str(key)),
        *("--tls-ca", str(ours.ca), "--tls-client-ca", str(ours.ca)),
    )
    mine, my_key = ours.issue("client")
    places = {
        "POLLARD_MODELS_ADDRESS": up.address("models"),
        "POLLARD_VISION_ADDRESS": up.address("preprocess"),
    }
    env = {
        **places,
        "POLLARD_TLS_CA": str(ours.ca),
        "POLLARD_TLS_CERTIFICATE": str(mine),
        "POLLARD_TLS_KEY": str(my_key),
    }
    image = tmp_path / "image.png"
    image.write_bytes(png(PIXELS))
    for seed in (1, 2):
        done = pollard("models", "push", make_bundle(seed=seed).path, "--model", "m", env=env)
        assert done.returncode == 0, done.stderr
    assert pollard("models", "alias", "m", "production", "2", env=env).returncode == 0
    done = pollard("predict", image, "--model", "m", "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["revision"] == 2

    refused = pollard("models", "list", env={**places, "POLLARD_TLS_CA": str(ours.ca)})
    assert refused.returncode == 1
    assert "cannot be reached" in refused.stderr
    refused = pollard("models", "list", env={**places, "POLLARD_TOKEN": "secret"})
    assert refused.returncode == 1
    assert "cannot be reached" in refused.stderr
    assert "secret" not in refused.stderr

    tls = Tls(ca_file=ours.ca, certificate_file=mine, key_file=my_key)
    with VisionClient(up.address("preprocess"), tls=tls) as vision:
        assert vision.predict(PIXELS, model="m").revision == 2
    # Tensors go the same way, by the front end that is the default.
    credentials = grpc.ssl_channel_credentials(
        ours.ca.read_bytes(), my_key.read_bytes(), mine.read_bytes()
    )
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[PIXELS.tobytes()])
    request.inputs.add(name="image", datatype="UINT8", shape=[1, 8, 8, 1])
    with grpc.secure_channel(up.address("inference"), credentials) as channel:
        answer = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=20)
    assert answer.model_version == "2"

    stranger, stranger_key = make_authority("others").issue("client")
    tls = Tls(ca_file=ours.ca, certificate_file=stranger, key_file=stranger_key)
    with VisionClient(up.address("preprocess"), tls=tls) as vision, pytest.raises(PollardError):
        vision.predict(PIXELS, model="m")
    assert "Traceback" not in up.said()
    assert "secret" not in up.said()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--tls-certificate",), "together"),
        (("--tls-certificate", "--tls-key"), "--tls-ca"),
        (("--tls-ca",), "--tls-certificate"),
    ],
)
def test_half_of_what_tls_needs_is_refused(
    pollard: Callable[..., Any], make_authority: Any, tmp_path: Path, given: Any, words: str
) -> None:
    ours = make_authority("ours")
    certificate, key = ours.issue("services")
    files = {"--tls-certificate": certificate, "--tls-key": key, "--tls-ca": ours.ca}
    flags = [item for flag in given for item in (flag, files[flag])]
    done = pollard("up", "--port-base", "0", "--data-dir", tmp_path / "data", *flags)
    assert done.returncode == 1
    assert words in done.stderr


def test_a_certificate_for_another_name_is_told_at_the_start(
    pollard: Callable[..., Any], make_authority: Callable[[str], Any], tmp_path: Path
) -> None:
    ours = make_authority("ours")
    certificate, key = ours.issue("services", "pollard.example")
    done = pollard(
        *("up", "--data-dir", tmp_path / "up", "--port-base", "0"),
        *("--tls-certificate", certificate, "--tls-key", key, "--tls-ca", ours.ca),
    )
    assert done.returncode == 1
    assert "certificate that models shows is not for 127.0.0.1" in done.stderr
    assert "--tls-name" in done.stderr
