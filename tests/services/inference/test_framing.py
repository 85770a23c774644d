"""gRPC's framing, where it is written by hand."""

import pytest

from pollard.services.inference.frontends.framing import seconds_of


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [(b"1S", 1), (b"100m", 0.1), (b"2H", 7200), (b"00000005M", 300), (b"99999999n", 0.099999999)],
)
def test_timeouts_in_every_unit(timeout, seconds):
    assert seconds_of(timeout) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "timeout", [b"", b"S", b"1", b"-1S", b"1.5S", b"1s", b"123456789S", b"9" * 400 + b"H"]
)
def test_malformed_timeouts_are_none(timeout):
    assert seconds_of(timeout) is None
