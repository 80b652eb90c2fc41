"""`lcm-ds index`: tars made elsewhere become a dataset that trains like ours, and stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from lcm_ds.data.format import open_dataset, read_normalizer
from lcm_ds.data.index import index
from lcm_ds.data.loader import Loader, trace
from lcm_ds.data.normalizer import fit
from lcm_ds.data.plan import Plan, Source
from lcm_ds.data.reader import open_shard, open_shard_once, verify
from lcm_ds.errors import InputError
from lcm_ds.files import sha256_of

Foreign = Callable[..., list[np.ndarray]]


@pytest.fixture
def foreign() -> Foreign:
    """Writes a tar the way others do, and returns its documents."""

    def make(path: Path, documents: int = 6, embed_dim: int = 5, dtype: str = "float32") -> list[np.ndarray]:
        random = np.random.default_rng(len(path.name) + documents)
        made = [random.normal(size=(int(random.integers(1, 20)), embed_dim)).astype(dtype) for _ in range(documents)]
        with webdataset.TarWriter(str(path)) as tar:
            for number, concepts in enumerate(made):
                tar.write({"__key__": f"docs/{number:04d}", "npy": concepts, "url.txt": "https://example.org"})
        return made

    return make


def test_foreign_tars_become_a_dataset_and_stay_as_they_are(tmp_path: Path, foreign: Foreign) -> None:
    documents = [d for n in range(3) for d in foreign(tmp_path / f"part-{n:02d}.tar", documents=n + 4)]
    before = [sha256_of(path) for path in sorted(tmp_path.glob("*.tar"))]
    index(str(tmp_path / "part-{00..02}.tar"), tmp_path / "out", encoder={"name": "theirs"})
    assert [sha256_of(path) for path in sorted(tmp_path.glob("*.tar"))] == before
    dataset = open_dataset(tmp_path / "out")
    assert list(chain(*verify(dataset))) == []
    assert (dataset.embed_dim, dataset.info.dtype, dataset.info.encoder) == (5, "float32", {"name": "theirs"})
    assert dataset.info.totals.documents == 15
    assert dataset.info.totals.concepts == sum(map(len, documents))
    for found, expected in zip(read_normalizer(tmp_path / "out"), fit(np.concatenate(documents)), strict=True):
        np.testing.assert_array_equal(found, expected)

    plan = Plan([Source([shard.concepts for shard in dataset.shards])], 0, 2, 8, epochs=1)
    batches = list(Loader([dataset], plan, 128, 0, 1, 2))
    read = np.concatenate([b.concepts[b.segment_ids >= 0].numpy() for b in batches])
    stored = np.concatenate(documents)
    np.testing.assert_array_equal(np.sort(read, axis=0), np.sort(stored, axis=0))
    line = trace([dataset], plan, 128, 0)[0]
    assert (line.key, line.id, line.words) == (line.key, line.key, "")


def test_tars_in_the_datasets_own_folder_move_with_it(tmp_path: Path, foreign: Foreign) -> None:
    (tmp_path / "mine").mkdir()
    foreign(tmp_path / "mine" / "a.tar")
    index(str(tmp_path / "mine" / "a.tar"), tmp_path / "mine")
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert list(chain(*verify(open_dataset(tmp_path / "moved")))) == []


def test_tars_elsewhere_are_adopted_where_they_are(tmp_path: Path, foreign: Foreign) -> None:
    (tmp_path / "made").mkdir()
    for name in ("a.tar", "b.tar"):
        foreign(tmp_path / "made" / name)
    fsspec.filesystem("memory").put(str(tmp_path / "made"), "memory://foreign", recursive=True)
    index("memory://foreign/{a,b}.tar", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset.json",
        "normalizer.safetensors",
        "shards.jsonl",
    ]
    dataset = open_dataset(tmp_path / "out", tmp_path / "cache")
    assert [shard.name for shard in dataset.shards] == ["memory://foreign/a.tar", "memory://foreign/b.tar"]
    assert list(chain(*verify(dataset))) == []
    kept = tmp_path / "cache"
    assert list(kept.iterdir()) == []  # verifying keeps nothing of what it fetched
    once = open_shard_once(dataset, 0)
    assert list(kept.iterdir()) == []
    assert np.array_equal(once.concepts(2), open_shard(dataset, 0).concepts(2))


def test_every_tar_that_cannot_be_adopted_is_named(tmp_path: Path, foreign: Foreign) -> None:
    foreign(tmp_path / "0.tar")
    foreign(tmp_path / "1.tar", embed_dim=6)
    foreign(tmp_path / "2.tar", dtype="float16")
    with webdataset.TarWriter(str(tmp_path / "3.tar")) as tar:
        tar.write({"__key__": "bad", "npy": np.full((2, 5), np.nan, np.float32)})
    (tmp_path / "4.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:1024])
    with pytest.raises(InputError) as caught:
        index(str(tmp_path / "{0..4}.tar"), tmp_path / "out")
    lines = caught.value.mistakes
    assert len(lines) == 4
    for line, text in zip(
        lines,
        (
            "1.tar: docs/0000.npy: has embed_dim 6, its dataset 5",
            "2.tar: docs/0000.npy: is float16, its dataset is float32",
            "3.tar: bad: has a concept that is not finite",
            "4.tar: is cut off",
        ),
        strict=True,
    ):
        assert line.startswith(f"{tmp_path}/{text}")
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("array", [np.zeros((2, 5), np.int64), np.zeros((2, 5)), np.zeros((2, 0), np.float32)])
def test_concepts_are_fp16_or_fp32(tmp_path: Path, array: np.ndarray) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "x", "npy": array})
    with pytest.raises(InputError, match=r"a\.tar: holds .* concepts are fp16 or fp32"):
        index(str(tmp_path / "a.tar"), tmp_path / "out")


def test_bad_calls_are_refused(tmp_path: Path, foreign: Foreign) -> None:
    foreign(tmp_path / "0.tar")
    with pytest.raises(InputError) as caught:
        index(str(tmp_path / "{0..2}.tar"), tmp_path / "out")
    assert caught.value.mistakes == [f"{tmp_path}/{n}.tar: no such file" for n in (1, 2)]
    for shards in (f"pipe:touch {tmp_path}/ran", f"{tmp_path}/0.tar::pipe:touch {tmp_path}/ran"):
        with pytest.raises(InputError, match="pipe: runs a shell command and is refused"):
            index(shards, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    webdataset.TarWriter(str(tmp_path / "empty.tar")).close()
    with pytest.raises(InputError, match="hold no documents"):
        index(str(tmp_path / "empty.tar"), tmp_path / "out")
    index(str(tmp_path / "0.tar"), tmp_path / "out")
    with pytest.raises(InputError, match="is a dataset already"):
        index(str(tmp_path / "0.tar"), tmp_path / "out")
