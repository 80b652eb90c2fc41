"""What the tests of datasets share: documents, and datasets that may be damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lcm_ds.data.remote import cache
from lcm_ds.data.writer import Document


@pytest.fixture(autouse=True)
def disk_of_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches keep their shards, however full this machine's disk is."""
    monkeypatch.setattr(cache, "FREE_SHARE", 0.0)


@pytest.fixture
def document() -> Callable[..., Document]:
    """document(key, n, embed_dim=4) -> a document of n random concepts; further keywords replace its fields."""

    def make(key: str, n: int = 3, embed_dim: int = 4, **fields: object) -> Document:
        random = np.random.default_rng(sum(key.encode()) + n)
        values = {
            "key": key,
            "id": f"text/{key}",
            "source": "tests",
            "sentences": [f"Sätze {i} of {key}." for i in range(n)],
            "concepts": random.normal(size=(n, embed_dim)).astype(np.float32),
        }
        return Document(**(values | fields))

    return make


@pytest.fixture
def own_dataset(synthetic_dataset: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a synthetic dataset of 4 shards with 10 documents each, for one test to damage."""
    return Path(shutil.copytree(synthetic_dataset(), tmp_path / "own"))
