"""One rank's work: units are read, split and tokenized, encoded and written, each stage ahead of the next.

The calling thread only encodes; everything that it could wait for happens in other processes and threads. It starts the
next batch before it takes the concepts of the one before, so that the device has work while the host prepares.
"""

from __future__ import annotations

import errno
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import SPLITS
from lcm_ds.data.quantization import Quantization
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.encoders import Encoder
from lcm_ds.encoders.base import PendingBatch, TokenBatch
from lcm_ds.errors import InputError, RunFailedError
from lcm_ds.prepare.coordinator import Coordinator
from lcm_ds.prepare.deduplicate import write_ids
from lcm_ds.prepare.readers import Readers, TokenizedUnit, WorkUnit
from lcm_ds.prepare.state import UnitResult, shard_name
from lcm_ds.text.base import FILTERED

REPORT_SECONDS = 1.0
_MAX_WRITING = 2  # units whose shards are being written while the next one is encoded


@dataclass
class Figures:
    """A rank's progress, and how long its encoder was busy."""

    units: int = 0  # whose sentences are all encoded
    sentences: int = 0  # done, each repetition counted
    encoded: int = 0  # sentences that the encoder saw
    tokens: int = 0
    padded_tokens: int = 0  # with padding
    busy: float = 0.0  # seconds of the device
    waited: float = 0.0  # seconds between two batches, from its first to its last


@dataclass(frozen=True)
class WorkerContext:
    """The parts of one rank."""

    config: PrepareConfig
    encoder: Encoder
    end_of_text: np.ndarray  # fp32 [embed_dim], raw space
    quantization: Quantization | None
    coordinator: Coordinator
    figures: Figures = field(default_factory=Figures)

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self.config.output)


@dataclass
class _Concepts:
    """What a unit's sentences have become."""

    unit: TokenizedUnit
    concepts: np.ndarray  # fp32 [sentences, embed_dim], raw space
    batches_left: int
    encoded: int = 0  # sentences, each once
    counted: int = 0  # in Figures.sentences
    failed: dict[int, str] = field(default_factory=dict)  # the error for each sentence that has none


def encode_units(rank: WorkerContext, readers: Readers, pending: Iterator[WorkUnit]) -> None:
    """Make the units that this rank can claim, and report each to rank 0.

    Args:
        rank: The parts of this rank.
        readers: Read, split and tokenize documents.
        pending: The units that are to be made, in the same order on all ranks; a rank claims an index into them.

    Raises:
        InputError: the source cannot be read, the disk is full, or a batch does not fit into the device's memory.
        RunFailedError: a process of the readers has died.
    """
    writing: deque[Future[None]] = deque()
    writer = ThreadPoolExecutor(1, "lcm-ds-writer")

    def write(done: _Concepts) -> None:
        while len(writing) >= _MAX_WRITING:
            writing.popleft().result()
        writing.append(writer.submit(_write, rank, done))

    readers.start(rank.encoder)
    device = _Device(rank, write)
    try:
        with closing(_read_ahead(rank, readers, pending)) as units:
            for future in units:
                if not future.done():
                    device.take_all()
                unit = future.result()
                if not unit.documents:  # the source has ended
                    break
                device.encode(unit)
            device.take_all()
        while writing:
            writing.popleft().result()
    except BrokenProcessPool:
        raise RunFailedError(
            "split_workers: a process that reads, splits and tokenizes has died: unless its error is above, this host "
            "probably ran out of memory; committed units are kept: use fewer split_workers or processes and start "
            "again to resume"
        ) from None
    finally:
        writer.shutdown(wait=True, cancel_futures=True)


def _read_ahead(
    rank: WorkerContext, readers: Readers, pending: Iterator[WorkUnit]
) -> Generator[Future[TokenizedUnit], None, None]:
    """The units that this rank claims, each while the next ones are read.

    Args:
        rank: The parts of this rank.
        readers: Of the units.
        pending: The units to claim.
    """
    ahead: deque[Future[TokenizedUnit]] = deque()
    units = _claimed(rank.coordinator, pending)
    try:
        while True:
            while len(ahead) < readers.ahead and (unit := next(units, None)) is not None:
                ahead.append(readers.submit(unit))
            if not ahead:
                return
            yield ahead.popleft()
    finally:
        for future in ahead:
            future.cancel()


def _claimed(coordinator: Coordinator, pending: Iterator[WorkUnit]) -> Iterator[WorkUnit]:
    """Claim a unit whenever the next one is asked for."""
    position = 0
    while True:
        index = coordinator.claim()
        unit = next(islice(pending, index - position, None), None)
        if unit is None:
            return
        position = index + 1
        yield unit


