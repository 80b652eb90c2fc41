"""For notebooks and scripts: prepare, train and evaluate as functions, with configs as objects.

The same code as behind the commands of `lcm-ds`. Invalid input raises an InputError with a line for each error.

    from lcm_ds.api import PrepareConfig, TrainConfig, evaluate, load, prepare, train

    data = prepare(load(PrepareConfig, "configs/prepare/quickstart.yaml"))
    run = train(load(TrainConfig, "configs/train/quickstart.yaml", ["steps=50"]), processes=2)
    figures = evaluate(run.path)
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_ds.config import PrepareConfig, TrainConfig, dump, load
from lcm_ds.data.format import Dataset, open_dataset
from lcm_ds.deepspeed_config import find
from lcm_ds.errors import InputError, PeerFailed, RunFailedError

__all__ = ["InputError", "PrepareConfig", "Prepared", "Run", "TrainConfig", "evaluate", "load", "prepare", "train"]


@dataclass(frozen=True)
class Prepared:
    """The datasets of a preparation."""

    train: Dataset
    validation: Dataset | None  # None if the config sets no documents aside for it


@dataclass(frozen=True)
class Run:
    """A run on disk.

    stopped: `train` was asked to stop before the end of the run and saved a checkpoint; call it again to continue.
    """

    path: Path
    stopped: bool = False

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of RUN/metrics.jsonl, oldest first; keys of validations begin with val_."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    @property
    def step(self) -> int:
        """The step of its newest checkpoint."""
        from lcm_ds.checkpoint.format import find

        return find(self.path).step


def prepare(config: PrepareConfig) -> Prepared:
    """Text → dataset, as `lcm-ds prepare`; a dataset that is complete already is only opened.

    If a launcher has set RANK and WORLD_SIZE, all its ranks have to call this. Raises InputError, and RunFailedError if
    another rank or process fails.
    """
    from lcm_ds.prepare.pipeline import prepare

    try:
        prepare(config)
    except PeerFailed as error:
        raise RunFailedError(error.message or f"{config.output}: another rank has failed") from None
    out = Path(config.output)
    validation = out / "validation"
    return Prepared(open_dataset(out / "train"), open_dataset(validation) if validation.is_dir() else None)


def train(config: TrainConfig, processes: int = 1) -> Run:
    """Train, or resume from the newest checkpoint, as `lcm-ds launch --local`; only from the main thread.

    Workers' output is printed here. An interrupt or the file RUN/STOP saves a checkpoint and returns a `stopped` run.

    Args:
        config: The run.
        processes: Workers on this host.

    Raises:
        InputError: The config is invalid.
        RunFailedError: The run failed.
    """
    from lcm_ds.launcher.launch import launch
    from lcm_ds.signals import STOPPED

    if isinstance(config.deepspeed, str):
        # Workers read a copy of the config in another folder.
        config = config.model_copy(update={"deepspeed": str(find(config.deepspeed, None).resolve())})
    with tempfile.TemporaryDirectory(prefix="lcm-ds-") as folder, _printed() as output:
        path = Path(folder) / "config.yaml"
        path.write_text(dump(config), encoding="utf-8")
        try:
            code = launch(path, local=processes, output=output)
        except InputError as error:
            raise type(error)(line.replace(str(path), "config") for line in error.errors) from None
    if code == 2:
        raise InputError(f"{config.run_dir}: the workers refused to start; see their output above")
    if code == 1:
        raise RunFailedError(f"{config.run_dir}: failed; see the workers' output above and {config.run_dir}/log.txt")
    return Run(Path(config.run_dir), stopped=code == STOPPED)


def evaluate(run: Run | str | Path, **options: Any) -> dict[str, Any]:
    """Metrics of a run's newest checkpoint and its baselines; options as of `lcm_ds.evaluate.run.evaluate`."""
    from lcm_ds.evaluate.run import evaluate

    return evaluate(run.path if isinstance(run, Run) else run, **options)


@contextmanager
def _printed() -> Iterator[int]:
    """A file descriptor whose lines this process prints: the output of workers reaches a notebook's cell."""
    read_end, write_end = os.pipe()

    def print_lines() -> None:
        with os.fdopen(read_end, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                sys.stdout.write(line)
                sys.stdout.flush()

    printer = threading.Thread(target=print_lines, name="lcm-ds-output")
    printer.start()
    try:
        yield write_end
    finally:
        os.close(write_end)
        printer.join()
