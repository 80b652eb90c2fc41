"""Contract 1: shards are plain tars, the same bytes for the same documents, and never half of one."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from lcm_ds.data.shard import Shard
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.errors import InputError
from lcm_ds.files import sha256_of

Make = Callable[..., Document]


def test_webdataset_reads_what_was_written(tmp_path: Path, document: Make) -> None:
    written = [[document(f"{s}-{i}", n=i + 1) for i in range(5)] for s in range(2)]
    names = [write_shard(tmp_path, f"{s}.tar", documents).name for s, documents in enumerate(written)]
    shards = [str(tmp_path / name) for name in names]
    read = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == [d.key for documents in written for d in documents]
    for sample, expected in zip(read, (d for documents in written for d in documents), strict=True):
        assert sample["npy"].dtype == np.float16
        np.testing.assert_array_equal(sample["npy"], expected.concepts.astype(np.float16))
        assert sample["json"] == {"id": expected.id, "source": "tests", "sentences": expected.sentences}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_our_reader_reads_what_was_written(tmp_path: Path, document: Make, dtype: str) -> None:
    documents = [document(f"d{i}", n=i + 1) for i in range(5)]
    info = write_shard(tmp_path, "a.tar", documents, dtype)
    shard = Shard(tmp_path / "a.tar", info, 4, dtype)
    assert shard.keys == [d.key for d in documents]
    assert shard.lengths.tolist() == [1, 2, 3, 4, 5]
    assert (info.documents, info.concepts) == (5, 15)
    assert (info.bytes, info.sha256) == ((tmp_path / "a.tar").stat().st_size, sha256_of(tmp_path / "a.tar"))
    for i, expected in enumerate(documents):
        np.testing.assert_array_equal(shard.concepts(i), expected.concepts.astype(dtype))
        assert shard.meta(i)["sentences"] == expected.sentences


def test_the_same_documents_give_the_same_bytes_at_any_time(tmp_path: Path, document: Make) -> None:
    first = write_shard(tmp_path, "a.tar", [document("x"), document("y")])
    time.sleep(1.1)  # a tar's times are whole seconds
    second = write_shard(tmp_path, "b.tar", [document("x"), document("y")])
    assert first.sha256 == second.sha256
    # Pinned: a unit of the source has to give this shard on any machine, with any version of the libraries.
    fixed = Document("k", "i", "s", ["One.", "Two."], np.array([[0.5, 1.0], [-2.0, 0.25]]))
    assert write_shard(tmp_path, "c.tar", [fixed]).sha256 == FIXED_SHA256


FIXED_SHA256 = "be1c76e7ddca314661fa4da85cd75dd0f73349f48eb1f3d0b26121b2b94e2567"


def test_concepts_are_little_endian_and_need_no_pickle(tmp_path: Path, document: Make) -> None:
    made = document("big")
    write_shard(tmp_path, "a.tar", [document("big", concepts=made.concepts.astype(">f8"))])
    with tarfile.open(tmp_path / "a.tar") as tar:
        data = tar.extractfile("big.npy").read()  # type: ignore[union-attr]
        meta = json.load(tar.extractfile("big.json"))  # type: ignore[arg-type]
    assert b"'<f2'" in data[:80]
    np.testing.assert_array_equal(np.load(io.BytesIO(data), allow_pickle=False), made.concepts.astype(np.float16))
    assert meta["sentences"] == made.sentences


BAD = {
    "a NaN": ({"concepts": np.array([[0, 1], [np.nan, 0]])}, "concept 1 is not finite: 'Two.'"),
    "an infinity": ({"concepts": np.array([[np.inf, 1], [0, 0]])}, "concept 0 is not finite: 'One.'"),
    "too large for fp16": ({"concepts": np.array([[0, 1], [1e5, 0]])}, r"not finite in float16 \(it holds ±100000\)"),
    "one sentence too few": ({"sentences": ["One."]}, "has 1 sentences and 2 concepts"),
    "one dimension": (
        {"concepts": np.zeros(2)},
        r"have to be floats \[n, embed_dim\], n ≥ 1; these are float64 \(2,\)",
    ),
    "no concepts": ({"concepts": np.zeros((0, 2)), "sentences": []}, "n ≥ 1"),
    "integers": ({"concepts": np.zeros((2, 2), int)}, "have to be floats"),
    "another embed_dim": ({"concepts": np.zeros((2, 3))}, "embed_dim is 3, that of the documents before it 2"),
    "a key with a dot": ({"key": "a.b"}, "a key is"),
    "a key with a slash": ({"key": "a/b"}, "a key is"),
    "a key of WebDataset's own": ({"key": "__a"}, "a key is"),
    "a key twice": ({"key": "good"}, "its key is there already"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_document_is_refused_by_name_and_leaves_no_shard(tmp_path: Path, case: str) -> None:
    fields, message = BAD[case]
    good = {"key": "good", "id": "one", "source": "s", "sentences": ["One.", "Two."], "concepts": np.zeros((2, 2))}
    bad = good | {"key": "bad", "id": "id/of/bad"} | fields
    with pytest.raises(InputError, match=message) as caught:
        write_shard(tmp_path, "a.tar", [Document(**good), Document(**bad)])
    assert f"{tmp_path / 'a.tar'}: document {bad['key']} (id/of/bad)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path: Path, document: Make) -> None:
    def documents() -> Iterator[Document]:
        for i in range(3):
            (only,) = tmp_path.iterdir()
            assert only.name.startswith("a.tar.")
            assert only.name.endswith(".partial")
            yield document(f"d{i}")

    write_shard(tmp_path, "a.tar", documents())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.record"]
