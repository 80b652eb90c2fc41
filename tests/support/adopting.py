"""Documents of sentences with concepts, and tables of them as other programs write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lcm_ds.data.format import open_dataset
from lcm_ds.data.shard import open_shard

DIM = 8
CONCEPT = pa.list_(pa.float32(), DIM)


class Made:
    """`count` documents of 1 to 6 sentences: ids, sentences, and concepts float32 [n, DIM] that float16 holds."""

    def __init__(self, count: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        lengths = random.integers(1, 7, count)
        self.ids = [f"d{seed}-{number}" for number in range(count)]
        self.sentences = [
            [f"Sentence {i} of {name}." for i in range(n)] for name, n in zip(self.ids, lengths, strict=True)
        ]
        self.concepts = [random.normal(size=(n, DIM)).astype(np.float16).astype(np.float32) for n in lengths]

    def table(self, concepts: Any = None, sentences: Any = None) -> pa.Table:
        """In Meta's columns, of these Arrow types."""
        half = "half" in str(concepts)
        lists = [(each.astype(np.float16) if half else each).tolist() for each in self.concepts]
        return pa.table(
            {
                "id": self.ids,
                "url": ["https://example.org"] * len(self.ids),
                "text": [" ".join(each) for each in self.sentences],
                "text_sentences": pa.array(self.sentences, sentences or pa.list_(pa.string())),
                "text_sentences_sonar_emb": pa.array(lists, concepts or pa.list_(CONCEPT)),
            }
        )


def documents(folder: Path) -> dict[str, tuple[list[str], np.ndarray, dict[str, Any]]]:
    """Sentences, concepts and the JSON of each document of a dataset, by id, in order."""
    dataset = open_dataset(folder)
    found = {}
    for index in range(len(dataset.shards)):
        shard = open_shard(dataset, index)
        for document in range(len(shard)):
            meta = shard.meta(document)
            assert meta["id"] not in found
            found[meta["id"]] = (meta["sentences"], shard.concepts(document), meta)
    return found


def check(folder: Path, made: Made) -> None:
    """Assert that a dataset holds exactly these documents, in their order."""
    found = documents(folder)
    assert list(found) == made.ids
    for name, sentences, concepts in zip(made.ids, made.sentences, made.concepts, strict=True):
        assert found[name][0] == sentences
        np.testing.assert_array_equal(found[name][1], concepts)
