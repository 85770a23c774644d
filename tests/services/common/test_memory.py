"""What is there at the beginning is left out of collections; what is large goes back."""

from __future__ import annotations

import subprocess
import sys

import pytest

_FROZEN = """
import gc
import numpy
from pollard.services.common.memory import freeze_heap

before = len(gc.get_objects())
freeze_heap()
assert gc.get_freeze_count() > 0.9 * before
assert len(gc.get_objects()) < 0.1 * before

class Knot:
    pass

# What comes later is still collected.
knot = Knot()
knot.itself = knot
del knot
assert gc.collect() > 0
"""

_STEADY = """
import gc
import numpy as np
from pathlib import Path
from pollard.services.common.memory import steady_heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

steady_heap()
before, kept = resident(), []
for _ in range(20):
    # glibc would put all but the first into its heap, and what lies behind it would keep it there.
    large = np.ones(24 * 2**20, np.uint8)
    kept.append(bytearray(100_000))
    del large
assert resident() - before < 12 * 2**20
"""


@pytest.mark.parametrize("program", [_FROZEN, _STEADY], ids=["frozen", "steady"])
def test_in_a_process_of_its_own(program: str) -> None:
    # Both change the whole process.
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
