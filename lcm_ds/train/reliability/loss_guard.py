"""What a run does about steps that go wrong: those that are not finite, and losses that leap.

All ranks see the same losses and come to the same.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lcm_ds.config import GuardConfig
from lcm_ds.data.loader import Loader
from lcm_ds.data.trace import trace
from lcm_ds.distributed.collectives import from_first
from lcm_ds.errors import InputError, RunFailedError
from lcm_ds.files import write_whole
from lcm_ds.train.job import TrainJob

logger = logging.getLogger("lcm_ds.train")

MOST_TIMES = 10
NAMED = 5  # documents in a line of the log; RUN/incidents.jsonl has them all


@dataclass(frozen=True)
class Incident:
    """Something that went wrong at a step."""

    step: int
    what: str
    leave_out: range | None = None  # the steps to go back for, and to leave out then


class Rollback(Exception):
    """The run has to go back to its last checkpoint; raised by all ranks at the same step."""

    def __init__(self, incident: Incident) -> None:
        super().__init__(incident.what)
        self.incident = incident


class StepMonitor:
    """Judges each step by its loss and by whether it was applied.

    losses: of the steps before the first one, as `state` gives them.
    """

    def __init__(self, config: GuardConfig, losses: list[float]) -> None:
        self._config = config
        self._losses = deque(losses, maxlen=config.spike_window)
        self.skipped_in_a_row = 0

    def state(self) -> list[float]:
        """What a run that is resumed has to know to judge as this one does."""
        return list(self._losses)

    def check(self, step: int, loss: float | None, applied: bool) -> Incident | None:
        """What is wrong with a step: with its loss over all ranks, or with its gradients (`applied` is False then).

        A step without targets has no loss (None), and is none of those that later ones are compared with.
        """
        if not applied:
            self.skipped_in_a_row += 1
            what = "the loss" if loss is not None and not math.isfinite(loss) else "the gradient"
            what = f"{what} is not finite, the step is skipped"
            if self.skipped_in_a_row < self._config.max_skipped:
                return Incident(step, what)
            what += f", as {self.skipped_in_a_row} in a row were (guard.max_skipped)"
            return Incident(step, what, range(step + 1 - self.skipped_in_a_row, step + 1))
        self.skipped_in_a_row = 0
        if loss is None:
            return None
        leap = self._leap(loss)
        self._losses.append(loss)
        if leap is None:
            return None
        leave_out = range(max(0, step + 1 - self._config.spike_steps), step + 1)
        return Incident(step, leap, leave_out if self._config.on_spike == "rollback" else None)

    def _leap(self, loss: float) -> str | None:
        """How far a loss is above those before it, where that is further than guard.spike_sigma."""
        sigma = self._config.spike_sigma
        if sigma is None or len(self._losses) < self._config.spike_window:
            return None
        mean, spread = statistics.fmean(self._losses), statistics.stdev(self._losses)
        if loss <= mean + sigma * spread:
            return None
        return f"the loss leaps to {loss:.4g}, from {mean:.4g} ± {spread:.2g} over {len(self._losses)} steps"


class SkippedSteps:
    """The steps that a run passes over, in RUN/left_out.json from the moment at which it goes back for them.

    Rank 0 reads and writes it, and all ranks make the same of it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "left_out.json"
        there = dist.get_rank() == 0 and self._path.exists()
        self._found: list[dict[str, int]] = from_first(json.loads(self._path.read_text("utf-8")) if there else [])

    @property
    def ranges(self) -> list[range]:
        """The steps, in the order in which they were found bad."""
        return [range(entry["first"], entry["last"] + 1) for entry in self._found]

    def add(self, incident: Incident, back_to: int) -> None:
        """Pass over an incident's steps from now on; `back_to`: steps done where the run starts again.

        Raises RunFailedError where they follow on steps that were left out before: that did not help. So, too, where it
        has gone back there MOST_TIMES times.
        """
        assert incident.leave_out is not None
        first, last = max(back_to, incident.leave_out.start), incident.leave_out.stop - 1
        before = [entry for entry in self._found if entry["back_to"] == back_to]
        if any(entry["first"] <= first <= entry["last"] + 1 for entry in before) or len(before) >= MOST_TIMES:
            tried = ", ".join(f"{entry['first']} to {entry['last']}" for entry in before)
            raise RunFailedError(
                f"step {incident.step}: {incident.what}; the run has gone back to step {back_to} before, for the steps "
                f"{tried}, and that did not help; {self._path.with_name('incidents.jsonl')} has the documents"
            )
        self._found.append({"first": first, "last": last, "back_to": back_to})
        if dist.get_rank() == 0:
            try:
                write_whole(self._path, json.dumps(self._found))
            except OSError as error:  # a full disk; this process knows it all the same
                logger.error("left_out.json: %s", error)


def tell(incident: Incident, job: TrainJob, loader: Loader, where: str) -> None:
    """Write an incident into the log and, with all documents of its step, into RUN/incidents.jsonl.

    Every rank looks at the documents of its own rows, and says which of them hold numbers that are not finite. where:
    the end of the line in the log.
    """
    mine: list[dict[str, Any]] = []
    try:
        mine = _documents(job, loader, incident.step)
    except (InputError, OSError) as error:  # what is only to be told must not end the run
        logger.error("step %d: its documents cannot be read: %s", incident.step, error)
    every: list[list[dict[str, Any]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    if dist.get_rank() != 0:
        return
    documents = [document for some in every for document in some]
    broken = [document["id"] for document in documents if not document["finite"]]
    if broken:
        named = f"documents with numbers that are not finite: {_some(broken)}"
    else:
        named = f"documents: {_some(list(dict.fromkeys(document['id'] for document in documents)))}"
    logger.warning("step %d: %s%s; %s", incident.step, incident.what, where, named)
    left_out = None if incident.leave_out is None else [incident.leave_out.start, incident.leave_out.stop - 1]
    line = {"step": incident.step, "what": incident.what, "left_out": left_out, "documents": documents}
    try:
        with (job.run_dir / "incidents.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        logger.error("incidents.jsonl: %s", error)


def _documents(job: TrainJob, loader: Loader, step: int) -> list[dict[str, Any]]:
    """The documents of this rank's rows of a step, each with whether all its concepts in them are finite."""
    batches = [loader.read(step, index) for index in range(loader.micro_batches)]
    segments = {
        (batch.first_lane + row, int(segment)): bool(
            batch.concepts[row][batch.segment_ids[row] == segment].isfinite().all()
        )
        for batch in batches
        for row in range(len(batch.segment_ids))
        for segment in batch.segment_ids[row].unique()
    }
    ((_, lines),) = trace(job.datasets, job.plan, job.config.data.max_segment, range(step, step + 1), loader.lanes)
    return [
        {
            "lane": line.lane,
            "dataset": line.dataset,
            "shard": line.shard,
            "key": line.key,
            "id": line.id,
            "concepts": [line.start, line.stop],
            "finite": segments.get((line.lane, line.segment), True),
        }
        for line in lines
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
