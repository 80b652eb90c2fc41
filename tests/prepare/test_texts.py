"""Whatever a text holds, it becomes sentences and concepts, or is refused and counted; what cannot be read is named."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from preparing import HashEncoder

from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import open_dataset
from lcm_ds.data.shard import open_shard
from lcm_ds.errors import InputError
from lcm_ds.prepare.pipeline import prepare
from lcm_ds.prepare.state import read_units
from lcm_ds.text.splitter import Splitter

PARAGRAPH = "It is a truth that is told again and again. Nobody doubts it any more, and yet it has to be said. "


def prepared(tmp_path, texts, **changes):
    """The sentences of each document, by id, once the texts have been prepared from parquet."""
    path = tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts.values()), "id": list(texts)}), path)
    prepare(config_for(tmp_path, path, **changes), HashEncoder())
    dataset = open_dataset(tmp_path / "out/train")
    shards = [open_shard(dataset, index) for index in range(len(dataset.shards))]
    return {
        meta["id"]: meta["sentences"][:-1]
        for shard in shards
        for document in range(len(shard))
        if len((meta := shard.meta(document))["sentences"]) == shard.lengths[document]
    }, dataset


def config_for(tmp_path, path, **changes):
    return PrepareConfig(
        **{
            "output": str(tmp_path / "out"),
            "source": {"name": "huggingface", "paths": [str(path)]},
            "encoder": {"name": "sentence-transformers", "model": "minilm"},
            "validation": 0,
            "min_sentences": 1,
            "split_workers": 0,
            **changes,
        }
    )


def test_lists_of_sentences_are_not_split_and_cut_only_on_request(tmp_path):
    long = "word " * 79 + "word"
    lists = {"a": ["One. Two.", long, "Three\x00\ud800 \tmore"], "b": ["Four.", "", "Five."]}
    lists = {id: [each.encode("utf-8", "replace").decode() for each in some] for id, some in lists.items()}
    (tmp_path / "as").mkdir()
    found, dataset = prepared(tmp_path / "as", lists)
    assert found == {"a": ["One. Two.", long, "Three ? more"], "b": ["Four.", "Five."]}
    assert dataset.info.splitter == {"splitter": "none", "language": "en"}
    (tmp_path / "cut").mkdir()
    sentences = {"cut_lists": True, "split_by": "SaT sat-12l-sm", "max_characters": 200}
    found, dataset = prepared(tmp_path / "cut", lists, sentences=sentences)
    assert [len(sentence) for sentence in found["a"]] == [9, 199, 199, 12]
    assert dataset.info.splitter == {
        "splitter": "none", "language": "en", "split_by": "SaT sat-12l-sm", "max_characters": 200
    }  # fmt: skip


def test_a_text_that_a_pipeline_cannot_split_is_named_and_does_not_end_the_preparation(tmp_path, monkeypatch):
    split = Splitter.split

    def fails(self, text):
        if "odd" in text:
            raise RuntimeError("Input is too long, it can't be more than 49149 bytes")
        return split(self, text)

    monkeypatch.setattr(Splitter, "split", fails)
    found, dataset = prepared(tmp_path, {"a": "One. Two.", "b": "An odd one.", "c": "Three."})
    assert list(found) == ["a", "c"]
    assert dataset.info.source["refused"] == {"unreadable": 1}
    [unit] = read_units(tmp_path / "out")
    assert unit.unreadable == [
        "texts.parquet: b: cannot be split into sentences: Input is too long, it can't be more than 49149 bytes"
    ]


def test_texts_among_lists_are_split(tmp_path):
    rows = [{"id": "a", "text": "One. Two."}, {"id": "b", "text": ["One. Two.", "Three \ud800."]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(config_for(tmp_path, tmp_path / "rows.jsonl", sentences={"split_by": "hand"}), HashEncoder())
    dataset = open_dataset(tmp_path / "out/train")
    shard = open_shard(dataset, 0)
    found = [shard.meta(document)["sentences"][:-1] for document in range(2)]
    assert found == [["One.", "Two."], ["One. Two.", "Three ."]]
    assert dataset.info.splitter["library"].startswith("spacy")
    assert dataset.info.splitter["split_by"] == "hand"


def test_control_characters_emoji_and_scripts_from_right_to_left_come_through(tmp_path):
    texts = {
        "control": "One\x00 is\x07 here.\x1b Two is\u200b here.\x7f",
        "emoji": "What a day! 🌞 We went to the 🏖️ beach 👨‍👩‍👧. It was fun 🎉!",
        "hebrew": "השמש זורחת היום. אנחנו הולכים לים!",
        "arabic": "هل تشرق الشمس اليوم؟ نحن ذاهبون إلى البحر.",
    }
    found, _ = prepared(tmp_path, texts)
    assert found["control"] == ["One is here.", "Two is here."]
    assert "".join(found["emoji"]).replace(" ", "") == texts["emoji"].replace(" ", "")
    assert found["hebrew"] == ["השמש זורחת היום.", "אנחנו הולכים לים!"]
    assert found["arabic"] == ["هل تشرق الشمس اليوم؟", "نحن ذاهبون إلى البحر."]


def test_a_document_of_5_mb_and_a_word_of_100000_characters_lose_nothing(tmp_path):
    texts = {"long": PARAGRAPH * (5_000_000 // len(PARAGRAPH)), "word": "x" * 100_000, "short": PARAGRAPH}
    found, dataset = prepared(tmp_path, texts)
    assert " ".join(found["long"]) == texts["long"].strip()
    assert "".join(found["word"]) == texts["word"]
    assert {len(piece) for piece in found["word"]} == {250}
    assert dataset.info.totals.concepts == sum(len(sentences) + 1 for sentences in found.values())


def test_a_document_with_too_many_sentences_is_refused_and_the_next_is_kept(tmp_path):
    found, dataset = prepared(tmp_path, {"long": PARAGRAPH * 100, "short": PARAGRAPH}, max_sentences=100)
    assert list(found) == ["short"]
    assert dataset.info.source["refused"] == {"too_many_sentences": 1}


def test_a_filter_that_leaves_no_row_out_says_so(tmp_path, capsys):
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [PARAGRAPH], "id": ["a"], "score": [3]}), tmp_path / "rows.parquet"
    )
    paths = str(tmp_path / "rows.parquet")  # one path stands for a list of one
    source = {"name": "huggingface", "paths": paths, "filter": {"score": {"min": 3}}}
    prepare(config_for(tmp_path, "", source=source), HashEncoder())
    assert open_dataset(tmp_path / "out/train").info.source["refused"] == {"filtered": 0}
    assert ", 0 refused (filtered); " in capsys.readouterr().out


def test_rows_that_the_source_leaves_out_are_counted_by_reason(tmp_path):
    columns = {
        "text": [PARAGRAPH] * 5,
        "id": list("abcde"),
        "score": [1, 3, 4, 3, None],
        "lang": ["en"] * 3 + ["de", "en"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    source = {
        "name": "huggingface",
        "paths": [str(tmp_path / "rows.parquet")],
        "filter": {"score": {"min": 3}},
        "language_column": "lang",
    }
    prepare(config_for(tmp_path, "", source=source), HashEncoder())
    source = open_dataset(tmp_path / "out/train").info.source
    assert (source["given"], source["kept"]["train"]) == (5, 2)
    assert source["refused"] == {"filtered": 2, "language": 1}


def test_what_cannot_be_read_is_named_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [PARAGRAPH], "id": ["a"]}), path)
    original = path.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(original[: len(original) // 2])
    with pytest.raises(InputError, match=r"cut\.parquet: not a parquet file that can be read"):
        prepare(config_for(tmp_path, tmp_path / "cut.parquet"), HashEncoder())
    source = {"name": "huggingface", "paths": [str(path)], "text_column": "content"}
    with pytest.raises(InputError, match=r"source\.text_column: texts\.parquet has no column 'content'"):
        prepare(config_for(tmp_path, path, source=source), HashEncoder())
    assert not (tmp_path / "out").exists()
    broken = bytearray(original)
    broken[4:80] = bytes(76)  # the pages; the footer says that all is well
    path.write_bytes(broken)
    with pytest.raises(InputError, match=r"texts\.parquet: cannot be read"):
        prepare(config_for(tmp_path, path), HashEncoder())


def test_an_empty_source_is_said_to_be_empty(tmp_path):
    path = tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], "string"), "id": pyarrow.array([], "string")}), path
    )
    with pytest.raises(InputError, match=r"none of 0 documents is left to train on \(the source is empty\)"):
        prepare(config_for(tmp_path, path), HashEncoder())
