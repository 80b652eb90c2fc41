"""Sources of text: documents in an order that never changes, and any range of them on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lcm_ds.config import SourceConfig


@dataclass(frozen=True)
class TextDocument:
    """A document as its source yields it; the text may be empty, and ids are not checked for duplicates."""

    id: str
    source: str
    text: str | list[str]  # a list: of sentences, which are taken as they are
    refused: str | None = None  # why the source itself refuses it; its text is empty then
    target: str | list[str] | None = None  # of a supervised document: what follows `text` and is learned
    problem: str | None = None  # of a row that cannot be read: what is wrong with it, with file and row
    language: str | None = None  # its code of SONAR, if the source has several languages
    named: bool = True  # whether the id is the document's own; otherwise it is made of file and row
    group: str | None = None  # what it shares with other documents, which are on the same side of the split

    @property
    def split_key(self) -> str:
        """What decides the split: the group, else the id, else the text (of a supervised document, the source).

        Not the path, which may be spelt differently on another machine. Texts that differ only in whitespace have the
        same key.
        """
        if self.group is not None:
            return self.group
        if self.named:
            return self.id
        return " ".join((self.text if isinstance(self.text, str) else " ".join(self.text)).split())


UNREADABLE = "unreadable"  # `refused` of a document with a `problem`
FILTERED = "filtered"  # by source.filter
Row = TypeVar("Row")


class Sequential(Generic[Row]):
    """Rows that can only be read from the first one on: a later range continues where the last one ended.

    So a process that reads ranges in their order reads a file once. start: opens the rows.
    """

    def __init__(self, start: Callable[[], Iterator[Row]]) -> None:
        self._start = start
        self._kept: tuple[Iterator[Row], int] | None = None  # rows, and the number of the next one

    def read(self, first: int, last: int) -> Iterator[tuple[int, Row]]:
        """Rows `first` up to, not including, `last`, with their numbers; fewer or none if they end before."""
        if first >= last:
            return
        kept, self._kept = self._kept, None  # taken, for as long as it is read from
        rows, at = kept if kept is not None and kept[1] <= first else (self._start(), 0)
        for row in rows:
            at += 1
            if at == last:
                self._kept = rows, at
            if at > first:
                yield at - 1, row
            if at == last:
                return


class Source(Protocol):
    """Documents in a stable order, numbered from 0.

    `documents(start, stop)` yields a range of them, so that many processes can share a source; a range of `units` is
    read without reading the others.
    """

    @property
    def total(self) -> int | None:
        """The number of documents; None if it is only known after reading all."""

    @property
    def characters(self) -> int | None:
        """The approximate number of characters of all documents; None if unknown."""

    def units(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges (start, stop) of about `size` documents, in order, which together cover the source.

        Endless if the total is not known: the first range without documents is behind the last document.
        """

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[TextDocument]:
        """Documents `start` up to, not including, `stop`; fewer or none if the source ends before.

        A row that cannot be read is a refused document. Raises InputError if the source cannot be read.
        """

    def describe(self) -> dict[str, Any]:
        """Where the documents are from, for dataset.json."""

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file that the documents are in."""

    def index(self) -> dict[str, Any]:
        """The result of inspecting the source, as JSON, for `open_source` in other processes."""


def window(config: SourceConfig, start: int, stop: int | None) -> tuple[int, int | None]:
    """The rows of the source behind documents `start` to `stop`, which `skip` and `take` have shifted and limited."""
    ends = [end for end in (stop, config.take) if end is not None]
    return config.skip + start, config.skip + min(ends) if ends else None


def even_units(total: int | None, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of `size` documents."""
    start = 0
    while total is None or start < total:
        yield start, start + size if total is None else min(start + size, total)
        start += size
