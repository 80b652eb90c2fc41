"""For notebooks and scripts: prepare, train and evaluate as functions, with the configs as objects.

The same code as behind the verbs of `lcm-ds`. What is wrong is an InputError with a line for each mistake.

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
from lcm_ds.errors import InputError, RunFailedError

__all__ = ["InputError", "PrepareConfig", "Prepared", "Run", "TrainConfig", "evaluate", "load", "prepare", "train"]


@dataclass(frozen=True)
class Prepared:
    """What a preparation made."""

    train: Dataset
    validation: Dataset | None  # None where the config keeps no documents for it


@dataclass(frozen=True)
class Run:
    """A run on disk.

    stopped: whether the call of `train` that returned it was asked to stop before the run's end. Its checkpoint is
    saved; call `train` again to continue.
    """

    path: Path
    stopped: bool = False

    def metrics(self) -> list[dict[str, Any]]:
        """Every line of RUN/metrics.jsonl, oldest first; those of validations have keys that begin with val_."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    @property
    def step(self) -> int:
        """Steps up to its newest checkpoint."""
        from lcm_ds.checkpoint.format import find

        return find(self.path).step


def prepare(config: PrepareConfig) -> Prepared:
    """Text → dataset, as `lcm-ds prepare`; what is finished already is opened.

    Where a launcher has set RANK and WORLD_SIZE, this is one of its ranks, and all of them have to call it. Raises
    InputError, RunFailedError if another rank or process fails.
    """
    from lcm_ds.prepare.coordinator import PeerFailed
    from lcm_ds.prepare.pipeline import prepare

    try:
        prepare(config)
    except PeerFailed as error:
        raise RunFailedError(error.message or f"{config.output}: another rank has failed") from None
    out = Path(config.output)
    validation = out / "validation"
    return Prepared(open_dataset(out / "train"), open_dataset(validation) if validation.is_dir() else None)


def train(config: TrainConfig, processes: int = 1) -> Run:
    """Train in so many processes on this host, as `lcm-ds launch --local`, or go on from the run's newest checkpoint.

    What the workers say is printed here. Interrupting it saves, and so does the file RUN/STOP: `stopped` of what is
    returned says so, and called again, the run goes on. Call it from the main thread. Raises InputError for what is
    wrong with the config, RunFailedError if the run fails.
    """
    from lcm_ds.launcher.launch import launch
    from lcm_ds.signals import STOPPED

    if isinstance(config.deepspeed, str):
        # The workers read the config from elsewhere.
        config = config.model_copy(update={"deepspeed": str(find(config.deepspeed, None).resolve())})
    with tempfile.TemporaryDirectory(prefix="lcm-ds-") as folder, _printed() as output:
        path = Path(folder) / "config.yaml"
        path.write_text(dump(config), encoding="utf-8")
        try:
            code = launch(path, local=processes, output=output)
        except InputError as error:
            raise type(error)(line.replace(str(path), "config") for line in error.errors) from None
    if code == 2:
        raise InputError(f"{config.run_dir}: the workers refused to start; what they said is above")
    if code == 1:
        raise RunFailedError(
            f"{config.run_dir}: failed; what the workers said is above and in {config.run_dir}/log.txt"
        )
    return Run(Path(config.run_dir), stopped=code == STOPPED)


def evaluate(run: Run | str | Path, **options: Any) -> dict[str, Any]:
    """The figures of a run's newest checkpoint beside its baselines, as `lcm-ds evaluate` (see its function)."""
    from lcm_ds.evaluate.run import evaluate

    return evaluate(run.path if isinstance(run, Run) else run, **options)


@contextmanager
def _printed() -> Iterator[int]:
    """A file descriptor whose lines are printed by this process: what workers write there reaches a notebook's cell."""
    reading, writing = os.pipe()

    def tell() -> None:
        with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                sys.stdout.write(line)
                sys.stdout.flush()

    teller = threading.Thread(target=tell, name="lcm-ds-output")
    teller.start()
    try:
        yield writing
    finally:
        os.close(writing)
        teller.join()
