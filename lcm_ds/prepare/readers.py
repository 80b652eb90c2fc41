"""Reading, splitting and tokenizing the documents of a unit, in separate processes or in threads.

The interpreter of the process that encodes stays free to start work on the device.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from lcm_ds.config import PrepareConfig
from lcm_ds.encoders.base import Encoder, TokenBatch, Tokenizer
from lcm_ds.errors import InputError, first_line
from lcm_ds.prepare.state import SOURCE, split_of
from lcm_ds.processes import set_parent_death_signal
from lcm_ds.text.base import UNREADABLE, Source, TextDocument
from lcm_ds.text.open import open_source
from lcm_ds.text.splitter import BY_DOCUMENT, Splitter, cut, for_language


class WorkUnit(NamedTuple):
    """Documents `start` to `stop` − 1 of the source."""

    unit: int
    start: int
    stop: int


class SplitDocument(NamedTuple):
    """A document of a unit, split into sentences."""

    number: int  # in the source, from 0
    id: str
    source: str
    sentences: list[str]
    refused: str | None  # the reason
    given: int | None = None  # of a supervised document: the number of sentences of its source, with the suffix
    problem: str | None = None  # why the document could not be read
    split: str = ""  # unless it is refused
    language: str | None = None  # its code of SONAR, if the source has several
    is_list: bool = False  # whether it came as a list of sentences
    group: str | None = None  # of the source's group_column


@dataclass(frozen=True)
class TokenizedUnit:
    """A unit's documents, and its distinct sentences as batches; one that occurs several times is encoded once."""

    unit: WorkUnit
    documents: list[SplitDocument]
    sentences: list[str]  # distinct, in the order of their first occurrence
    rows: np.ndarray  # int32: where each sentence of the documents, one after the other, is in `sentences`
    batches: list[TokenBatch]
    languages: list[str] | None = None  # of each of `sentences`, if every document is encoded with its own


