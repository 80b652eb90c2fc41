"""`lcm-ds index`: tars made elsewhere become a dataset that trains like ours, and stay as they are."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset

from lcm_ds.cli import main
from lcm_ds.data.batch import Batch
from lcm_ds.data.format import open_dataset, read_normalizer
from lcm_ds.data.loader import Loader
from lcm_ds.data.normalizer import fit
from lcm_ds.data.plan import Plan
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.shard import open_shard, open_shard_once, verify
from lcm_ds.data.supervised import source_of
from lcm_ds.data.tools.index import index
from lcm_ds.data.trace import trace
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

    plan = Plan([source_of(dataset, 8, 128)], 0, 2, 8, epochs=1)
    batches = list(Loader([dataset], plan, 0, 1, 2))
    read = np.concatenate([b.concepts[b.segment_ids >= 0].numpy() for b in batches])
    stored = np.concatenate(documents)
    np.testing.assert_array_equal(np.sort(read, axis=0), np.sort(stored, axis=0))
    ((step, lines),) = trace([dataset], plan, range(2, 3))
    assert step == 2
    assert (lines[0].id, lines[0].sentences) == (lines[0].key, ())


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
        "documents.idx",
        "normalizer.safetensors",
        "shards.jsonl",
    ]
    dataset = open_dataset(tmp_path / "out", Cache(str(tmp_path / "cache")))
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
    lines = caught.value.errors
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
    assert caught.value.errors == [f"{tmp_path}/{n}.tar: no such file" for n in (1, 2)]
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


# --- what others keep otherwise ---


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with webdataset.TarWriter(str(path)) as tar:
        for key, members in samples.items():
            tar.write({"__key__": key, **members})


def test_bf16_in_uint16_is_read_as_fp32(tmp_path: Path) -> None:
    values = torch.randn(40, 6).to(torch.bfloat16)
    stored = values.view(torch.int16).numpy().view(np.uint16)
    write(tmp_path / "a.tar", {"x": {"npy": npy(stored[:30])}, "y": {"npy": npy(stored[30:])}})
    with pytest.raises(InputError, match=r"a\.tar: holds uint16 .* --bf16"):
        index(str(tmp_path / "a.tar"), tmp_path / "out")
    index(str(tmp_path / "a.tar"), tmp_path / "out", bf16=True)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.info.dtype == "bfloat16"
    assert list(chain(*verify(dataset))) == []
    np.testing.assert_array_equal(open_shard(dataset, 0).concepts(0, 4, 9), values[4:9].float().numpy())
    plan = Plan([source_of(dataset, 40, 64)], 0, 1, 40, epochs=1)
    loader = Loader([dataset], plan, 0, 1, 1, workers=2)
    (batch,) = loader
    loader.close()
    assert batch.concepts.dtype == torch.float32
    read = torch.cat([batch.concepts[0, :30], batch.concepts[0, 30:]])
    assert torch.equal(read.sum(0), values.float()[read_order(batch)].sum(0))
    center, _ = read_normalizer(tmp_path / "out")
    np.testing.assert_array_equal(center, np.median(values.float().numpy(), axis=0))


def read_order(batch: Batch) -> list[int]:
    """Positions among x's 30 and y's 10 concepts, in the order of the batch."""
    first = int((batch.segment_ids[0] == 0).sum())
    return list(range(40)) if first == 30 else [*range(30, 40), *range(30)]


@pytest.mark.parametrize("texts", ["json:texts", "sents.txt"])
def test_concepts_and_texts_are_taken_from_where_the_call_says(tmp_path: Path, texts: str) -> None:
    concepts = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float16)
    lines = [f"Sätze {number}." for number in range(5)]
    text = {"json": json.dumps({"id": 7, "texts": lines}).encode()}
    if texts == "sents.txt":
        text = {"json": b'{"id": 7}', "sents.txt": "\n".join(lines).encode() + b"\n"}
    pickled = {"npy": b"not for us", "meta.pkl": pickle.dumps({"a": 1})}
    write(tmp_path / "a.tar", {"k": {"Emb.npy": npy(concepts), **text, **pickled}})
    index(str(tmp_path / "a.tar"), tmp_path / "out", extension="Emb.npy", texts=texts)
    shard = open_shard(open_dataset(tmp_path / "out"), 0)
    np.testing.assert_array_equal(shard.concepts(0), concepts)
    assert (shard.meta(0)["sentences"], shard.meta(0)["id"]) == (lines, 7)
    with pytest.raises(InputError, match=r"a\.tar: k: has a \.json and no \.vec\.npy"):
        index(str(tmp_path / "a.tar"), tmp_path / "other", extension="vec.npy")
    assert not (tmp_path / "other").exists()


def test_texts_have_to_be_as_many_as_concepts(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"k": {"npy": npy(np.eye(3, dtype=np.float16)), "txt": b"One.\nTwo."}})
    with pytest.raises(InputError, match=r"a\.tar: k: has 2 sentences and 3 concepts"):
        index(str(tmp_path / "a.tar"), tmp_path / "out", texts="txt")


def test_pickled_concepts_are_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    write(tmp_path / "a.tar", {"k": {"npy": npy(np.array([[Trap()]], dtype=object))}})
    with pytest.raises(InputError, match=r"a\.tar: k\.npy: holds pickled objects, which are never loaded"):
        index(str(tmp_path / "a.tar"), tmp_path / "out")
    write(tmp_path / "b.tar", {"k": {"pyd": pickle.dumps(Trap())}})
    with pytest.raises(InputError, match=r"b\.tar: k\.pyd: not an \.npy file"):
        index(str(tmp_path / "b.tar"), tmp_path / "out", extension="pyd")
    assert not (tmp_path / "ran").exists()


def test_documents_without_concepts_count_and_read_as_none(tmp_path: Path, foreign: Foreign) -> None:
    made = foreign(tmp_path / "a.tar")
    empty = npy(np.zeros((0, 5), np.float32))
    write(tmp_path / "b.tar", {"e": {"npy": empty}, "f": {"npy": npy(made[0])}, "g": {"npy": empty}})
    write(tmp_path / "c.tar", {"h": {"npy": empty}})
    index(str(tmp_path / "{c,a,b}.tar"), tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert list(chain(*verify(dataset))) == []
    assert [(shard.documents, shard.concepts > 0) for shard in dataset.shards] == [(6, True), (3, True), (1, False)]
    plan = Plan([source_of(dataset, 7, 4)], 3, 2, 7, epochs=3)
    total = sum(batch.real_concepts for batch in Loader([dataset], plan, 0, 1, 2))
    assert total == 3 * (sum(map(len, made)) + len(made[0]))


def test_the_encoder_is_that_of_another_dataset_or_of_the_call(
    tmp_path: Path, foreign: Foreign, synthetic_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ours = synthetic_dataset(documents=20, embed_dim=5)
    foreign(tmp_path / "a.tar")
    assert main(["index", str(tmp_path / "a.tar"), str(tmp_path / "like"), "--like", str(ours)]) == 0
    like, other = open_dataset(tmp_path / "like").info, open_dataset(ours).info
    assert (like.encoder, like.end_of_text) == (other.encoder, other.end_of_text)
    call = ["index", str(tmp_path / "a.tar"), str(tmp_path / "said"), "--encoder", "name=sonar", "model=a/b=c"]
    assert main(call) == 0
    assert open_dataset(tmp_path / "said").info.encoder == {"name": "sonar", "model": "a/b=c"}
    capsys.readouterr()
    assert main([*call[:2], str(tmp_path / "no"), "--like", str(synthetic_dataset())]) == 2
    assert "has embed_dim 5" in capsys.readouterr().err
    assert main([*call[:2], str(tmp_path / "no"), "--encoder", "name=sonar", "model=a/b", "language=germn"]) == 2
    assert capsys.readouterr().err == "--encoder.language: SONAR has no language 'germn'; did you mean 'deu_Latn'?\n"
    assert main([*call[:2], str(tmp_path / "no"), "--encoder", "sonar"]) == 2
    assert capsys.readouterr().err == "--encoder sonar: has to be KEY=VALUE\n"
    assert not (tmp_path / "no").exists()


def test_what_an_unfinished_preparation_left_is_not_written_over(tmp_path: Path, foreign: Foreign) -> None:
    foreign(tmp_path / "a.tar")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shards.jsonl").write_text("a line of hours of work\n")
    with pytest.raises(InputError, match="is a dataset already"):
        index(str(tmp_path / "a.tar"), tmp_path / "out")
    assert (tmp_path / "out" / "shards.jsonl").read_text() == "a line of hours of work\n"


@pytest.mark.parametrize("texts", ["Meta.json:Sätze", "TXT"])
def test_texts_are_found_in_a_json_of_any_extension_in_capitals_or_not(tmp_path: Path, texts: str) -> None:
    lines = [f"Satz {number}." for number in range(3)]
    members = {"Meta.json": json.dumps({"Sätze": lines}).encode(), "txt": "\n".join(lines).encode()}
    write(tmp_path / "a.tar", {"k": {"npy": npy(np.eye(3, dtype=np.float16)), **members}})
    index(str(tmp_path / "a.tar"), tmp_path / "out", texts=texts)
    meta = open_shard(open_dataset(tmp_path / "out"), 0).meta(0)
    assert (meta["id"], meta["sentences"]) == ("k", lines)
    for wrong in ("", ":sentences", "json:"):
        with pytest.raises(InputError, match=r"--texts: .* has to be EXT:FIELD"):
            index(str(tmp_path / "a.tar"), tmp_path / "other", texts=wrong)


def test_a_call_that_cannot_be_met_is_a_line_and_leaves_nothing(
    tmp_path: Path, foreign: Foreign, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(tmp_path / "a.tar")
    (tmp_path / "b.tar").symlink_to(tmp_path / "a.tar")
    for shards, output, said in (
        (f"{tmp_path}/a{{000..2.tar", "out", "cannot be expanded: "),
        (f"{tmp_path}/${{NOT_SET}}.tar", "out", "cannot be expanded: "),
        (f"{tmp_path}/{{a,b}}.tar", "out", f"{tmp_path}/b.tar: is the same file as {tmp_path}/a.tar: name it once"),
        (f"file:{tmp_path}/a.tar", "out", "no such file: a URL has //"),
        (f"{tmp_path}/a.tar", "a.tar/out", "a.tar/out: no such folder can be made: Not a directory"),
    ):
        assert main(["index", shards, str(tmp_path / output)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]
