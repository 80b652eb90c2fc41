"""Text → dataset: documents, sentences, concepts, shards, and at the end the normaliser and dataset.json.

A unit is a range of documents of the source, about `documents_per_shard`; its shards, one in train/ and one in
validation/, are a function of the unit, the config (its `encoder.threads`, too) and the kind of device. Any number of
processes make the units, whoever has time the next one; rank 0 commits them, a line of units.jsonl each. So a
preparation that was killed anywhere goes on after the units that are done, and on the same kind of device ends with the
same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcm_ds.config import PrepareConfig, dump
from lcm_ds.data.format import (
    SPLITS,
    DatasetInfo,
    EndOfText,
    QuantParams,
    Supervised,
    finish,
    read_shards,
    write_normalizer,
)
from lcm_ds.data.normalizer import Constants, constant, draw, fit
from lcm_ds.data.quantization import Quantization
from lcm_ds.data.shard import Shard
from lcm_ds.distributed.environment import DistEnv, detect_environment, free_port
from lcm_ds.encoders import Encoder, load_encoder
from lcm_ds.errors import InputError
from lcm_ds.files import sync, write_whole
from lcm_ds.prepare import disk_space
from lcm_ds.prepare.committer import Committer
from lcm_ds.prepare.coordinator import Coordinator, PeerFailed
from lcm_ds.prepare.deduplicate import drop_duplicates, forget_ids, has_ids
from lcm_ds.prepare.encode import WorkerContext, encode_units, full_disk, storable
from lcm_ds.prepare.progress import Progress
from lcm_ds.prepare.readers import Reader, Readers, WorkUnit, open_reader
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
    owned,
    read_units,
    summary,
    tidy,
)
from lcm_ds.processes import set_parent_death_signal
from lcm_ds.text.base import Source
from lcm_ds.text.open import open_source
from lcm_ds.text.splitter import Splitter

# For int8: from how many sentences at the beginning the steps of the dimensions are told.
_PILOT_SENTENCES = 4096


def prepare(config: PrepareConfig, encoder: Encoder | None = None) -> None:
    """Make the datasets OUT/train and OUT/validation, or go on making them where a former call was ended.

    Under a launcher this is one of its ranks; else it starts `processes` − 1 others. encoder: instead of loading the
    one the config names, in this process alone. A finished dataset is left as it is. Raises InputError for a source or
    an encoder that cannot be used, an output folder of another config or in use, an encoder, a source or a splitter
    that is not what it was when the dataset was begun, a disk that is full or will be, and a source that gives no
    documents to train on.
    """
    place = detect_environment(os.environ)
    with _threads(config.encoder.threads):
        if place.rank == 0:
            _Leader(config, place, encoder).prepare()
        else:
            _follow(config, place, encoder)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with this many threads, whatever a launcher has set: the bytes of a shard depend on it on some CPUs.

    Products of bf16 matrices by AMX do: oneDNN splits their sums among the threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # of a notebook that goes on


class _Leader:
    """Rank 0: looks at everything first, commits what all ranks make, and finishes the dataset."""

    def __init__(self, config: PrepareConfig, place: DistEnv, encoder: Encoder | None) -> None:
        self.config, self.place, self.out = config, place, Path(config.output)
        self.started = time.monotonic()
        self._given_encoder = encoder
        self._children: list[subprocess.Popen[bytes]] = []
        self._launched = place.world_size > 1
        if not self._launched and encoder is None and (processes := _processes(config)) > 1:
            self.place = DistEnv(0, processes, 0, processes, "127.0.0.1", free_port())

    def prepare(self) -> None:
        """All of it."""
        if not self._launched and self._is_there():
            return
        peers = Coordinator(self.place)
        try:
            if self._launched and self._is_there():
                peers.begin({"done": None})
                while (left := peers.left()) < self.place.world_size - 1:
                    peers.check_arrivals(left + 1, print)
                    time.sleep(0.05)
                return
            self._start_children()
            self._prepare(peers)
            peers.finish()
        except BaseException as error:
            raise peers.fail(error) from None
        finally:
            self._end_children()

    def _is_there(self) -> bool:
        """Whether there is nothing left to do, which is said."""
        if not is_finished(self.out, self.config):
            return False
        forget_ids(self.out)
        print(f"{self.out}: already prepared: {summary(read_units(self.out))}")
        return True

    def _prepare(self, peers: Coordinator) -> None:
        config, out = self.config, self.out
        # Before the output is there: a mistake in the config leaves nothing behind. A dataset of the hub stays as it is
        # under its commit; what is on this machine is looked at again.
        known = config.source.dataset is not None and (out / SOURCE).exists()
        index = json.loads((out / SOURCE).read_text(encoding="utf-8")) if known else None
        source = open_source(config.source, config.sentences.language, index)
        reader = Reader(config, source)
        with contextlib.closing(Readers(config)) as readers:  # they get ready while the encoder is loaded
            encoder = self._given_encoder or _load(config, self.place)
            self._prepare_with(encoder, reader, readers, peers)

    def _prepare_with(self, encoder: Encoder, reader: Reader, readers: Readers, peers: Coordinator) -> None:
        config, out, source = self.config, self.out, reader.source
        end = _end_of_text(config, encoder)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{out}: output: cannot be made: {error.strerror}") from None
        with owned(out):
            # Again, now that nobody else can: since then a process with another config may have been here. (One that
            # has finished this very dataset has left nothing to do: what follows writes the same files once more.)
            is_finished(out, config)
            try:
                units = self._begin(source, reader, encoder)
                rank = WorkerContext(config, encoder, end, self._quantization(reader, encoder), peers)
                progress = self._encode(rank, source, readers, units)
                tidy(out, {unit.unit for unit in units})
                units = drop_duplicates(out, units, config.source.supervised)
                self._finish(source, reader.splitter, rank, units)
            except OSError as error:
                raise full_disk(out, error) from error
            forget_ids(out)
        told = progress.told()
        if told:
            print(told)
        print(f"{out}: {summary(units)}")

    def _begin(self, source: Source, reader: Reader, encoder: Encoder) -> list[UnitResult]:
        """Note in the output what is made of what; returns the units that are done."""
        out = self.out
        units = [unit for unit in read_units(out) if has_ids(out, unit.unit)]
        disk_space.check(self.config, source, encoder.embed_dim, sum(unit.given for unit in units))
        write_whole(out / CONFIG, dump(self.config))
        if (out / SOURCE).exists():
            begun = json.loads((out / SOURCE).read_text(encoding="utf-8"))
            check_files(out, open_source(self.config.source, self.config.sentences.language, begun).sizes, source.sizes)
        check_parts(
            out,
            {
                "encoder": encoder.describe(),
                "sentences": reader.splitter.settings(),
                "source": source.describe(),
                # Those begun before this was noted were split by path where there is no id.
                **({} if self.config.source.has_ids else {"split": "by text"}),
            },
        )
        if not (out / SOURCE).exists():
            write_whole(out / SOURCE, json.dumps(source.index()))
        for folder in (*SPLITS, IDS):
            (out / folder).mkdir(exist_ok=True)
        sync(out)
        if units:
            print(f"{out}: going on after {summary(units)}", flush=True)
        tidy(out, {unit.unit for unit in units})
        return units

    def _quantization(self, reader: Reader, encoder: Encoder) -> Quantization | None:
        """For int8: the steps of the dimensions, told from the first sentences, once."""
        if self.config.dtype != "int8":
            return None
        path = self.out / QUANTIZATION
        if not path.exists():
            sentences = list(islice(_sentences(reader), _PILOT_SENTENCES))
            if len(sentences) < 2:
                raise InputError(f"{self.out}: int8 needs sentences to tell its steps from; the source gives none")
            found = _steps(Quantization.of(*fit(encoder.encode(sentences))))
            write_whole(path, found.model_dump_json())
        return _read_quantization(path)

    def _encode(self, rank: WorkerContext, source: Source, readers: Readers, units: list[UnitResult]) -> Progress:
        """Make the units that are not done yet, with all ranks, and add them to `units`."""
        total = source.total
        peers, done = rank.peers, {unit.unit for unit in units}
        peers.begin({"done": _ranges(sorted(done))})
        given = sum(unit.given for unit in units)
        with Progress(total, given, self.place.world_size, self.started) as progress:
            clerk = Committer(self.config, peers, units, progress, self._check_children)
            try:
                _take_part(rank, source, readers, done)
                clerk.close()
            except BaseException as error:
                peers.fail(error)
                clerk.abandon()
                with contextlib.suppress(OSError):
                    tidy(self.out, {unit.unit for unit in units})
                raise
        return progress

    def _finish(self, source: Source, splitter: Splitter, rank: WorkerContext, units: list[UnitResult]) -> None:
        """The normaliser, fitted on the training split, and dataset.json of both, which makes them datasets."""
        config, out, end = self.config, self.out, rank.end
        given, kept, refused = counts(units)
        if not kept["train"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in refused.items()) or "the source is empty"
            raise InputError(f"{out}: none of {given} documents is left to train on ({reasons})")
        center, scale, statistics = _fit(config, out / "train", len(end), rank.quantization)
        for split in SPLITS:
            if not kept[split]:
                shutil.rmtree(out / split, ignore_errors=True)
                continue
            write_normalizer(out / split, center, scale, statistics)
            info = DatasetInfo(
                encoder=rank.encoder.describe(),
                threads=config.encoder.threads,
                embed_dim=len(end),
                dtype=config.dtype,
                quantization=None if rank.quantization is None else _steps(rank.quantization),
                language=config.sentences.language,
                splitter=splitter.settings(),
                end_of_text=EndOfText(text=config.end_of_text, vector=[float(value) for value in end]),
                supervised=Supervised(source_suffix=config.source_suffix) if config.source.supervised else None,
                source={
                    **source.describe(),
                    "split": split,
                    "validation_share": config.validation,
                    "given": given,
                    "kept": dict(kept),
                    "refused": dict(sorted(refused.items())),
                },
            )
            finish(out / split, info)
        if config.validation and not kept["validation"]:
            print(f"{out}: no document fell into validation (a share of {config.validation} of {given})")

    # --- processes that no launcher has started ---

    def _start_children(self) -> None:
        """The other ranks, where this process has to start them itself."""
        if self._launched:
            return
        for rank in range(1, self.place.world_size):
            place = DistEnv(
                rank, self.place.world_size, rank, self.place.world_size, "127.0.0.1", self.place.master_port
            )
            command = [sys.executable, "-m", "lcm_ds.prepare", "-"]
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                env=place.within(os.environ),
                start_new_session=True,
                preexec_fn=set_parent_death_signal(),
            )
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(dump(self.config).encode())
                child.stdin.close()
            self._children.append(child)

    def _check_children(self) -> None:
        """Raise where one of them has ended otherwise than well."""
        for child in self._children:
            if child.poll() not in (None, 0):
                raise PeerFailed(1, f"process {child.pid} of the preparation ended with exit code {child.returncode}")

    def _end_children(self) -> None:
        for child in self._children:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _follow(config: PrepareConfig, place: DistEnv, encoder: Encoder | None) -> None:
    """Any other rank: makes units until there are none left."""
    peers = Coordinator(place)
    try:
        with contextlib.closing(Readers(config)) as readers:
            encoder = encoder or _load(config, place)
            end = _end_of_text(config, encoder)
            said = peers.wait()
            if said["done"] is None:
                peers.leave()
                return
            out = Path(config.output)
            begun = json.loads((out / PARTS).read_text(encoding="utf-8"))["encoder"]
            if begun != encoder.describe():
                raise InputError(f"rank {place.rank}: its encoder is {encoder.describe()}, that of rank 0 {begun}")
            quantization = _read_quantization(out / QUANTIZATION) if config.dtype == "int8" else None
            done = {unit for first, last in said["done"] for unit in range(first, last)}
            _take_part(
                WorkerContext(config, encoder, end, quantization, peers), open_reader(config).source, readers, done
            )
        peers.await_finish()
    except BaseException as error:
        raise peers.fail(error) from None


def _take_part(rank: WorkerContext, source: Source, readers: Readers, done: set[int]) -> None:
    """Make units until there are none left to claim."""
    encode_units(rank, readers, _pending(source, rank.config.documents_per_shard, done))
    rank.peers.leave()


def _pending(source: Source, size: int, done: set[int]) -> Iterator[WorkUnit]:
    """The units that are not done, in order."""
    for number, (start, stop) in enumerate(source.units(size)):
        if number not in done:
            yield WorkUnit(number, start, stop)


def _processes(config: PrepareConfig) -> int:
    """How many processes encode on this host: as the config says, or one a device."""
    if config.processes is not None:
        return config.processes
    if config.encoder.device is not None and config.encoder.device != "cpu":
        return 1
    if config.encoder.device is None and torch.cuda.is_available():
        return torch.cuda.device_count()
    return max(1, len(os.sched_getaffinity(0)) // config.encoder.threads)


def _load(config: PrepareConfig, place: DistEnv) -> Encoder:
    """This rank's encoder, on its own device."""
    encoder = config.encoder
    if encoder.device is None and torch.cuda.is_available():
        device = f"cuda:{place.local_rank % torch.cuda.device_count()}"
        encoder = encoder.model_copy(update={"device": device})
    return load_encoder(encoder)


