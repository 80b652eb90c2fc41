"""Sources: a stable order, any range, ids, and mistakes told before an hour is lost."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
import tempfile
from itertools import accumulate
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_ds.config import PrepareConfig, SentencesConfig, SourceConfig, load
from lcm_ds.errors import InputError
from lcm_ds.text.base import Source, TextDocument
from lcm_ds.text.files import open_plain
from lcm_ds.text.open import open_source
from lcm_ds.text.sample import BOOKS
from lcm_ds.text.splitter import Splitter

FIRST = "H.G. Wells: The Invisible Man, 12"
TEXTS = "4c00e55eb03efc9dfa49e757c618376378c3ade1a9cff872aa9257000493f70b"  # sha256 of the sample's texts


def source(name: str, **settings: object) -> Source:
    return open_source(SourceConfig.model_validate({"name": name, **settings}))


def parquet(path: Path, first: int, rows: int, **columns: list) -> None:
    path.parent.mkdir(exist_ok=True)
    numbers = range(first, first + rows)
    table = {"id": [f"doc-{n}" for n in numbers], "text": [f"Text {n}." for n in numbers], **columns}
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """700 rows in two parquet files of the same name, 3 rows of JSONL, two text files."""
    parquet(tmp_path / "a" / "part.parquet", 0, 600)
    parquet(tmp_path / "b" / "part.parquet", 600, 100)
    lines = [{"text": "First.", "id": 7}, {"text": None, "id": None}, {"text": "Third.", "id": 9}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "one.txt").write_text("Über one.\n", encoding="utf-8-sig")
    (tmp_path / "two.txt").write_text("Two.\n")
    return tmp_path


def every_range_is_that_part_of_the_whole(of: Source, size: int) -> None:
    whole = list(of.documents())
    units = [document for start in range(0, len(whole), size) for document in of.documents(start, start + size)]
    assert units == whole
    assert list(of.documents(len(whole) // 2)) == whole[len(whole) // 2 :]
    assert list(of.documents(1, 3)) == whole[1:3]  # back again
    assert list(of.documents(len(whole), len(whole) + 5)) == []
    assert of.total in (None, len(whole))


def test_rows_of_local_parquet_in_order_by_any_range(folder: Path) -> None:
    of = source("huggingface", paths=[str(folder / "*" / "*.parquet")])
    documents = list(of.documents())
    assert of.total == 700
    assert documents[650] == TextDocument("doc-650", "b/part.parquet", "Text 650.")
    assert [document.id for document in documents] == [f"doc-{n}" for n in range(700)]
    every_range_is_that_part_of_the_whole(of, 37)


def test_a_range_left_half_read_does_not_disturb_the_next(folder: Path) -> None:
    of = source("huggingface", paths=[str(folder / "a" / "part.parquet")])
    half = of.documents(10, 500)
    assert [next(half).id for _ in range(3)] == ["doc-10", "doc-11", "doc-12"]
    assert [document.id for document in of.documents(13, 15)] == ["doc-13", "doc-14"]
    half.close()
    assert [document.id for document in of.documents(20, 22)] == ["doc-20", "doc-21"]


def test_ids_fall_back_to_the_file_and_the_row(folder: Path) -> None:
    jsonl = source("huggingface", paths=[str(folder / "rows.jsonl")])
    assert [document.id for document in jsonl.documents()] == ["7", "rows.jsonl#1", "9"]
    assert [document.text for document in jsonl.documents()] == ["First.", "", "Third."]  # a null text is an empty one
    every_range_is_that_part_of_the_whole(jsonl, 2)
    numbered = source("huggingface", paths=[str(folder / "*" / "*.parquet")], id_column=None)
    ids = [document.id for document in numbered.documents()]
    assert (ids[0], ids[-1]) == ("a/part.parquet#0", "b/part.parquet#99")
    assert len(set(ids)) == 700


def test_skip_and_take_count_over_all_files(folder: Path) -> None:
    paths = [str(folder / "*" / "*.parquet"), str(folder / "rows.jsonl")]
    of = source("huggingface", paths=paths, skip=690, take=12)
    assert [document.id for document in of.documents()] == [*(f"doc-{n}" for n in range(690, 700)), "7", "rows.jsonl#1"]
    assert [document.id for document in of.documents(9, 11)] == ["doc-699", "7"]
    assert source("huggingface", paths=paths[:1], skip=690, take=12).total == 10
    jsonl_first = source("huggingface", paths=[str(folder / "a*" / "*"), *paths[1:]], skip=602)
    assert [document.id for document in jsonl_first.documents()] == ["9"]
    texts = source("files", paths=[str(folder / "*.txt")], skip=1, take=5)
    assert [document.text for document in texts.documents()] == ["Two.\n"]
    assert texts.total == 1


def test_text_files_are_documents_in_the_order_of_their_names(folder: Path) -> None:
    of = source("files", paths=[str(folder / "two.txt"), str(folder / "*.txt")])
    assert [document.text for document in of.documents()] == ["Über one.\n", "Two.\n"]
    assert [Path(document.id).name for document in of.documents()] == ["one.txt", "two.txt"]
    assert of.describe()["files"] == 2


def test_missing_columns_are_named_with_those_that_are_there(folder: Path) -> None:
    with pytest.raises(InputError) as error:
        source("huggingface", paths=[str(folder / "a" / "*")], text_column="content", id_column="url")
    assert len(error.value.errors) == 2
    assert "source.text_column: part.parquet has no column 'content'; its columns: id, text" in error.value.errors
    with pytest.raises(InputError, match=r"source\.id_column: rows\.jsonl has no column 'key'"):
        source("huggingface", paths=[str(folder / "rows.jsonl")], id_column="key")
    for values, kind in (
        ([1, 2, 3], "int64"),
        ([[1], [2], [3]], r"list<.*int64>"),
        ([[["a"]]] * 3, r"list<.*list<.*>"),
    ):
        parquet(folder / "numbers.parquet", 0, 3, text=values)
        named = rf"'text' of numbers\.parquet holds {kind}, not texts \(string, large_string, string_view, a dictionary"
        with pytest.raises(InputError, match=named):
            source("huggingface", paths=[str(folder / "numbers.parquet")])


def test_a_limit_in_sentences_is_only_for_the_sample(folder: Path) -> None:
    with pytest.raises(ValueError, match="take_sentences is only for source sample"):
        source("files", paths=[str(folder / "*.txt")], take_sentences=5)


def test_missing_and_unreadable_files_are_all_named_at_once(folder: Path) -> None:
    (folder / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    (folder / "notes.csv").write_text("text\n")
    with pytest.raises(InputError) as error:
        source("huggingface", paths=[str(folder / "none-*.parquet"), str(folder), "absent.jsonl"])
    assert error.value.errors == [
        f"source.paths: {folder}/none-*.parquet: no such file",
        f"source.paths: {folder} is a folder; name files, or a glob such as {folder}/*",
        "source.paths: absent.jsonl: no such file",
    ]
    (folder / "notes.xlsx").write_text("text\n")
    with pytest.raises(InputError) as error:
        source(
            "huggingface",
            paths=[str(folder / name) for name in ("broken.parquet", "notes.csv", "notes.xlsx")],
            id_column="key",
        )
    assert "not a parquet file" in error.value.errors[0]
    hint = "(null: documents are named by file and row)"
    assert error.value.errors[1] == f"source.id_column: notes.csv has no column 'key'; its columns: text {hint}"
    assert error.value.errors[2] == (
        "source.paths: notes.xlsx: is not read, by its name; what is read: parquet, JSONL (.jsonl, .ndjson, .json), "
        "CSV, TSV (these also as .gz, .zst, .bz2, .xz) and datasets' .arrow"
    )
    (folder / "pretty.json").write_text('{\n "text": "One.",\n "id": 1\n}\n')
    (folder / "list.json").write_text('\ufeff[\n{"text": "One.", "id": 1},\n{"text": "Two.", "id": 2}\n]\n')
    with pytest.raises(InputError) as error:
        source("huggingface", paths=[str(folder / "*.json")])
    assert error.value.errors[0].startswith("source.paths: list.json is one JSON list, not JSONL")
    assert error.value.errors[1].startswith("source.paths: pretty.json is no JSONL: none of its first rows is read:")


def problems(of: Source) -> list[str | None]:
    """What is wrong with each document; where something is, it is refused as unreadable and has no text."""
    documents = list(of.documents())
    assert all((d.refused, d.text) == ("unreadable", "") for d in documents if d.problem is not None)
    return [document.problem for document in documents]


def test_a_row_that_cannot_be_read_is_a_refused_document_whatever_holds_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(
        b'{"text": "ok", "id": 1}\n\n{"text": oh\n[1, 2]\n{"id": 4}\n{"text": 5, "id": 5}\n{"text": null, "id": 6}\n'
        b'{"text": "\xdcber", "id": 7}\n' + b"[" * 100_000 + b'\n{"text": "ok", "id": 8}'
    )
    found = problems(source("huggingface", paths=[str(tmp_path / "rows.jsonl")]))
    named = [None if problem is None else problem[:29] for problem in found]
    assert named == [
        None,
        "rows.jsonl: line 3: not JSON:",
        "rows.jsonl: line 4: not an ob",
        "rows.jsonl: line 5: has no 't",
        "rows.jsonl: line 6: 'text' is",
        None,  # a null text is an empty one
        "rows.jsonl: line 8: not JSON:",
        "rows.jsonl: line 9: not JSON:",
        None,
    ]
    latin = pyarrow.array([b"One.", b"\xdcber", b"Three.", None], "binary").view("string")
    pyarrow.parquet.write_table(pyarrow.table({"text": latin, "id": list("abcd")}), tmp_path / "latin.parquet")
    of = source("huggingface", paths=[str(tmp_path / "latin.parquet")])
    assert [document.text for document in of.documents()] == ["One.", "", "Three.", ""]
    assert [bool(problem) for problem in problems(of)] == [False, True, False, False]
    assert str(problems(of)[1]).startswith("latin.parquet: row 1: 'utf-8' codec can't decode")
    (tmp_path / "latin.txt").write_bytes("Über".encode("latin-1"))
    [problem] = problems(source("files", paths=[str(tmp_path / "latin.txt")]))
    assert str(problem).endswith("latin.txt: not UTF-8 text: invalid continuation byte at byte 0")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_blank_lines_are_no_rows(tmp_path: Path, end: bytes) -> None:
    rows = [json.dumps({"id": str(n), "text": f"Text {n}."}).encode() for n in range(1200)]
    draw = random.Random(0)
    lines = [b"", b" \t"]
    for row in rows:
        lines += [row, *[draw.choice([b"", b"  "])] * draw.choice([0, 0, 0, 1, 3])]
    (tmp_path / "blank.jsonl").write_bytes(end.join(lines) + end + end)
    (tmp_path / "blank.jsonl.gz").write_bytes(gzip.compress(end.join(lines) + end + end))
    for name in ("blank.jsonl", "blank.jsonl.gz"):
        of = source("huggingface", paths=[str(tmp_path / name)])
        assert of.total == 1200
        assert [document.id for document in of.documents()] == [str(n) for n in range(1200)]
        every_range_is_that_part_of_the_whole(of, 170)
        some = source("huggingface", paths=[str(tmp_path / name)], skip=600, take=2, id_column=None)
        assert [document.id for document in some.documents()] == [f"{name}#600", f"{name}#601"]
    number = lines.index(rows[1000])
    lines[number] = b"{"
    (tmp_path / "blank.jsonl").write_bytes(end.join(lines))
    of = source("huggingface", paths=[str(tmp_path / "blank.jsonl")])
    [document] = of.documents(1000, 1001)
    assert (document.id, str(document.problem).split(": not")[0]) == (
        "blank.jsonl#1000",
        f"blank.jsonl: line {number + 1}",
    )


def test_strings_are_read_in_every_type_that_parquet_has_for_them(tmp_path: Path) -> None:
    import pandas

    texts = pyarrow.array(["One.", "Two.", "One."])
    frame = pandas.DataFrame({"text": pandas.Categorical(texts.to_pylist()), "id": [1, 2, 3]})
    frame.to_parquet(tmp_path / "category.parquet")
    for kind in ("string", "large_string", "string_view", "dictionary", "category"):
        if kind != "category":
            column = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
            pyarrow.parquet.write_table(pyarrow.table({"text": column, "id": [1, 2, 3]}), tmp_path / f"{kind}.parquet")
        of = source("huggingface", paths=[str(tmp_path / f"{kind}.parquet")])
        assert [document.text for document in of.documents()] == ["One.", "Two.", "One."]
        assert [document.id for document in of.documents()] == ["1", "2", "3"]


def test_lists_of_sentences_are_taken_as_they_are_in_every_type(tmp_path: Path) -> None:
    lists = [["One  is\there.", "Two\x07 is \u200b"], ["", " \n"], None]
    strings = pyarrow.array(lists)
    kinds = {
        "list": strings,
        "large_list": strings.cast(pyarrow.large_list(pyarrow.large_string())),
        "view": pyarrow.array(lists, pyarrow.list_(pyarrow.string_view())),
        "fixed": pyarrow.array(lists, pyarrow.list_(pyarrow.string(), 2)),
        "list_view": pyarrow.array(lists, pyarrow.list_view(pyarrow.string())),
        "large_list_view": pyarrow.array(lists, pyarrow.large_list_view(pyarrow.string_view())),
    }
    expected = [["One is here.", "Two is"], [], ""]
    for name, column in kinds.items():
        table = pyarrow.table({"text": column, "id": list("abc")})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        with pyarrow.ipc.new_stream(str(tmp_path / f"{name}.arrow"), table.schema) as stream:
            stream.write_table(table)
        pyarrow.feather.write_feather(table, tmp_path / f"{name}-file.arrow")
        for file in (f"{name}.parquet", f"{name}.arrow", f"{name}-file.arrow"):
            of = source("huggingface", paths=[str(tmp_path / file)])
            assert [document.text for document in of.documents()] == expected, file
    rows = [
        {"id": 1, "text": ["A \ud800 half.", "Whole."]},
        {"id": 2, "text": ["One.", None]},
        {"id": 3, "text": [1]},
        {"id": 4, "text": {"a": "b"}},
    ]
    (tmp_path / "lists.jsonl").write_text("\n".join(map(json.dumps, rows)))
    of = source("huggingface", paths=[str(tmp_path / "lists.jsonl")])
    assert next(iter(of.documents())).text == ["A half.", "Whole."]
    assert problems(of)[1:3] == [
        "lists.jsonl: line 2: 'text' holds None as item 1, not a sentence",
        "lists.jsonl: line 3: 'text' holds 1 as item 0, not a sentence",
    ]
    assert str(problems(of)[3]).startswith("lists.jsonl: line 4: 'text' is {'a': 'b'}, not texts (string,")


def test_ids_may_be_numbers_or_missing(tmp_path: Path) -> None:
    for values, ids in (
        ([7, 8, 9], ["7", "8", "9"]),
        ([7.0, None, float("nan")], ["7", "f.parquet#1", "f.parquet#2"]),
        (["", "a", None], ["f.parquet#0", "a", "f.parquet#2"]),
        (None, ["f.parquet#0", "f.parquet#1", "f.parquet#2"]),
    ):
        columns = {
            "text": ["One.", "Two.", "Three."],
            **({} if values is None else {"id": pyarrow.array(values, from_pandas=False)}),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "f.parquet")
        documents = list(source("huggingface", paths=[str(tmp_path / "f.parquet")]).documents())
        assert [document.id for document in documents] == ids
        assert [document.named for document in documents] == ["#" not in id for id in ids]
    (tmp_path / "f.jsonl").write_text('{"text": "One."}\n')
    [document] = source("huggingface", paths=[str(tmp_path / "f.jsonl")]).documents()
    assert document.id == "f.jsonl#0"


def test_a_parquet_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["One.", "Two."], "id": [7, 8]}), path)
    first = source("huggingface", paths=[str(path)])
    assert [document.id for document in first.documents()] == ["7", "8"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["One.", "Two."], "id": [7.5, 8.5]}), path)
    again = source("huggingface", paths=[str(path)])
    assert [document.id for document in again.documents()] == ["7.5", "8.5"]


def packed(path: Path, data: bytes) -> str:
    """Write a file, compressed as its name says; returns its path."""
    if path.suffix == ".zst":
        half = len(data) // 2
        frames = [pyarrow.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:])]
        path.write_bytes(b"".join(frames))
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_with_a_bom_and_however_it_is_compressed(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"id": n, "text": f"Text {n}."}).encode() for n in range(1300)]
    for start in (b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b""):
        of = source("huggingface", paths=[packed(tmp_path / name, start + b"\n".join(lines))])
        assert of.total == 1300
        assert [document.text for document in of.documents()] == [f"Text {n}." for n in range(1300)]
        every_range_is_that_part_of_the_whole(of, 170)


def test_a_compressed_file_is_read_once_by_ranges_in_their_order(tmp_path: Path, monkeypatch) -> None:
    lines = [json.dumps({"id": n, "text": f"Text {n}."}).encode() for n in range(1000)]
    rows = b"id,text\n" + b"".join(b"%d,Text %d.\n" % (n, n) for n in range(1000))
    sources = [
        source("huggingface", paths=[packed(tmp_path / "a.jsonl.gz", b"\n".join(lines))]),
        source("huggingface", paths=[packed(tmp_path / "a.csv.gz", rows)]),
    ]
    opened: list[str] = []
    for module in ("jsonl", "table"):
        monkeypatch.setattr(f"lcm_ds.text.{module}.open_plain", lambda place: opened.append(place) or open_plain(place))
    for of, most in zip(sources, (1, 2), strict=True):  # of CSV, first the header
        opened.clear()
        for start in range(0, 1000, 100):
            ids = [document.id for document in of.documents(start, start + 50)]
            assert ids == [str(n) for n in range(start, start + 50)]
        assert len(opened) == most


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.tsv.zst"])
def test_tables_of_text(tmp_path: Path, name: str) -> None:
    rows = [(str(n), f'Text "{n}",\ttabs\nand lines.', str(n / 2)) for n in range(700)]
    file = io.StringIO()
    csv.writer(file, delimiter="\t" if ".tsv" in name else ",").writerows([("id", "text", "score"), *rows])
    of = source("huggingface", paths=[packed(tmp_path / name, b"\xef\xbb\xbf" + file.getvalue().encode())])
    assert of.total == 700
    found = list(of.documents())
    assert [document.id for document in found] == [str(n) for n in range(700)]
    assert found[3].text == 'Text "3",\ttabs\nand lines.'
    every_range_is_that_part_of_the_whole(of, 130)
    few = source("huggingface", paths=[str(tmp_path / name)], filter={"score": {"min": 349}}, take=700)
    assert [document.id for document in few.documents() if document.refused is None] == ["698", "699"]
    again = open_source(of.config, index=json.loads(json.dumps(of.index())))
    assert list(again.documents(5, 9)) == found[5:9]


def test_rows_of_a_table_that_cannot_be_read_are_refused_in_their_place(tmp_path: Path) -> None:
    rows = [
        b"id,text,n",
        b"1,one,1",
        b"2,two",
        b"3,\xdcber,3",
        b"",
        b"4,four,x",
        b"5,a,b,c",
        b"6,",
        b"7,seven,",
        b"8,,",
    ]
    (tmp_path / "t.csv").write_bytes(b"\r\n".join(rows))
    of = source("huggingface", paths=[str(tmp_path / "t.csv")], filter={})
    documents = list(of.documents())
    assert [document.text for document in documents] == ["one", "", "", "four", "", "", "seven", ""]
    assert of.total == 8
    assert [None if p is None else p[:31] for p in problems(of)] == [
        None,
        "t.csv: row 1: has 2 columns, th",
        "t.csv: row 2: 'utf-8' codec can",
        None,
        "t.csv: row 4: has 4 columns, th",
        "t.csv: row 5: has 2 columns, th",
        None,
        None,
    ]
    every_range_is_that_part_of_the_whole(of, 2)
    with pytest.raises(InputError, match=r"source\.text_column: t\.csv has no column 'body'; its columns: id, text, n"):
        source("huggingface", paths=[str(tmp_path / "t.csv")], text_column="body")


def test_a_local_folder_or_file_as_load_dataset_takes_it(tmp_path: Path) -> None:
    import datasets

    texts = {"id": [f"doc-{n}" for n in range(600)], "text": [f"Text {n}." for n in range(600)]}
    made = datasets.Dataset.from_dict(texts)
    (tmp_path / "data").mkdir()
    made.to_parquet(tmp_path / "data/train-0.parquet")
    made.select(range(5)).to_parquet(tmp_path / "data/test-0.parquet")
    (tmp_path / "csv").mkdir()
    made.to_csv(tmp_path / "csv/all.csv")
    (tmp_path / "list").mkdir()
    (tmp_path / "list/all.json").write_text(json.dumps(made.to_list()))
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made, "test": made.select(range(5))}).save_to_disk(tmp_path / "both")
    made.select(range(599, -1, -1)).save_to_disk(tmp_path / "reversed")
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    for name in ("data", "csv", "list", "saved", "both", "data/train-0.parquet", "csv/all.csv", str(arrow)):
        of = source("huggingface", dataset=str(tmp_path / name))
        assert [document.id for document in of.documents()] == texts["id"], name
        assert [document.text for document in of.documents(3, 5)] == ["Text 3.", "Text 4."]
        if name != "list":
            assert of.total == 600
            every_range_is_that_part_of_the_whole(of, 170)
            again = open_source(of.config, index=json.loads(json.dumps(of.index())))
            assert next(iter(again.documents(7))).id == "doc-7"
    assert [d.id for d in source("huggingface", dataset=str(tmp_path / "reversed")).documents()] == texts["id"][::-1]
    for name in ("data", "both"):
        assert source("huggingface", dataset=str(tmp_path / name), split="test").total == 5
        with pytest.raises(InputError, match="has no split 'dev'; it has"):
            source("huggingface", dataset=str(tmp_path / name), split="dev")
    with pytest.raises(
        InputError, match=r"source\.text_column: saved\.arrow has no column 'body'; its columns: id, text"
    ):
        source("huggingface", dataset=str(tmp_path / "saved"), text_column="body")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/state.json").write_text("{}")
    with pytest.raises(InputError, match=r"broken\.arrow: cannot be read"):
        source("huggingface", dataset=str(tmp_path / "broken"))


LANGUAGES = [
    ("deu", "Latn"), ("de", None), ("deu_Latn", None), ("German", None), ("cmn", "Hant"), ("zh", None), ("tlh", "Latn"),
    (None, None), ("arb", "Latn"), ("DEUTSCH", None),
]  # fmt: skip


def test_each_document_has_its_own_language(tmp_path: Path) -> None:
    rows = [{"id": n, "text": "A.", "language": code, "script": script} for n, (code, script) in enumerate(LANGUAGES)]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"paths": [str(tmp_path / "l.jsonl")], "language_column": "language", "script_column": "script"}
    of = source("huggingface", **columns, languages="all")
    codes = ["deu_Latn"] * 4 + ["zho_Hant", "zho_Hans"] + [None] * 4
    assert [document.language for document in of.documents()] == codes
    assert problems(of)[:6] == [None] * 6
    unknown = "SONAR has no such language; did you mean 'tgl_Latn'?"
    assert problems(of)[6] == f"l.jsonl: line 7: 'language' is 'tlh' in the script 'Latn': {unknown}"
    assert problems(of)[7] == "l.jsonl: line 8: 'language' is None: SONAR has no such language"
    assert str(problems(of)[8]).startswith("l.jsonl: line 9: 'language' is 'arb' in the script 'Latn': SONAR has no")
    assert of.describe()["languages"] == "all"
    some = source("huggingface", **columns, languages=["zho_Hant", "German"])
    assert some.config.languages == ["zho_Hant", "deu_Latn"]
    assert [document.refused for document in some.documents()] == [None] * 5 + ["language"] * 5
    one = open_source(some.config.model_copy(update={"languages": None}), "de")
    assert [(d.refused, d.language) for d in one.documents()] == [(None, None)] * 4 + [("language", None)] * 6
    with pytest.raises(ValueError, match="SONAR has no language 'germn'; did you mean 'deu_Latn'"):
        source("huggingface", **columns, languages=["germn"])
    with pytest.raises(ValueError, match="languages and script_column need language_column"):
        source("huggingface", paths=["x.jsonl"], languages="all")


def test_a_dataset_of_the_hub_that_cannot_be_reached_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="source: no/such-dataset: cannot be opened"):
        source("huggingface", dataset="no/such-dataset")


# --- the sample -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample() -> Source:
    return source("sample")


def test_the_sample_is_the_same_on_every_machine(sample: Source) -> None:
    documents = list(sample.documents())
    assert len({document.id for document in documents}) == len(documents) == sample.total == 390
    assert documents[0].id == FIRST
    texts = "\0".join(document.text for document in documents if isinstance(document.text, str))
    assert hashlib.sha256(texts.encode()).hexdigest() == TEXTS
    assert len({document.id.split(":")[0] for document in documents[:60]}) > 10  # any beginning mixes the authors
    every_range_is_that_part_of_the_whole(sample, 17)


def test_take_sentences_counts_the_sentences_of_the_default_splitter() -> None:
    splitter = Splitter(SentencesConfig())  # type: ignore[call-arg]
    some = source("sample", take_sentences=500)
    counts = [len(splitter.split(document.text)) for document in some.documents() if isinstance(document.text, str)]
    assert sum(counts[:-1]) < 500 <= sum(counts)
    assert some.total == len(counts)
    assert source("sample", take_sentences=500, skip=1).total == len(counts) - 1
    assert source("sample", take_sentences=500, take=2).total == 2
    assert source("sample", take_sentences=10**9).total == 390
    assert source("sample", take_sentences=1, skip=5).total == 0
    assert some.describe()["take_sentences"] == 500


def test_the_sample_is_small_and_lists_its_books(sample: Source) -> None:
    assert BOOKS.stat().st_size < 3_000_000
    listed = BOOKS.with_name("README.md").read_text(encoding="utf-8")
    titles = {document.id.rsplit(",", 1)[0].split(": ", 1)[1] for document in sample.documents()}
    assert [title for title in titles if f"| {title} |" not in listed] == []


# --- units ------------------------------------------------------------------------------------------------------------


def write_groups(path: Path, groups: list[int], first: int) -> None:
    """A parquet file with row groups of these sizes; ids count on from `first`."""
    with pyarrow.parquet.ParquetWriter(
        path, pyarrow.schema({"text": pyarrow.string(), "id": pyarrow.string()})
    ) as file:
        for rows in groups:
            numbers = range(first, first + rows)
            file.write_table(pyarrow.table({"text": [f"Text {n}." for n in numbers], "id": [f"{n}" for n in numbers]}))
            first += rows


@settings(max_examples=25)
@given(
    files=st.lists(st.lists(st.integers(1, 40), max_size=5), min_size=1, max_size=4),
    size=st.integers(1, 30),
    skip=st.integers(0, 50),
    take=st.none() | st.integers(1, 120),
)
def test_units_are_all_rows_once_in_order_whatever_the_row_groups(
    files: list[list[int]], size: int, skip: int, take: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = 0
        for number, groups in enumerate(files):
            write_groups(Path(folder) / f"{number}.parquet", groups, first)
            first += sum(groups)
        of = source("huggingface", paths=[f"{folder}/*.parquet"], skip=skip, take=take)
        units = list(of.units(size))
        expected = [str(n) for n in range(skip, first)][:take]
        shuffled = random.Random(0).sample(units, len(units))
        found = {unit: [document.id for document in of.documents(*unit)] for unit in shuffled}
        assert [id for unit in units for id in found[unit]] == expected
        assert all(found.values())
        assert all(stop - start <= 2.5 * size + 1 for start, stop in units)
        if take is None and not skip and all(rows <= 2 * size for groups in files for rows in groups):
            ends = set(accumulate(rows for groups in files for rows in groups))
            assert {stop for _, stop in units} <= ends


def test_a_range_reads_its_own_row_groups_and_the_columns_that_are_used(tmp_path: Path, monkeypatch) -> None:
    write_groups(tmp_path / "0.parquet", [10] * 8, 0)
    of = source("huggingface", paths=[str(tmp_path / "0.parquet")])
    asked: list[tuple[list[int], list[str]]] = []
    whole = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(self, batch_size, row_groups, columns, **more):
        asked.append((row_groups, columns))
        return whole(self, batch_size, row_groups=row_groups, columns=columns, **more)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    for unit in of.units(20):
        assert len(list(of.documents(*unit))) == 20
    assert asked == [
        ([0, 1], ["text", "id"]),
        ([2, 3], ["text", "id"]),
        ([4, 5], ["text", "id"]),
        ([6, 7], ["text", "id"]),
    ]


def test_a_row_group_is_read_piece_by_piece(tmp_path: Path) -> None:
    texts = [random.Random(n).randbytes(500).hex() for n in range(32_000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "0.parquet", compression="none")
    assert (tmp_path / "0.parquet").stat().st_size > 31_000_000
    of, most, read = source("huggingface", paths=[str(tmp_path / "0.parquet")]), 0, 0
    before = pyarrow.total_allocated_bytes()
    for document in of.documents():
        read += len(document.text)
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert read == 32_000_000
    assert most < 8 << 20


def test_14_files_of_large_row_groups_feed_100_processes(tmp_path: Path) -> None:
    for number in range(14):
        write_groups(tmp_path / f"{number:02d}.parquet", [1000], 1000 * number)
    units = list(source("huggingface", paths=[str(tmp_path / "*.parquet")]).units(100))
    assert len(units) == 140
    assert {stop - start for start, stop in units} == {100}


def test_rows_are_left_out_by_number_and_language_and_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    scores, languages = [1.5, 2.5, None, 3.5, float("nan"), 4.5], ["en", "EN", "en", "de", "en", "en"]
    parquet(path, 0, 6, score=scores, language=languages)
    lines = [
        {"id": f"doc-{n}", "text": f"Text {n}.", "score": s, "language": v}
        for n, (s, v) in enumerate(zip(scores, languages, strict=True))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("rows.parquet", "rows.jsonl"):
        settings = {"filter": {"score": {"min": 2, "max": 4}}, "language_column": "language"}
        of = source("huggingface", paths=[str(tmp_path / name)], **settings)
        found = [(document.id, document.text, document.refused) for document in of.documents()]
        assert found == [
            ("doc-0", "", "filtered"),
            ("doc-1", "Text 1.", None),
            ("doc-2", "", "filtered"),
            ("doc-3", "", "language"),
            ("doc-4", "", "filtered"),
            ("doc-5", "", "filtered"),
        ]
        assert of.describe()["filter"] == {"score": {"min": 2.0, "max": 4.0}}
    with pytest.raises(InputError) as error:
        source(
            "huggingface", paths=[str(path)], filter={"text": {"min": 1}, "stars": {"max": 1}}, language_column="lang"
        )
    assert [line.split(":")[0] for line in error.value.errors] == [
        "source.language_column",
        "source.filter",
        "source.filter",
    ]


def test_columns_of_one_name_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,text,id\n1,A.,B.,2\n")
    table = pyarrow.table([["1"], ["A."], ["B."], ["2"]], names=["id", "text", "text", "id"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(InputError) as error:
            source("huggingface", paths=[str(tmp_path / name)])
        assert error.value.errors == [
            f"source.{key}: {name} has 2 columns {column!r}: rename all but one"
            for key, column in (("text_column", "text"), ("id_column", "id"))
        ]


def test_a_second_process_needs_no_second_look(folder: Path, monkeypatch) -> None:
    settings = {"paths": [str(folder / "*" / "*.parquet"), str(folder / "rows.jsonl")]}
    config = SourceConfig.model_validate({"name": "huggingface", **settings})
    first = open_source(config)
    index = json.loads(json.dumps(first.index()))
    monkeypatch.setattr("lcm_ds.text.huggingface._inspect", lambda *_: pytest.fail("looked again"))
    second = open_source(config, index=index)
    assert list(second.documents()) == list(first.documents())
    assert (second.total, second.characters) == (first.total, first.characters)
    assert second.describe() == first.describe()


def test_jsonl_is_read_from_the_mark_before_a_range_and_compressed_too(tmp_path: Path) -> None:
    lines = [json.dumps({"id": str(n), "text": "ä" * (n % 7)}) for n in range(2300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name in ("a.jsonl", "b.jsonl.gz"):
        of = source("huggingface", paths=[str(tmp_path / name)])
        assert of.total == 2300
        every_range_is_that_part_of_the_whole(of, 499)
        assert [document.id for document in of.documents(1500, 1503)] == ["1500", "1501", "1502"]


def test_a_line_may_lack_what_a_filter_asks_for_but_not_every_line(tmp_path: Path) -> None:
    lines = [{"id": "a", "text": "A."}, {"id": "b", "text": "B.", "score": 3}, {"id": "c", "text": "C.", "score": "3"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines[:2])))
    of = source("huggingface", paths=[str(path)], filter={"score": {"min": 1}})
    assert [document.refused for document in of.documents()] == ["filtered", None]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError) as error:
        source("huggingface", paths=[str(path)], filter={"score": {"min": 1}, "stars": {"min": 1}})
    assert error.value.errors == [
        "source.filter: rows.jsonl has no column 'stars'; its columns: id, text, score",
        "source.filter: 'score' of rows.jsonl holds '3', not numbers",
    ]


def test_compressed_files_that_cannot_be_unpacked_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"text": "%d", "id": %d}\n' % (n, n) for n in range(1000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.jsonl.gz").write_bytes(b"not gzip at all")
    (tmp_path / "other.jsonl.xz").write_bytes(b"not xz at all")
    (tmp_path / "broken.jsonl.gz").write_bytes(whole[:200] + bytes(100) + whole[300:])
    with pytest.raises(InputError) as error:
        source("huggingface", paths=[str(tmp_path / "*")])
    named = [line.split(": cannot be read: ")[0] for line in error.value.errors]
    assert named == ["broken.jsonl.gz", "cut.jsonl.gz", "other.jsonl.gz", "other.jsonl.xz"]


def test_a_file_that_changed_since_the_first_look_is_named(folder: Path) -> None:
    sources = [
        source("huggingface", paths=[str(folder / "a" / "part.parquet")]),
        source("huggingface", paths=[str(folder / "rows.jsonl")]),
        source("files", paths=[str(folder / "one.txt")]),
    ]
    parquet(folder / "a" / "part.parquet", 0, 601)
    (folder / "rows.jsonl").unlink()
    (folder / "one.txt").write_text("Another one.\n")
    named = [r"part\.parquet: has \d+ bytes, but had \d+", r"rows\.jsonl: cannot be read", r"one\.txt: has 13 bytes"]
    for of, mistake in zip(sources, named, strict=True):
        again = open_source(of.config, index=json.loads(json.dumps(of.index())))  # which reads nothing yet
        with pytest.raises(InputError, match=mistake):
            list(again.documents())


def test_files_at_a_url_are_read_in_ranges(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder / "a" / "part.parquet"), "/sources/part.parquet")
    memory.put(str(folder / "rows.jsonl"), "/sources/rows.jsonl")
    of = source(
        "huggingface", paths=[f"memory://sources/{name}" for name in ("part.parquet", "rows.jsonl", "part.parquet")]
    )
    assert of.total == 603
    assert [document.id for document in of.documents(598, 601)] == ["doc-598", "doc-599", "7"]
    memory.rm("/sources", recursive=True)


def test_an_empty_source_has_no_units(tmp_path: Path) -> None:
    write_groups(tmp_path / "0.parquet", [], 0)
    (tmp_path / "0.jsonl").write_text("")
    for name in ("0.parquet", "0.jsonl"):
        of = source("huggingface", paths=[str(tmp_path / name)])
        assert of.total == 0
        assert list(of.units(10)) == []
        assert list(of.documents()) == []


def test_every_config_in_the_repository_is_valid() -> None:
    paths = sorted((Path(__file__).parents[2] / "configs/prepare").glob("*.yaml"))
    configs = {path.stem: load(PrepareConfig, path) for path in paths}
    assert {
        "quickstart",
        "text_files",
        "fineweb_edu_mini",
        "fineweb_edu_10bt",
        "fineweb_edu_100bt",
        "fineweb_edu_full",
    } <= set(configs)
    for name, config in configs.items():
        if name.startswith("fineweb"):
            assert config.encoder.name == "sonar"
            assert config.source.dataset is not None
    assert configs["fineweb_edu_mini"].source.take == 1000
