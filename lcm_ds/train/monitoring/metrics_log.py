"""A run's metrics (rank 0): metrics.jsonl, TensorBoard, Weights & Biases and MLflow."""

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


def hparams_of(job: TrainJob, ranks: int) -> dict[str, Setting]:
    """Hyperparameters that runs are compared by: dotted config keys, without blocks that do not affect learning."""
    return {
        **_flat(job.config.model_dump(mode="json", exclude={"deepspeed", "checkpoint", "evaluate", "log", "guard"})),
        "ranks": ranks,
        "zero_stage": deepspeed_config.zero_stage(job.ds),
        "precision": deepspeed_config.precision(job.ds),
        **{f"model.{key}": value for key, value in job.model.sizes().items()},
    }


def _flat(block: Any, key: str = "") -> dict[str, Setting]:
    """The scalars in a config block, by their dotted keys."""
    if isinstance(block, str | bool | int | float):
        return {key: block}
    parts = block if isinstance(block, dict) else dict(enumerate(block)) if isinstance(block, list) else {}
    flat: dict[str, Setting] = {}
    for part, inner in parts.items():
        flat |= _flat(inner, f"{key}.{part}" if key else str(part))
    return flat


class RunLog:
    """Writes a run's metrics. On a resume, entries of later steps are removed everywhere.

    While the disk is full, lines of metrics.jsonl are held in memory, and TensorBoard misses points.
    """

    def __init__(self, job: TrainJob, ranks: int, start_step: int) -> None:
        self._path = job.run_dir / "metrics.jsonl"
        truncate_metrics(self._path, start_step)
        self._file = self._path.open("ab", buffering=0)
        self._unwritten = b""
        self.done = False  # whether the run is complete
        hparams = hparams_of(job, ranks)
        self._tensorboard = TensorBoardWriter(job.run_dir / "tensorboard", hparams, start_step)
        self._trackers = Trackers(job.config.log, job.run_dir, hparams)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl after `step` steps, and its scalars to TensorBoard and trackers.

        Values that are not finite become null, as JSON has no such numbers.
        """
        line = {"step": step, **{key: _finite(value) for key, value in values.items()}}
        self._unwritten += (json.dumps(line) + "\n").encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            logger.error("metrics.jsonl: %s; %d bytes not written yet", error, len(self._unwritten))
        scalars = {
            tag: float(value)
            for key, value in values.items()
            if (tag := tag_of(key)) is not None and isinstance(value, int | float)
        }
        self._tensorboard.scalars(step, scalars)
        self._trackers.scalars(step, scalars)
        if values.get(ERROR_BY_POSITION):
            self._tensorboard.errors(step, values[ERROR_BY_POSITION])

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Histograms of weights and gradients."""
        self._tensorboard.histograms(step, values)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Predictions for fixed prompts after `step` steps, as text."""
        self._tensorboard.samples(step, samples)
        self._tensorboard.flush(step)

    def validation_losses(self) -> dict[int, float]:
        """The finite losses of this run's validations so far, by step."""
        lines = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return {line["step"]: line["val_loss"] for line in lines if line.get("val_loss") is not None}

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        self._tensorboard.close(self.done)
        self._trackers.close(self.done)


def tag_of(key: str) -> str | None:
    """A metric's tag in TensorBoard; None: it is only in metrics.jsonl."""
    if key in LOGGED:
        return LOGGED[key].tag or None
    return f"val/{key.removeprefix('val_')}" if key.startswith("val_") else None


def read_losses(path: Path) -> dict[int, float]:
    """The logged loss of each step, counted from 0; nan: not finite, or without targets."""
    losses: dict[int, float] = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a last line that is being written
                line = json.loads(text)
                line_losses: list[float | None] = line.get("losses", [])
                first = line["step"] - len(line_losses)
                losses.update((first + i, math.nan if loss is None else loss) for i, loss in enumerate(line_losses))
    return losses


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, and lines truncated by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
    write_whole(path, "".join(line + "\n" for line in kept))


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
