"""Units made by tasks that never meet: each makes a fixed share of them, and one call at the end makes the dataset.

For engines that run tasks whenever there is room, such as datatrove's executors. A task cannot report to a rank 0 that
listens, so it leaves the report of each unit in the output; whoever prepares the dataset next commits them.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

from lcm_ds.config import PrepareConfig
from lcm_ds.data.quantization import Quantization
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.errors import InputError
from lcm_ds.files import lock, write_whole
from lcm_ds.prepare.coordinator import Coordinator
from lcm_ds.prepare.encode import disk_error
from lcm_ds.prepare.pipeline import begin, prepare, quantization_of, threads
from lcm_ds.prepare.readers import WorkUnit
from lcm_ds.prepare.state import (
    REPORTS,
    SOURCE,
    UnitResult,
    is_finished,
    locked,
    read_units,
    save_report,
    saved_reports,
)
from lcm_ds.prepare.texts import EncoderFacts, Texts, TextWork
from lcm_ds.text.open import open_source

_ENCODER, _START_LOCK = "encoder.json", "start.lock"


def make_share(
    config: PrepareConfig, share: int, shares: int, on_unit: Callable[[UnitResult], None] = lambda unit: None
) -> None:
    """Make the units whose number modulo `shares` is `share`, but those that are made already.

    Args:
        config: Of the preparation.
        share: This task, from 0; it also chooses one of the GPUs that this process sees.
        shares: The number of tasks.
        on_unit: Called with each unit that is made.

    Raises:
        InputError: The source or the encoder cannot be used, or no longer is what it was when the dataset was started;
            the disk is full; another process is finishing the dataset.
    """
    check_texts(config)
    out = Path(config.output)
    if is_finished(out, config):
        return
    try:
        (out / REPORTS).mkdir(parents=True, exist_ok=True)
        env = DistEnv.local(share, shares, 0)
        with threads(config.threads), locked(out, shared=True), closing(TextWork(config, env, None, None)) as work:
            quantization = _begin(config, work)
            done = {unit.unit for unit in read_units(out)}
            done |= {report["unit"]["unit"] for report in saved_reports(out, done)}
            reports = _Reports(out, on_unit)
            work.make(_share(work, done, share, shares), reports, quantization)
            if work.total is None:
                # Behind the source's last document.
                for unit in islice(_share(work, done | reports.saved, share, shares), 1):
                    _end(out, unit.unit).touch()
    except OSError as error:
        raise disk_error(out, error) from error


def finish_shares(config: PrepareConfig) -> None:
    """Make the dataset of the units that tasks have made, without an encoder.

    Raises InputError if a unit is missing, and for what `prepare` refuses.
    """
    check_texts(config)
    prepare(config, open_work=_Made)


def check_texts(config: PrepareConfig) -> None:
    """Raise InputError for a config whose units cannot be handed out to other engines."""
    if config.source.name == "concepts":
        raise InputError(
            "source.name: concepts: needs no encoder, and is not run on Ray or datatrove; use lcm-ds adopt or launch"
        )


def _begin(config: PrepareConfig, work: TextWork) -> Quantization | None:
    """Begin the preparation, unless another task has; returns the steps of int8. Only one task at a time is here."""
    out = Path(config.output)
    with _alone(out / REPORTS / _START_LOCK):
        index = json.loads((out / SOURCE).read_text(encoding="utf-8")) if (out / SOURCE).exists() else None
        source = open_source(config.source, config.sentences.language, index)
        begin(config, Texts(config, work.facts, source))
        if not (out / REPORTS / _ENCODER).exists():
            write_whole(out / REPORTS / _ENCODER, json.dumps(work.facts._asdict()))
        return quantization_of(config, work)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        lock(file.fileno(), fcntl.LOCK_EX, path)
        yield


def _share(work: Texts, done: set[int], share: int, shares: int) -> Iterator[WorkUnit]:
    return (unit for unit in work.pending(done) if unit.unit % shares == share)


def _end(out: Path, unit: int) -> Path:
    """Marks a unit behind the source's last document."""
    return out / REPORTS / f"{unit:08d}.end"


class _Reports(Coordinator):
    """Of a task that has its units for itself, and saves their reports."""

    def __init__(self, out: Path, on_unit: Callable[[UnitResult], None]) -> None:
        super().__init__(DistEnv.local(0, 1, 0))
        self.saved: set[int] = set()
        self._out, self._on_unit, self._next = out, on_unit, count()

    def claim(self) -> int:
        """The next unit."""
        return next(self._next)

    def report(self, message: dict[str, Any]) -> None:
        """Save it."""
        save_report(self._out, message)
        unit = UnitResult(**message["unit"])
        self.saved.add(unit.unit)
        self._on_unit(unit)


class _Made(Texts):
    """Units that tasks have made: nothing is left but to commit them."""

    processes = 1

    def __init__(self, config: PrepareConfig, index: dict[str, Any] | None) -> None:
        path = Path(config.output) / REPORTS / _ENCODER
        if not path.exists():
            raise InputError(
                f"{config.output}: no task has made units of it: run the pipeline with EncodeConcepts first"
            )
        facts = EncoderFacts(**json.loads(path.read_text(encoding="utf-8")))
        super().__init__(config, facts, open_source(config.source, config.sentences.language, index))

    def quantization(self) -> Quantization:
        """Never needed: the task that began has determined the steps."""
        raise NotImplementedError

    def make_units(self, coordinator: Coordinator, quantization: Quantization | None, done: set[int]) -> None:
        """Make none; raise InputError if one is missing."""
        out = Path(self.config.output)
        for unit in self.pending(done):
            if not _end(out, unit.unit).exists():
                raise InputError(
                    f"{out}: unit {unit.unit} (documents {unit.start} to {unit.stop - 1}) is not made: "
                    "run the tasks that failed again"
                )
            return
