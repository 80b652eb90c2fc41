"""Rank 0's second task: committing what the ranks have written, and showing how far they are.

One process appends to units.jsonl and shards.jsonl, for appends of several hosts to one file need not come out whole.
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
from lcm_ds.prepare.encode import full_disk
from lcm_ds.prepare.progress import Progress
from lcm_ds.prepare.state import UnitResult, add_unit

SECONDS_A_LOOK = 0.1


class Committer:
    """Commits units in a thread until all ranks have left.

    units: those that are done, which it adds to; check: called again and again, it raises where a rank is gone.
    Raises, in `close`, what went wrong: InputError where the disk is full, or too many documents cannot be
    read or encoded.
    """

    def __init__(
        self,
        config: PrepareConfig,
        peers: Coordinator,
        units: list[UnitResult],
        progress: Progress,
        check: Callable[[], None],
    ) -> None:
        self.config, self.peers, self.units, self.progress, self._check = config, peers, units, progress, check
        self._problems = [problem for unit in units for problem in unit.problems]
        self._error: BaseException | None = None
        self._abandoned = Event()
        self._thread = Thread(target=self._work, name="lcm-ds-clerk", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until every rank has left and all is committed."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Commit what is reported by now, and end."""
        self._abandoned.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            while True:
                # In this order: what a rank reported before it left is seen below.
                left = self.peers.left()
                last = self._abandoned.is_set() or left == self.peers.place.world_size
                for message in self.peers.reports():
                    self._commit(message)
                self.progress.show(self.peers.told())
                if last:
                    return
                self.peers.check()
                self.peers.check_arrivals(left, self.progress.say)
                self._check()
                time.sleep(SECONDS_A_LOOK)
        except BaseException as error:
            self._error = full_disk(Path(self.config.output), error) if isinstance(error, OSError) else error
            self.peers.fail(self._error)

    def _commit(self, message: dict[str, Any]) -> None:
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
        """Raise InputError once too many documents cannot be read or encoded, of all that the source has, or has given.

        One is never too many.
        """
        self._problems += unit.problems
        given = self.progress.total or max(self.progress.given + unit.given, self.config.documents_per_shard)
        if unit.problems and len(self._problems) > max(1, self.config.max_refused * given):
            raise InputError(
                f"{self.config.output}: {len(self._problems):,} of {given:,} documents could not be read or encoded, "
                f"more than max_refused {self.config.max_refused:g} allows; the first: {'; '.join(self._problems[:3])}"
            )
