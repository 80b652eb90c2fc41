"""What is encoded already becomes a dataset, whatever it lies in: each document once, each number as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adopting import CONCEPT, DIM, Made, check, documents

from lcm_ds.adopt.command import adoption_config, is_hub_id
from lcm_ds.cli import main
from lcm_ds.data.format import open_dataset
from lcm_ds.data.shard import verify
from lcm_ds.errors import InputError
from lcm_ds.prepare.pipeline import prepare
from lcm_ds.prepare.state import split_of

CONCEPTS = {
    "Meta's": pa.list_(CONCEPT),
    "half": pa.list_(pa.list_(pa.float16(), DIM)),
    "double": pa.list_(pa.list_(pa.float64())),
    "lists": pa.list_(pa.list_(pa.float32())),
    "lists of half": pa.list_(pa.list_(pa.float16())),
    "large": pa.large_list(pa.large_list(pa.float32())),
    "large, fixed": pa.large_list(CONCEPT),
    "views": pa.list_view(pa.list_view(pa.float32())),
    "large views": pa.large_list_view(pa.large_list_view(pa.float16())),
    "views, fixed": pa.list_view(CONCEPT),
}
SENTENCES = {
    "strings": pa.list_(pa.string()),
    "large": pa.large_list(pa.large_string()),
    "views": pa.list_(pa.string_view()),
    "categories": pa.list_(pa.dictionary(pa.int32(), pa.string())),
    "list views": pa.list_view(pa.string()),
    "large list views": pa.large_list_view(pa.string_view()),
}


@pytest.mark.parametrize("concepts", CONCEPTS.values(), ids=CONCEPTS)
def test_each_arrow_type_of_concepts_is_read(adopt, tmp_path, concepts):
    made = Made(40)
    pq.write_table(made.table(concepts), tmp_path / "a.parquet", row_group_size=7)
    out = adopt(tmp_path / "a.parquet")
    check(out / "train", made)
    info = open_dataset(out / "train").info
    assert (info.embed_dim, info.dtype, info.encoder, info.end_of_text) == (DIM, "float16", {"name": "unknown"}, None)
    assert info.source["largest_error"] == 0
    assert list(chain(*verify(open_dataset(out / "train")))) == []


@pytest.mark.parametrize("sentences", SENTENCES.values(), ids=SENTENCES)
def test_each_arrow_type_of_sentences_is_read(adopt, tmp_path, sentences):
    made = Made(12)
    if "dictionary" in str(sentences):
        table = made.table()
        values = table.column("text_sentences").combine_chunks()
        column = pa.ListArray.from_arrays(values.offsets, values.values.dictionary_encode())
        table = table.set_column(3, "text_sentences", column)
    else:
        table = made.table(sentences=sentences)
    pq.write_table(table, tmp_path / "a.parquet")
    assert pq.read_schema(tmp_path / "a.parquet").field("text_sentences").type.id == sentences.id
    check(adopt(tmp_path / "a.parquet") / "train", made)


def test_views_in_any_order_and_slices_of_them_are_read(adopt, tmp_path):
    """Lists that lie in another order than the rows', share numbers, and have numbers between them."""
    numbers = np.arange(20 * DIM, dtype=np.float32)
    inner = pa.FixedSizeListArray.from_arrays(pa.array(numbers), DIM)
    views = pa.ListViewArray.from_arrays(pa.array([9, 2, 2, 14], pa.int32()), pa.array([3, 0, 4, 1], pa.int32()), inner)
    table = pa.table({"id": ["a", "b", "c", "d"], "e": views})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.slice(1))
    found = documents(adopt(tmp_path / "a.arrow", "max_refused=0.5") / "train")
    assert list(found) == ["c", "d"]
    np.testing.assert_array_equal(found["c"][1], numbers.reshape(20, DIM)[2:6])
    np.testing.assert_array_equal(found["d"][1], numbers.reshape(20, DIM)[14:15])
    lists = pa.array([[[1.0, 2.0], None], [[3.0, 4.0], [5.0, 7.0]], None], pa.list_view(pa.list_view(pa.float32())))
    pq.write_table(pa.table({"id": ["a", "b", "c"], "e": lists}), tmp_path / "b.parquet")
    assert list(documents(adopt(tmp_path / "b.parquet", "max_refused=0.7") / "train")) == ["b"]


