"""Documents of a group choose penalties and the best baseline together, or are fitted together."""

import numpy as np
import pytest
import torch

from lcm_ds.baselines.held_out import HELD_OUT, group_is_held_out, held_out_of, is_held_out
from lcm_ds.baselines.linear import TrainingSums, training_targets
from lcm_ds.baselines.targets import TargetReader
from lcm_ds.config import DataConfig
from lcm_ds.data.format import DatasetInfo, commit, finish, open_dataset, write_normalizer
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.evaluate.baselines import fit_baselines
from lcm_ds.model.normalizer import Normalizer

EMBED_DIM, BOOKS, CHAPTERS, LENGTH = 8, 40, 12, 6
CPU = torch.device("cpu")


def group_of(book, chapter):
    return None if book == BOOKS - 1 else f"book {book}"  # the chapters of the last book have none


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A shard has a chapter of each book, in which every concept is the number of the book."""
    folder = tmp_path_factory.mktemp("books")
    for chapter in range(CHAPTERS):
        some = [
            Document(f"{book}", f"{book}-{chapter}", "made", ["A."] * LENGTH,
                     np.full((LENGTH, EMBED_DIM), book, np.float32), group=group_of(book, chapter))
            for book in range(BOOKS)
        ]  # fmt: skip
        commit(folder, write_shard(folder, f"{chapter:02d}.tar", some, "float32"))
    write_normalizer(folder, np.zeros(EMBED_DIM), np.ones(EMBED_DIM), {})
    encoder = {"name": "synthetic", "model": "books"}
    finish(folder, DatasetInfo(encoder=encoder, embed_dim=EMBED_DIM, dtype="float32", source={"group_column": "book"}))
    return open_dataset(folder)


def held_out_books():
    return {book for book in range(BOOKS - 1) if group_is_held_out(f"book {book}")}


def test_no_book_is_on_both_sides(books):
    documents = torch.arange(BOOKS * CHAPTERS)
    chosen = held_out_of(books)(documents).view(CHAPTERS, BOOKS)
    by_book = chosen[:, : BOOKS - 1]
    assert torch.equal(by_book, by_book[:1].expand_as(by_book))
    assert set(by_book[0].nonzero().flatten().tolist()) == held_out_books()
    assert 0 < len(held_out_books()) < BOOKS / 3
    # Chapters without a book are held out one by one.
    alone = documents.view(CHAPTERS, BOOKS)[:, BOOKS - 1]
    assert torch.equal(chosen[:, BOOKS - 1], is_held_out(alone))
    # The answer does not depend on what is asked together.
    shuffled = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0))
    assert torch.equal(held_out_of(books)(shuffled), chosen.flatten()[shuffled])


def test_one_group_in_ten_is_held_out_whatever_their_names():
    share = sum(group_is_held_out(f"https://example.org/{number}") for number in range(20_000)) / 20_000
    assert share == pytest.approx(1 / HELD_OUT, rel=0.1)


def test_linear_baselines_and_the_nearest_neighbour_hold_out_books(books):
    data = DataConfig(train=str(books.path), row_length=5 * LENGTH, max_segment=LENGTH)  # no chapter is cut
    reader, normalizer = TargetReader(data), Normalizer(EMBED_DIM)
    seen = {True: set(), False: set()}
    for targets, chooses in training_targets(reader, [books], data.train, normalizer, 10_000):
        for chosen in (True, False):
            seen[chosen] |= set(targets.truth[chooses == chosen, 0].long().tolist()) - {BOOKS - 1}
    assert seen[True] == held_out_books()
    assert seen[False] == set(range(BOOKS - 1)) - held_out_books()
    sums = TrainingSums.from_targets(
        training_targets(reader, [books], data.train, normalizer, 10_000), EMBED_DIM, CPU, Ranks().all_reduce
    )
    baselines = fit_baselines(reader, [books], data.train, normalizer, Ranks())
    alone = int(is_held_out(torch.arange(CHAPTERS) * BOOKS + BOOKS - 1).sum())
    expected = (len(held_out_books()) * CHAPTERS + alone) * (LENGTH - 1)
    assert baselines.held_out == sums.held_out.count == expected
    # A chapter's neighbours in its own book would have an error of 0: the nearest in other books has at least 1.
    others = (expected - alone * (LENGTH - 1)) / expected
    assert baselines.held_out_mse["nearest in the training data"] >= others
