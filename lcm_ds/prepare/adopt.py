"""Units of concepts that exist already: read in small blocks by one thread, written as shards by others.

In memory are a few blocks of about 2 MB, whatever the size of units and row groups.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from lcm_ds.adopt.columns import Block, checked
from lcm_ds.adopt.lists import Concepts, use_system_allocator
from lcm_ds.adopt.parts import Part
from lcm_ds.adopt.source import ConceptSource, Unit
from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import SPLITS, DatasetInfo, EndOfText, Supervised, read_info
from lcm_ds.data.normalizer import fit
from lcm_ds.data.quantization import Quantization
from lcm_ds.data.writer import Document, ShardWriter
from lcm_ds.encoders.from_dataset import encoder_of
from lcm_ds.errors import InputError
from lcm_ds.prepare.coordinator import Coordinator
from lcm_ds.prepare.deduplicate import REASON, write_ids
from lcm_ds.prepare.disk_space import BYTES
from lcm_ds.prepare.encode import disk_error
from lcm_ds.prepare.state import SOURCE, UnitResult, shard_name, split_of
from lcm_ds.text.base import UNREADABLE, TextDocument

ADOPTING_CORES = 2  # of a process: one decodes what the other writes
_CALIBRATION_CONCEPTS = 4096  # from the beginning of the source, for the steps of int8
_AHEAD = 2  # blocks
_FINISHING = 2  # units whose bytes are on their way to the disk while the next one is written
_Item = TypeVar("_Item")
# Those of Arrow are not, and nothing here writes into them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class _Row(NamedTuple):
    """A document that is kept, or why it is not."""

    document: Document | None
    split: str = ""
    refused: str = ""
    problem: str | None = None
    sentences: int = 0  # without what is added


class _Piece(NamedTuple):
    """Rows of one unit."""

    unit: Unit
    rows: list[_Row]
    error: float
    last: bool  # whether the unit ends with them


class AdoptedWork:
    """Concepts in parquet, Arrow or NumPy files; see Work.

    Args:
        config: Of the preparation.
        processes: The number of ranks.
        index: Of the source, if it is known.
        first: Whether this is rank 0, which inspects the files; others read its index.
    """

    def __init__(self, config: PrepareConfig, processes: int, index: dict[str, Any] | None, first: bool) -> None:
        use_system_allocator()
        self.config, self.processes = config, processes
        self.threads: int | None = None
        self._index = index
        if first:
            self.source = ConceptSource(config.source, index)
            self.about = self._describe(index)

    @cached_property
    def source(self) -> ConceptSource:
        """The source."""
        return ConceptSource(self.config.source, self._written())

    @cached_property
    def about(self) -> DatasetInfo:
        """What dataset.json says of the concepts."""
        return DatasetInfo(**self._written()["about"])

    def _written(self) -> dict[str, Any]:
        index: dict[str, Any] = json.loads((Path(self.config.output) / SOURCE).read_text(encoding="utf-8"))
        return index

    def _describe(self, index: dict[str, Any] | None) -> DatasetInfo:
        """Encoder, language, end of text and suffix: those of an index, else by the config. Raises InputError."""
        config, source = self.config.source, self.source
        written = Path(self.config.output) / SOURCE
        if index is None and written.exists():  # a concept that is encoded again may differ in its last bits
            index = json.loads(written.read_text(encoding="utf-8"))
        if index is not None and "about" in index:
            return DatasetInfo(**index["about"])
        ours = source.described()
        like = None if config.like is None else read_info(config.like)
        if like is not None and like.embed_dim != source.embed_dim:
            raise InputError(
                f"source.like: {config.like} has embed_dim {like.embed_dim}, the concepts here {source.embed_dim}"
            )
        encoder = config.encoder or (like.encoder if like else ours.get("encoder")) or {"name": "unknown"}
        known = [EndOfText(**each) for key in ("end_of_text", "source_suffix") if (each := ours.get(key))]
        known += [like.end_of_text] if like and like.end_of_text else []
        end = self.config.end_of_text if "end_of_text" in config.add else (ours.get("end_of_text") or {}).get("text")
        suffix = self.config.source_suffix if "source_suffix" in config.add else None
        suffix = suffix or (ours.get("source_suffix") or {}).get("text")
        constants = self._constants([text for text in (end, suffix) if text], known, encoder)
        self.source_suffix = constants.get(suffix or "")
        return DatasetInfo(
            encoder=encoder,
            threads=None,
            embed_dim=source.embed_dim,
            dtype="float32",
            language=like.language if like else ours.get("language"),
            splitter=like.splitter if like else ours.get("splitter") or {},
            end_of_text=constants.get(end or ""),
            supervised=Supervised(source_suffix=suffix) if source.supervised else None,
            source={"suffix": None if self.source_suffix is None else self.source_suffix.model_dump()},
        )

    def _constants(self, texts: list[str], known: list[EndOfText], encoder: dict[str, Any]) -> dict[str, EndOfText]:
        """Sentences with their concepts: known ones, or else by the encoder. Raises InputError if it cannot be used."""
        found = {each.text: each for each in known}
        if missing := [text for text in texts if text not in found]:
            if encoder.get("name") == "unknown":
                raise InputError(
                    f"source.add: no encoder is known, which {missing[0]!r} has to be encoded with: name it in "
                    "source.encoder (--encoder), or a dataset that has it in source.like (--like)"
                )
            loaded = encoder_of(encoder, self.source.embed_dim, "source.encoder")
            for text, concept in zip(missing, loaded.encode(missing), strict=True):
                found[text] = EndOfText(text=text, vector=[float(value) for value in concept])
        return found

    @property
    def embed_dim(self) -> int:
        """Numbers in a concept."""
        return self.source.embed_dim

    @property
    def end_of_text(self) -> EndOfText | None:
        """What ends each document."""
        return self.about.end_of_text

    @property
    def supervised(self) -> Supervised | None:
        """Set if documents have a source and a target."""
        return self.about.supervised

    @property
    def total(self) -> int:
        """Documents of the source."""
        return self.source.total

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file of the source."""
        return self.source.sizes

    def estimate(self) -> int | None:
        """Approximate bytes of the dataset."""
        return round(sum(part.size / part.itemsize for part in self.source.parts) * BYTES[self.config.dtype])

    def encoder(self) -> dict[str, Any]:
        """For dataset.json."""
        return self.about.encoder

    def splitter(self, units: Sequence[UnitResult] | None = None) -> dict[str, Any]:
        """For dataset.json."""
        return self.about.splitter

    def language(self) -> str | None:
        """For dataset.json."""
        return self.about.language

    def describe(self) -> dict[str, Any]:
        """Where the documents are from."""
        return self.source.describe()

    def index(self) -> dict[str, Any]:
        """The result of inspecting the source, and what is known of its concepts."""
        return {**self.source.index(), "about": self.about.model_dump()}

    def sizes_in(self, index: dict[str, Any]) -> dict[str, int]:
        """The bytes of each file by an older `index`."""
        return {part["name"]: part["size"] for part in index["parts"]}

    def quantization(self) -> Quantization:
        """The steps of int8: those of the dataset that export-data wrote the files from, or by the first concepts."""
        if (steps := self.source.described().get("quantization")) is not None:
            return Quantization(*(np.asarray(steps[key], np.float32) for key in ("center", "step")))
        first: list[np.ndarray] = []
        for _, _, block in self.source.blocks(0, self.source.total):
            for concepts in block.concepts:
                first.append(concepts.values[np.isfinite(concepts.values).all(axis=1)])
            if sum(map(len, first)) >= _CALIBRATION_CONCEPTS:
                break
        values = np.concatenate(first)[:_CALIBRATION_CONCEPTS] if first else np.empty((0, self.embed_dim))
        if len(values) < 2:
            raise InputError(f"{self.config.output}: int8 needs concepts to determine its steps; the source has none")
        return Quantization.of(*fit(values.astype(np.float32)))

    def make_units(self, coordinator: Coordinator, quantization: Quantization | None, done: set[int]) -> None:
        """Make units until none is left to claim; see Work."""
        _Maker(self, coordinator, quantization).make(done)

    def summary(self, units: list[UnitResult], scale: np.ndarray) -> str | None:
        """The largest error of storing, and whether documents have an end."""
        errors = [unit.largest_error for unit in units if unit.largest_error is not None]
        error = max(errors, default=0.0)
        share = error / float(np.median(scale))
        end = "" if self.end_of_text else "; documents have no end of text (source.add, --end-of-text)"
        return f"stored as {self.config.dtype}: largest error {error:.3g}, {share:.2g} standard deviations{end}"

    def close(self) -> None:
        """Nothing is left running."""


