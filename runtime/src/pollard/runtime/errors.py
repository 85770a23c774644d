"""The errors of the runtime, in one tree.

::

    RuntimeFault
    ├── BundleError            a bundle cannot be used
    │   ├── ManifestInvalid      the manifest says something impossible
    │   ├── BundleCorrupt        a file differs from its digest, is missing, or is not listed
    │   ├── ArchiveInvalid       the tar is malformed, unsafe or too large
    │   ├── SignatureInvalid     the bundle's signature is damaged, forged, or of other files
    │   └── SignatureUntrusted   the bundle is not signed with a key that is trusted here
    ├── KeyInvalid             a key for signatures cannot be used
    ├── ModelError             a model file cannot be run
    │   ├── RequirementsNotMet   this machine lacks something that the variant needs
    │   ├── ModelLoadFailed      onnxruntime refuses the file
    │   │   └── ProviderMissing    the provider asked for cannot be used on this machine
    │   ├── DeviceFault          the GPU, or its driver, failed
    │   │   ├── DeviceMemoryShort  the GPU has not enough free memory
    │   │   └── DeviceLost         the GPU cannot be used any more by this process
    │   ├── SignatureMismatch    the graph's inputs or outputs are not those of the manifest
    │   └── GoldenMismatch       the outputs for the golden inputs are not the recorded ones
    ├── TensorInvalid          an input tensor does not fit the model
    ├── ImageInvalid           an image cannot be used
    │   ├── ImageEmpty           no bytes at all
    │   ├── ImageUnsupported     not an image, or not of a supported format
    │   ├── ImageDamaged         truncated or otherwise unreadable
    │   ├── ImageTooLarge        beyond the limits on bytes or pixels
    │   └── ImageTooSmall        smaller than what the steps crop out of it
    └── StepsInvalid           preprocessing steps that cannot be carried out

``reason`` is stable and machine-readable; it travels as ``ErrorInfo.reason``.
"""

from __future__ import annotations

from typing import ClassVar


class RuntimeFault(Exception):
    """Root of every error that this distribution raises on purpose."""

    reason: ClassVar[str] = "RUNTIME_FAULT"

    def __init__(self, message: str, **metadata: object) -> None:
        """Keep ``metadata``: every dynamic value of the message, by name."""
        super().__init__(message)
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send these errors back; keyword arguments would be lost.
        return (_rebuild, (type(self), self.message, self.metadata))


def _rebuild(kind: type[RuntimeFault], message: str, metadata: dict[str, str]) -> RuntimeFault:
    return kind(message, **metadata)


class BundleError(RuntimeFault):
    """A bundle cannot be used."""

    reason = "BUNDLE_INVALID"


class ManifestInvalid(BundleError):
    """The manifest is not readable or says something impossible."""

    reason = "MANIFEST_INVALID"


class BundleCorrupt(BundleError):
    """A file differs from its digest, is missing, or is not listed."""

    reason = "BUNDLE_CORRUPT"


class ArchiveInvalid(BundleError):
    """The tar is malformed, unsafe or too large."""

    reason = "ARCHIVE_INVALID"


class SignatureInvalid(BundleError):
    """The bundle's signature is damaged, forged, or of other files."""

    reason = "SIGNATURE_INVALID"


class SignatureUntrusted(BundleError):
    """The bundle is not signed, or not with a key that is trusted here."""

    reason = "SIGNATURE_UNTRUSTED"


class KeyInvalid(RuntimeFault):
    """A key for signatures cannot be used."""

    reason = "KEY_INVALID"


class ModelError(RuntimeFault):
    """A model file cannot be run."""

    reason = "MODEL_INVALID"


class RequirementsNotMet(ModelError):
    """This machine lacks something that every variant needs."""

    reason = "REQUIREMENTS_NOT_MET"


class ModelLoadFailed(ModelError):
    """onnxruntime refuses the file."""

    reason = "MODEL_LOAD_FAILED"


class ProviderMissing(ModelLoadFailed):
    """The execution provider asked for cannot be used on this machine."""

    reason = "PROVIDER_MISSING"


class DeviceFault(ModelError):
    """The GPU, or its driver, failed."""

    reason = "DEVICE_FAULT"


class DeviceMemoryShort(DeviceFault):
    """The GPU has not enough free memory."""

    reason = "DEVICE_MEMORY_SHORT"


class DeviceLost(DeviceFault):
    """The GPU cannot be used any more by this process."""

    reason = "DEVICE_LOST"


class SignatureMismatch(ModelError):
    """The graph's inputs or outputs are not those of the manifest."""

    reason = "SIGNATURE_MISMATCH"


class GoldenMismatch(ModelError):
    """The outputs for the golden inputs are not the recorded ones."""

    reason = "GOLDEN_MISMATCH"


class TensorInvalid(RuntimeFault):
    """An input tensor does not fit the model."""

    reason = "TENSOR_INVALID"


class ImageInvalid(RuntimeFault):
    """An image cannot be used."""

    reason = "IMAGE_INVALID"


class ImageEmpty(ImageInvalid):
    """There are no bytes at all."""

    reason = "IMAGE_EMPTY"


class ImageUnsupported(ImageInvalid):
    """Not an image, or not of a supported format."""

    reason = "IMAGE_UNSUPPORTED"


class ImageDamaged(ImageInvalid):
    """Truncated or otherwise unreadable."""

    reason = "IMAGE_DAMAGED"


class ImageTooLarge(ImageInvalid):
    """Beyond the limits on bytes or pixels."""

    reason = "IMAGE_TOO_LARGE"


class ImageTooSmall(ImageInvalid):
    """The image is smaller than what the steps crop out of it."""

    reason = "IMAGE_TOO_SMALL"


class StepsInvalid(RuntimeFault):
    """Preprocessing steps that cannot be carried out."""

    reason = "STEPS_INVALID"