def test_lists_of_fixed_length_and_slices_of_tables_are_read(adopt, tmp_path):
    made = Made(9)
    made.concepts = [np.arange(3 * DIM, dtype=np.float32).reshape(3, DIM) + n for n in range(9)]
    made.sentences = [["a", "b", name] for name in made.ids]
    pq.write_table(made.table(pa.list_(CONCEPT, 3), pa.list_(pa.string(), 3)), tmp_path / "a.parquet")
    check(adopt(tmp_path / "a.parquet") / "train", made)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file:
        table = made.table().slice(4, 5)
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    found = documents(adopt(tmp_path / "b.arrow") / "train")
    assert list(found) == made.ids[4:]
    np.testing.assert_array_equal(found[made.ids[6]][1], made.concepts[6])


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_files_and_row_groups_of_any_size_give_the_documents_in_order(adopt, tmp_path, size):
    parts = [Made(count, seed) for seed, count in enumerate((33, 1, 70, 12))]
    for number, (made, rows) in enumerate(zip(parts, (100, 1, 9, 4), strict=True)):
        pq.write_table(made.table(), tmp_path / f"{number}.parquet", row_group_size=rows)
    out = adopt(tmp_path, f"documents_per_shard={size}")
    found = documents(out / "train")
    assert list(found) == [name for made in parts for name in made.ids]
    np.testing.assert_array_equal(
        np.concatenate([concepts for _, concepts, _ in found.values()]),
        np.concatenate([concepts for made in parts for concepts in made.concepts]),
    )


def test_a_row_group_is_read_piece_by_piece(tmp_path):
    from lcm_ds.adopt.source import ConceptSource
    from lcm_ds.config import SourceConfig

    numbers = pa.array(np.ones(16 << 20, np.float32))  # 64 MiB: 1024 documents of 16 concepts of 1024 numbers
    rows = pa.ListArray.from_arrays(
        np.arange(0, 16385, 16, dtype=np.int32), pa.FixedSizeListArray.from_arrays(numbers, 1024)
    )
    pq.write_table(pa.table({"e": rows}), tmp_path / "a.parquet", use_dictionary=False, compression="none")
    del numbers, rows
    source = ConceptSource(SourceConfig(name="concepts", paths=[str(tmp_path / "a.parquet")]))
    before, most, concepts = pa.total_allocated_bytes(), 0, 0
    for _, _, block in source.blocks(0, source.total):
        concepts += len(block.concepts[0].values)
        most = max(most, pa.total_allocated_bytes() - before)
    assert concepts == 16384
    assert most < 16 << 20


def test_globs_and_urls_name_files(adopt, tmp_path):
    import fsspec

    parts = [Made(12, seed) for seed in range(3)]
    for made, name in zip(parts, ("a-0", "a-1", "b-0"), strict=True):
        pq.write_table(made.table(), tmp_path / f"{name}.parquet", row_group_size=5)
        with fsspec.open(f"memory://embeddings/{name}.parquet", "wb") as file:
            file.write((tmp_path / f"{name}.parquet").read_bytes())
    both = [name for made in parts[:2] for name in made.ids]
    assert list(documents(adopt(tmp_path / "a-*.parquet") / "train")) == both
    assert list(documents(adopt("memory://embeddings/a-*.parquet") / "train")) == both
    check(adopt("memory://embeddings/b-0.parquet") / "train", parts[2])
    with pytest.raises(InputError, match=r"source.paths: memory://embeddings/c-\*.parquet: no such file"):
        adopt("memory://embeddings/c-*.parquet")


def test_folders_of_splits_decide_the_split(adopt, tmp_path):
    train, more, validation = Made(20, 1), Made(5, 2), Made(7, 3)
    for folder, made in (("split=train/a", train), ("split=train/b", more), ("split=validation", validation)):
        (tmp_path / "data" / folder).mkdir(parents=True)
        pq.write_table(made.table(), tmp_path / "data" / folder / "0.parquet")
    out = adopt(tmp_path / "data", "validation=0.9")
    assert list(documents(out / "train")) == train.ids + more.ids
    check(out / "validation", validation)
    (tmp_path / "data/split=train/a").rename(tmp_path / "data/split=test")
    with pytest.raises(InputError, match=r"split=test/0.parquet: is of the split 'test'"):
        adopt(tmp_path / "data")


