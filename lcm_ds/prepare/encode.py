"""One rank's work: units are read and split, tokenized, encoded and written, each stage ahead of the next.

The calling thread only encodes; everything that it could wait for happens in other threads and processes.
"""

from __future__ import annotations

import errno
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from lcm_ds.encoders.base import TokenBatch
from lcm_ds.errors import InputError
from lcm_ds.prepare.coordinator import Coordinator
from lcm_ds.prepare.deduplicate import write_ids
from lcm_ds.prepare.readers import Readers, SplitDocument, WorkUnit
from lcm_ds.prepare.state import UnitResult, shard_name

REPORT_SECONDS = 1.0
_MAX_WRITING = 2  # units whose shards are being written while the next one is encoded


@dataclass
class Figures:
    """A rank's progress, and how long its encoder was busy."""

    sentences: int = 0  # done, each repetition counted
    encoded: int = 0  # sentences that the encoder saw
    tokens: int = 0
    padded_tokens: int = 0  # with padding
    busy: float = 0.0  # seconds in the encoder


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
class TokenizedUnit:
    """A unit's documents, and its distinct sentences as batches."""

    unit: WorkUnit
    documents: list[SplitDocument]
    sentences: list[str]  # distinct, in the order of their first occurrence
    batches: list[TokenBatch]


def encode_units(rank: WorkerContext, readers: Readers, pending: Iterator[WorkUnit]) -> None:
    """Make the units that this rank can claim, and report each to rank 0.

    Args:
        rank: The parts of this rank.
        readers: Read and split documents.
        pending: The units that are to be made, in the same order on all ranks; a rank claims an index into them.

    Raises:
        InputError: the source cannot be read, the disk is full, or a batch does not fit into the device's memory.
    """
    tokenized: deque[Future[TokenizedUnit]] = deque()
    writing: deque[Future[None]] = deque()
    tokenizer = ThreadPoolExecutor(1, "lcm-ds-tokenizer")
    writer = ThreadPoolExecutor(1, "lcm-ds-writer")
    try:
        units = _claimed(rank.coordinator, pending)
        ended = False
        while True:
            while not ended and len(tokenized) < readers.ahead:
                unit = next(units, None)
                if unit is None:
                    ended = True
                else:
                    tokenized.append(tokenizer.submit(_tokenize, rank.encoder, unit, readers.submit(unit)))
            if not tokenized:
                break
            unit_tokens = tokenized.popleft().result()
            if not unit_tokens.documents:  # the source has ended
                ended = True
                continue
            concepts, failed = _embed(rank, unit_tokens)
            while len(writing) >= _MAX_WRITING:
                writing.popleft().result()
            writing.append(writer.submit(_write, rank, unit_tokens, concepts, failed))
        while writing:
            writing.popleft().result()
    finally:
        tokenizer.shutdown(wait=True, cancel_futures=True)
        writer.shutdown(wait=True, cancel_futures=True)


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


def _tokenize(encoder: Encoder, unit: WorkUnit, future: Future[list[SplitDocument]]) -> TokenizedUnit:
    documents = future.result()
    # A sentence that occurs several times in a unit is encoded once.
    sentences = list(dict.fromkeys(sentence for document in documents for sentence in document.sentences))
    try:
        batches = encoder.tokenize(sentences)
    except Exception:  # because of some sentence, which shows when they are encoded one by one
        batches = [TokenBatch(list(range(len(sentences))), {}, 0, 0)]
    return TokenizedUnit(unit, documents, sentences, batches)


