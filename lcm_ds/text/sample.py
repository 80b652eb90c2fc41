"""The source `sample`: chapters of public-domain books that come with lcm-ds (sample_text/README.md lists them)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lcm_ds.config import SourceConfig
from lcm_ds.files import sha256_of
from lcm_ds.text.huggingface import HuggingFaceSource
from lcm_ds.text.parquet import open_parquet

BOOKS = Path(__file__).with_name("sample_text") / "books.parquet"


class SampleSource(HuggingFaceSource):
    """The shipped parquet file, read as any other; the same documents on every machine.

    The order is by a hash of the text, so that the first documents are a fair sample of all books.
    """

    def __init__(self, config: SourceConfig) -> None:
        self._limits = config.model_dump(include={"skip", "take", "take_sentences"}, exclude_defaults=True)
        take = config.take
        if config.take_sentences is not None:
            available = max(0, _documents_with(config.take_sentences) - config.skip)
            take = available if take is None else min(take, available)
        columns = {"text_column": "text", "id_column": "id"}
        super().__init__(config.model_copy(update={"paths": [str(BOOKS)], "take": take, **columns}))

    def describe(self) -> dict[str, Any]:
        """The file's checksum and the limits, for dataset.json."""
        return {"name": "sample", "sha256": sha256_of(BOOKS), **self._limits}


def _documents_with(sentences: int) -> int:
    """The number of documents, from the first on, that together have at least `sentences`; all if there are too few."""
    documents = 0
    for count in open_parquet(str(BOOKS), BOOKS.name).read(columns=["sentences"])["sentences"].to_pylist():
        if sentences <= 0:
            break
        documents, sentences = documents + 1, sentences - count
    return documents
