"""Rank 0's thread that commits what all ranks have written, and shows their progress.

Only one process appends to units.jsonl and shards.jsonl, because concurrent appends from several hosts may be torn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import ShardInfo, commit
from lcm_ds.errors import InputError
from lcm_ds.prepare.coordinator import Coordinator
from lcm_ds.prepare.encode import disk_error
from lcm_ds.prepare.progress import Progress
from lcm_ds.prepare.state import UnitResult, add_unit

POLL_SECONDS = 0.1


class Committer:
    """Commits units in a thread until all ranks have deregistered.

    Args:
        config: Of the preparation.
        coordinator: To the other ranks.
        units: Those that are done; committed ones are appended.
        progress: Shows it.
        check: Called again and again; raises if a rank is gone.
    """

    def __init__(
        self,
        config: PrepareConfig,
        coordinator: Coordinator,
        units: list[UnitResult],
        progress: Progress,
        check: Callable[[], None],
    ) -> None:
        self.config, self.coordinator, self.units, self.progress = config, coordinator, units, progress
        self._check = check
        self._problems = [problem for unit in units for problem in unit.problems]
        self._error: BaseException | None = None
        self._aborted = Event()
        self._thread = Thread(target=self._run, name="lcm-ds-committer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until everything is committed.

        Raises InputError if the disk is full or too many documents cannot be read or encoded, and what `check` raises.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        """Commit only what has been reported by now."""
        self._aborted.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                # Read before the reports: what a rank reported before it deregistered is seen below.
                last = self._aborted.is_set() or self.coordinator.deregistered() == self.coordinator.env.world_size
                for message in self.coordinator.new_reports():
                    self._commit(message)
                self.progress.show(self.coordinator.progress_of_ranks())
                if last:
                    return
                self.coordinator.raise_if_failed()
                self.coordinator.check_arrivals(self.progress.say)
                self._check()
                time.sleep(POLL_SECONDS)
        except BaseException as error:
            self._error = disk_error(Path(self.config.output), error) if isinstance(error, OSError) else error
            self.coordinator.fail(self._error)

    def _commit(self, message: dict[str, Any]) -> None:
        if "note" in message:  # not of a unit
            self.progress.say(message["note"])
            return
        unit = UnitResult(**message["unit"])
        for problem in unit.problems:
            self.progress.say(problem)
        self._check_refused(unit)
        out = Path(self.config.output)
        for split, shard in message["shards"].items():
            commit(out / split, ShardInfo(**shard))
        add_unit(out, unit)
        self.units.append(unit)
        self.progress.add(unit.given)

    def _check_refused(self, unit: UnitResult) -> None:
        """Raise InputError if too many documents cannot be read or encoded; a single one is never too many."""
        self._problems += unit.problems
        total = self.progress.total or max(self.progress.given + unit.given, self.config.documents_per_shard)
        if unit.problems and len(self._problems) > max(1, self.config.max_refused * total):
            raise InputError(
                f"{self.config.output}: {len(self._problems):,} of {total:,} documents could not be read or encoded, "
                f"more than max_refused {self.config.max_refused:g} allows; the first: {'; '.join(self._problems[:3])}"
            )
