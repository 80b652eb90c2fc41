"""Optional Weights & Biases, MLflow and Prometheus: the scalars of TensorBoard under the same tags and steps.

A resumed run continues the tracker's run. No error of a tracker ends a run or delays it.
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
from typing import TYPE_CHECKING, Protocol

from lcm_ds.config import LogConfig, MlflowConfig, WandbConfig
from lcm_ds.files import read_object, write_whole

if TYPE_CHECKING:
    from lcm_ds.train.monitoring.tensorboard import Setting

logger = logging.getLogger("lcm_ds")

IDS = "trackers.json"  # in the run's folder: its ids in the trackers
MAX_QUEUED = 10_000  # calls
# How long the end of a run waits for queued calls; the shorter if no tracker has answered yet or the run was stopped.
CLOSE_SECONDS, SHORT_CLOSE_SECONDS = 30.0, 5.0
PARAMS_PER_CALL, MAX_PARAM_LENGTH = 100, 500  # MLflow's limits


class Tracker(Protocol):
    """A service that receives scalars."""

    id: str  # of the run in the tracker

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars by tag."""

    def close(self, done: bool) -> None:
        """done: whether the run is complete."""


class Wandb:
    """A run of Weights & Biases. `step` is a metric of its own, because wandb's step cannot decrease on a resume."""

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
    """A run of MLflow, without the library's global state."""

    def __init__(self, config: MlflowConfig, run_dir: Path, settings: Mapping[str, Setting], known: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(config.tracking_uri)
        if known is None:
            existing = self._client.get_experiment_by_name(config.experiment)
            experiment = existing.experiment_id if existing else self._client.create_experiment(config.experiment)
            self.id = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
            params = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in settings.items()]
            for first in range(0, len(params), PARAMS_PER_CALL):
                self._client.log_batch(self.id, params=params[first : first + PARAMS_PER_CALL])
        else:
            self.id = known
            self._client.update_run(known, status="RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self.id, [self._metric(tag, value, now, step) for tag, value in values.items()])

    def close(self, done: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if done else "KILLED")


class Prometheus:
    """A text file of gauges, written anew at each report, as node_exporter's textfile collector reads it."""

    def __init__(self, path: str, run_dir: Path, settings: Mapping[str, Setting], known: str | None) -> None:
        import prometheus_client

        from lcm_ds.metrics import LOGGED

        self._client, self.id = prometheus_client, path
        self._about = {metric.tag: metric.about for metric in LOGGED.values()}
        self._labels = {"run": str(run_dir)}
        self._registry = prometheus_client.CollectorRegistry()
        self._gauges: dict[str, prometheus_client.Gauge] = {}
        Path(path).parent.mkdir(parents=True, exist_ok=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._set("step", step, "steps done so far")
        for tag, value in values.items():
            self._set(tag.replace("/", "_"), value, self._about.get(tag, tag))
        self._set("reported", time.time(), "when these values were written, in seconds since 1970")
        self._write(running=True)

    def close(self, done: bool) -> None:
        self._write(running=False)

    def _set(self, name: str, value: float, description: str) -> None:
        if name not in self._gauges:
            labels = list(self._labels)
            self._gauges[name] = self._client.Gauge(f"lcm_ds_{name}", description, labels, registry=self._registry)
        self._gauges[name].labels(**self._labels).set(value)

    def _write(self, running: bool) -> None:
        self._set("running", float(running), "1 while the run trains, 0 when it has ended")
        self._client.write_to_textfile(self.id, self._registry)


KINDS: dict[str, Callable[..., Tracker]] = {"wandb": Wandb, "mlflow": Mlflow, "prometheus": Prometheus}
PACKAGES = {"prometheus": "prometheus_client"}  # where its name is not the kind's


class Trackers:
    """The configured trackers, called from a thread; one that fails is disabled."""

    def __init__(self, config: LogConfig, run_dir: Path, settings: Mapping[str, Setting]) -> None:
        self._names = [name for name in KINDS if getattr(config, name) is not None]
        self._active: dict[str, Tracker] = {}
        self._ready = threading.Event()  # all have answered or are disabled
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MAX_QUEUED)
        self._thread: threading.Thread | None = None
        if self._names:
            arguments = (config, run_dir, dict(settings))
            self._thread = threading.Thread(target=self._work, args=arguments, name="lcm-ds-trackers", daemon=True)
            self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars by tag; dropped if the queue is full, because a tracker does not answer."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._calls.put_nowait(lambda tracker: tracker.scalars(step, values))

    def close(self, done: bool) -> None:
        """Send queued calls, for CLOSE_SECONDS at most; done: whether the run is complete."""
        if self._thread is None:
            return
        until = time.monotonic() + (CLOSE_SECONDS if done and self._ready.is_set() else SHORT_CLOSE_SECONDS)
        with contextlib.suppress(queue.Full):
            self._calls.put(lambda tracker: tracker.close(done), timeout=until - time.monotonic())
            self._calls.put(None, timeout=max(0.0, until - time.monotonic()))
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            logger.error("log.%s: no answer: the last values may be missing", ", log.".join(self._names))

    def _work(self, config: LogConfig, run_dir: Path, settings: Mapping[str, Setting]) -> None:
        ids = read_object(run_dir / IDS, default={})
        for name, kind in KINDS.items():
            if (block := getattr(config, name)) is not None:
                with self._disable_on_error(name):
                    self._active[name] = kind(block, run_dir, settings, ids.get(name))
        self._ready.set()
        with contextlib.suppress(OSError):  # a full disk
            ids |= {name: tracker.id for name, tracker in self._active.items()}
            write_whole(run_dir / IDS, json.dumps(ids) + "\n")
        while (call := self._calls.get()) is not None:
            for name, tracker in list(self._active.items()):
                with self._disable_on_error(name):
                    call(tracker)

    @contextlib.contextmanager
    def _disable_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: libraries raise their own
            logger.error("log.%s: disabled for this run: %s", name, " ".join(str(error).split()) or repr(error))
            self._active.pop(name, None)


def missing_packages(config: LogConfig) -> list[str]:
    """A line for each tracker in the config that is not installed."""
    packages = {name: PACKAGES.get(name, name) for name in KINDS}
    return [
        f"log.{name}: the package {package} is not installed: pip install 'lcm-ds[{name}]'"
        for name, package in packages.items()
        if getattr(config, name) is not None and importlib.util.find_spec(package) is None
    ]
