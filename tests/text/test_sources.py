"""Sources: a stable order, any range, ids, and mistakes told before an hour is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lcm_ds.config import SentencesConfig, SourceConfig
from lcm_ds.errors import InputError
from lcm_ds.text.prose import is_prose, prose
from lcm_ds.text.sentences import Splitter
from lcm_ds.text.sources import Source, TextDocument, open_source


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
    assert len(error.value.mistakes) == 2
    assert "source.text_column: part.parquet has no column 'content'; its columns: id, text" in error.value.mistakes
    with pytest.raises(InputError, match=r"source\.id_column: rows\.jsonl has no column 'key'"):
        source("huggingface", paths=[str(folder / "rows.jsonl")], id_column="key")
    parquet(folder / "numbers.parquet", 0, 3, text=[1, 2, 3])
    with pytest.raises(InputError, match=r"'text' of numbers\.parquet holds int64, not strings"):
        source("huggingface", paths=[str(folder / "numbers.parquet")])


def test_a_limit_in_sentences_is_for_the_sample_alone(folder: Path) -> None:
    with pytest.raises(ValueError, match="take_sentences is for the source sample"):
        source("files", paths=[str(folder / "*.txt")], take_sentences=5)


def test_missing_and_unreadable_files_are_all_named_at_once(folder: Path) -> None:
    (folder / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    (folder / "notes.csv").write_text("text\n")
    with pytest.raises(InputError) as error:
        source("huggingface", paths=[str(folder / "none-*.parquet"), str(folder), "absent.jsonl"])
    assert error.value.mistakes == [
        f"source.paths: {folder}/none-*.parquet: no such file",
        f"source.paths: {folder} is a folder; name files, or a glob such as {folder}/*",
        "source.paths: absent.jsonl: no such file",
    ]
    with pytest.raises(InputError) as error:
        source("huggingface", paths=[str(folder / "broken.parquet"), str(folder / "notes.csv")])
    assert "not a parquet file" in error.value.mistakes[0]
    assert "neither parquet nor JSONL" in error.value.mistakes[1]
    (folder / "broken.jsonl").write_text('{"text": "ok", "id": 1}\n{"text": oh')
    with pytest.raises(InputError, match=r"broken\.jsonl: cannot be read"):
        list(source("huggingface", paths=[str(folder / "broken.jsonl")]).documents())
    (folder / "latin.txt").write_bytes("Über".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt: not UTF-8 text: .* at byte 0"):
        list(source("files", paths=[str(folder / "latin.txt")]).documents())


def test_a_dataset_of_the_hub_that_cannot_be_reached_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="source: no/such-dataset: cannot be opened"):
        source("huggingface", dataset="no/such-dataset")


# --- the sample -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample() -> Source:
    config = SourceConfig.model_validate({"name": "sample", "take_sentences": 2500})
    return open_source(config, SentencesConfig.model_validate({"max_characters": 200}))


def test_no_sentence_of_the_sample_is_in_two_documents(sample: Source) -> None:
    """By the splitter that makes the concepts; so whichever documents validate, training has not seen them."""
    splitter = Splitter(SentencesConfig.model_validate({"max_characters": 200}))
    sentences = [sentence for document in sample.documents() for sentence in splitter.split(document.text)]
    assert len(sentences) == len(set(sentences))
    assert 2500 <= len(sentences) < 4000


def test_the_sample_mixes_its_origins_and_never_changes(sample: Source) -> None:
    documents = list(sample.documents())
    assert {document.source for document in documents} == {"python-topics", "python", "torch"}
    assert len({document.id for document in documents}) == len(documents) == sample.total
    shorter = source("sample", take_sentences=500)
    assert [document.id for document in shorter.documents()] == [document.id for document in documents][: shorter.total]
    every_range_is_that_part_of_the_whole(sample, 17)
    assert sample.describe()["take_sentences"] == 2500


def test_the_sample_is_english_prose(sample: Source) -> None:
    text = "\n".join(document.text for document in sample.documents())
    for code in (">>>", "::", "```", "==", "def "):
        assert text.count(code) < 10
    words = text.lower().split()
    assert words.count("the") > 0.03 * len(words)


def test_prose_leaves_code_lists_and_markup_behind() -> None:
    docstring = """
    Return the sum of *all* values, see :func:`~math.fsum`.

    .. versionadded:: 3.2
       Nothing of this stays.

    .. note:: The order does ``not`` matter here.

    It is used like this::

        total = Add the values
        and more

    >>> add([1, 2])
    This is the output.

    Args:
        values (list): The values that are added.
    Then the [1]_ result is given back.

    Parameters
    ----------
    x : int
        The number of times.
    """
    assert prose(docstring).split("\n\n") == [
        "Return the sum of all values, see math.fsum.",
        "The order does not matter here.",
        "It is used like this::",
        "Then the result is given back.",
    ]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Return a copy of the list with its items reversed.", True),
        ('The "in" operator tests whether an item is there.', True),
        ("return a copy of the list.", False),
        ("Return a copy of the list", False),
        ("See below.", False),
        ("X = the_value of [this, that] {and} more.", False),
        ("Foo_bar baz_qux quux_corge the_grault garply_waldo.", False),
    ],
)
def test_what_counts_as_an_english_sentence(sentence: str, expected: bool) -> None:
    assert is_prose(sentence) is expected
