"""What a run measures (rank 0): metrics.jsonl, and from there TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_ds import deepspeed_config
from lcm_ds.files import write_whole
from lcm_ds.metrics import LOGGED
from lcm_ds.train.job import TrainJob
from lcm_ds.train.monitoring.histograms import Histogram
from lcm_ds.train.monitoring.tensorboard import ERROR_BY_POSITION, Setting, TensorBoardWriter
from lcm_ds.train.monitoring.text_samples import Sample
from lcm_ds.train.monitoring.trackers import Trackers

logger = logging.getLogger("lcm_ds")


def settings_of(job: TrainJob, ranks: int) -> dict[str, Setting]:
    """What tells runs apart: the config's values by their dotted keys, and what follows from it.

    Without the blocks that change nothing about what is learnt.
    """
    more = {
        "ranks": ranks,
        "zero_stage": deepspeed_config.zero_stage(job.ds),
        "precision": deepspeed_config.precision(job.ds),
        **{f"model.{key}": value for key, value in job.model.sizes().items()},
    }
    return {
        **_flat(job.config.model_dump(mode="json", exclude={"deepspeed", "checkpoint", "evaluate", "log", "guard"})),
        **more,
    }


def _flat(block: Any, key: str = "") -> dict[str, Setting]:
    """The numbers, words and yes-or-nos in a block of a config, by their dotted keys."""
    if isinstance(block, str | bool | int | float):
        return {key: block}
    parts = block if isinstance(block, dict) else dict(enumerate(block)) if isinstance(block, list) else {}
    flat: dict[str, Setting] = {}
    for part, inner in parts.items():
        flat |= _flat(inner, f"{key}.{part}" if key else str(part))
    return flat


class RunLog:
    """Writes a run's metrics. After a resume nothing overlaps: later lines are dropped, TensorBoard is purged.

    Where the disk is full lines of metrics.jsonl wait until it is not, and TensorBoard goes without.
    """

    def __init__(self, job: TrainJob, ranks: int, start_step: int) -> None:
        self._path = job.run_dir / "metrics.jsonl"
        truncate_metrics(self._path, start_step)
        self._file = self._path.open("ab", buffering=0)
        self._waiting = b""
        self.done = False  # whether the run has come to its end
        settings = settings_of(job, ranks)
        self._board = TensorBoardWriter(job.run_dir / "tensorboard", settings, start_step)
        self._trackers = Trackers(job.config.log, job.run_dir, settings)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl for `step` (steps done so far), and its scalars wherever they go.

        A number that is not finite becomes null in the JSON, which has no such numbers.
        """
        line = {"step": step, **{key: _finite(value) for key, value in values.items()}}
        self._waiting += (json.dumps(line) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            logger.error("metrics.jsonl: %s; %d bytes wait", error, len(self._waiting))
        scalars = {
            tag: float(value)
            for key, value in values.items()
            if (tag := tag_of(key)) is not None and isinstance(value, int | float)
        }
        self._board.scalars(step, scalars)
        self._trackers.scalars(step, scalars)
        if values.get(ERROR_BY_POSITION):
            self._board.errors(step, values[ERROR_BY_POSITION])

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Histograms of the step that begins after `step` steps."""
        self._board.histograms(step, values)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """What the model predicts for fixed prompts after `step` steps, in words."""
        self._board.samples(step, samples)
        self._board.flush()

    def validation_losses(self) -> dict[int, float]:
        """The loss of each validation of this run so far, by steps; those that are not finite are left out."""
        lines = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return {line["step"]: line["val_loss"] for line in lines if line.get("val_loss") is not None}

    def close(self) -> None:
        """Write out and close everything."""
        self._file.close()
        self._board.close(self.done)
        self._trackers.close(self.done)


def tag_of(key: str) -> str | None:
    """A metric's tag in TensorBoard; None: it stays in metrics.jsonl alone."""
    if key in LOGGED:
        return LOGGED[key].tag or None
    return f"val/{key.removeprefix('val_')}" if key.startswith("val_") else None


def read_losses(path: Path) -> dict[int, float]:
    """The loss of each step, counted from 0, that a run has logged so far; nan: not finite, or none."""
    losses: dict[int, float] = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a last line that is being written
                line = json.loads(text)
                some: list[float | None] = line.get("losses", [])
                first = line["step"] - len(some)
                losses.update((first + i, math.nan if loss is None else loss) for i, loss in enumerate(some))
    return losses


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    write_whole(path, "".join(line + "\n" for line in kept))


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