class Reader:
    """Reads units of a source."""

    def __init__(
        self, config: PrepareConfig, source: Source, make_splitter: Callable[[], Splitter] | None = None
    ) -> None:
        self.config, self.source = config, source
        self._make_splitter = make_splitter or partial(Splitter, config.sentences)
        self._by_language: dict[str, Splitter] = {}

    @cached_property
    def splitter(self) -> Splitter:
        """Splits texts into sentences; its construction takes seconds, and lists of sentences need none."""
        return self._make_splitter()

    def splitter_of(self, language: str | None) -> Splitter:
        """The splitter of a document in a language, SONAR's code; None if the source has only one."""
        if language is None or self.config.sentences.splitter == "none":
            return self.splitter
        config = for_language(self.config.sentences, language)
        if config.language not in self._by_language:
            self._by_language[config.language] = Splitter(config)
        return self._by_language[config.language]

    def settings(self, lists: int = 0, texts: int = 1) -> dict[str, Any]:
        """What determines the sentences, for dataset.json.

        lists: documents that came as lists of sentences; texts: documents that did not.
        """
        config = self.config.sentences
        given = {"split_by": config.split_by} if config.split_by is not None else {}
        if lists and not texts:
            limit = {"max_characters": config.max_characters} if config.cut_lists else {}
            return {"splitter": "none", "language": config.language, **given, **limit}
        by_document = {} if self.config.source.languages is None else {"language": BY_DOCUMENT}
        return {**self.splitter.settings(), **by_document, **given}

    def read(self, unit: WorkUnit) -> list[SplitDocument]:
        """The documents of a unit in order; none if the source has ended. Raises InputError."""
        documents: list[SplitDocument] = []
        ids: set[str] = set()
        for number, document in enumerate(self.source.documents(unit.start, unit.stop), start=unit.start):
            sentences: list[str] = []
            given, refused, problem = None, document.refused, document.problem
            if refused is None and document.id in ids:
                refused = "duplicate_id"
            if refused is None:
                try:
                    sentences, given, refused = self._split(document)
                except (InputError, MemoryError):
                    raise
                except Exception as error:  # of a pipeline's tokenizer, for example, which has limits of its own
                    refused = UNREADABLE
                    problem = f"{document.source}: {document.id}: cannot be split into sentences: {first_line(error)}"
            if refused is None:
                ids.add(document.id)
            split = "" if refused is not None else split_of(document.split_key, self.config.validation)
            sentences = sentences if refused is None else []
            documents.append(
                SplitDocument(
                    number,
                    document.id,
                    document.source,
                    sentences,
                    refused,
                    given,
                    problem,
                    split,
                    document.language,
                    isinstance(document.text, list),
                    document.group,
                )
            )
        return documents

    def _split(self, document: TextDocument) -> tuple[list[str], int | None, str | None]:
        """A document's sentences, the number of those of its source if it is supervised, and why it is refused."""
        sentences = self._sentences(document.text, document.language)
        if document.target is None:
            return sentences, None, self._refused(sentences)
        target = self._sentences(document.target, document.language)
        suffix = [] if self.config.source_suffix is None else [self.config.source_suffix]
        refused = "empty" if not (sentences and target) else self._refused([*sentences, *target])
        return [*sentences, *suffix, *target], len(sentences) + len(suffix), refused

    def _sentences(self, text: str | list[str], language: str | None) -> list[str]:
        """The sentences of a text, or a list of them unchanged unless they are to be cut."""
        config = self.config.sentences
        if isinstance(text, list):
            return [piece for one in text for piece in cut(one, config.max_characters)] if config.cut_lists else text
        return self.splitter_of(language).split(text) if text.strip() else []

    def _refused(self, sentences: list[str]) -> str | None:
        """Why a document with these sentences is refused."""
        if not sentences:
            return "empty"
        if len(sentences) < self.config.min_sentences:
            return "too_few_sentences"
        if self.config.max_sentences is not None and len(sentences) > self.config.max_sentences:
            return "too_many_sentences"
        return None


class Readers:
    """Reads units ahead, in `split_workers` processes, or in a thread if that is 0.

    The processes start at once. Before the first `submit` the source's index has to be in the output. Construct it in a
    thread that lasts: the processes end with it.
    """

    def __init__(self, config: PrepareConfig) -> None:
        self.ahead = max(1, config.split_workers) + 1  # units that are read at the same time
        self._pool: Executor
        self._tokenize: Tokenizer | None = None  # in this process
        self._thread = ThreadPoolExecutor(1, "lcm-ds-tokenizer")
        self._processes = config.split_workers
        self._language_of_each = config.language_of_each
        self._pickled: Any = None  # a file with the tokenizer that the processes use
        if config.split_workers == 0:
            self._pool = ThreadPoolExecutor(1, "lcm-ds-reader")
            self._in_thread = cache(partial(open_reader, config))
            return
        context = multiprocessing.get_context("spawn")
        arguments = (config.model_dump(mode="json"), os.getpid())
        self._pool = ProcessPoolExecutor(config.split_workers, context, initializer=_initialize, initargs=arguments)
        with _new_processes():
            for _ in range(config.split_workers):
                self._pool.submit(_splitter)

    def start(self, encoder: Encoder) -> None:
        """Tokenize for this encoder: in the processes if they can take its `batch_tokenizer`, otherwise in a thread.

        Called once.
        """
        pickled = portable(getattr(encoder, "batch_tokenizer", None)) if self._processes else None
        if pickled is None:
            self._tokenize = encoder.tokenize
            return
        self._pickled = tempfile.NamedTemporaryFile(prefix="lcm-ds-tokenizer-")  # noqa: SIM115
        self._pickled.write(pickled)
        self._pickled.flush()

    def submit(self, unit: WorkUnit) -> Future[TokenizedUnit]:
        """Read, split and tokenize a unit; it has no documents if the source has ended."""
        if isinstance(self._pool, ThreadPoolExecutor):
            each = self._language_of_each
            found = self._pool.submit(lambda: distinct(unit, self._in_thread().read(unit), each))
        else:
            found = self._pool.submit(_read, unit, None if self._pickled is None else self._pickled.name)
        if self._tokenize is None:
            return found
        return self._thread.submit(lambda: tokenized(found.result(), self._tokenize))

    def close(self) -> None:
        """End the processes; units that they have not started are dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._thread.shutdown(wait=True)
        if self._pickled is not None:
            self._pickled.close()


def portable(tokenizer: Tokenizer | None) -> bytes | None:
    """A tokenizer pickled for another process; None if that is impossible: the main module is not imported there."""
    if tokenizer is None:
        return None
    buffer = io.BytesIO()
    try:
        _PortablePickler(buffer).dump(tokenizer)
    except Exception:  # any, of any object inside
        return None
    return buffer.getvalue()


class _PortablePickler(pickle.Pickler):
    """Refuses whatever the main module defines."""

    def reducer_override(self, value: Any) -> Any:
        for kind in (value, type(value)):
            if getattr(kind, "__module__", None) == "__main__":
                raise pickle.PicklingError(f"{kind!r} is of the main module")
        return NotImplemented


@contextmanager
def _new_processes() -> Iterator[None]:
    """In this context new processes do not import the main module, which may be a script that calls `prepare`.

    Ctrl-C is blocked in them, too: it would print a traceback until `_initialize` has them ignore it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sys.modules["__main__"] = main


