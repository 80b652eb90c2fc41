"""Metrics from sums over groups of documents, and their bootstrap intervals."""

import pytest
import torch

from lcm_ds.evaluate.accumulator import BUCKETS, GROUPS, Accumulator, bootstrap_weights, bucket_of, interval

CPU = torch.device("cpu")


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full():
    return torch.ones(1, GROUPS, dtype=torch.float64)


def test_means_do_not_depend_on_the_batches_and_leave_out_what_is_not_known():
    values, documents = drawn(0, 900), torch.arange(900)
    values[::7] = torch.nan
    together, apart = Accumulator(CPU), Accumulator(CPU)
    together.add("x", values, documents)
    for part in torch.arange(900).split(130):
        apart.add("x", values[part], documents[part])
    assert together.means(full())["x"].item() == pytest.approx(values.nanmean().item())
    assert torch.allclose(apart.means(full())["x"], together.means(full())["x"])
    assert int(together.counts("x")) == 900 - 129


def test_buckets_of_positions_double():
    positions = torch.tensor([1, 2, 3, 4, 5, 8, 9, 512, 513, 9999])
    assert bucket_of(positions).tolist() == [0, 1, 2, 2, 3, 3, 4, 9, 10, 10]
    assert [BUCKETS[number] for number in (0, 1, 2, 3, 10)] == [(1, 1), (2, 2), (3, 4), (5, 8), (513, None)]
    tally = Accumulator(CPU)
    tally.add("x", torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0, 1, 0]), bucket_of(torch.tensor([3, 4, 1])))
    means = tally.means(full())["x"][0]
    assert means[2] == 2.0
    assert means[0] == 10.0
    assert means[1].isnan()


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = drawn(1, GROUPS)
    tally = Accumulator(CPU)
    tally.add("x", values, torch.arange(GROUPS))
    low, high = interval(tally.means(bootstrap_weights(tally.groups))["x"])
    error = 1.96 * values.std().item() / GROUPS**0.5
    assert low == pytest.approx(values.mean().item() - error, abs=0.15 * error)
    assert high == pytest.approx(values.mean().item() + error, abs=0.15 * error)


def test_a_bucket_of_one_document_has_a_mean_and_no_interval():
    tally = Accumulator(CPU)
    tally.add(
        "x", torch.tensor([1.0, 3.0, 10.0, 12.0]), torch.tensor([0, 1, 0, 0]), bucket_of(torch.tensor([3, 4, 1, 1]))
    )
    assert tally.means(full())["x"][0, 0] == 11.0
    replicates = tally.means(bootstrap_weights(tally.groups))["x"]
    assert interval(replicates[:, 0]) is None
    assert interval(replicates[:, 2]) == [1.0, 3.0]


def test_targets_of_one_document_are_drawn_together():
    # 64 documents of 50 targets each, which are all the same: no more is known than of 64 targets.
    by_document = drawn(2, 64)
    one, fifty = Accumulator(CPU), Accumulator(CPU)
    one.add("x", by_document, torch.arange(64))
    fifty.add("x", by_document.repeat(50), torch.arange(64).repeat(50))
    assert interval(fifty.means(bootstrap_weights(fifty.groups))["x"]) == pytest.approx(
        interval(one.means(bootstrap_weights(one.groups))["x"])
    )


def test_what_is_drawn_is_always_the_same_and_as_many_as_there_are():
    groups = torch.zeros(GROUPS, dtype=torch.bool)
    groups[[3, 70, 200]] = True
    weights = bootstrap_weights(groups)
    assert torch.equal(weights, bootstrap_weights(groups))
    assert (weights.sum(1) == 3).all()
    assert weights[:, ~groups].sum() == 0
    assert len(weights.unique(dim=0)) == 10  # ways to draw three of three
    groups[[3, 70]] = False
    assert bootstrap_weights(groups) is None


def test_a_difference_of_the_same_documents_is_known_better_than_either():
    documents, hard = torch.arange(200), 5 * drawn(3, 200)
    ours, theirs = Accumulator(CPU), Accumulator(CPU)
    ours.add("mse", hard, documents)
    theirs.add("mse", hard + 0.2 + 0.1 * drawn(4, 200), documents)
    weights = bootstrap_weights(ours.groups)
    low, high = interval(ours.means(weights)["mse"] - theirs.means(weights)["mse"])
    assert -0.3 < low < high < -0.1
    separate = interval(ours.means(weights)["mse"])
    assert separate[1] - separate[0] > 10 * (high - low)


def test_variances_are_those_of_the_vectors():
    vectors, documents = drawn(5, 500, 4) + 3.0, torch.arange(500)
    tally = Accumulator(CPU)
    for part in torch.arange(500).split(120):
        tally.add_vectors("raw", vectors[part], documents[part])
    assert tally.variances(full())["raw"].item() == pytest.approx(vectors.var(dim=0, correction=0).sum().item())


def test_the_effective_rank_has_an_interval_around_it():
    documents = torch.arange(4000)
    tally, constant = Accumulator(CPU), Accumulator(CPU)
    tally.add_spectrum(drawn(6, 4000, 6), documents)
    rank, (low, high) = tally.effective_rank()
    assert 5.9 < rank <= 6.0
    assert 5.9 < low < rank < high
    constant.add_spectrum(torch.full((4000, 6), 0.3), documents)
    assert constant.effective_rank() == (None, None)
    assert Accumulator(CPU).effective_rank() == (None, None)


def test_the_interval_of_the_effective_rank_is_as_wide_as_the_rank_is_uncertain():
    spread = torch.linspace(1, 0.05, 30, dtype=torch.float64)
    ranks, widths = [], []
    for seed in range(40):
        tally = Accumulator(CPU)
        tally.add_spectrum(drawn(seed, 1000, 30) * spread, torch.arange(1000))
        rank, (low, high) = tally.effective_rank()
        ranks.append(rank)
        widths.append((high - low) / (2 * 1.96))
    assert sum(widths) / len(widths) == pytest.approx(torch.tensor(ranks).std().item(), rel=0.25)