def _embed(rank: WorkerContext, unit: TokenizedUnit) -> tuple[np.ndarray, dict[int, str]]:
    """The concepts of a unit's sentences, fp32 [n, embed_dim], raw space; and the error for each that has none."""
    figures = rank.figures
    concepts = np.empty((len(unit.sentences), rank.encoder.embed_dim), np.float32)
    failed: dict[int, str] = {}
    before, total, done = figures.sentences, sum(len(document.sentences) for document in unit.documents), 0
    reported = time.monotonic()
    for batch in unit.batches:
        started = time.monotonic()
        try:
            concepts[batch.rows] = rank.encoder.embed(batch)
        except torch.OutOfMemoryError:
            raise InputError(
                f"encoder.tokens_per_batch: a batch of {batch.padded_tokens:,} tokens is more than the device's "
                "memory holds"
            ) from None
        except Exception:
            failed |= _one_by_one(rank, unit.sentences, batch.rows, concepts)
        now = time.monotonic()
        done += len(batch.rows)
        figures.busy += now - started
        figures.encoded += len(batch.rows)
        figures.tokens += batch.tokens
        figures.padded_tokens += batch.padded_tokens
        figures.sentences = before + total * done // len(unit.sentences)
        if now - reported >= REPORT_SECONDS:
            reported = now
            rank.coordinator.report_progress(asdict(figures))
            rank.coordinator.raise_if_failed()
    return concepts, failed


def _one_by_one(rank: WorkerContext, sentences: list[str], rows: list[int], concepts: np.ndarray) -> dict[int, str]:
    """Encode the sentences of a failed batch one by one; returns the error of each that fails again.

    Args:
        rank: The parts of this rank.
        sentences: Of the unit.
        rows: Which of them the batch holds.
        concepts: [len(sentences), embed_dim], filled in.
    """
    failed = {}
    for row in rows:
        try:
            concepts[row] = rank.encoder.encode([sentences[row]])[0]
        except Exception as error:
            failed[row] = f"{type(error).__name__}: {error}"
    if failed:
        # If the end of text, which could be encoded at the start, fails now, the device is to blame.
        rank.encoder.encode([rank.config.end_of_text])
    return failed


def _write(rank: WorkerContext, tokenized: TokenizedUnit, concepts: np.ndarray, failed: dict[int, str]) -> None:
    """Write the unit's shards and report them."""
    unit, documents = _documents(rank, tokenized, concepts, failed)
    shards = {}
    name = shard_name(unit.unit)
    try:
        for split, kept in documents.items():
            if kept:
                shards[split] = asdict(write_shard(rank.out / split, name, kept, rank.config.dtype, rank.quantization))
        write_ids(rank.out, unit.unit, [document.id for kept in documents.values() for document in kept])
    except OSError as error:
        raise disk_error(rank.out, error) from error
    rank.coordinator.report_progress(asdict(rank.figures))
    rank.coordinator.report({"unit": asdict(unit), "shards": shards})


def disk_error(out: Path, error: OSError) -> Exception:
    """An InputError for a full disk; any other error unchanged."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return InputError(
        f"{out}: output: the disk is full ({error.strerror}): committed units are kept; "
        "make room and start again to resume"
    )


def _documents(
    rank: WorkerContext, tokenized: TokenizedUnit, concepts: np.ndarray, failed: dict[int, str]
) -> tuple[UnitResult, dict[str, list[Document]]]:
    """The unit's counts, and its documents by split."""
    config = rank.config
    row_of = {sentence: row for row, sentence in enumerate(tokenized.sentences)}
    unit = UnitResult(tokenized.unit.unit, given=len(tokenized.documents), encoded=len(tokenized.sentences))
    refused: Counter[str] = Counter()
    documents: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for text in tokenized.documents:
        if text.refused is not None:
            refused[text.refused] += 1
            if text.problem is not None:
                unit.unreadable.append(text.problem)
            continue
        rows = [row_of[sentence] for sentence in text.sentences]
        own = np.vstack([concepts[rows], rank.end_of_text])
        reason = next((failed[row] for row in rows if row in failed), None)
        if reason is None and not storable(own, config.dtype):
            reason = f"a concept that is not finite in {config.dtype}"
        if reason is not None:
            refused["not_encoded"] += 1
            unit.not_encoded[text.id] = reason
            continue
        key = f"{text.number:012d}"
        sentences = [*text.sentences, config.end_of_text]
        documents[text.split].append(Document(key, text.id, text.source, sentences, own, text.given))
        unit.sentences += len(text.sentences)
    unit.kept = {split: len(kept) for split, kept in documents.items()}
    unit.refused = dict(sorted(refused.items()))
    return unit, documents


def storable(concepts: np.ndarray, dtype: str) -> bool:
    """Whether all numbers are finite in the dtype in which they are stored."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(concepts.astype("float32" if dtype == "float32" else "float16")).all())