_config: PrepareConfig  # in the processes of Readers


def _initialize(mapping: dict[str, Any], parent: int) -> None:
    global _config
    set_parent_death_signal(parent=parent)()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are what is parallel
    _config = PrepareConfig(**mapping)


@cache
def _splitter() -> Splitter:
    return Splitter(_config.sentences)


@cache
def _reader() -> Reader:
    return open_reader(_config, _splitter)


@cache
def _tokenizer(pickled: str) -> Tokenizer:
    tokenizer: Tokenizer = pickle.loads(Path(pickled).read_bytes())
    return tokenizer


def _read(unit: WorkUnit, pickled: str | None) -> TokenizedUnit:
    found = distinct(unit, _reader().read(unit), _config.language_of_each)
    return tokenized(found, None if pickled is None else _tokenizer(pickled))


def distinct(unit: WorkUnit, documents: list[SplitDocument], language_of_each: bool = False) -> TokenizedUnit:
    """A unit with its distinct sentences, not tokenized.

    language_of_each: the same sentence in another language is another one.
    """
    row_of: dict[tuple[str, str | None], int] = {}
    rows = [
        row_of.setdefault((sentence, document.language if language_of_each else None), len(row_of))
        for document in documents
        for sentence in document.sentences
    ]
    languages = [str(language) for _, language in row_of] if language_of_each else None
    return TokenizedUnit(unit, documents, [text for text, _ in row_of], np.array(rows, np.int32), [], languages)


def tokenized(unit: TokenizedUnit, tokenize: Tokenizer | None) -> TokenizedUnit:
    """The unit with its batches; None leaves that to the process that encodes."""
    if tokenize is None:
        return unit
    try:
        languages = unit.languages
        batches = tokenize(unit.sentences) if languages is None else tokenize(unit.sentences, languages)
    except Exception:  # because of some sentence, which shows when they are encoded one by one
        batches = [TokenBatch(range(len(unit.sentences)), {}, 0, 0)]
    return replace(unit, batches=batches)


def open_reader(config: PrepareConfig, make_splitter: Callable[[], Splitter] | None = None) -> Reader:
    """The reader of a preparation that has started: rank 0 has written the source's index to its output."""
    index = json.loads((Path(config.output) / SOURCE).read_text(encoding="utf-8"))
    return Reader(config, open_source(config.source, config.sentences.language, index), make_splitter)
