"""A dataset in Meta's columns is the same dataset when it is adopted again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adopting import DIM, Made, documents
from preparing import HashEncoder

from lcm_ds.cli import main
from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import open_dataset
from lcm_ds.errors import InputError
from lcm_ds.prepare.pipeline import prepare

ABOUT = {"encoder", "language", "splitter", "end_of_text", "supervised", "quantization", "embed_dim", "dtype"}


def prepared(folder: Path, dtype: str = "float16", supervised: bool = False) -> Path:
    """Texts, prepared: the training split."""
    texts = {"text": "One more day. It is day {}. It ends.", "q": "What is {}? Tell.", "a": "It is {}. Yes."}
    rows = [{"id": f"t{n}", **{key: text.format(n) for key, text in texts.items()}} for n in range(40)]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"source_column": "q", "target_column": "a"} if supervised else {}
    config = PrepareConfig(
        output=str(folder / "prepared"),
        source={"name": "huggingface", "paths": [str(folder / "lines.jsonl")], **columns},
        encoder={"name": "sonar", "model": "hash"},
        dtype=dtype,
        documents_per_shard=7,
        split_workers=0,
        processes=1,
        validation=0,
    )
    prepare(config, HashEncoder())
    return folder / "prepared/train"


@pytest.mark.parametrize("supervised", [False, True], ids=["plain", "supervised"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_a_dataset_exported_and_adopted_is_the_same(adopt, tmp_path, dtype, supervised):
    before = prepared(tmp_path, dtype, supervised)
    assert main(["export-data", str(before), str(tmp_path / "data.parquet")]) == 0
    after = adopt(tmp_path / "data.parquet", f"dtype={dtype}") / "train"
    infos = [open_dataset(path).info.model_dump(include=ABOUT) for path in (before, after)]
    assert infos[0] == infos[1]
    old, new = documents(before), documents(after)
    assert list(old) == list(new)
    for (sentences, concepts, meta), (sentences_again, concepts_again, meta_again) in zip(
        old.values(), new.values(), strict=True
    ):
        assert sentences == sentences_again
        assert meta == meta_again
        np.testing.assert_array_equal(concepts, concepts_again)


@pytest.mark.parametrize("supervised", [False, True], ids=["plain", "supervised"])
def test_the_columns_are_metas_without_what_its_loader_adds(tmp_path, supervised):
    before = prepared(tmp_path, supervised=supervised)
    main(["export-data", str(before), str(tmp_path / "data.parquet")])
    table = pq.read_table(tmp_path / "data.parquet")
    names = ["prompt_sentences", "answer_sentences"] if supervised else ["text_sentences"]
    assert table.column_names == ["id", "source", *(f"{name}{end}" for name in names for end in ("", "_sonar_emb"))]
    for name in names:
        kind = table.schema.field(f"{name}_sonar_emb").type
        assert str(kind) == f"list<element: fixed_size_list<element: float>[{DIM}]>"
        for sentences, concepts in zip(table[name].to_pylist(), table[f"{name}_sonar_emb"].to_pylist(), strict=True):
            expected = [HashEncoder().concept(sentence).astype(np.float16) for sentence in sentences]
            np.testing.assert_array_equal(concepts, expected)
            assert not {"End of text.", "[MODEL]:"}.intersection(sentences)


def test_columns_of_metas_that_are_adopted_and_exported_are_the_same(adopt, tmp_path):
    table = Made(50).table()
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=11)
    main(["export-data", str(adopt(tmp_path / "a.parquet") / "train"), str(tmp_path / "b.parquet")])
    again = pq.read_table(tmp_path / "b.parquet")
    for name in ("id", "text_sentences", "text_sentences_sonar_emb"):
        assert again[name].to_pylist() == table[name].to_pylist()
        assert again.schema.field(name).type == pq.read_schema(tmp_path / "a.parquet").field(name).type


def test_concepts_without_sentences_have_no_such_column(adopt, tmp_path):
    made = Made(9)
    pq.write_table(made.table().drop_columns(["text_sentences"]), tmp_path / "a.parquet")
    before = adopt(tmp_path / "a.parquet") / "train"
    main(["export-data", str(before), str(tmp_path / "b.parquet")])
    assert pq.read_schema(tmp_path / "b.parquet").names == ["id", "source", "text_sentences_sonar_emb"]
    after = documents(adopt(tmp_path / "b.parquet") / "train")
    np.testing.assert_array_equal(after[made.ids[5]][1], made.concepts[5])


def test_row_groups_are_of_bounded_size(adopt, tmp_path, monkeypatch):
    monkeypatch.setattr("lcm_ds.adopt.export.GROUP_BYTES", 4 * DIM * 20)
    made = Made(60)
    pq.write_table(made.table(), tmp_path / "a.parquet")
    main(["export-data", str(adopt(tmp_path / "a.parquet") / "train"), str(tmp_path / "b.parquet")])
    groups = [pq.ParquetFile(tmp_path / "b.parquet").read_row_group(index) for index in range(9)]
    assert all(sum(map(len, group["text_sentences"].to_pylist())) <= 20 for group in groups)
    assert pq.read_table(tmp_path / "b.parquet")["id"].to_pylist() == made.ids


def test_an_output_that_is_there_or_cannot_be_is_refused(adopt, tmp_path, capsys):
    pq.write_table(Made(5).table(), tmp_path / "a.parquet")
    dataset = str(adopt(tmp_path / "a.parquet") / "train")
    for output, message in (("a.parquet", "is there already"), ("no/b.parquet", "has to be a file in a folder")):
        assert main(["export-data", dataset, str(tmp_path / output)]) == 2
        assert message in capsys.readouterr().err
    assert main(["export-data", str(tmp_path), str(tmp_path / "b.parquet")]) == 2
    assert not (tmp_path / "b.parquet").exists()


def test_documents_of_which_some_have_sentences_are_refused(tmp_path):
    from lcm_ds.adopt.export import export_data
    from lcm_ds.data.format import DatasetInfo, commit, finish, write_normalizer
    from lcm_ds.data.writer import Document, write_shard

    some = [Document("a", "a", "s", ["A."], np.ones((1, 2))), Document("b", "b", "s", None, np.ones((1, 2)))]
    commit(tmp_path, write_shard(tmp_path, "0.tar", some))
    write_normalizer(tmp_path, np.zeros(2), np.ones(2), {})
    finish(tmp_path, DatasetInfo(encoder={"name": "unknown"}, embed_dim=2, dtype="float16"))
    with pytest.raises(InputError, match=r"0.tar: b: has 0 sentences, unlike others"):
        export_data(tmp_path, tmp_path / "b.parquet")
    assert not list(tmp_path.glob("b.parquet*"))


def test_groups_are_kept(adopt, tmp_path):
    made = Made(20)
    pq.write_table(
        made.table().append_column("book", pa.array([f"b{n % 4}" for n in range(20)])), tmp_path / "a.parquet"
    )
    before = adopt(tmp_path / "a.parquet", "source.group_column=book") / "train"
    assert main(["export-data", str(before), str(tmp_path / "data.parquet")]) == 0
    after = adopt(tmp_path / "data.parquet") / "train"
    assert open_dataset(after).has_groups
    assert [meta for _, _, meta in documents(before).values()] == [meta for _, _, meta in documents(after).values()]
    assert {meta["group"] for _, _, meta in documents(after).values()} == {"b0", "b1", "b2", "b3"}
