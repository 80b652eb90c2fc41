"""Weights & Biases and MLflow, for those who ask for them: the scalars of TensorBoard under the same tags and steps.

Promises: a resumed run goes on in the same run over there; no trouble with a tracker ends a run or makes it wait.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from lcm_ds.config import LogConfig, MlflowConfig, WandbConfig
from lcm_ds.files import read_object, write_whole
from lcm_ds.train.monitoring.tensorboard import Setting

logger = logging.getLogger("lcm_ds")

IDS = "trackers.json"  # in the run's folder: under which names the run is known elsewhere
MOST_WAITING = 10_000  # lines of metrics
# That the end of a run waits for what is still to be sent, and where nobody has answered yet or the run was stopped.
PATIENCE_SECONDS, SHORT_PATIENCE_SECONDS = 30.0, 5.0
PARAMS_AT_A_TIME, LONGEST_PARAM = 100, 500  # MLflow's limits


class Tracker(Protocol):
    """Somewhere that scalars go."""

    id: str  # of the run over there

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by their tags."""

    def close(self, done: bool) -> None:
        """done: whether the run came to its end."""


class Wandb:
    """A run of Weights & Biases. The step is a value of its own, for theirs never goes back, as a resumed run may."""

    def __init__(self, config: WandbConfig, run_dir: Path, settings: Mapping[str, Setting], known: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            name=config.name or run_dir.name,
            mode=config.mode,
            dir=run_dir,
            id=known,
            resume="allow" if config.mode == "online" else None,
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.id = str(self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0)


class Mlflow:
    """A run of MLflow; its state is kept here, none of the library's."""

    def __init__(self, config: MlflowConfig, run_dir: Path, settings: Mapping[str, Setting], known: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers of each call
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(config.tracking_uri)
        if known is None:
            found = self._client.get_experiment_by_name(config.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(config.experiment)
            self.id = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
            params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in settings.items()]
            for first in range(0, len(params), PARAMS_AT_A_TIME):
                self._client.log_batch(self.id, params=params[first : first + PARAMS_AT_A_TIME])
        else:
            self.id = known
            self._client.update_run(known, status="RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self.id, [self._metric(tag, value, now, step) for tag, value in values.items()])

    def close(self, done: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if done else "KILLED")


KINDS: dict[str, Callable[..., Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


class Trackers:
    """Those that the config names, in a thread of their own. One that fails is left out from then on."""

    def __init__(self, config: LogConfig, run_dir: Path, settings: Mapping[str, Setting]) -> None:
        self._names = [name for name in KINDS if getattr(config, name) is not None]
        self._there: dict[str, Tracker] = {}
        self._ready = threading.Event()  # all have answered, or are left out
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        if self._names:
            work = (config, run_dir, dict(settings))
            self._thread = threading.Thread(target=self._work, args=work, name="lcm-ds-trackers", daemon=True)
            self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by their tags; dropped where too many wait for a tracker that does not answer."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait(lambda tracker: tracker.scalars(step, values))

    def close(self, done: bool) -> None:
        """Send what waits, for PATIENCE_SECONDS at most; done: whether the run came to its end."""
        if self._thread is None:
            return
        until = time.monotonic() + (PATIENCE_SECONDS if done and self._ready.is_set() else SHORT_PATIENCE_SECONDS)
        with contextlib.suppress(queue.Full):
            self._waiting.put(lambda tracker: tracker.close(done), timeout=until - time.monotonic())
            self._waiting.put(None, timeout=max(0.0, until - time.monotonic()))
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            logger.error("log.%s: no answer: some of the last values are not there", ", log.".join(self._names))

    def _work(self, config: LogConfig, run_dir: Path, settings: Mapping[str, Setting]) -> None:
        known = read_object(run_dir / IDS, default={})
        for name, kind in KINDS.items():
            if (block := getattr(config, name)) is not None:
                with self._left_out_if_it_fails(name):
                    self._there[name] = kind(block, run_dir, settings, known.get(name))
        self._ready.set()
        with contextlib.suppress(OSError):  # a full disk
            write_whole(run_dir / IDS, json.dumps(known | {name: each.id for name, each in self._there.items()}) + "\n")
        while (call := self._waiting.get()) is not None:
            for name, tracker in list(self._there.items()):
                with self._left_out_if_it_fails(name):
                    call(tracker)

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library of somebody else's raises
            logger.error("log.%s: left out from here on: %s", name, " ".join(str(error).split()) or repr(error))
            self._there.pop(name, None)


def missing_packages(config: LogConfig) -> list[str]:
    """A line for each tracker that the config names and that is not installed."""
    return [
        f"log.{name}: the package {name} is not installed: pip install 'lcm-ds[{name}]'"
        for name in KINDS
        if getattr(config, name) is not None and importlib.util.find_spec(name) is None
    ]