def _fit(
    config: PrepareConfig, train: Path, embed_dim: int, quantization: Quantization | None
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Center and scale of the normaliser, and what they were fitted on."""
    shards, supervised = read_shards(train), config.source.supervised
    constants = Constants(end_of_text=True, source_suffix=supervised and config.source_suffix is not None)
    samples = draw(
        shards,
        lambda shard: Shard(train / shard.name, shard, embed_dim, config.dtype, quantization, supervised=supervised),
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


def _end_of_text(config: PrepareConfig, encoder: Encoder) -> np.ndarray:
    """The end-of-text concept; one that cannot be stored would refuse every document, after hours of encoding."""
    end: np.ndarray = encoder.encode([config.end_of_text])[0]
    if not storable(end, config.dtype):
        raise InputError(f"end_of_text: the encoder makes {config.end_of_text!r} a concept that is not finite")
    return end


def _sentences(reader: Reader) -> Iterator[str]:
    """The sentences of the documents that are not refused, from the beginning."""
    for unit in _pending(reader.source, reader.config.documents_per_shard, set()):
        texts = reader.read(unit)
        if not texts:
            return
        for text in texts:
            yield from text.sentences


def _steps(quantization: Quantization) -> QuantParams:
    return QuantParams(center=quantization.center.tolist(), step=quantization.step.tolist())


def _read_quantization(path: Path) -> Quantization:
    numbers: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Quantization(*(np.asarray(numbers[key], np.float32) for key in ("center", "step")))


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Sorted numbers as ranges (first, after the last)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges
