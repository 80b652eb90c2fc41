"""`lcm-ds prepare CONFIG --on ray`: the units of a preparation are made by actors of a Ray cluster.

This process, Ray's driver, is the only rank: it checks everything, commits what the actors report and finishes the
dataset. An actor does what another rank would do: it claims the next unit, reads and encodes it, and writes its shards.
Ray places the actors, one per GPU or per `encoder.threads` processors, and says which of them are lost with their node;
the units that those had claimed are made again by others, in a next round. (Ray's own retries bind a call to its
actor, which may wait for room in the cluster forever while others have room.)
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lcm_ds.config import PrepareConfig
from lcm_ds.data.quantization import Quantization
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.errors import InputError, RunFailedError, first_line
from lcm_ds.launcher.schedulers import forwarded_variables
from lcm_ds.prepare import pipeline
from lcm_ds.prepare.coordinator import Coordinator
from lcm_ds.prepare.shares import check_texts
from lcm_ds.prepare.state import SOURCE
from lcm_ds.prepare.texts import EncoderFacts, Texts, TextWork
from lcm_ds.terminal import hide_warnings
from lcm_ds.text.open import open_source

POLL_SECONDS = 0.2
REMIND_SECONDS = 60.0  # between two lines about a cluster without room
MORE_DEATHS = 3  # than there are actors, without a unit made in between, end the preparation


def prepare(config: PrepareConfig) -> None:
    """Prepare on the Ray cluster that runs (RAY_ADDRESS, or one of this host), or on one that is started here.

    Raises InputError as `lcm_ds.prepare.pipeline.prepare`, and if Ray is missing or does not answer.
    """
    check_texts(config)
    pipeline.prepare(config, open_work=RayWork)


class Maker:
    """An actor: makes units. What is wrong with its encoder is an error of its first call.

    Args:
        config: A PrepareConfig, as JSON.
        folder: The driver's current one, in which paths of the config start.
        name: For its claims.
    """

    def __init__(self, config: dict[str, Any], folder: str, name: str) -> None:
        self._mapping, self._folder, self._name = config, folder, name

    @cached_property
    def _work(self) -> TextWork:
        hide_warnings()
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise InputError(
                f"{self._folder}: {error.strerror} on {socket.gethostname()}: the nodes of a Ray cluster have to see "
                "the folders of a preparation under the same paths"
            ) from None
        config = PrepareConfig(**self._mapping)
        torch.set_num_threads(config.threads)
        return TextWork(config, DistEnv.local(0, 1, 0), None, None)

    def facts(self) -> EncoderFacts:
        """About its encoder."""
        return self._work.facts

    def quantization(self) -> Quantization:
        """The steps of int8."""
        self._check_output()
        return self._work.quantization()

    def _check_output(self) -> None:
        """Raise InputError if this node does not see that the preparation has begun."""
        source = Path(self._work.config.output) / SOURCE
        if not source.exists():
            raise InputError(
                f"{source.absolute()}: not seen on {socket.gethostname()}: the nodes of a Ray cluster have to share "
                "the folder `output`"
            )

    def make_units(self, board: Any, turn: int, described: dict[str, Any], done: set[int]) -> None:
        """Make units until none is left to claim.

        Args:
            board: The actor that holds the claims.
            turn: The number of the round.
            described: The encoder of the driver's facts.
            done: The units that are done.

        Raises:
            InputError: As `make_units` of Work, or the encoder here is another one.
        """
        work = self._work
        if work.encoder() != described:
            raise InputError(
                f"on {socket.gethostname()} the encoder is {work.encoder()}, on the first node {described}"
            )
        self._check_output()
        quantization = pipeline.read_quantization(work.config)
        work.make_units(_Claims(board, turn, self._name), quantization, done)


class Board:
    """An actor beside the driver: which units are claimed, and what is reported."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}
        self._claimants: dict[int, set[str]] = {}
        self._reports: list[dict[str, Any]] = []
        self._figures: dict[tuple[int, str], dict[str, float]] = {}

    def claim(self, turn: int, name: str) -> int:
        """The next number in a round, from 0."""
        self._claimants.setdefault(turn, set()).add(name)
        self._next[turn] = self._next.get(turn, -1) + 1
        return self._next[turn]

    def report(self, message: dict[str, Any]) -> None:
        """Keep a message for the driver."""
        self._reports.append(message)

    def report_progress(self, turn: int, name: str, figures: dict[str, float]) -> None:
        """Keep the latest figures of an actor in a round."""
        self._figures[turn, name] = figures

    def take(self, turn: int) -> tuple[list[dict[str, Any]], dict[str, float], set[str]]:
        """The reports since the last call, the sums of all figures, and who has claimed in a round."""
        reports, self._reports = self._reports, []
        sums: dict[str, float] = {}
        for figures in self._figures.values():
            for key, value in figures.items():
                sums[key] = sums.get(key, 0) + value
        return reports, sums, self._claimants.get(turn, set())


class _Claims(Coordinator):
    """An actor's connection to the board."""

    def __init__(self, board: Any, turn: int, name: str) -> None:
        super().__init__(DistEnv.local(0, 1, 0))
        self._board, self._turn, self._name = board, turn, name

    def claim(self) -> int:
        """The next number that no actor has claimed in this round."""
        return int(_ray().get(self._board.claim.remote(self._turn, self._name)))

    def report(self, message: dict[str, Any]) -> None:
        """Send the driver a message; it has arrived when this returns."""
        _ray().get(self._board.report.remote(message))

    def report_progress(self, figures: dict[str, float]) -> None:
        """Publish this actor's progress."""
        self._board.report_progress.remote(self._turn, self._name, figures)


class RayWork(Texts):
    """Texts that actors encode; see Work."""

    def __init__(self, config: PrepareConfig, index: dict[str, Any] | None) -> None:
        source = open_source(config.source, config.sentences.language, index)
        self._actors = _Actors(config)
        try:
            facts = self._actors.of_one(lambda actor: actor.facts.remote())
        except BaseException:
            self._actors.close()
            raise
        self.processes = self._actors.wanted()
        super().__init__(config, facts, source)

    def quantization(self) -> Quantization:
        """The steps of int8, from the first sentences."""
        return self._actors.of_one(lambda actor: actor.quantization.remote())

    def make_units(self, coordinator: Coordinator, quantization: Quantization | None, done: set[int]) -> None:
        """Make units until none is left, in rounds; see Work."""
        done, turn = set(done), 0
        try:
            while not self._round(coordinator, turn, done):
                turn += 1
        except BaseException:
            self._actors.close()  # before the files of units that are not done are removed
            raise

    def _round(self, coordinator: Coordinator, turn: int, done: set[int]) -> bool:
        """Have all units made that are not done; returns False if units were lost with their actor.

        Args:
            coordinator: For the reports.
            turn: The number of the round.
            done: The units that are done; those that are made are added.
        """
        actors, lost, exhausted = self._actors, False, False
        begun = frozenset(done)
        calls: dict[Any, str] = {}  # the name of the actor behind each
        reminded = time.monotonic()
        claimants: set[str] = set()
        # An actor that has claimed nothing may still be waiting for room: it is not waited for.
        while not exhausted or claimants.intersection(calls.values()):
            for name, actor in {} if exhausted else actors.fill().items():
                if name not in calls.values():
                    calls[actor.make_units.remote(actors.board, turn, self.facts.description, begun)] = name
            for call in actors.ready(calls):
                name = calls.pop(call)
                if actors.result(call, name):
                    exhausted = True
                else:
                    lost = True
                    coordinator.report({"note": f"{actors.last_death}; its units are made again"})
            reports, sums, claimants = actors.board_state(turn)
            for report in reports:
                number = report["unit"]["unit"]
                if number not in done:  # an actor that was given up may have been alive
                    done.add(number)
                    coordinator.report(report)
            if sums:
                coordinator.report_progress(sums)
            coordinator.raise_if_failed()
            if claimants.intersection(calls.values()):
                reminded = time.monotonic()
            elif time.monotonic() - reminded > REMIND_SECONDS:
                reminded = time.monotonic()
                coordinator.report({"note": actors.reminder()})
        actors.drop(set(calls.values()))
        return not lost

    def close(self) -> None:
        """End the actors."""
        self._actors.close()


