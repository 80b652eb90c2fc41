"""Fixtures that every area shares."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from machine import patience

from lcm_ds.data.format import DatasetInfo, EndOfText, Supervised, commit, finish, write_normalizer
from lcm_ds.data.normalizer import fit
from lcm_ds.data.writer import Document, write_shard

# The same examples on every machine, however slow it is.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

# Imported by a test, openvino sends no event (lcm_ds/encoders/openvino.py).
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

pytest_plugins = ["shared_fixtures"]

END_OF_TEXT = "End of text."


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """pytest-timeout's limits are those of a quiet reference machine, too, unless --timeout names one."""
    marker = item.get_closest_marker("timeout")
    if item.config.getoption("timeout", None) is None:
        limit = marker.args[0] if marker else float(item.config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patience(limit)), append=False)
    return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: whoever is left without a file at the end waits for a short one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def synthetic_dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes finished datasets of random but learnable concepts; the same call gives the same folder: do not change it.

    synthetic_dataset(documents=40, embed_dim=16, documents_per_shard=10, seed=0, dtype="float16",
    lengths=(2, 30), given=None) -> the dataset's folder. Documents have `lengths` concepts, both ends and the
    end-of-text included; given: so many of them are the source of a supervised document.
    """

    @cache
    def make(
        documents: int = 40,
        embed_dim: int = 16,
        documents_per_shard: int = 10,
        seed: int = 0,
        dtype: str = "float16",
        lengths: tuple[int, int] = (2, 30),
        given: int | None = None,
    ) -> Path:
        folder = tmp_path_factory.mktemp("dataset")
        made = [replace(each, given=given) for each in synthetic_documents(documents, embed_dim, seed, lengths)]
        for shard, first in enumerate(range(0, documents, documents_per_shard)):
            some = made[first : first + documents_per_shard]
            commit(folder, write_shard(folder, f"shard-{shard:05d}.tar", some, dtype))
        write_normalizer(folder, *synthetic_normalizer(embed_dim), {})
        end = EndOfText(text=END_OF_TEXT, vector=made[0].concepts[-1].tolist())
        encoder = {"name": "synthetic", "model": f"rotation-{embed_dim}", "revision": None}
        supervised = None if given is None else Supervised()
        info = DatasetInfo(encoder=encoder, embed_dim=embed_dim, dtype=dtype, end_of_text=end, supervised=supervised)
        finish(folder, info)
        return folder

    return make


@cache
def synthetic_normalizer(embed_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the language, and so of all its datasets: those of a run have to have one normaliser."""
    return fit(np.concatenate([document.concepts for document in synthetic_documents(300, embed_dim, 0, (2, 30))]))


def synthetic_documents(documents: int, embed_dim: int, seed: int, lengths: tuple[int, int]) -> list[Document]:
    """Documents whose next concept is the last one turned by a fixed rotation, plus noise of a third of its size.

    The rotation and the end-of-text depend on embed_dim alone: datasets of other seeds hold other documents of the
    same language, so that one can be trained on and another validate.
    """
    language = np.random.default_rng(embed_dim)
    rotation, _ = np.linalg.qr(language.normal(size=(embed_dim, embed_dim)))
    offset, end = language.normal(size=(2, embed_dim)) * 0.02
    random = np.random.default_rng(seed)
    made = []
    for number in range(documents):
        n = int(random.integers(lengths[0], lengths[1] + 1))
        state = random.normal(size=embed_dim)
        states = []
        for _ in range(n - 1):
            states.append(state)
            state = 0.95 * rotation @ state + 0.3 * random.normal(size=embed_dim)
        concepts = np.stack([*(offset + 0.05 * s for s in states), end]).astype(np.float32)
        sentences = [f"Sentence {i} of text {number}." for i in range(n - 1)] + [END_OF_TEXT]
        made.append(Document(f"{number:08d}", f"text-{seed}-{number}", "synthetic", sentences, concepts))
    return made
