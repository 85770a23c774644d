"""What a bundle is and how to run it.

One implementation of bundles, transforms, postprocessing and sessions, used by
compression and by the services, so that what is verified is what is served.
"""

import os

# From 1.29 on onnxruntime's published builds for Linux note each session – names of the model's
# file and graph, hashes of its weights, the machine – in the user's cache directory and send that
# to Microsoft. What runs here concerns nobody else. onnxruntime reads the variable when it is
# imported; who wants the telemetry sets it to 0.
if not os.environ.get("ORT_DISABLE_TELEMETRY"):
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