class _Actors:
    """The actors of a preparation, and the connection to their cluster."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self._mapping, self._folder = config.model_dump(mode="json"), os.getcwd()
        self._alive: dict[str, Any] = {}
        self._started, self._deaths, self._closed = 0, 0, False
        self.last_death = ""
        ray = _ray()
        self._connected = not ray.is_initialized()
        if self._connected:
            _connect()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        assert config.encoder is not None
        device, cluster = config.encoder.device, ray.cluster_resources()
        gpus = cluster.get("GPU", 0) >= 1 if device is None else not device.startswith("cpu")
        # On a GPU the processes that read and split have processors of their own; so has the one that encodes.
        self._needs = {
            "GPU": 1.0 if gpus else 0.0,
            "CPU": 1.0 + config.split_workers if gpus else float(config.threads),
        }
        self._environment = {"env_vars": _environment()}
        self.board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()

    def wanted(self) -> int:
        """The number of actors: the config's, or as many as the cluster has room for."""
        if self._config.processes is not None:
            return self._config.processes
        scarce = "GPU" if self._needs["GPU"] else "CPU"
        return max(1, int(_ray().cluster_resources().get(scarce, 0) // self._needs[scarce]))

    def fill(self) -> dict[str, Any]:
        """All actors by their names, once there are as many as wanted; some may wait for room in the cluster."""
        while len(self._alive) < self.wanted():
            self._start()
        return dict(self._alive)

    def _start(self) -> tuple[str, Any]:
        name = f"maker-{self._started}"
        self._started += 1
        options = {
            "num_cpus": self._needs["CPU"],
            "num_gpus": self._needs["GPU"],
            "scheduling_strategy": "SPREAD",
            "runtime_env": self._environment,
        }
        actor = _ray().remote(Maker).options(**options).remote(self._mapping, self._folder, name)
        self._alive[name] = actor
        return name, actor

    def of_one(self, call: Callable[[Any], Any]) -> Any:
        """The result of a call of one actor, the first that is there; if it is lost, of another one."""
        while True:
            name, actor = next(iter(self._alive.items())) if self._alive else self._start()
            waiting = time.monotonic()
            placed, found = [actor.__ray_ready__.remote()], [call(actor)]
            while not _ray().wait(found, timeout=POLL_SECONDS)[0]:
                if time.monotonic() - waiting > REMIND_SECONDS and not _ray().wait(placed, timeout=0)[0]:
                    waiting = time.monotonic()
                    print(self.reminder(), flush=True)
            if self.result(found[0], name):
                return _ray().get(found[0])
            print(self.last_death, flush=True)

    def ready(self, calls: dict[Any, str]) -> list[Any]:
        """The calls that have ended, after a moment."""
        ended: list[Any] = _ray().wait(list(calls), num_returns=len(calls), timeout=POLL_SECONDS)[0]
        return ended

    def result(self, call: Any, name: str) -> bool:
        """Whether an actor's call has succeeded; False if the actor is lost.

        Raises:
            InputError: What the actor has raised.
            RunFailedError: One actor after the other is lost.
        """
        from ray.exceptions import RayActorError, RayTaskError

        try:
            _ray().get(call)
            return True
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, InputError) else error from None
        except RayActorError as error:
            self.drop({name})
            self._deaths += 1
            self.last_death = _death(name, str(error))
        if self._deaths > self.wanted() + MORE_DEATHS:
            raise RunFailedError(
                f"{self._config.output}: {self._deaths} processes on Ray were lost without finishing a unit; the last: "
                f"{self.last_death}; committed units are kept: start again to resume"
            )
        return False

    def board_state(self, turn: int) -> tuple[list[dict[str, Any]], dict[str, float], set[str]]:
        """See `Board.take`."""
        state: tuple[list[dict[str, Any]], dict[str, float], set[str]] = _ray().get(self.board.take.remote(turn))
        if state[0]:
            self._deaths = 0
        return state

    def reminder(self) -> str:
        """What is waited for."""
        needs = " and ".join(f"{need:g} {key}" for key, need in self._needs.items() if need)
        return f"waiting for a Ray cluster with room: a process needs {needs} of a node"

    def drop(self, names: set[str]) -> None:
        """End actors."""
        for name in names:
            _ray().kill(self._alive.pop(name))

    def close(self) -> None:
        """End all actors, and the connection if it was made here."""
        if self._closed:
            return
        self._closed = True
        self.drop(set(self._alive))
        _ray().kill(self.board)
        if self._connected:
            _ray().shutdown()


def _death(name: str, text: str) -> str:
    """One line about a lost actor, of what Ray says: where it was and why, without advice."""
    words = " ".join(text.split())
    host = re.search(r"\bip: (\S+)", words)
    reason = re.search(r"The actor is dead because (.*?)(?: Some common causes|$)", words)
    return f"{name}{f' on {host[1]}' if host else ''} is lost: {reason[1] if reason else words}"


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("--on ray needs: pip install 'lcm-ds[ray]'") from None
    return ray


def _connect() -> None:
    """Join the cluster that RAY_ADDRESS names or that runs on this host, or start one here. Raises InputError."""
    with _own_signal_handlers():
        try:
            _ray().init(logging_level="warning")
        except (ConnectionError, RuntimeError, ValueError) as error:
            address = os.environ.get("RAY_ADDRESS", "of this host")
            raise InputError(f"--on ray: the cluster {address} cannot be joined: {first_line(error)}") from None


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the signal handlers of this process, which Ray replaces."""
    main = threading.current_thread() is threading.main_thread()
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if main}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _environment() -> dict[str, str]:
    """The variables that the actors get of the driver's: those that a launcher takes to other hosts.

    Not where programs are, which the nodes of a cluster know themselves.
    """
    variables = forwarded_variables(os.environ)
    return {name: value for name, value in variables.items() if name not in ("PATH", "LD_LIBRARY_PATH")}