class _Maker:
    """Makes the units of one rank."""

    def __init__(self, work: AdoptedWork, coordinator: Coordinator, quantization: Quantization | None) -> None:
        self.config, self.source = work.config, work.source
        self.out = Path(self.config.output)
        self._coordinator, self._quantization = coordinator, quantization
        self._supervised = work.supervised is not None
        suffix = work.about.source.get("suffix")
        self._suffix = None if suffix is None else self._constant(EndOfText(**suffix))
        self._end = None if work.end_of_text is None else self._constant(work.end_of_text)
        self._sentences = 0

    def make(self, done: set[int]) -> None:
        """Make units until none is left to claim, and report each."""
        finishing: deque[Future[None]] = deque()
        unit: _UnitWriter | None = None
        pieces = self._pieces(done)
        with ThreadPoolExecutor(1, "lcm-ds-writer") as pool:
            try:
                for piece in _ahead(pieces, _AHEAD):
                    unit = unit or _UnitWriter(self, piece.unit)
                    unit.add(piece)
                    if piece.last:
                        while len(finishing) >= _FINISHING:
                            finishing.popleft().result()
                        finishing.append(pool.submit(self._finish, unit))
                        unit = None
                while finishing:
                    finishing.popleft().result()
            except OSError as error:
                raise disk_error(self.out, error) from error
            finally:
                if unit is not None:
                    unit.close()

    def _finish(self, unit: _UnitWriter) -> None:
        """Give the unit's shards their names, and report it."""
        try:
            result, shards, ids = unit.finish()
            write_ids(self.out, result.unit, ids)
        except OSError as error:
            raise disk_error(self.out, error) from error
        finally:
            unit.close()
        self._sentences += result.sentences
        self._coordinator.report_progress({"sentences": self._sentences})
        self._coordinator.report({"unit": asdict(result), "shards": shards})

    def writer(self, split: str, unit: int) -> ShardWriter:
        """The writer of a unit's shard."""
        return ShardWriter(self.out / split, shard_name(unit), self.config.dtype, self._quantization)

    def _pieces(self, done: set[int]) -> Iterator[_Piece]:
        """The rows of the units that this rank claims, block by block."""
        left = (units for claim in self.source.claims(self.config.documents_per_shard)
                if (units := [unit for unit in claim if unit.number not in done]))  # fmt: skip
        position = 0
        while True:
            index = self._coordinator.claim()
            claimed = next(islice(left, index - position, None), None)
            if claimed is None:
                return
            position = index + 1
            yield from self._of_claim(claimed)

    def _of_claim(self, units: list[Unit]) -> Iterator[_Piece]:
        at, number = 0, units[0].start
        for part, row, block in self.source.blocks(units[0].start, units[-1].stop):
            block, error = self._stored(block)
            first = 0  # of the block
            while first < block.rows:
                unit = units[at]
                skipped = max(0, min(block.rows - first, unit.start - number))  # of a unit that is done
                first, number = first + skipped, number + skipped
                last = min(block.rows, first + unit.stop - number)
                if first < last:
                    rows = [self._row(part, block, i, row + i, number + i - first) for i in range(first, last)]
                    number += last - first
                    yield _Piece(unit, rows, error, number == unit.stop)
                    first = last
                at += number == unit.stop

    def _stored(self, block: Block) -> tuple[Block, float]:
        """The block with its concepts as they are stored (for int8 as they are), and the largest error by that."""
        columns, largest = [], 0.0
        for concepts in block.concepts:
            values, error = self._rounded(concepts.values)
            if np.isnan(error):
                # int8 is made of what float16 holds.
                with np.errstate(over="ignore"):
                    bad = ~np.isfinite(values.astype(np.float16) if self._quantization else values).all(axis=1)
                concepts = checked(concepts, bad)
                error = self._rounded(concepts.values[~bad])[1]
            columns.append(concepts._replace(values=values))
            largest = max(largest, error)
        return block._replace(concepts=columns), largest

    def _rounded(self, values: np.ndarray) -> tuple[np.ndarray, float]:
        """Concepts [n, embed_dim] as they are stored, and the largest error; NaN if one of them cannot be stored."""
        given = torch.from_numpy(values)  # NumPy rounds to half at a fraction of the speed
        kept = given.to(torch.float16 if self.config.dtype == "float16" else torch.float32)
        stored: np.ndarray = kept.numpy()
        if not len(values):
            return stored, 0.0
        if self._quantization is not None:
            with np.errstate(invalid="ignore"):
                again = self._quantization.decode(self._quantization.encode(stored), np.empty_like(stored))
            errors = torch.from_numpy(again).to(given.dtype).sub_(given)
            held = bool(torch.isfinite(kept.abs().max().half()))  # int8 is made of what float16 holds
        else:
            errors = kept.to(torch.promote_types(given.dtype, kept.dtype)) - given
            held = True
        low, high = (float(bound) for bound in errors.aminmax())
        error = max(high, -low)
        return stored, error if held and np.isfinite(high - low) else float("nan")

    def _constant(self, known: EndOfText) -> tuple[str, np.ndarray]:
        """A sentence and its concept as it is stored, [1, embed_dim]."""
        return known.text, self._rounded(np.array([known.vector], np.float32))[0]

    def _row(self, part: Part, block: Block, at: int, row: int, number: int) -> _Row:
        """The document in a row.

        Args:
            part: Its part.
            block: Its block.
            at: Its row in the block.
            row: Its row in the part.
            number: Its number in the source.
        """
        problem = block.problem(at)
        if problem is not None:
            return _Row(None, refused=UNREADABLE, problem=f"{part.name}: row {row}: {problem}")
        values = [_slice(concepts, at) for concepts in block.concepts]
        sentences = [column.lists[at] for column in block.sentences]
        count = sum(map(len, values))
        if not all(map(len, values)):
            return _Row(None, refused="empty")
        if count < self.config.min_sentences:
            return _Row(None, refused="too_few_sentences")
        if self.config.max_sentences is not None and count > self.config.max_sentences:
            return _Row(None, refused="too_many_sentences")
        name = block.ids[at]
        id, source = name or f"{part.name}#{row}", block.sources[at] or part.name
        given = None
        if self._supervised and self._suffix is not None:
            values[0], sentences[0] = _with(values[0], sentences[0], self._suffix)
        if self._supervised:
            given = len(values[0])
        text = [sentence for each in sentences for sentence in each]
        split = part.split
        if split is None:
            # As in prepare: without an id, and of a supervised document its source, the text decides.
            words = sentences[0] if sentences else id
            document = TextDocument(id, source, words, named=name is not None, group=block.groups[at])
            split = split_of(document.split_key, self.config.validation)
        concepts = values[0] if len(values) == 1 else np.concatenate(values)
        if self._end is not None and not (text and text[-1] == self._end[0]):
            concepts, text = _with(concepts, text, self._end)
        known = text if sentences else None
        stored = Document(f"{number:012d}", id, source, known, concepts, given, group=block.groups[at])
        return _Row(stored, split, sentences=count)


