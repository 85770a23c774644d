"""Ask a served model about images: python classify_images.py MODEL IMAGE…"""

from __future__ import annotations

import os
import sys

from pollard.client import NotFound, PollardError, VisionClient


def main(model: str, *images: str) -> int:
    address = os.environ.get("POLLARD_VISION_ADDRESS", "127.0.0.1:8011")
    with VisionClient(address) as vision:
        for image in images:
            try:
                prediction = vision.predict(image, model, top_k=3, timeout=10)
            except NotFound as error:
                print(f"push a model first: {error}", file=sys.stderr)
                return 1
            except PollardError as error:
                print(f"{image}: {error}", file=sys.stderr)
                return 1
            best = ", ".join(f"{label.label} {label.score:.1%}" for label in prediction.labels)
            print(f"{image}: {best} (revision {prediction.revision})")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        print("usage: python classify_images.py MODEL IMAGE…", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(*sys.argv[1:]))
