"""Sources of text: documents in an order that never changes, and any range of them on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from lcm_ds.config import SourceConfig


@dataclass(frozen=True)
class TextDocument:
    """One document as its source gives it; a text may be empty, and nothing checks that an id occurs once."""

    id: str
    source: str
    text: str | list[str]  # a list: of sentences, which are taken as they are
    refused: str | None = None  # why the source itself leaves it out; its text is not given then
    target: str | list[str] | None = None  # of a supervised document: what follows `text` and is to be learned
    problem: str | None = None  # what is wrong with a row that cannot be read, and where it is
    named: bool = True  # whether the id is its own; else it says where the document was found

    @property
    def split_key(self) -> str:
        """What decides the split: the id, or the text if there is none: paths are spelt otherwise on the next machine.

        Of a supervised document, the source. Texts that differ in whitespace only have the same key.
        """
        if self.named:
            return self.id
        return " ".join((self.text if isinstance(self.text, str) else " ".join(self.text)).split())


UNREADABLE = "unreadable"  # a document's `refused` where it has a `problem`


class Source(Protocol):
    """Documents in a stable order, numbered from 0.

    `documents(start, stop)` gives a range of them, so that each of many processes can make the part of a dataset that
    is its own; the ranges of `units` are those that are read without reading what belongs to others.
    """

    @property
    def total(self) -> int | None:
        """How many documents there are; None where only reading all would tell."""

    @property
    def characters(self) -> int | None:
        """About how many characters all documents have together; None where that is not known."""

    def units(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges (start, stop) of about `size` documents, in order, which together are the whole source.

        Without end where the total is not known: the first range without documents is behind the last document.
        """

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[TextDocument]:
        """Documents number `start` up to, not including, `stop`; fewer or none where the source ends before.

        A row that cannot be read is a refused document. Raises InputError where the source cannot be read.
        """

    def describe(self) -> dict[str, Any]:
        """What the documents were taken from, for dataset.json."""

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file that the documents are in."""

    def index(self) -> dict[str, Any]:
        """What was found out by looking at the source, for `open_source` in other processes; JSON holds it."""


def window(config: SourceConfig, start: int, stop: int | None) -> tuple[int, int | None]:
    """The rows of the whole source that documents `start` to `stop` are, once `skip` and `take` have had their say."""
    ends = [end for end in (stop, config.take) if end is not None]
    return config.skip + start, config.skip + min(ends) if ends else None


def even_units(total: int | None, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of `size` documents."""
    start = 0
    while total is None or start < total:
        yield start, start + size if total is None else min(start + size, total)
        start += size
