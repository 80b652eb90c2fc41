"""A trace of some steps by torch's profiler, for Perfetto or TensorBoard."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torch.profiler import profile

logger = logging.getLogger("lcm_ds.train")


class StepProfiler:
    """Records the steps (first, last), from 0, into RUN/profile/steps_FIRST-LAST.pt.trace.json; None: nothing."""

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None) -> None:
        self._folder, self._steps = run_dir / "profile", steps
        self._profile: profile | None = None
        self._first = self._last = 0

    def begin(self, step: int) -> None:
        """Call this before a step."""
        if self._profile is None and self._steps is not None and self._steps[0] <= step <= self._steps[1]:
            self._first = step
            self._profile = profile(record_shapes=True)
            self._profile.start()

    def end(self, step: int) -> None:
        """Call this after it."""
        self._last = step
        if self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write the trace, even if the run ends before its last step."""
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps_{self._first}-{self._last}.pt.trace.json"
        partial = path.with_suffix(".partial")
        self._profile.export_chrome_trace(str(partial))
        os.replace(partial, path)
        self._profile, self._steps = None, None
        logger.info("wrote %s", path)
