"""Text → dataset: documents, sentences, concepts, shards, and at the end the normaliser and dataset.json.

A unit is a range of about `documents_per_shard` documents of the source. Its shards, one in train/ and one in
validation/, are a function of the unit, the config (with `encoder.threads`), the encoder's backend and the kind of
device. Any number of processes make the units, each of them the next one that is free; rank 0 commits them with a line
of units.jsonl. So a preparation that was killed resumes after the units that are done, and on the same kind of device
ends with the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcm_ds.config import PrepareConfig, dump
from lcm_ds.data.format import SPLITS, DatasetInfo, QuantParams, finish, read_shards, write_normalizer
from lcm_ds.data.normalizer import Constants, constant, draw, fit
from lcm_ds.data.quantization import Quantization
from lcm_ds.data.shard import Shard
from lcm_ds.distributed.environment import DistEnv, detect_environment, free_port
from lcm_ds.distributed.workers import Workers
from lcm_ds.encoders import Encoder
from lcm_ds.errors import InputError, PeerFailed
from lcm_ds.files import sync, write_whole
from lcm_ds.prepare import disk_space
from lcm_ds.prepare.adopt import ADOPTING_CORES, AdoptedWork
from lcm_ds.prepare.committer import Committer
from lcm_ds.prepare.coordinator import Coordinator
from lcm_ds.prepare.deduplicate import drop_duplicates, has_ids, remove_ids
from lcm_ds.prepare.encode import disk_error
from lcm_ds.prepare.progress import Progress
from lcm_ds.prepare.state import (
    CONFIG,
    IDS,
    PARTS,
    QUANTIZATION,
    SOURCE,
    UnitResult,
    check_files,
    check_parts,
    counts,
    is_finished,
    locked,
    read_units,
    remove_reports,
    saved_reports,
    summary,
    tidy,
)
from lcm_ds.prepare.texts import Texts, TextWork
from lcm_ds.prepare.work import Work
from lcm_ds.processes import warn_of_few_cores
from lcm_ds.signals import DONE, FAILED, describe_exit
from lcm_ds.text.huggingface import is_local
from lcm_ds.text.open import open_source

_EXIT_SECONDS = 10.0  # for the other processes to end after a failure, before they are killed
# Makes the work of a config, given the source's index if it is known.
OpenWork = Callable[[PrepareConfig, dict[str, Any] | None], Work]


def prepare(config: PrepareConfig, encoder: Encoder | None = None, open_work: OpenWork | None = None) -> None:
    """Make the datasets OUT/train and OUT/validation, or resume after a former call; a finished dataset is kept.

    Under a launcher this process is one of its ranks; otherwise it starts `processes` − 1 others.

    Args:
        config: What is prepared.
        encoder: To be used in this process instead of the one that the config names.
        open_work: Work whose units others make than ranks of this program, so that this process is the only rank.

    Raises:
        InputError: a source or an encoder that cannot be used, or no longer is what it was when the dataset was
            started; an output folder that belongs to another config or process; a disk that is or will be full; no
            documents to train on.
        PeerFailed: another rank has failed.
    """
    env = detect_environment(os.environ)
    with threads(config.threads):
        if open_work is not None and env.world_size > 1:
            raise InputError(
                f"started in {env.world_size} processes (WORLD_SIZE, or a launcher): one starts and finishes a "
                "preparation whose units others make; start it without a launcher"
            )
        if env.rank == 0:
            _RankZero(config, env, encoder, open_work).prepare()
        else:
            _run_other_rank(config, env, encoder)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this number of threads, whatever a launcher has set: on some CPUs the bytes of shards depend on it.

    In bf16 products by AMX, oneDNN splits the sums among the threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # for a notebook


class _RankZero:
    """Rank 0: checks everything first, commits what all ranks make, and finishes the dataset."""

    def __init__(
        self, config: PrepareConfig, env: DistEnv, encoder: Encoder | None, open_work: OpenWork | None
    ) -> None:
        self.config, self.env, self.out = config, env, Path(config.output)
        self.started = time.monotonic()
        self._open = open_work or (lambda config, index: _open_work(config, self.env, encoder, True, index))
        self._workers = Workers(grace=_EXIT_SECONDS / 2, patience=_EXIT_SECONDS)  # the ranks that this process starts
        self._launched = env.world_size > 1
        alone = encoder is not None or open_work is not None
        if not self._launched and not alone and (processes := _processes(config)) > 1:
            self.env = DistEnv.local(0, processes, free_port())

    def prepare(self) -> None:
        """Prepare the dataset, unless it is finished."""
        if not self._launched and self._already_finished():
            return
        coordinator = Coordinator(self.env)
        try:
            if self._launched and self._already_finished():
                coordinator.start({"done": None})
                coordinator.deregister()
                while coordinator.deregistered() < self.env.world_size:
                    coordinator.check_arrivals(print)
                    time.sleep(0.05)
                return
            self._start_workers()
            self._prepare(coordinator)
            coordinator.finish()
        except BaseException as error:
            raise coordinator.fail(error) from None
        finally:
            self._workers.wait(_EXIT_SECONDS)

    def _already_finished(self) -> bool:
        """Whether there is nothing left to do, which is printed."""
        if not is_finished(self.out, self.config):
            return False
        remove_ids(self.out)
        remove_reports(self.out)
        print(f"{self.out}: already prepared: {summary(read_units(self.out))}")
        return True

    def _prepare(self, coordinator: Coordinator) -> None:
        config, out = self.config, self.out
        # Before the output is made, so that a mistake in the config leaves nothing behind. The index of a hub's dataset
        # stays valid under its commit; local files are read again.
        at_hub = config.source.dataset is not None and not is_local(config.source)
        known = at_hub and (out / SOURCE).exists()
        index = json.loads((out / SOURCE).read_text(encoding="utf-8")) if known else None
        with contextlib.closing(self._open(config, index)) as work:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{out}: output: cannot be made: {error.strerror}") from None
            with locked(out):
                # Again, under the lock: another process may have been here. (If it has finished this very dataset, the
                # following writes the same files again.)
                is_finished(out, config)
                try:
                    units = self._begin(work)
                    quantization = quantization_of(config, work)
                    progress = self._encode(work, coordinator, quantization, units)
                    print(f"normaliser: of at most {config.normalizer_samples:,} concepts", flush=True)
                    tidy(out, {unit.unit for unit in units})
                    units = drop_duplicates(out, units, work.supervised is not None, work.end_of_text is not None)
                    scale = self._finish(work, quantization, units)
                except OSError as error:
                    raise disk_error(out, error) from error
                remove_ids(out)
                remove_reports(out)
            lines = [progress.summary(), work.summary(units, scale)]
        for line in lines:
            if line:
                print(line)
        print(f"{out}: {summary(units)}")

    def _begin(self, work: Work) -> list[UnitResult]:
        """Write down which parts make the dataset; returns the units that are done."""
        out = self.out
        units = [unit for unit in read_units(out) if has_ids(out, unit.unit)]
        done = {unit.unit for unit in units}
        given = sum(unit.given for unit in units)
        given += sum(report["unit"]["given"] for report in saved_reports(out, done))
        disk_space.check(self.config, work.estimate(), work.total, given)
        begin(self.config, work)
        if units:
            print(f"{out}: resuming after {summary(units)}", flush=True)
        tidy(out, done)
        return units

    def _print_phase(self, work: Work, given: int) -> None:
        """The line that ends the start-up; `given` documents are done."""
        if work.total == given:
            return
        seconds = time.monotonic() - self.started
        left = "documents" if work.total is None else f"{work.total - given:,} documents"
        verb = "encoding" if work.threads is not None else "adopting"
        count = work.processes
        by = " by OpenVINO" if work.threads is not None and work.encoder().get("backend") == "openvino" else ""
        print(
            f"{verb}{by}: {left} in {count} process{'es' if count > 1 else ''}, after a start-up of {seconds:.0f} s",
            flush=True,
        )

    def _encode(
        self, work: Work, coordinator: Coordinator, quantization: Quantization | None, units: list[UnitResult]
    ) -> Progress:
        """Make the units that are not done, with all ranks, and append them to `units`.

        Args:
            work: What they are made of.
            coordinator: To the other ranks.
            quantization: For int8.
            units: Those that are done.

        Returns:
            The progress at the end.
        """
        done = {unit.unit for unit in units}
        reports = saved_reports(self.out, done)  # of tasks that made units on their own; see shares.py
        done |= {report["unit"]["unit"] for report in reports}
        given = sum(unit.given for unit in units)
        self._print_phase(work, given + sum(report["unit"]["given"] for report in reports))
        coordinator.start({"done": _ranges(sorted(done))})
        with Progress(work.total, given, work.processes, self.started) as progress:
            committer = Committer(self.config, coordinator, units, progress, self._check_workers)
            try:
                for report in reports:
                    coordinator.report(report)
                work.make_units(coordinator, quantization, done)
                coordinator.deregister()
                committer.close()
            except BaseException as error:
                coordinator.fail(error)
                committer.abort()
                with contextlib.suppress(OSError):
                    tidy(self.out, {unit.unit for unit in units})
                if isinstance(error, PeerFailed):
                    committer.close()  # raises if it was not another rank, but this one's committer
                raise
        return progress

    def _finish(self, work: Work, quantization: Quantization | None, units: list[UnitResult]) -> np.ndarray:
        """Fit the normaliser to the training split and write dataset.json of both, which makes them datasets.

        Args:
            work: What the units were made of.
            quantization: For int8.
            units: All that were made.

        Returns:
            The normaliser's scale.
        """
        config, out = self.config, self.out
        given, kept, refused = counts(units)
        if not kept["train"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in refused.items()) or "the source is empty"
            raise InputError(f"{out}: none of {given} documents is left to train on ({reasons})")
        languages = Counter[str]()
        for unit in units:
            languages.update(unit.languages)
        center, scale, statistics = _fit(config, out / "train", work, quantization)
        errors = [unit.largest_error for unit in units if unit.largest_error is not None]
        for split in SPLITS:
            if not kept[split]:
                shutil.rmtree(out / split, ignore_errors=True)
                continue
            write_normalizer(out / split, center, scale, statistics)
            info = DatasetInfo(
                encoder=work.encoder(),
                threads=work.threads,
                embed_dim=work.embed_dim,
                dtype=config.dtype,
                quantization=None if quantization is None else _quant_params(quantization),
                language=work.language(),
                splitter=work.splitter(units),
                end_of_text=work.end_of_text,
                supervised=work.supervised,
                source={
                    **work.describe(),
                    "split": split,
                    "validation_share": config.validation,
                    "given": given,
                    "kept": dict(kept),
                    "refused": dict(sorted(refused.items())),
                    **({"largest_error": max(errors)} if errors else {}),
                    **({"documents_by_language": dict(sorted(languages.items()))} if languages else {}),
                },
            )
            finish(out / split, info)
        if config.validation and not kept["validation"]:
            print(f"{out}: no document fell into validation (a share of {config.validation} of {given})")
        return scale

    def _start_workers(self) -> None:
        """Start the other ranks, unless a launcher has."""
        if self._launched:
            return
        if self.config.encoder is not None and not torch.cuda.is_available():
            warn_of_few_cores(self.env.world_size * self.config.threads)
        command = [sys.executable, "-m", "lcm_ds.prepare", "-"]
        for rank in range(1, self.env.world_size):
            env = DistEnv.local(rank, self.env.world_size, self.env.master_port)
            self._workers.start(command, os.environ, env, stdin=dump(self.config).encode())

    def _check_workers(self) -> None:
        """Raise PeerFailed if one of them has failed."""
        for index, code in self._workers.poll().items():
            if code != DONE:
                pid = self._workers.processes[index].pid
                raise PeerFailed(FAILED, f"process {pid} of the preparation {describe_exit(code)}")


def _run_other_rank(config: PrepareConfig, env: DistEnv, encoder: Encoder | None) -> None:
    """Make units until none are left, then wait for rank 0 to finish the dataset."""
    coordinator = Coordinator(env)
    try:
        with contextlib.closing(_open_work(config, env, encoder, False)) as work:
            message = coordinator.wait_for_start()
            if message["done"] is None:
                coordinator.deregister()
                return
            out = Path(config.output)
            rank_0_encoder = json.loads((out / PARTS).read_text(encoding="utf-8"))["encoder"]
            if rank_0_encoder != work.encoder():
                raise InputError(f"rank {env.rank}: its encoder is {work.encoder()}, that of rank 0 {rank_0_encoder}")
            quantization = read_quantization(config)
            work.make_units(coordinator, quantization, {u for first, end in message["done"] for u in range(first, end)})
            coordinator.deregister()
        coordinator.wait_for_finish()
    except BaseException as error:
        raise coordinator.fail(error) from None


def _open_work(
    config: PrepareConfig, env: DistEnv, encoder: Encoder | None, first: bool, index: dict[str, Any] | None = None
) -> Work:
    """What a preparation is made of.

    Args:
        config: Of the preparation.
        env: This rank.
        encoder: Instead of the one that the config names.
        first: Whether this is rank 0, which looks at the source; others wait for what it found.
        index: Of the source, if it is known already.

    Returns:
        The work of this rank.

    Raises:
        InputError: The source or the encoder cannot be used.
    """
    if config.source.name == "concepts":
        return AdoptedWork(config, env.world_size, index, first)
    source = open_source(config.source, config.sentences.language, index) if first else None
    return TextWork(config, env, encoder, source)


def _processes(config: PrepareConfig) -> int:
    """The number of encoding processes on this host: the config's, or one per device."""
    if config.processes is not None:
        return config.processes
    cores = len(os.sched_getaffinity(0))
    if config.encoder is None:
        return max(1, cores // ADOPTING_CORES)
    if config.encoder.device is not None and config.encoder.device != "cpu":
        return 1
    if config.encoder.device is None and torch.cuda.is_available():
        return torch.cuda.device_count()
    return max(1, cores // config.threads)


def _fit(
    config: PrepareConfig, train: Path, work: Work, quantization: Quantization | None
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The normaliser's center and scale, fp32 [embed_dim] each, and statistics of the concepts they were fitted to.

    Args:
        config: Of the preparation.
        train: The training split.
        work: What it was made of.
        quantization: For int8.
    """
    shards, supervised = read_shards(train), work.supervised is not None
    constants = Constants.of(work.end_of_text, work.supervised)
    samples = draw(
        shards,
        lambda shard: Shard(
            train / shard.name, shard, work.embed_dim, config.dtype, quantization, supervised=supervised
        ),
        config.normalizer_samples,
        constants,
    )
    center, scale = fit(samples)
    statistics = {
        "concepts": sum(shard.concepts for shard in shards),
        "samples": len(samples),
        "left_out": constants.names,
        "percentiles": [25, 50, 75],
        "constant_dimensions": constant(samples).tolist(),
    }
    return center, scale, statistics


def begin(config: PrepareConfig, work: Work | Texts) -> None:
    """Write down which config, parts and source make the dataset, or compare them with what is written.

    Raises InputError with a line for each that has changed.
    """
    out = Path(config.output)
    write_whole(out / CONFIG, dump(config))
    if (out / SOURCE).exists():
        check_files(out, work.sizes_in(json.loads((out / SOURCE).read_text(encoding="utf-8"))), work.sizes)
    check_parts(
        out,
        {
            "encoder": work.encoder(),
            "sentences": work.splitter(),
            "source": work.describe(),
            # Older preparations have no such key: without ids they were split by path.
            **({} if config.source.has_ids else {"split": "by text"}),
        },
    )
    if not (out / SOURCE).exists():
        write_whole(out / SOURCE, json.dumps(work.index()))
    for folder in (*SPLITS, IDS):
        (out / folder).mkdir(exist_ok=True)
    sync(out)


def quantization_of(config: PrepareConfig, work: Work) -> Quantization | None:
    """For int8: the step of each dimension, determined once, from the first concepts."""
    path = Path(config.output) / QUANTIZATION
    if config.dtype == "int8" and not path.exists():
        write_whole(path, _quant_params(work.quantization()).model_dump_json())
    return read_quantization(config)


def read_quantization(config: PrepareConfig) -> Quantization | None:
    """For int8: the step of each dimension, as the output of a preparation that has begun holds it."""
    if config.dtype != "int8":
        return None
    numbers: dict[str, Any] = json.loads((Path(config.output) / QUANTIZATION).read_text(encoding="utf-8"))
    return Quantization(*(np.asarray(numbers[key], np.float32) for key in ("center", "step")))


def _quant_params(quantization: Quantization) -> QuantParams:
    return QuantParams(center=quantization.center.tolist(), step=quantization.step.tolist())


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Sorted numbers as ranges (first, last + 1)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges
