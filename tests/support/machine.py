"""How fast this machine is now, so that a test on a slow or busy one is given its time."""

from __future__ import annotations

import os
import subprocess
import sys
import time

# What tests do: start Python, import a large library, multiply matrices. On one core, so that what it takes of the
# processor is what it takes on a quiet machine.
WORK = "import numpy; a = numpy.full((256, 256), 1 / 256); [a := a @ a for _ in range(200)]"
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Seconds of the processor that it takes on an AMD EPYC with avx512; the tests' limits were chosen on two of its cores.
REFERENCE = 0.3
GOOD_FOR = 60.0  # seconds: who else is on the machine changes

_measured: list[tuple[float, float]] = []  # when, and how slow it was


def slowness() -> float:
    """How many times as long as on a quiet reference machine work takes here now, at least 1."""
    started = time.monotonic()
    if not _measured or started - _measured[-1][0] > GOOD_FOR:
        subprocess.run([sys.executable, "-c", WORK], check=True, env={**os.environ, **ONE_CORE})
        ended = time.monotonic()
        _measured.append((ended, max(1.0, (ended - started) / REFERENCE)))
    return _measured[-1][1]


def patience(seconds: float) -> float:
    """A limit in seconds that was chosen on a quiet reference machine, for this one as it is now."""
    return seconds * slowness()