class _UnitWriter:
    """The shards of a unit, one in each split, both open while its rows come."""

    def __init__(self, maker: _Maker, unit: Unit) -> None:
        self._maker = maker
        self._writers: dict[str, ShardWriter] = {}
        self._ids: dict[str, None] = {}
        self._refused: Counter[str] = Counter()
        self.result = UnitResult(unit.number, kept=dict.fromkeys(SPLITS, 0), largest_error=0.0)

    def add(self, piece: _Piece) -> None:
        """Write the documents of some rows. Raises OSError."""
        result = self.result
        result.given += len(piece.rows)
        result.largest_error = max(result.largest_error or 0.0, piece.error)
        for row in piece.rows:
            document, refused = row.document, row.refused
            if document is not None and document.id in self._ids:
                document, refused = None, REASON
            if document is None:
                self._refused[refused] += 1
                result.unreadable += [] if row.problem is None else [row.problem]
                continue
            self._ids[document.id] = None
            if row.split not in self._writers:
                self._writers[row.split] = self._maker.writer(row.split, result.unit)
            self._writers[row.split].add(document, finite=True)
            result.kept[row.split] += 1
            result.sentences += row.sentences

    def finish(self) -> tuple[UnitResult, dict[str, dict[str, Any]], list[str]]:
        """Counts, the lines of shards.jsonl by split, and the ids."""
        self.result.refused = dict(sorted(self._refused.items()))
        shards = {split: asdict(writer.finish()) for split, writer in sorted(self._writers.items())}
        return self.result, shards, list(self._ids)

    def close(self) -> None:
        """Remove what is not finished."""
        for writer in self._writers.values():
            writer.__exit__(None, None, None)


def _slice(concepts: Concepts, row: int) -> np.ndarray:
    return concepts.values[concepts.offsets[row] : concepts.offsets[row + 1]]


def _with(concepts: np.ndarray, sentences: list[str], constant: tuple[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """Concepts and sentences with another one behind them."""
    return np.concatenate([concepts, constant[1]]), [*sentences, constant[0]]


def _ahead(items: Iterator[_Item], count: int) -> Iterator[_Item]:
    """The items, each made in a thread while those before it are used."""
    with ThreadPoolExecutor(1, "lcm-ds-reader") as pool:
        waiting = deque(pool.submit(next, items, None) for _ in range(count))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
