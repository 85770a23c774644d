"""What `pollard.client` offers, and what it costs to import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pollard.client
from pollard.client import errors

EXPORTED = [
    "DEFAULT_INFERENCE_ADDRESS",
    "DEFAULT_MAX_MESSAGE_BYTES",
    "DEFAULT_MODELS_ADDRESS",
    "DEFAULT_TIMEOUT_SECONDS",
    "DEFAULT_VISION_ADDRESS",
    "Aborted",
    "Accuracy",
    "Alias",
    "AliasSwitchFailed",
    "AliasSwitchTimeout",
    "AlreadyExists",
    "AsyncInferenceClient",
    "AsyncModelsClient",
    "AsyncVisionClient",
    "BundleSignature",
    "Caller",
    "Cancelled",
    "Copied",
    "DamagedFile",
    "DataLoss",
    "DeadlineExceeded",
    "DetectedObject",
    "ErrorDetails",
    "Event",
    "Explanation",
    "FailedPrecondition",
    "GateEvidence",
    "Geometry",
    "ImageLike",
    "InferResult",
    "InferenceClient",
    "Internal",
    "InvalidAnswer",
    "InvalidArgument",
    "InvalidBundle",
    "Model",
    "ModelMetadata",
    "ModelsClient",
    "NewToken",
    "NotFound",
    "Origin",
    "OutOfRange",
    "PermissionDenied",
    "PollardError",
    "Prediction",
    "Progress",
    "ProgressCallback",
    "Pushed",
    "RepositoryEntry",
    "RequestFailed",
    "ResourceExhausted",
    "RetryPolicy",
    "Revision",
    "RevisionEvidence",
    "Rollout",
    "RolloutEvidence",
    "ScoredLabel",
    "Server",
    "ServerFailure",
    "ServerMetadata",
    "ServerRevision",
    "ShadowEvidence",
    "TensorInfo",
    "Timings",
    "Tls",
    "Token",
    "TokenLimits",
    "Transformed",
    "Tuning",
    "TuningPoint",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "Variant",
    "Verified",
    "VisionClient",
]


def test_the_exported_names_are_these_and_no_others() -> None:
    assert pollard.client.__all__ == EXPORTED


def test_every_error_is_exported_and_has_one_root() -> None:
    classes = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert classes <= set(EXPORTED)
    assert all(issubclass(getattr(errors, name), errors.PollardError) for name in classes)


def test_the_error_tree_in_the_docstring_is_the_real_one() -> None:
    for name in ("RequestFailed", *(cls.__name__ for cls in errors.RequestFailed.__subclasses__())):
        assert name in (errors.__doc__ or "")


def test_sync_and_asyncio_clients_offer_the_same_methods() -> None:
    for name in ("VisionClient", "InferenceClient", "ModelsClient"):
        sync = getattr(pollard.client, name)
        asynchronous = getattr(pollard.client, f"Async{name}")
        public = {item for item in dir(sync) if not item.startswith("_")}
        assert public == {item for item in dir(asynchronous) if not item.startswith("_")}
        for item in public:
            expected = str(inspect.signature(getattr(asynchronous, item)))
            expected = expected.replace("AsyncIterator[", "Iterator[")
            expected = re.sub(
                r"AsyncGenerator\[(\w+), None\]", r"Generator[\1, None, None]", expected
            )
            assert str(inspect.signature(getattr(sync, item))) == expected


def test_the_sync_clients_are_made_from_the_asyncio_ones() -> None:
    script = Path(__file__).parents[2] / "clients" / "python" / "generate_sync.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = (
        "import sys, pollard.client, pollard.client.cli\n"
        "heavy = ['onnxruntime', 'torch', 'sqlalchemy', 'PIL', 'pydantic', 'onnx',"
        " 'pollard.runtime', 'pollard.services', 'pollard.compress']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