def test_without_ids_rows_are_named_and_equal_texts_are_in_one_split(adopt, tmp_path):
    made = Made(60)
    table = made.table().drop_columns(["id", "url", "text"])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    out = adopt(tmp_path / "a.parquet", "validation=0.3")
    found = {split: documents(out / split) for split in ("train", "validation")}
    assert len(found["train"]) + len(found["validation"]) == 60
    assert min(map(len, found.values())) > 5
    assert "a.parquet#59" in {**found["train"], **found["validation"]}
    pq.write_table(pa.concat_tables([table.slice(30), table.slice(0, 30)]), tmp_path / "b.parquet")
    again = documents(adopt(tmp_path / "b.parquet", "validation=0.3") / "train")
    assert {tuple(s) for s, _, _ in again.values()} == {tuple(s) for s, _, _ in found["train"].values()}


def test_ids_may_be_numbers_and_the_first_document_of_an_id_is_kept(adopt, tmp_path):
    made = Made(30)
    ids = [*range(20), *range(10)]
    pq.write_table(made.table().set_column(0, "id", pa.array(ids)), tmp_path / "a.parquet", row_group_size=6)
    out = adopt(tmp_path / "a.parquet", "documents_per_shard=6")
    found = documents(out / "train")
    assert list(found) == [str(number) for number in range(20)]
    assert found["3"][0] == made.sentences[3]
    assert open_dataset(out / "train").info.source["refused"] == {"duplicate_id": 10}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_largest_error_of_storing_is_told(adopt, tmp_path, dtype, capsys):
    made = Made(300)
    made.concepts = [concepts + np.float32(1e-5) for concepts in made.concepts]
    pq.write_table(made.table(), tmp_path / "a.parquet", row_group_size=64)
    out = adopt(tmp_path / "a.parquet", f"dtype={dtype}", "documents_per_shard=50")
    found = documents(out / "train")
    largest = max(
        np.abs(found[name][1].astype(np.float32) - concepts).max()
        for name, concepts in zip(made.ids, made.concepts, strict=True)
    )
    dataset = open_dataset(out / "train")
    # What int8 stands for is decoded in float32 here, and in float16 when it is read.
    slack = 0.004 if dtype == "int8" else 0
    assert dataset.info.source["largest_error"] == pytest.approx(largest, abs=slack or 1e-12)
    assert (largest > 0) == (dtype != "float32")
    assert f"stored as {dtype}: largest error {dataset.info.source['largest_error']:.3g}, " in capsys.readouterr().out


