"""What a preprocess server counts of each revision, for the gates of rollouts."""

from __future__ import annotations

from pollard.runtime.errors import ImageInvalid, ImageTooSmall, RuntimeFault, StepsInvalid
from pollard.services.common.call_metrics import Buckets
from pollard.services.common.counters import RequestCounters
from pollard.services.common.errors import ServiceError
from pollard.services.preprocess.errors import DecoderCrashed, DecodeTimeout, TensorRefused

_ITS_OWN = (ImageTooSmall, StepsInvalid, DecoderCrashed, DecodeTimeout, TensorRefused)
"""What a revision's preprocessing may do to an image that others can take. An image that is no
image, or a damaged one, is the client's; what the model fails, the inference server counts."""


class Counts:
    """Counters by model and revision; they only grow while the server runs."""

    def __init__(self) -> None:
        self._counters: dict[tuple[str, int], RequestCounters] = {}
        self.durations: dict[tuple[str, int], Buckets] = {}
        """From an image's coming to its answer, in seconds, by model and revision."""

    def of(self, model: str, revision: int) -> RequestCounters:
        """Return the counters of a revision, making them."""
        return self._counters.setdefault((model, revision), RequestCounters())

    def succeeded(self, model: str, revision: int, seconds: float) -> None:
        """Count an image that was answered.

        The manager is not told how long it took: gates judge what inference servers measure, in
        which nothing of the decoders' load is.
        """
        self.of(model, revision).succeeded += 1
        self.durations.setdefault((model, revision), Buckets()).add(seconds)

    def known(self, model: str, revision: int) -> RequestCounters | None:
        """Return the counters of a revision; None if it has had no request."""
        return self._counters.get((model, revision))

    def failed(self, model: str, revision: int, error: RuntimeFault | ServiceError) -> None:
        """Count an image without an answer, if the revision's own part failed or it is no image."""
        if isinstance(error, _ITS_OWN):
            self.of(model, revision).fail()
        elif isinstance(error, ImageInvalid):
            self.of(model, revision).reject()