class _Device:
    """Encodes units batch by batch; one batch is on the device while the next one is prepared.

    Args:
        rank: The parts of this rank.
        write: Called with each unit that is complete, in order.
    """

    def __init__(self, rank: WorkerContext, write: Callable[[_Concepts], None]) -> None:
        self._rank, self._write = rank, write
        self._units: deque[_Concepts] = deque()  # not complete
        self._started: deque[tuple[_Concepts, TokenBatch, PendingBatch | None]] = deque()  # None: it failed
        self._last: PendingBatch | None = None
        self._reported = time.monotonic()

    def encode(self, unit: TokenizedUnit) -> None:
        """Start all batches of a unit; the last of them is not waited for."""
        concepts = np.empty((len(unit.sentences), self._rank.encoder.embed_dim), np.float32)
        current = _Concepts(unit, concepts, len(unit.batches))
        self._units.append(current)
        for batch in unit.batches:
            self._started.append((current, batch, self._start(batch)))
            while len(self._started) > 1:
                self._take()
        self._write_complete()

    def take_all(self) -> None:
        """Wait for what is on the device."""
        while self._started:
            self._take()

    def _start(self, batch: TokenBatch) -> PendingBatch | None:
        try:
            self._last = PendingBatch(self._rank.encoder, batch, self._last)
            return self._last
        except torch.OutOfMemoryError:
            raise _too_large(batch) from None
        except Exception:
            return None

    def _take(self) -> None:
        """Wait for the concepts of the batch that was started first."""
        figures = self._rank.figures
        unit, batch, embedding = self._started.popleft()
        try:
            if embedding is not None:
                unit.concepts[batch.rows] = embedding.result()
                figures.busy += embedding.seconds
                figures.waited += embedding.waited
        except torch.OutOfMemoryError:
            raise _too_large(batch) from None
        except Exception:
            embedding = None
        if embedding is None:
            started = time.monotonic()
            unit.failed |= _one_by_one(self._rank, unit.unit, batch.rows, unit.concepts)
            figures.busy += time.monotonic() - started
        unit.batches_left -= 1
        unit.encoded += len(batch.rows)
        figures.encoded += len(batch.rows)
        figures.tokens += batch.tokens
        figures.padded_tokens += batch.padded_tokens
        counted = len(unit.unit.rows) * unit.encoded // max(1, len(unit.unit.sentences))
        figures.sentences += counted - unit.counted
        unit.counted = counted
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._reported = time.monotonic()
            self._rank.coordinator.report_progress(asdict(figures))
            self._rank.coordinator.raise_if_failed()
        self._write_complete()

    def _write_complete(self) -> None:
        while self._units and self._units[0].batches_left == 0:
            self._rank.figures.units += 1
            self._rank.coordinator.report_progress(asdict(self._rank.figures))
            self._write(self._units.popleft())


def _too_large(batch: TokenBatch) -> InputError:
    return InputError(
        f"encoder.tokens_per_batch: a batch of {batch.padded_tokens:,} tokens is more than the device's memory holds"
    )


def _one_by_one(
    rank: WorkerContext, unit: TokenizedUnit, rows: Sequence[int] | np.ndarray, concepts: np.ndarray
) -> dict[int, str]:
    """Encode the sentences of a failed batch one by one; returns the error of each that fails again.

    Args:
        rank: The parts of this rank.
        unit: With the sentences.
        rows: Which of them the batch holds.
        concepts: [len(sentences), embed_dim], filled in.
    """
    sentences, languages = unit.sentences, unit.languages
    failed = {}
    for row in map(int, rows):
        try:
            one = [sentences[row]]
            encoded = rank.encoder.encode(one) if languages is None else rank.encoder.encode(one, [languages[row]])
            concepts[row] = encoded[0]
        except Exception as error:
            failed[row] = f"{type(error).__name__}: {error}"
    if failed:
        # If the end of text, which could be encoded at the start, fails now, the device is to blame.
        rank.encoder.encode([rank.config.end_of_text])
    return failed


def _write(rank: WorkerContext, done: _Concepts) -> None:
    """Write the unit's shards and report them."""
    unit, documents = _documents(rank, done)
    shards = {}
    name = shard_name(unit.unit)
    try:
        for split, kept in documents.items():
            if kept:
                shards[split] = asdict(write_shard(rank.out / split, name, kept, rank.config.dtype, rank.quantization))
        write_ids(rank.out, unit.unit, [document.id for kept in documents.values() for document in kept])
    except OSError as error:
        raise disk_error(rank.out, error) from error
    rank.coordinator.report({"unit": asdict(unit), "shards": shards})


def disk_error(out: Path, error: OSError) -> Exception:
    """An InputError for a full disk; any other error unchanged."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return InputError(
        f"{out}: output: the disk is full ({error.strerror}): committed units are kept; "
        "make room and start again to resume"
    )


def _documents(rank: WorkerContext, done: _Concepts) -> tuple[UnitResult, dict[str, list[Document]]]:
    """The unit's counts, and its documents by split."""
    config, tokenized, failed = rank.config, done.unit, done.failed
    unit = UnitResult(tokenized.unit.unit, given=len(tokenized.documents), encoded=len(tokenized.sentences))
    end = 0
    refused = Counter({FILTERED: 0} if config.source.filter else {})  # a filter tells of no rows, too
    languages: Counter[str] = Counter()
    documents: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for text in tokenized.documents:
        rows = tokenized.rows[end : end + len(text.sentences)]
        end += len(text.sentences)
        if text.refused is not None:
            refused[text.refused] += 1
            if text.problem is not None:
                unit.unreadable.append(text.problem)
            continue
        own = np.vstack([done.concepts[rows], rank.end_of_text])
        reason = next((failed[row] for row in rows.tolist() if row in failed), None) if failed else None
        if reason is None and not storable(own, config.dtype):
            reason = f"a concept that is not finite in {config.dtype}"
        if reason is not None:
            refused["not_encoded"] += 1
            unit.not_encoded[text.id] = reason
            continue
        key = f"{text.number:012d}"
        sentences = [*text.sentences, config.end_of_text]
        document = Document(key, text.id, text.source, sentences, own, text.given, text.language, text.group)
        documents[text.split].append(document)
        unit.sentences += len(text.sentences)
        unit.lists += text.is_list
        languages.update([] if text.language is None else [text.language])
    unit.kept = {split: len(kept) for split, kept in documents.items()}
    unit.refused = dict(sorted(refused.items()))
    unit.languages = dict(sorted(languages.items()))
    return unit, documents


def storable(concepts: np.ndarray, dtype: str) -> bool:
    """Whether all numbers are finite in the dtype in which they are stored."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(concepts.astype("float32" if dtype == "float32" else "float16")).all())
