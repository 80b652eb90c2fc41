"""The current speed of this machine, so that tests get more time on a slow or busy one."""

from __future__ import annotations

import os
import subprocess
import sys
import time

# Typical work of tests: start Python, import a large library, multiply matrices; on one core.
WORK = "import numpy; a = numpy.full((256, 256), 1 / 256); [a := a @ a for _ in range(200)]"
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Seconds of processor time on an AMD EPYC with avx512, on two cores of which the limits were chosen.
REFERENCE = 0.3
GOOD_FOR = 60.0  # seconds until the load is measured again

_measured: list[tuple[float, float]] = []  # (time, slowness)


def slowness() -> float:
    """The duration of work on this machine now, relative to a quiet reference machine, at least 1."""
    started = time.monotonic()
    if not _measured or started - _measured[-1][0] > GOOD_FOR:
        subprocess.run([sys.executable, "-c", WORK], check=True, env={**os.environ, **ONE_CORE})
        ended = time.monotonic()
        _measured.append((ended, max(1.0, (ended - started) / REFERENCE)))
    return _measured[-1][1]


def patience(seconds: float) -> float:
    """Scale a time limit, chosen on a quiet reference machine, to the current speed of this one."""
    return seconds * slowness()
