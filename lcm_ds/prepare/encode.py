"""One rank's work: units are read and split, tokenized, encoded and written, each stage ahead of the next.

The encoder has the calling thread for itself; all that it could wait for happens in other threads and processes.
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

SECONDS_A_REPORT = 1.0
# Units whose shards are being written while the next one is encoded.
_WRITTEN_AT_A_TIME = 2


@dataclass
class Figures:
    """How far a rank is, and what its time went into."""

    sentences: int = 0  # encoded, repeats counted each time
    encoded: int = 0  # sentences that the encoder saw
    tokens: int = 0
    places: int = 0  # tokens and padding
    busy: float = 0.0  # seconds in the encoder


@dataclass(frozen=True)
class WorkerContext:
    """What a rank works with."""

    config: PrepareConfig
    encoder: Encoder
    end: np.ndarray  # fp32 [embed_dim]: the end-of-text concept
    quantization: Quantization | None
    peers: Coordinator
    figures: Figures = field(default_factory=Figures)

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self.config.output)


@dataclass
class TokenizedUnit:
    """A unit's texts, with its different sentences as batches."""

    unit: WorkUnit
    texts: list[SplitDocument]
    sentences: list[str]  # each once, in the order in which they first occur
    batches: list[TokenBatch]


def encode_units(rank: WorkerContext, readers: Readers, pending: Iterator[WorkUnit]) -> None:
    """Make the units that this rank can claim, and report each to rank 0.

    pending: the units that are to be made, in an order that is the same in all ranks; a claim is for a place in it.
    Raises InputError where the source cannot be read, the disk is full or too many documents cannot be encoded.
    """
    coming: deque[Future[TokenizedUnit]] = deque()
    written: deque[Future[None]] = deque()
    tokenizer = ThreadPoolExecutor(1, "lcm-ds-tokenizer")
    writer = ThreadPoolExecutor(1, "lcm-ds-writer")
    try:
        units = _claimed(rank.peers, pending)
        ended = False
        while True:
            while not ended and len(coming) < readers.ahead:
                unit = next(units, None)
                if unit is None:
                    ended = True
                else:
                    coming.append(tokenizer.submit(_tokenized, rank.encoder, unit, readers.submit(unit)))
            if not coming:
                break
            pool = coming.popleft().result()
            if not pool.texts:  # the source has ended
                ended = True
                continue
            concepts, failed = _embedded(rank, pool)
            while len(written) >= _WRITTEN_AT_A_TIME:
                written.popleft().result()
            written.append(writer.submit(_write, rank, pool, concepts, failed))
        while written:
            written.popleft().result()
    finally:
        tokenizer.shutdown(wait=True, cancel_futures=True)
        writer.shutdown(wait=True, cancel_futures=True)


def _claimed(peers: Coordinator, pending: Iterator[WorkUnit]) -> Iterator[WorkUnit]:
    """The units that this rank gets, one whenever it asks."""
    at = 0
    while True:
        place = peers.claim()
        unit = next(islice(pending, place - at, None), None)
        if unit is None:
            return
        at = place + 1
        yield unit


def _tokenized(encoder: Encoder, unit: WorkUnit, texts: Future[list[SplitDocument]]) -> TokenizedUnit:
    found = texts.result()
    # A sentence that stands in a unit several times is encoded once.
    sentences = list(dict.fromkeys(sentence for text in found for sentence in text.sentences))
    try:
        batches = encoder.tokenize(sentences)
    except Exception:  # some sentence cannot be: which one shows when they are encoded one by one
        batches = [TokenBatch(list(range(len(sentences))), {}, 0, 0)]
    return TokenizedUnit(unit, found, sentences, batches)


def _embedded(rank: WorkerContext, pool: TokenizedUnit) -> tuple[np.ndarray, dict[int, str]]:
    """Concepts of the pool's sentences, float32 [n, embed_dim], and why sentence i has none."""
    figures = rank.figures
    concepts = np.empty((len(pool.sentences), rank.encoder.embed_dim), np.float32)
    failed: dict[int, str] = {}
    before, repeated, done = figures.sentences, sum(len(text.sentences) for text in pool.texts), 0
    told = time.monotonic()
    for batch in pool.batches:
        started = time.monotonic()
        try:
            concepts[batch.rows] = rank.encoder.embed(batch)
        except torch.OutOfMemoryError:
            raise InputError(
                f"encoder.tokens_per_batch: a batch of {batch.padded_tokens:,} tokens is more than the device's "
                "memory holds"
            ) from None
        except Exception:
            failed |= _one_by_one(rank, pool.sentences, batch.rows, concepts)
        now = time.monotonic()
        done += len(batch.rows)
        figures.busy += now - started
        figures.encoded += len(batch.rows)
        figures.tokens += batch.tokens
        figures.places += batch.padded_tokens
        figures.sentences = before + repeated * done // len(pool.sentences)
        if now - told >= SECONDS_A_REPORT:
            told = now
            rank.peers.tell(asdict(figures))
            rank.peers.check()
    return concepts, failed


def _one_by_one(rank: WorkerContext, sentences: list[str], rows: list[int], concepts: np.ndarray) -> dict[int, str]:
    """Encode the sentences of a batch that failed one by one; returns those that fail again, and why."""
    failed = {}
    for row in rows:
        try:
            concepts[row] = rank.encoder.encode([sentences[row]])[0]
        except Exception as error:
            failed[row] = f"{type(error).__name__}: {error}"
    if failed:
        # Is it the sentences? One that was encoded at the start tells: if it fails now, the device does.
        rank.encoder.encode([rank.config.end_of_text])
    return failed


def _write(rank: WorkerContext, pool: TokenizedUnit, concepts: np.ndarray, failed: dict[int, str]) -> None:
    """Write the unit's shards and report them."""
    unit, documents = _documents(rank, pool, concepts, failed)
    shards = {}
    name = shard_name(unit.unit)
    try:
        for split, kept in documents.items():
            if kept:
                shards[split] = asdict(write_shard(rank.out / split, name, kept, rank.config.dtype, rank.quantization))
        write_ids(rank.out, unit.unit, [document.id for kept in documents.values() for document in kept])
    except OSError as error:
        raise full_disk(rank.out, error) from error
    rank.peers.tell(asdict(rank.figures))
    rank.peers.report({"unit": asdict(unit), "shards": shards})


def full_disk(out: Path, error: OSError) -> Exception:
    """The mistake that a full disk is; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return InputError(
        f"{out}: output: the disk is full ({error.strerror}): what is committed is kept; "
        "make room and start again to go on"
    )


def _documents(
    rank: WorkerContext, pool: TokenizedUnit, concepts: np.ndarray, failed: dict[int, str]
) -> tuple[UnitResult, dict[str, list[Document]]]:
    """The documents of a unit by split, and what became of them all."""
    config = rank.config
    row = {sentence: index for index, sentence in enumerate(pool.sentences)}
    unit = UnitResult(pool.unit.unit, given=len(pool.texts), encoded=len(pool.sentences))
    refused: Counter[str] = Counter()
    documents: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for text in pool.texts:
        if text.refused is not None:
            refused[text.refused] += 1
            if text.problem is not None:
                unit.unreadable.append(text.problem)
            continue
        rows = [row[sentence] for sentence in text.sentences]
        own = np.vstack([concepts[rows], rank.end])
        reason = next((failed[index] for index in rows if index in failed), None)
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
    """Whether all numbers are finite, as they are stored, too."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(concepts.astype("float32" if dtype == "float32" else "float16")).all())
