"""Reactions to steps that go wrong: losses or gradients that are not finite, and loss spikes.

All ranks see the same losses and decide alike.
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

MAX_ROLLBACKS = 10  # to one checkpoint
MAX_NAMED_DOCUMENTS = 5  # in a line of the log; RUN/incidents.jsonl has them all


@dataclass(frozen=True)
class Incident:
    """Something that went wrong at a step."""

    step: int
    what: str
    skip: range | None = None  # the steps to skip after a rollback; None: no rollback


class Rollback(Exception):
    """The run returns to its last checkpoint; raised by all ranks at the same step."""

    def __init__(self, incident: Incident) -> None:
        super().__init__(incident.what)
        self.incident = incident


class StepMonitor:
    """Checks the loss of each step, and whether the step was applied.

    losses: of the steps before the first one, from `state`.
    """

    def __init__(self, config: GuardConfig, losses: list[float]) -> None:
        self._config = config
        self._losses = deque(losses, maxlen=config.spike_window)
        self.skipped_in_a_row = 0

    def state(self) -> list[float]:
        """What a resumed run needs to decide alike."""
        return list(self._losses)

    def check(self, step: int, loss: float | None, applied: bool) -> Incident | None:
        """What is wrong with a step, if anything.

        Args:
            step: Its number, from 0.
            loss: Over all ranks; None without targets: such a step is not compared with others.
            applied: False if the gradients were not finite.
        """
        if not applied:
            self.skipped_in_a_row += 1
            what = "the loss" if loss is not None and not math.isfinite(loss) else "the gradient"
            what = f"{what} is not finite, the step is skipped"
            if self.skipped_in_a_row < self._config.max_skipped:
                return Incident(step, what)
            what += f", the last of {self.skipped_in_a_row} in a row (guard.max_skipped)"
            return Incident(step, what, range(step + 1 - self.skipped_in_a_row, step + 1))
        self.skipped_in_a_row = 0
        if loss is None:
            return None
        spike = self._spike(loss)
        self._losses.append(loss)
        if spike is None:
            return None
        skip = range(max(0, step + 1 - self._config.spike_steps), step + 1)
        return Incident(step, spike, skip if self._config.on_spike == "rollback" else None)

    def _spike(self, loss: float) -> str | None:
        """A message if the loss is more than guard.spike_sigma standard deviations above the mean of those before."""
        sigma = self._config.spike_sigma
        if sigma is None or len(self._losses) < self._config.spike_window:
            return None
        mean, deviation = statistics.fmean(self._losses), statistics.stdev(self._losses)
        if loss <= mean + sigma * deviation:
            return None
        return f"loss spike: {loss:.4g} (previous {len(self._losses)} steps: {mean:.4g} ± {deviation:.2g})"


class SkippedSteps:
    """The steps that a run passes over since a rollback, kept in RUN/left_out.json; the same on all ranks."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "left_out.json"
        exists = dist.get_rank() == 0 and self._path.exists()
        self._entries: list[dict[str, int]] = from_first(json.loads(self._path.read_text("utf-8")) if exists else [])

    @property
    def ranges(self) -> list[range]:
        """The steps, in the order in which they went wrong."""
        return [range(entry["first"], entry["last"] + 1) for entry in self._entries]

    def add(self, incident: Incident, back_to: int) -> None:
        """Skip the incident's steps from now on.

        Args:
            incident: The reason for the rollback.
            back_to: Steps done at the checkpoint that the run resumes from.

        Raises:
            RunFailedError: These steps follow on others that were skipped from the same checkpoint, so that skipping
                does not help, or the run has returned there MAX_ROLLBACKS times.
        """
        assert incident.skip is not None
        first, last = max(back_to, incident.skip.start), incident.skip.stop - 1
        before = [entry for entry in self._entries if entry["back_to"] == back_to]
        if any(entry["first"] <= first <= entry["last"] + 1 for entry in before) or len(before) >= MAX_ROLLBACKS:
            tried = ", ".join(f"{entry['first']} to {entry['last']}" for entry in before)
            raise RunFailedError(
                f"step {incident.step}: {incident.what}; the run has already rolled back to step {back_to} and skipped "
                f"the steps {tried}; their documents are in {self._path.with_name('incidents.jsonl')}"
            )
        self._entries.append({"first": first, "last": last, "back_to": back_to})
        if dist.get_rank() == 0:
            try:
                write_whole(self._path, json.dumps(self._entries))
            except OSError as error:  # a full disk; this process knows the steps anyway
                logger.error("left_out.json: %s", error)


def record_incident(incident: Incident, job: TrainJob, loader: Loader) -> None:
    """Log an incident and append it, with all documents of its step, to RUN/incidents.jsonl; all ranks call this.

    Each rank reads its own rows again and reports which of their documents hold values that are not finite.
    """
    own_documents: list[dict[str, Any]] = []
    try:
        own_documents = _documents(job, loader, incident.step)
    except (InputError, OSError) as error:  # a report must not end the run
        logger.error("step %d: its documents cannot be read: %s", incident.step, error)
    by_rank: list[list[dict[str, Any]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(by_rank, own_documents)
    if dist.get_rank() != 0:
        return
    documents = [document for of_rank in by_rank for document in of_rank]
    not_finite = [document["id"] for document in documents if not document["finite"]]
    kind = "documents with values that are not finite" if not_finite else "documents"
    names = list(dict.fromkeys(not_finite or [document["id"] for document in documents]))
    named = ", ".join(names[:MAX_NAMED_DOCUMENTS])
    if len(names) > MAX_NAMED_DOCUMENTS:
        named += f" and {len(names) - MAX_NAMED_DOCUMENTS} more"
    skipped = None if incident.skip is None else [incident.skip.start, incident.skip.stop - 1]
    reaction = f": rolling back, skipping steps {skipped[0]} to {skipped[1]}" if skipped else ""
    logger.warning("step %d: %s%s; %s: %s", incident.step, incident.what, reaction, kind, named)
    line = {"step": incident.step, "what": incident.what, "left_out": skipped, "documents": documents}
    try:
        with (job.run_dir / "incidents.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        logger.error("incidents.jsonl: %s", error)


def _documents(job: TrainJob, loader: Loader, step: int) -> list[dict[str, Any]]:
    """The documents of this rank's rows of a step, each with whether all its concepts in them are finite."""
    batches = [loader.read(step, index) for index in range(loader.micro_batches)]
    finite = {
        (batch.first_lane + row, int(segment)): bool(
            batch.concepts[row][batch.segment_ids[row] == segment].isfinite().all()
        )
        for batch in batches
        for row in range(len(batch.segment_ids))
        for segment in batch.segment_ids[row].unique()
    }
    ((_, lines),) = trace(job.datasets, job.plan, range(step, step + 1), loader.lanes)
    return [
        {
            "lane": line.lane,
            "dataset": line.dataset,
            "shard": line.shard,
            "key": line.key,
            "id": line.id,
            "concepts": [line.start, line.stop],
            "finite": finite.get((line.lane, line.segment), True),
        }
        for line in lines
    ]
