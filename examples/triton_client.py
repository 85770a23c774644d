"""Triton's own client works unchanged: python triton_client.py MODEL

pip install 'tritonclient[grpc]'
"""

from __future__ import annotations

import os
import sys

import numpy as np
import tritonclient.grpc as triton


def main(model: str) -> int:
    client = triton.InferenceServerClient(
        os.environ.get("POLLARD_INFERENCE_ADDRESS", "127.0.0.1:8001")
    )
    metadata = client.get_model_metadata(model)
    declared = metadata.inputs[0]
    shape = [1, *declared.shape[1:]]
    image = triton.InferInput(declared.name, shape, declared.datatype)
    image.set_data_from_numpy(np.zeros(shape, np.uint8))
    result = client.infer(model, [image])
    scores = result.as_numpy(metadata.outputs[0].name)
    print(f"version {result.get_response().model_version}: {scores.round(2).tolist()}")
    client.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
