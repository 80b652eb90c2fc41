"""source.group_column: documents that share a value are on one side of the split."""

import json
import subprocess
import sys
from collections import defaultdict

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from machine import patience
from preparing import HashEncoder, written
from runs import SUPPORT

from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import SPLITS, open_dataset
from lcm_ds.data.shard import open_shard
from lcm_ds.errors import InputError
from lcm_ds.prepare.pipeline import prepare
from lcm_ds.prepare.state import split_of

BOOKS, CHAPTERS = 40, 5


@pytest.fixture
def chapters(tmp_path):
    """Parquet of 40 books with 5 chapters each, which do not lie together; two chapters have no book."""
    rows = [
        {"id": f"{book}-{chapter}", "book": f"Book {book}", "text": f"Chapter {chapter} of {book}. It rains. It ends."}
        for chapter in range(CHAPTERS)
        for book in range(BOOKS)
    ]
    rows[7]["book"], rows[8]["book"] = None, ""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chapters.parquet", row_group_size=30)
    return tmp_path / "chapters.parquet"


def config(chapters, output, **changes):
    source = {"name": "huggingface", "paths": [str(chapters)], "group_column": "book", **changes.pop("source", {})}
    return PrepareConfig(
        output=str(chapters.with_name(output)),
        source=source,
        encoder={"name": "sentence-transformers", "model": "minilm"},
        **{"documents_per_shard": 10, "validation": 0.2, "split_workers": 0, "processes": 1, **changes},
    )


def found(out):
    """(split, JSON) of each document."""
    metas = []
    for split in SPLITS:
        dataset = open_dataset(out / split)
        for shard in (open_shard(dataset, index) for index in range(len(dataset.shards))):
            metas += [(split, shard.meta(document)) for document in range(len(shard))]
    return metas


def test_no_group_is_on_both_sides_and_the_share_is_of_groups(chapters):
    prepare(config(chapters, "out"), HashEncoder())
    documents = found(chapters.with_name("out"))
    assert len(documents) == BOOKS * CHAPTERS
    splits_of = defaultdict(set)
    for split, meta in documents:
        # A document without a group is split by its id, as all are without the key.
        assert split == split_of(meta.get("group", meta["id"]), 0.2)
        splits_of[meta.get("group", meta["id"])].add(split)
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert {split for splits in splits_of.values() for split in splits} == set(SPLITS)
    assert [meta["id"] for _, meta in documents if "group" not in meta] == ["7-0", "8-0"]
    # By id the chapters of most books would fall apart.
    by_id = [{split_of(f"{book}-{chapter}", 0.2) for chapter in range(CHAPTERS)} for book in range(BOOKS)]
    assert sum(len(splits) > 1 for splits in by_id) > BOOKS / 2
    for split in SPLITS:
        dataset = open_dataset(chapters.with_name("out") / split)
        assert dataset.info.source["group_column"] == "book"
        assert dataset.has_groups


def test_without_the_key_the_split_and_the_documents_are_as_before(chapters):
    prepare(config(chapters, "out", source={"group_column": None}), HashEncoder())
    for split, meta in found(chapters.with_name("out")):
        assert split == split_of(meta["id"], 0.2)
        assert set(meta) == {"id", "source", "sentences"}
    dataset = open_dataset(chapters.with_name("out") / "train")
    assert "group_column" not in dataset.info.source
    assert not dataset.has_groups


@pytest.mark.slow
def test_ranks_with_processes_that_read_split_as_one_does(chapters, tmp_path):
    prepare(config(chapters, "one"), HashEncoder())
    several = config(chapters, "several", split_workers=1)
    (tmp_path / "several.yaml").write_text(yaml.safe_dump(several.model_dump(mode="json")))
    command = [sys.executable, str(SUPPORT / "preparing.py"), str(tmp_path / "several.yaml"), "0.01"]
    code = f"import sys; from lcm_ds.distributed.workers import run_local; sys.exit(run_local({command!r}, 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 0, done.stderr
    assert "in 2 processes" in done.stdout
    assert written(chapters.with_name("several")) == written(chapters.with_name("one"))


def test_groups_may_be_numbers_in_any_form(chapters, tmp_path):
    rows = [{"id": str(n), "site": n % 9, "text": f"Page {n}. It ends."} for n in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.csv").write_text("id,site,text\n" + "".join(f"{n},{n % 9},Page {n}. It ends.\n" for n in range(60)))
    splits = []
    for name in ("a.jsonl", "b.csv"):
        paths = [str(tmp_path / name)]
        prepare(config(chapters, name[0], source={"paths": paths, "group_column": "site"}), HashEncoder())
        splits.append({meta["id"]: (split, meta["group"]) for split, meta in found(tmp_path / name[0])})
    assert splits[0] == splits[1]
    assert all(split == split_of(group, 0.2) for split, group in splits[0].values())


def test_a_column_that_is_not_there_is_refused_in_one_line(chapters):
    with pytest.raises(InputError) as error:
        prepare(config(chapters, "out", source={"group_column": "novel"}), HashEncoder())
    assert error.value.errors == [
        "source.group_column: chapters.parquet has no column 'novel'; its columns: id, book, text"
    ]
    assert not chapters.with_name("out").exists()


@pytest.mark.parametrize("name", ["sample", "files"])
def test_sources_without_columns_refuse_it(chapters, name):
    with pytest.raises(ValueError, match=f"group_column: only for sources huggingface and concepts; {name} has no"):
        config(chapters, "out", source={"name": name})


def test_a_dataset_is_not_continued_with_another_column(chapters):
    prepare(config(chapters, "out"), HashEncoder())
    with pytest.raises(InputError, match=r"source.group_column: was 'book' when this dataset was started"):
        prepare(config(chapters, "out", source={"group_column": None}), HashEncoder())
