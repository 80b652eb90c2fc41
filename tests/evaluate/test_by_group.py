"""The bootstrap resamples what documents share, if the dataset names it."""

import numpy as np
import pytest
import torch

from lcm_ds.baselines.linear import COPY, MEAN
from lcm_ds.config import DataConfig
from lcm_ds.data.format import DatasetInfo, commit, finish, open_dataset, write_normalizer
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.evaluate.baselines import NEAREST
from lcm_ds.evaluate.compute import MODEL, measure
from lcm_ds.evaluate.groups import Groups
from lcm_ds.evaluate.report import print_tables
from lcm_ds.evaluate.task import EvaluationTask
from lcm_ds.evaluate.text_metrics import TextMetrics
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM

EMBED_DIM, BOOKS, CHAPTERS = 8, 6, 30
ENCODER = {"name": "synthetic", "model": "books"}


def make(folder, column):
    """Books that differ in the spread of their concepts, all chapters of a book alike; a shard has one of each book."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for chapter in range(CHAPTERS):
        some = []
        for book in range(BOOKS):
            concepts = random.normal(size=(6, EMBED_DIM)).astype(np.float32) * (0.5 + book / 3)
            group = f"book {book}" if column and (chapter, book) != (0, 0) else None
            some.append(Document(f"{book}", f"{book}-{chapter}", "made", ["A."] * 6, concepts, group=group))
        commit(folder, write_shard(folder, f"{chapter:02d}.tar", some, "float32"))
    write_normalizer(folder, np.zeros(EMBED_DIM), np.ones(EMBED_DIM), {})
    source = {"group_column": "book"} if column else {}
    finish(folder, DatasetInfo(encoder=ENCODER, embed_dim=EMBED_DIM, dtype="float32", source=source))
    return folder


def measured(folder):
    data = DataConfig(train=str(folder), row_length=12, max_segment=8)
    config = BaseLCMConfig(embed_dim=EMBED_DIM, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2)  # fmt: skip
    torch.manual_seed(0)
    dataset = open_dataset(folder)
    task = EvaluationTask(data, data.train, [dataset], dataset, str(folder))
    return measure(BaseLCM(config).eval(), task, Ranks(), TextMetrics(None, None, None, ()), 8)


def width(result):
    low, high = result["intervals"][MODEL]["normalised"]["mse"]
    return high - low


def test_documents_of_a_group_are_drawn_together(tmp_path, capsys):
    by_book, by_chapter = measured(make(tmp_path / "by_book", True)), measured(make(tmp_path / "by_chapter", False))
    assert by_book["groups"] == BOOKS + 1  # one chapter has no book
    assert "groups" not in by_chapter
    for name in (MODEL, MEAN, COPY, NEAREST):  # ridges are chosen on other documents: on held-out books
        own = by_book["scores"][name]["raw"]
        assert own == pytest.approx(by_chapter["scores"][name]["raw"], rel=1e-5)
    # 180 chapters of six books say as much of other books as six draws do: the interval is √30 times as wide.
    assert width(by_book) == pytest.approx(width(by_chapter) * CHAPTERS**0.5, rel=0.4)
    print_tables("made", {**by_book, "dataset": "made"})
    assert "180 documents in 7 groups, " in capsys.readouterr().out


def test_groups_are_numbered_in_the_order_of_the_shards(tmp_path):
    groups = Groups(open_dataset(make(tmp_path / "books", True)))
    assert groups.of(torch.tensor([0, 1, 5, 6, 7, 11])).tolist() == [0, 1, 5, 6, 1, 5]
    own = Groups(open_dataset(make(tmp_path / "chapters", False)))
    assert own.count == BOOKS * CHAPTERS
    assert own.of(torch.tensor([0, 7])).tolist() == [0, 7]
