"""Sources of text: documents in an order that never changes, and any range of them on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from lcm_ds.config import SentencesConfig, SourceConfig


@dataclass(frozen=True)
class TextDocument:
    """One document as its source gives it; the text may be empty, and nothing checks that an id occurs once."""

    id: str
    source: str
    text: str


class Source(Protocol):
    """Documents in a stable order, numbered from 0.

    `documents(start, stop)` gives a range of them, so that each of many processes can make the part of a dataset that
    is its own. Ranges asked for in rising order cost no more than one pass over the source.
    """

    @property
    def total(self) -> int | None:
        """How many documents there are; None where only reading all would tell."""

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[TextDocument]:
        """Documents number `start` up to, not including, `stop`; fewer or none where the source ends before.

        Raises InputError where the source cannot be read.
        """

    def __iter__(self) -> Iterator[TextDocument]:
        """All documents."""

    def describe(self) -> dict[str, Any]:
        """What the documents were taken from, for dataset.json."""


def window(config: SourceConfig, start: int, stop: int | None) -> tuple[int, int | None]:
    """The rows of the whole source that documents `start` to `stop` are, once `skip` and `take` have had their say."""
    ends = [end for end in (stop, config.take) if end is not None]
    return config.skip + start, config.skip + min(ends) if ends else None


def open_source(config: SourceConfig, sentences: SentencesConfig | None = None) -> Source:
    """The source that a config names.

    `sentences` says how the texts will be split later; the source `sample` needs it to keep any sentence from occurring
    in two documents, the others leave it aside. Raises InputError where files, a dataset or its columns are missing.
    """
    if config.name == "sample":
        from lcm_ds.text.sample import SampleSource
        from lcm_ds.text.sentences import Splitter

        splitter = Splitter(sentences or SentencesConfig())  # type: ignore[call-arg]
        return SampleSource(config, splitter)
    if config.name == "files":
        from lcm_ds.text.files import FilesSource

        return FilesSource(config)
    from lcm_ds.text.huggingface import HuggingFaceSource

    return HuggingFaceSource(config)