def wrong_rows() -> dict[str, tuple[str, object, object]]:
    """Mistake → its message, and a row's sentences and concepts with it; the other rows have DIM numbers a concept."""
    good = [[0.5] * DIM, [0.25] * DIM]
    return {
        "another number": ("has 1 sentences and 2 concepts", ["a"], good),
        "no concepts": ("has 2 sentences and 0 concepts", ["a", "b"], None),
        "no sentences": ("has 0 sentences and 2 concepts", None, good),
        "null concept": ("concept 1 is null", ["a", "b"], [good[0], None]),
        "null number": (f"number {DIM - 1} of concept 1 is null", ["a", "b"], [good[0], [*good[0][1:], None]]),
        "null sentence": ("sentence 0 is null", [None, "b"], good),
        "wide": (f"concept 1 has {DIM + 1} numbers, those of its dataset have", ["a", "b"], [good[0], [0] * (DIM + 1)]),
        "of two widths": (f"concept 0 has {DIM - 2} numbers", ["a", "b"], [[0.5] * (DIM - 2), [0.5] * (DIM + 2)]),
        "nan": ("concept 1 is not finite: nan", ["a", "b"], [good[0], [float("nan"), *good[0][1:]]]),
        "infinite": ("concept 0 is not finite: -inf", ["a", "b"], [[float("-inf"), *good[0][1:]], good[1]]),
        "too large": ("concept 1 is too large to be stored: 1e+06", ["a", "b"], [good[0], [1e6, *good[0][1:]]]),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("mistake", wrong_rows())
def test_a_bad_row_is_named_with_its_file_and_value_counted_and_left_out(adopt, tmp_path, mistake, dtype, capsys):
    message, sentences, concepts = wrong_rows()[mistake]
    made = Made(30)
    table = made.table(pa.list_(pa.list_(pa.float32())))
    bad = pa.table({**{name: table.column(name).slice(0, 1) for name in ("url", "text")}, "id": ["bad"],
                    "text_sentences": pa.array([sentences], pa.list_(pa.string())),
                    "text_sentences_sonar_emb": pa.array([concepts], pa.list_(pa.list_(pa.float32())))})  # fmt: skip
    bad = bad.select(table.column_names)
    pq.write_table(
        pa.concat_tables([table.slice(0, 17), bad, table.slice(17)]), tmp_path / "a.parquet", row_group_size=8
    )
    out = adopt(tmp_path / "a.parquet", f"dtype={dtype}", "documents_per_shard=8")
    assert f"not read: a.parquet: row 17: {message}" in capsys.readouterr().out
    assert list(documents(out / "train")) == made.ids
    assert open_dataset(out / "train").info.source["refused"] == {"unreadable": 1}
    pq.write_table(pa.concat_tables([table, bad, bad]), tmp_path / "b.parquet")
    with pytest.raises(
        InputError, match=r"more than max_refused 0.01 allows; the first: not read: b.parquet: row 30: "
    ):
        adopt(tmp_path / "b.parquet")


def test_empty_rows_are_counted(adopt, tmp_path, capsys):
    made = Made(5)
    made.sentences[2], made.concepts[2] = [], np.empty((0, DIM), np.float32)
    pq.write_table(made.table(), tmp_path / "a.parquet")
    assert len(documents(adopt(tmp_path / "a.parquet") / "train")) == 4
    assert "5 documents: 4 to train on, 0 for validation, 1 refused (empty)" in capsys.readouterr().out


def test_concepts_of_two_sizes_in_two_files_are_refused_and_nothing_is_left(adopt, tmp_path):
    pq.write_table(Made(3).table(), tmp_path / "a.parquet")
    lists = pa.array([[[0.5, 1.0]]], pa.list_(pa.list_(pa.float32())))
    pq.write_table(pa.table({"text_sentences": [["a"]], "text_sentences_sonar_emb": lists}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=f"b.parquet: its concepts have 2 numbers, those of a.parquet {DIM}"):
        adopt(tmp_path)
    assert not (tmp_path / "out-0").exists()


def test_columns_that_are_missing_or_leave_a_choice_are_told(adopt, tmp_path):
    table = Made(3).table()
    pq.write_table(table.drop_columns(["text_sentences_sonar_emb"]), tmp_path / "text.parquet")
    with pytest.raises(InputError, match=r"text.parquet: has no column of concepts .*; its columns: id \(string\), "):
        adopt(tmp_path / "text.parquet")
    two = table.append_column("other_emb", table.column("text_sentences_sonar_emb"))
    two = two.append_column("other", table.column("text_sentences"))
    pq.write_table(two, tmp_path / "two.parquet")
    with pytest.raises(InputError, match=r"several columns of concepts \(text_sentences_sonar_emb, other_emb\)"):
        adopt(tmp_path / "two.parquet")
    with pytest.raises(InputError, match=r"several columns of sentences \(text_sentences, other\)"):
        adopt(tmp_path / "two.parquet", concepts=["other_emb"])
    adopt(tmp_path / "two.parquet", concepts=["other_emb"], sentences=["other"])
    with pytest.raises(InputError) as caught:
        adopt(tmp_path / "two.parquet", "source.id_column=key", concepts=["text"], sentences=["nothing"])
    assert [line.split(";")[0] for line in caught.value.errors] == [
        "source.concepts_columns: 'text' of two.parquet holds string, not lists of lists of half, float or double",
        "source.sentences_columns: two.parquet has no column 'nothing'",
        "source.id_column: two.parquet has no column 'key'",
    ]
    with pytest.raises(InputError, match=r"nothing.parquet: no such file or folder"):
        adopt(tmp_path / "nothing.parquet")
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(InputError, match=r"notes.md: is none of what is read here \(parquet, "):
        adopt(tmp_path / "notes.md")


def test_columns_of_one_name_are_told(adopt, tmp_path):
    table = Made(3).table()
    pq.write_table(table.append_column("url", table["url"]), tmp_path / "a.parquet")
    adopt(tmp_path / "a.parquet")  # does not read them
    for name in ("id", "text_sentences", "text_sentences_sonar_emb"):
        pq.write_table(table.append_column(name, table[name]), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=f"a.parquet: has several columns '{name}': rename all but one"):
            adopt(tmp_path / "a.parquet")


def test_what_other_programs_hide_in_a_folder_is_passed_over(adopt, tmp_path):
    made, data = Made(8), tmp_path / "data"
    (data / "_temporary").mkdir(parents=True)
    pq.write_table(made.table(), data / "0.parquet")
    for name in (".0.parquet", "_metadata.parquet", "_temporary/1.parquet"):
        (data / name).write_bytes(b"PAR1")
    check(adopt(data) / "train", made)


def test_concepts_without_sentences_are_kept(adopt, tmp_path):
    made = Made(12)
    pq.write_table(made.table().drop_columns(["text", "text_sentences"]), tmp_path / "a.parquet")
    found = documents(adopt(tmp_path / "a.parquet") / "train")
    assert list(found) == made.ids
    assert all(sentences == [] for sentences, _, _ in found.values())
    np.testing.assert_array_equal(found[made.ids[7]][1], made.concepts[7])


def saved(tmp_path, features, rows):
    from datasets import Dataset, Features

    folder = tmp_path / "saved"
    Dataset.from_dict(rows, Features(features)).save_to_disk(folder, num_shards=2)
    return folder


def test_hugging_face_datasets_on_disk_are_read(adopt, tmp_path):
    from datasets import Array2D, Dataset, DatasetDict, List, Value

    made, other = Made(25), Made(4, 1)
    text = {"id": Value("string"), "sentences": List(Value("string"))}
    rows = {"id": made.ids, "sentences": made.sentences, "embeddings": [each.tolist() for each in made.concepts]}
    check(adopt(saved(tmp_path, {**text, "embeddings": List(List(Value("float32")))}, rows)) / "train", made)

    made.concepts = [np.full((3, DIM), number, np.float32) for number in range(25)]
    made.sentences = [["a", "b", name] for name in made.ids]
    rows = {"id": made.ids, "sentences": made.sentences, "embeddings": [each.tolist() for each in made.concepts]}
    for dtype in ("float32", "float16"):
        folder = saved(tmp_path / dtype, {**text, "embeddings": Array2D((3, DIM), dtype)}, rows)
        check(adopt(folder) / "train", made)

    splits = {
        split: Dataset.from_dict({"id": m.ids, "s": m.sentences, "e": [c.tolist() for c in m.concepts]})
        for split, m in (("train", made), ("validation", other))
    }
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    out = adopt(tmp_path / "both")
    check(out / "train", made)
    check(out / "validation", other)


def test_a_dataset_of_which_rows_were_selected_has_these(adopt, tmp_path):
    from datasets import Dataset

    made = Made(20)
    rows = {"id": made.ids, "s": made.sentences, "e": [each.tolist() for each in made.concepts]}
    Dataset.from_dict(rows).select([4, 2, 11]).save_to_disk(tmp_path / "some")
    assert list(documents(adopt(tmp_path / "some") / "train")) == [made.ids[i] for i in (4, 2, 11)]


@pytest.mark.parametrize("layout", ["stacked", "files", "archive", "files without sentences"])
def test_numpy_files_are_read_with_the_jsonl_beside_them(adopt, tmp_path, layout):
    made, folder = Made(300), tmp_path / "arrays"
    folder.mkdir()
    lines = [{"id": name, "sentences": each} for name, each in zip(made.ids, made.sentences, strict=True)]
    if layout == "stacked":
        np.save(folder / "part.npy", np.concatenate(made.concepts))
    elif layout == "archive":
        np.savez(folder / "all.npz", **dict(zip(made.ids, made.concepts, strict=True)))
    else:
        for name, concepts in zip(made.ids, made.concepts, strict=True):
            np.save(folder / f"{name}.npy", np.asfortranarray(concepts))
        lines = lines[::-1]
    if layout != "files without sentences":
        text = "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (folder / ("part.jsonl" if layout == "stacked" else "sentences.jsonl")).write_text(text, encoding="utf-8")
    found = documents(adopt(folder, "documents_per_shard=64") / "train")
    assert list(found) == (sorted(made.ids) if layout.startswith("files") else made.ids)
    for name, sentences, concepts in zip(made.ids, made.sentences, made.concepts, strict=True):
        assert found[name][0] == ([] if "without" in layout else sentences)
        np.testing.assert_array_equal(found[name][1], concepts)


def test_numpy_files_that_do_not_fit_their_jsonl_are_refused(adopt, tmp_path, capsys):
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "a.npy", np.zeros((5, DIM), np.float32))
    (folder / "a.jsonl").write_text('{"sentences": ["a", "b"]}\n{"sentences": ["c"]}\n')
    with pytest.raises(InputError, match=r"a.npy: has 5 concepts, a.jsonl 3 sentences"):
        adopt(folder)
    (folder / "a.jsonl").write_text('{"sentences": "a"}\n')
    with pytest.raises(
        InputError, match=r'a.jsonl: line 1: {"sentences": "a"}: has to be an object with a list of str'
    ):
        adopt(folder)
    (folder / "a.jsonl").rename(folder / "all.jsonl")
    np.save(folder / "b.npy", np.zeros((1, DIM), np.float32))
    (folder / "all.jsonl").write_text('{"id": "a", "sentences": ["a"]}\n{"id": "c", "sentences": ["c"]}\n')
    with pytest.raises(InputError) as caught:
        adopt(folder)
    assert caught.value.errors == [
        f"{folder}/all.jsonl: 1 of its documents have no array: c",
        "arrays: 1 arrays have no line in all.jsonl: b",
    ]
    (folder / "all.jsonl").unlink()
    random = np.random.default_rng(0)
    for number in range(8):
        np.save(folder / f"c{number}.npy", random.normal(size=(4, DIM)))
    np.save(folder / "b.npy", np.array([{}]), allow_pickle=True)
    (folder / "a.npy").unlink()
    found = documents(adopt(folder, "max_refused=0.2") / "train")
    assert len(found) == 8
    assert "not read: arrays: row 0: Object arrays cannot be loaded" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["stacked", "files"])
