"""Texts as the work of a preparation: their source, what splits them, and the encoder of this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import EndOfText, Supervised
from lcm_ds.data.normalizer import fit
from lcm_ds.data.quantization import Quantization
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.encoders import Encoder, load_encoder
from lcm_ds.encoders.base import UnreachableModel
from lcm_ds.errors import InputError
from lcm_ds.prepare import disk_space
from lcm_ds.prepare.coordinator import Coordinator
from lcm_ds.prepare.encode import WorkerContext, encode_units, storable
from lcm_ds.prepare.readers import Reader, Readers, WorkUnit, open_reader
from lcm_ds.prepare.state import UnitResult, backend_of
from lcm_ds.text.base import Source
from lcm_ds.text.open import open_source

_CALIBRATION_SENTENCES = 4096  # from the beginning of the source, for the steps of int8


class EncoderFacts(NamedTuple):
    """What the dataset holds about its encoder, which may be in another process."""

    description: dict[str, Any]
    embed_dim: int
    end_of_text: list[float]  # [embed_dim], raw space


class Texts:
    """What is known of a preparation of texts without encoding them: the part of Work that needs no encoder.

    Args:
        config: Of the preparation.
        encoder: Of the texts.
        source: Theirs; None for that of the index in the output, once it is there.
    """

    def __init__(self, config: PrepareConfig, encoder: EncoderFacts, source: Source | None) -> None:
        self.config, self.facts = config, encoder
        self._reader = None if source is None else Reader(config, source)
        self.embed_dim: int = encoder.embed_dim
        self.end_of_text: EndOfText | None = EndOfText(text=config.end_of_text, vector=encoder.end_of_text)
        self.supervised = Supervised(source_suffix=config.source_suffix) if config.source.supervised else None
        self.threads: int | None = config.threads

    @cached_property
    def reader(self) -> Reader:
        """Of the source."""
        return self._reader or open_reader(self.config)

    @property
    def total(self) -> int | None:
        """Documents of the source."""
        return self.reader.source.total

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file of the source."""
        return self.reader.source.sizes

    def estimate(self) -> int | None:
        """Approximate bytes of the dataset."""
        return disk_space.estimate(self.config, self.reader.source, self.embed_dim)

    def encoder(self) -> dict[str, Any]:
        """For dataset.json."""
        return self.facts.description

    def splitter(self, units: Sequence[UnitResult] | None = None) -> dict[str, Any]:
        """For dataset.json, once the units are made."""
        if units is None:
            return self.reader.settings()
        lists = sum(unit.lists for unit in units)
        return self.reader.settings(lists, texts=max(0, sum(sum(unit.kept.values()) for unit in units) - lists))

    def language(self) -> str | None:
        """For dataset.json; None for several."""
        return self.config.sentences.language if self.config.source.languages is None else None

    def describe(self) -> dict[str, Any]:
        """Where the documents are from."""
        return self.reader.source.describe()

    def index(self) -> dict[str, Any]:
        """The result of inspecting the source."""
        return self.reader.source.index()

    def sizes_in(self, index: dict[str, Any]) -> dict[str, int]:
        """The bytes of each file by an older `index`."""
        return open_source(self.config.source, self.config.sentences.language, index).sizes

    def pending(self, done: set[int]) -> Iterator[WorkUnit]:
        """The units that are not done, in order."""
        return pending_units(self.reader.source, self.config.documents_per_shard, done)

    def summary(self, units: list[UnitResult], scale: np.ndarray) -> str | None:
        """Nothing that Progress has not said."""
        return None

    def close(self) -> None:
        """Nothing is left running."""


class TextWork(Texts):
    """Texts, split and encoded by this rank; see Work and Texts."""

    def __init__(self, config: PrepareConfig, env: DistEnv, encoder: Encoder | None, source: Source | None) -> None:
        self.processes = env.world_size
        self._readers = Readers(config)  # they start while the encoder is loaded
        try:
            self._encoder = encoder or load_for_rank(config, env)
            super().__init__(config, _facts(config, self._encoder), source)
        except BaseException:
            self._readers.close()
            raise

    def quantization(self) -> Quantization:
        """The steps of int8, from the first sentences."""
        found = list(islice(sentences_of(self.reader), _CALIBRATION_SENTENCES))
        if len(found) < 2:
            raise InputError(f"{self.config.output}: int8 needs sentences to determine its steps; the source has none")
        sentences = [sentence for sentence, _ in found]
        languages = [str(language) for _, language in found]
        each, encode = self.config.language_of_each, self._encoder.encode
        return Quantization.of(*fit(encode(sentences, languages) if each else encode(sentences)))

    def make_units(self, coordinator: Coordinator, quantization: Quantization | None, done: set[int]) -> None:
        """Make units until none is left to claim; see Work."""
        self.make(self.pending(done), coordinator, quantization)

    def make(self, units: Iterator[WorkUnit], coordinator: Coordinator, quantization: Quantization | None) -> None:
        """Make those of the units that this rank can claim.

        Args:
            units: In the same order on all ranks; a claim is an index into them.
            coordinator: Of the claims and reports.
            quantization: For int8.

        Raises:
            InputError: As `make_units` of Work.
        """
        end = np.array(self.facts.end_of_text, np.float32)
        encode_units(WorkerContext(self.config, self._encoder, end, quantization, coordinator), self._readers, units)

    def close(self) -> None:
        """End the reading processes."""
        self._readers.close()


def load_for_rank(config: PrepareConfig, env: DistEnv) -> Encoder:
    """This rank's encoder, on its own device, by the backend that the dataset was started with."""
    encoder = config.encoder
    assert encoder is not None
    if encoder.backend is None:
        encoder = encoder.model_copy(update={"backend": backend_of(Path(config.output))})
    if encoder.device is None and torch.cuda.is_available():
        device = f"cuda:{env.device_index(torch.cuda.device_count())}"
        encoder = encoder.model_copy(update={"device": device})
    try:
        return load_encoder(encoder)
    except UnreachableModel as error:
        raise InputError(
            f"{error}; without a hub use encoder.name=sentence-transformers encoder.model=minilm"
        ) from None


def _facts(config: PrepareConfig, encoder: Encoder) -> EncoderFacts:
    """What the dataset says of an encoder.

    If the end of text could not be stored, every document would be refused, after hours of encoding.
    """
    concept: np.ndarray = encoder.encode([config.end_of_text])[0]
    if not storable(concept, config.dtype):
        raise InputError(f"end_of_text: the encoder makes {config.end_of_text!r} a concept that is not finite")
    return EncoderFacts(encoder.describe(), encoder.embed_dim, [float(value) for value in concept])


def pending_units(source: Source, size: int, done: set[int]) -> Iterator[WorkUnit]:
    """The units that are not done, in order.

    Args:
        source: Of the documents.
        size: Documents of a unit, approximately.
        done: Numbers of units.
    """
    for number, (start, stop) in enumerate(source.units(size)):
        if number not in done:
            yield WorkUnit(number, start, stop)


def sentences_of(reader: Reader) -> Iterator[tuple[str, str | None]]:
    """All sentences of the documents that are not refused, in order, each with its document's language."""
    for unit in pending_units(reader.source, reader.config.documents_per_shard, set()):
        documents = reader.read(unit)
        if not documents:
            return
        for document in documents:
            yield from ((sentence, document.language) for sentence in document.sentences)
