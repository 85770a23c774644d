"""Send tensors at once with asyncio: python infer_many.py MODEL

The model's metadata say what it takes; here come random images.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter

import numpy as np

from pollard.client import AsyncInferenceClient


async def main(model: str) -> int:
    address = os.environ.get("POLLARD_INFERENCE_ADDRESS", "127.0.0.1:8001")
    generator = np.random.default_rng(0)
    async with AsyncInferenceClient(address) as inference:
        metadata = await inference.model_metadata(model)
        image = metadata.inputs[0]
        shape = [1, *image.shape[1:]]
        answers = await asyncio.gather(
            *(
                inference.infer(
                    model, {image.name: generator.integers(0, 256, shape, dtype=np.uint8)}
                )
                for _ in range(100)
            )
        )
    versions = Counter(answer.version for answer in answers)
    print(f"{len(answers)} answers; by revision: {dict(versions)}")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