def test_bad_documents_of_arrays_are_named_counted_and_left_out(adopt, tmp_path, layout, capsys):
    made, folder = Made(30), tmp_path / "arrays"
    folder.mkdir()
    made.concepts[3] = made.concepts[3].copy()
    made.concepts[3][0, 2] = np.nan
    lines = [{"id": name, "sentences": [*each]} for name, each in zip(made.ids, made.sentences, strict=True)]
    lines[7]["sentences"][0], lines[8]["sentences"][0] = None, 5
    if layout == "stacked":
        np.save(folder / "part.npy", np.concatenate(made.concepts))
    else:
        made.concepts[12] = made.concepts[12][:, :-1]
        lines[14]["sentences"].append("One more.")
        for name, concepts in zip(made.ids, made.concepts, strict=True):
            np.save(folder / f"{name}.npy", concepts)
    (folder / "part.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match="of 30 documents could not be read or encoded, more than max_refused"):
        adopt(folder)
    capsys.readouterr()
    found = documents(adopt(folder, "max_refused=0.2") / "train")
    told = [line.partition(": row ")[2].partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    expected = {3: "concept 0 is not finite: nan", 7: "sentence 0 is null", 8: "sentence 0 is 5"}
    if layout == "files":
        count = len(made.concepts[14])
        expected |= {12: f"concept 0 has {DIM - 1} numbers, those of its dataset have {DIM}"}
        expected |= {14: f"has {count + 1} sentences and {count} concepts"}
    assert sorted(filter(None, told)) == sorted(expected.values())
    assert sorted(found) == sorted(name for number, name in enumerate(made.ids) if number not in expected)


def test_a_language_that_sonar_does_not_know_is_refused(adopt, tmp_path):
    pq.write_table(Made(3).table(), tmp_path / "a.parquet")
    for given, meant in (("eng_Lat", "eng_Latn"), ("de", "deu_Latn")):
        with pytest.raises(InputError, match=f"SONAR has no language '{given}'; did you mean '{meant}'"):
            adopt(tmp_path / "a.parquet", encoder={"name": "sonar", "model": "a/b", "language": given})
    adopt(tmp_path / "a.parquet", encoder={"name": "sonar", "model": "a/b", "language": "deu_Latn"})


def test_supervised_documents_have_a_source_and_a_target(adopt, tmp_path):
    source, target = Made(15, 1), Made(15, 2)
    table = pa.table({"id": source.ids, "q": source.sentences, "q_sonar_emb": source.table().column(4),
                      "a": target.sentences, "a_sonar_emb": target.table().column(4)})  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    out = adopt(tmp_path / "a.parquet", concepts=["q_sonar_emb", "a_sonar_emb"])
    dataset = open_dataset(out / "train")
    assert dataset.info.supervised is not None
    assert dataset.info.supervised.source_suffix is None
    for (sentences, concepts, meta), *parts in zip(
        documents(out / "train").values(),
        source.sentences,
        target.sentences,
        source.concepts,
        target.concepts,
        strict=True,
    ):
        assert [meta["source_sentences"], meta["target_sentences"]] == parts[:2]
        assert sentences == parts[0] + parts[1]
        np.testing.assert_array_equal(concepts, np.concatenate(parts[2:]))
    with pytest.raises(InputError, match="add: source_suffix is for supervised documents"):
        adopt(tmp_path / "a.parquet", concepts=["q_sonar_emb"], source_suffix="")


def test_the_end_of_text_is_that_of_a_dataset_of_the_same_encoder(adopt, tmp_path):
    from preparing import HashEncoder

    from lcm_ds.config import PrepareConfig

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("The river rose in the night. We tied the boat. It held. We slept.")
    like = PrepareConfig(output=str(tmp_path / "like"), source={"name": "files", "paths": [f"{tmp_path}/texts/*"]},
                         encoder={"name": "sonar", "model": "hash"}, split_workers=0, validation=0)  # fmt: skip
    prepare(like.model_copy(update={"processes": 1}), HashEncoder())
    theirs = open_dataset(tmp_path / "like/train").info
    made = Made(20)
    made.sentences[3][-1] = "End of text."  # is there already
    pq.write_table(made.table(), tmp_path / "a.parquet")
    out = adopt(tmp_path / "a.parquet", like=str(tmp_path / "like/train"), end_of_text="")
    info = open_dataset(out / "train").info
    assert (info.encoder, info.end_of_text, info.language) == (theirs.encoder, theirs.end_of_text, "en")
    found = documents(out / "train")
    for number, (name, concepts) in enumerate(zip(made.ids, made.concepts, strict=True)):
        expected = concepts if number == 3 else np.vstack([concepts, np.array(theirs.end_of_text.vector, np.float16)])
        np.testing.assert_array_equal(found[name][1], expected)
        assert found[name][0][-1] == "End of text."
    with pytest.raises(InputError, match=r"source.add: no encoder is known, which 'End of text.' has to be"):
        adopt(tmp_path / "a.parquet", end_of_text="")
    with pytest.raises(InputError, match=r"encoder.name: 'theirs' cannot encode a prompt"):
        adopt(tmp_path / "a.parquet", end_of_text="", encoder={"name": "theirs"})
    with pytest.raises(InputError, match="like and encoder both say what made the concepts"):
        adopt(tmp_path / "a.parquet", like=str(tmp_path / "like/train"), encoder={"name": "theirs"})


def test_the_end_of_text_is_encoded_by_the_encoder_that_is_named(adopt, tmp_path):
    from lcm_ds.config import EncoderConfig
    from lcm_ds.encoders import load_encoder

    described = {"name": "sentence-transformers", "model": "minilm"}
    encoder = load_encoder(EncoderConfig(**described, dtype="float32"))
    sentences = [["One day.", "Another day."], ["A third one."]]
    lists = pa.array([[row.tolist() for row in encoder.encode(each)] for each in sentences])
    pq.write_table(pa.table({"s": sentences, "e": lists}), tmp_path / "a.parquet")
    out = adopt(tmp_path / "a.parquet", encoder={**described, "dtype": "float32"}, end_of_text="The end.")
    ends = [concepts[-1] for _, concepts, _ in documents(out / "train").values()]
    # One thread sums in another order than several.
    np.testing.assert_allclose(ends, np.repeat(encoder.encode(["The end."]), 2, axis=0), rtol=2e-3, atol=1e-5)
    np.testing.assert_array_equal(ends[0], ends[1])


def test_the_command_adopts_and_says_what_it_did(tmp_path, capsys):
    made = Made(6)
    pq.write_table(made.table(), tmp_path / "meta.parquet")
    command = ["adopt", str(tmp_path / "meta.parquet"), str(tmp_path / "out"), "validation=0", "--processes", "1"]
    assert main([*command, "--encoder", "name=sonar", "model=a/b"]) == 0
    out = capsys.readouterr().out
    assert "stored as float16: largest error 0, 0 standard deviations; documents have no end of text" in out
    assert f"out: 6 documents: 6 to train on, 0 for validation; {sum(map(len, made.sentences))} sentences" in out
    assert open_dataset(tmp_path / "out/train").info.encoder == {"name": "sonar", "model": "a/b"}
    assert main([*command, "--encoder", "sonar"]) == 2
    assert "--encoder sonar: has to be KEY=VALUE" in capsys.readouterr().err
    assert main(["index", str(tmp_path / "meta.parquet"), str(tmp_path / "tars")]) == 2
    assert "meta.parquet: is parquet, not a tar: lcm-ds adopt takes" in capsys.readouterr().err


def test_hub_ids_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/embeddings")
    assert not any(map(is_hub_id, ["a.parquet", "owner/a.parquet", "s3://a/b", "a*/b", "/owner/embeddings", "./a"]))
    (tmp_path / "owner").mkdir()
    assert not is_hub_id("owner/embeddings")
    assert adoption_config("owner-2/embeddings", "out").source.dataset == "owner-2/embeddings"


def test_a_config_of_a_folder_in_the_layout_of_the_hub_is_read(adopt, tmp_path):
    card = "configs:\n"
    for config in ("de", "fr"):
        (tmp_path / "hub" / config).mkdir(parents=True)
        pq.write_table(Made(20, ord(config[0])).table(), tmp_path / "hub" / config / "0.parquet")
        card += f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/*\n"
    (tmp_path / "hub/README.md").write_text(f"---\n{card}---\n")
    check(adopt(tmp_path / "hub", "source.config=fr") / "train", Made(20, ord("f")))
    assert len(documents(adopt(tmp_path / "hub") / "train")) == 40


def test_a_hub_dataset_is_read_by_its_name(tmp_path):
    import os

    made = Made(30)
    hub = Path(__file__).parents[1] / "text/hub.py"
    (tmp_path / "hub/data").mkdir(parents=True)
    pq.write_table(made.table(), tmp_path / "hub/data/0.parquet", row_group_size=8)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.parquet\n---\n"
    (tmp_path / "hub/README.md").write_text(card)
    command = [sys.executable, str(hub), str(tmp_path / "hub")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        environ = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "lcm_ds.cli", "adopt", "tales/of-the-mill", str(tmp_path / "out"),
                   "--processes", "2", "validation=0", "documents_per_shard=8"]  # fmt: skip
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 0, done.stderr
    check(tmp_path / "out/train", made)
    assert open_dataset(tmp_path / "out/train").info.source["revision"] == "0123456789abcdef0123456789abcdef01234567"


def test_documents_of_a_group_are_on_one_side(adopt, tmp_path):
    made = Made(60)
    groups = [None if n == 3 else n % 12 for n in range(60)]
    table = made.table().append_column("book", pa.array(groups, pa.int64()))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=25)
    out = adopt(tmp_path / "a.parquet", "validation=0.3", "source.group_column=book")
    found = {split: documents(out / split) for split in ("train", "validation")}
    assert open_dataset(out / "train").info.source["group_column"] == "book"
    assert len(found["train"]) + len(found["validation"]) == 60
    assert min(map(len, found.values())) > 5
    for split, some in found.items():
        for name, (_, _, meta) in some.items():
            group = groups[made.ids.index(name)]
            assert meta.get("group") == (None if group is None else str(group))
            assert split_of(name if group is None else str(group), 0.3) == split
    with pytest.raises(InputError, match=r"source.group_column: a.parquet has no column 'novel'; its columns: id, url"):
        adopt(tmp_path / "a.parquet", "source.group_column=novel")
    (tmp_path / "data/split=train").mkdir(parents=True)
    pq.write_table(table, tmp_path / "data/split=train/0.parquet")
    with pytest.raises(
        InputError, match=r"source.group_column: .*data has folders of splits \(split=…\), which decide"
    ):
        adopt(tmp_path / "data", "source.group_column=book")


@pytest.mark.parametrize("layout", ["stacked", "files"])
def test_groups_of_arrays_are_in_the_jsonl_beside_them(adopt, tmp_path, layout):
    made, folder = Made(40), tmp_path / "arrays"
    folder.mkdir()
    lines = [{"id": name, "sentences": each, "book": int(name.split("-")[1]) % 8}
             for name, each in zip(made.ids, made.sentences, strict=True)]  # fmt: skip
    if layout == "stacked":
        np.save(folder / "part.npy", np.concatenate(made.concepts))
    else:
        for name, concepts in zip(made.ids, made.concepts, strict=True):
            np.save(folder / f"{name}.npy", concepts)
    jsonl = folder / ("part.jsonl" if layout == "stacked" else "all.jsonl")
    jsonl.write_text("\n".join(map(json.dumps, lines)))
    out = adopt(folder, "validation=0.4", "source.group_column=book")
    for split in ("train", "validation"):
        found = documents(out / split)
        assert {split_of(meta["group"], 0.4) for _, _, meta in found.values()} == {split}
    with pytest.raises(
        InputError, match=r"source.group_column: .*l has no column 'novel'; its columns: id, sentences, b"
    ):
        adopt(folder, "source.group_column=novel")
    if layout == "files":
        jsonl.unlink()
        with pytest.raises(InputError, match=r"source.group_column: arrays has no column 'book'; its columns: $"):
            adopt(folder, "source.group_column=book")
