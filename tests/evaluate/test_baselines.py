"""Baselines are fitted on training data, which also chooses the best one; they are exact solutions."""

import math

import pytest
import torch

from lcm_ds.baselines.held_out import is_held_out
from lcm_ds.baselines.linear import (
    BEFORE,
    BLOCK,
    CONTEXT,
    LAST,
    PENALTIES,
    TILE,
    Linear,
    Sums,
    TrainingSums,
    best_of,
)
from lcm_ds.baselines.targets import Rows, Targets
from lcm_ds.data.batch import Batch
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.evaluate.baselines import BF16_ERROR, Baselines, NearestNeighbour
from lcm_ds.model.normalizer import Normalizer

CPU = torch.device("cpu")


def made(n, seed, noise=0.1, dims=6, of_context=0.0, of_before=0.0):
    """Targets that are a fixed linear map of the last concept plus noise, and shares of the context's mean and of the
    concept before the last.
    """
    world = torch.Generator().manual_seed(99)
    matrix = torch.randn(dims, dims, generator=world) / dims**0.5
    draw = torch.Generator().manual_seed(seed)
    last, before, context, other = torch.randn(4, n, dims, generator=draw)
    truth = last @ matrix + 2.0 + of_context * context + of_before * before + noise * other
    numbers = torch.arange(n)
    return Targets(truth, last, before, context, numbers, torch.ones_like(numbers)), matrix


def trained(training):
    pairs = [(targets, is_held_out(targets.document)) for targets in training]
    return TrainingSums.from_targets(pairs, 6, CPU, Ranks().all_reduce)


def mse(predicted, truth):
    return (predicted - truth).square().mean().item()


def test_baselines_do_what_their_names_say():
    training = [made(256, seed)[0] for seed in range(20)]
    fresh, _ = made(1000, 500)
    sums = trained(training)
    fitted = sums.predictors()
    assert sums.all.count == 20 * 256
    assert list(fitted) == [
        "mean concept",
        "copy of the last",
        "ridge from the last",
        "ridge from the context's mean",
        "ridge from last and mean",
        "ridge from last two and mean",
    ]
    mean = torch.cat([targets.truth for targets in training]).mean(0)
    assert torch.allclose(fitted["mean concept"](fresh), mean.expand(1000, 6), atol=1e-4)
    assert torch.equal(fitted["copy of the last"](fresh), fresh.last)
    # At the noise floor, which is 0.1²; the context's mean tells nothing, so its ridge is the mean.
    assert mse(fitted["ridge from the last"](fresh), fresh.truth) == pytest.approx(0.01, rel=0.1)
    of_mean = mse(fitted["mean concept"](fresh), fresh.truth)
    assert mse(fitted["ridge from the context's mean"](fresh), fresh.truth) == pytest.approx(of_mean, rel=0.02)


@pytest.mark.parametrize(
    ("shares", "matters"),
    [
        ({}, {LAST}),
        ({"of_context": 0.5}, {LAST, CONTEXT}),
        ({"of_context": 0.5, "of_before": 0.5}, {LAST, BEFORE, CONTEXT}),
    ],
)
def test_the_best_is_one_that_has_all_that_matters(shares, matters):
    fitted = trained([made(256, seed, **shares)[0] for seed in range(3)]).predictors()
    assert set(fitted[best_of(fitted)].inputs) >= matters
    fresh, _ = made(1000, 500, **shares)
    assert mse(fitted[best_of(fitted)](fresh), fresh.truth) == pytest.approx(0.01, rel=0.1)  # the noise


def test_every_error_is_that_on_the_held_out_documents_of_what_is_fitted_to_the_others():
    targets, _ = made(400, 3, of_context=0.3)
    chooses = is_held_out(targets.document)
    assert 20 < chooses.sum() < 60
    fitted = trained([targets]).predictors()
    truth, others = targets.truth[chooses], targets.truth[~chooses]
    assert fitted["mean concept"].held_out_mse == pytest.approx(mse(others.mean(0), truth), rel=1e-5)
    assert fitted["copy of the last"].held_out_mse == pytest.approx(mse(targets.last[chooses], truth), rel=1e-5)
    both = torch.cat([targets.last, targets.context], 1)
    separate = Sums(12, 6)
    separate.add(both[~chooses], others)
    errors = []
    for penalty in PENALTIES:
        weights = separate.solve(penalty)
        errors.append(mse(both[chooses].double() @ weights[:-1] + weights[-1], truth))
    of_zero = targets.truth.square().mean().item()  # products in fp32 err by 1e-7 of it
    assert fitted["ridge from last and mean"].held_out_mse == pytest.approx(min(errors), abs=3e-7 * of_zero)
    # What is used is fitted to all of them.
    weights_without_held_out = separate.solve(PENALTIES[errors.index(min(errors))])
    separate.add(both[chooses], truth)
    full = separate.solve(PENALTIES[errors.index(min(errors))])
    found = fitted["ridge from last and mean"].weights
    off = (found - full).abs().max().item()  # products in fp32, of values up to 4, summed in another order
    assert off < 1e-5 < (found - weights_without_held_out).abs().max().item()


def test_without_documents_to_hold_out_the_data_that_is_fitted_chooses():
    targets, _ = made(300, 4)
    one = Targets(*(getattr(targets, key) for key in ("truth", "last", "before", "context")),
                  torch.zeros_like(targets.document), targets.position)  # fmt: skip
    sums = trained([one])
    assert not sums.chooses
    predictors = sums.predictors()
    assert mse(predictors["ridge from the last"](one), one.truth) == pytest.approx(0.01, rel=0.2)
    assert all(isinstance(each, Linear) and each.held_out_mse >= 0 for each in predictors.values())


def test_the_best_baseline_is_never_told_by_the_validation_data():
    errors = {"mean concept": 0.9, "ridge from the last": 0.7, "nearest in the training data": 1.5}
    assert Baselines({}, held_out_mse=errors).best == "ridge from the last"
    assert Baselines({"copy of the last": lambda targets: targets.last}).best == "copy of the last"


def test_what_a_target_is_predicted_from_is_of_its_own_segment():
    # One row of two segments, of three concepts and two, and a place without any.
    concepts = torch.tensor([[[1.0], [2.0], [6.0], [10.0], [20.0], [0.0]]])
    ids = torch.tensor([[0, 0, 0, 1, 1, -1]], dtype=torch.int32)
    origins = torch.tensor([[[7, 0], [7, 1], [7, 2], [8, 0], [8, 1], [-1, -1]]])
    targets = Rows.from_batch(Batch(concepts, ids, 0, 0, 0, origins=origins), Normalizer(1), 8).targets
    assert targets.truth.flatten().tolist() == [2, 6, 20]
    assert targets.last.flatten().tolist() == [1, 2, 10]
    assert targets.before.flatten().tolist() == [0, 1, 0]
    assert targets.context.flatten().tolist() == [1, 1.5, 10]
    assert targets.document.tolist() == [7, 7, 8]


def test_the_squared_error_of_sums_is_that_of_the_data():
    targets, _ = made(300, 1)
    sums = Sums(6, 6)
    sums.add(targets.last, targets.truth)
    weights = sums.solve(0.1)
    predicted = targets.last.double() @ weights[:-1] + weights[-1]
    of_zero = targets.truth.square().sum().item()  # products in fp32 err by 1e-7 of it
    assert sums.squared_error(weights) == pytest.approx(
        (predicted - targets.truth).square().sum().item(), abs=3e-7 * of_zero
    )


@pytest.mark.parametrize("inputs", [6, TILE - 1, 2 * TILE + 5])
def test_sums_are_those_of_all_samples_in_fp64(inputs):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(BLOCK + 7, inputs, generator=draw), torch.randn(BLOCK + 7, 3, generator=draw)
    sums = Sums(inputs, 3)
    sums.add(x, y)
    exact = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    assert torch.allclose(sums.xx, exact.T @ exact, rtol=0, atol=2e-6 * len(x))
    assert torch.allclose(sums.xy, exact.T @ y.double(), rtol=0, atol=2e-6 * len(x))
    assert sums.count == len(x)


def test_a_small_penalty_recovers_the_map():
    targets, matrix = made(5000, 2, noise=0.0)
    weights = trained([targets]).predictors(["ridge from the last"])["ridge from the last"].weights
    assert torch.allclose(weights[:-1].float(), matrix, atol=1e-2)
    assert torch.allclose(weights[-1].float(), torch.full((6,), 2.0), atol=1e-2)


def batch(rows, document=0):
    """A batch of the loader from rows of (segment, concept), all of one document."""
    ids = torch.tensor([[segment for segment, _ in row] for row in rows], dtype=torch.int32)
    origins = torch.full((*ids.shape, 2), document)
    concepts = torch.tensor([[concept for _, concept in row] for row in rows]).half()
    return Batch(concepts, ids, 0, 0, 0, origins=origins)


def test_the_nearest_in_the_training_data_says_what_followed_it_there():
    east, north, west, south = [1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, -0.5]
    normalizer = Normalizer(2)
    normalizer.set([0.5, 0.0], [2.0, 1.0])
    # Of three rows the first has two segments. West ends one twice: nothing followed it.
    nothing = (-1, [0.0, 0.0])
    training = [
        batch([[(0, east), (0, north), (0, west), (1, south)], [(0, south), (0, west), nothing, nothing]]),
        batch([[(0, east), (0, south), (0, south), (0, south)]]),
    ]
    nearest = NearestNeighbour([(each, is_held_out) for each in training], normalizer)
    assert len(nearest) == 6
    last = torch.tensor([[0.9, 0.1], [0.3, 5.0], [-1.0, -1.1]])
    zeros = torch.zeros(3, dtype=torch.long)
    targets = Targets(last, normalizer.normalize(last), last, last, zeros, zeros)
    # by direction: east, which north followed first; north; south, which west followed first
    expected = torch.tensor([north, west, west])
    assert torch.allclose(normalizer.denormalize(nearest(targets)), expected)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_nearest_is_that_of_fp64_and_the_first_of_equals(bf16, monkeypatch):
    monkeypatch.setattr("lcm_ds.evaluate.baselines.cpu_has_bf16", lambda: bf16)
    draw = torch.Generator().manual_seed(3)
    half = torch.randn(1, 2000, 24, generator=draw).half()
    # Each of them twice, with different ones that follow: in other blocks, and the last ones in one block.
    concepts = torch.cat([half, half.flip(1)], 1)
    ids, origins = torch.zeros(1, 4000, dtype=torch.int32), torch.full((1, 4000, 2), 1)
    normalizer = Normalizer(24)
    nearest = NearestNeighbour([(Batch(concepts, ids, 0, 0, 0, origins=origins), is_held_out)], normalizer)
    own, other = half[0, 100:1900].float(), torch.randn(500, 24, generator=draw)
    last = torch.cat([own, own + 1e-3 * torch.randn(own.shape, generator=draw), other])
    numbers = torch.zeros(len(last), dtype=torch.long)
    directions = torch.nn.functional.normalize(concepts[0, :-1].double(), dim=1)
    cosines = torch.nn.functional.normalize(last.double(), dim=1) @ directions.T
    first = (cosines >= cosines.amax(1, keepdim=True) - 1e-9).int().argmax(1)
    expected = concepts[0, first + 1].float()
    assert torch.equal(nearest(Targets(last, last, last, last, numbers, numbers)), expected)


def test_a_cosine_in_bf16_errs_by_less_than_its_bound():
    """All entries of the first vector are the same number, just above a power of two, where bf16 rounds by the most."""
    dims, draw = 1017, torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(
        torch.cat([torch.ones(1, dims), torch.randn(200, dims, generator=draw)]), dim=1
    )
    error = (vectors.bfloat16() @ vectors.bfloat16().T).double() - vectors.double() @ vectors.double().T
    assert error.abs().max() < BF16_ERROR
    assert error.abs().max() > BF16_ERROR / 8


@pytest.mark.parametrize("bf16", [False, True])
def test_the_nearest_s_error_is_that_on_held_out_documents_looked_for_among_the_others(bf16, monkeypatch):
    monkeypatch.setattr("lcm_ds.evaluate.baselines.cpu_has_bf16", lambda: bf16)
    east, north, west = [1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]
    assert is_held_out(torch.tensor([0, 1])).tolist() == [True, False]
    row = [(0, east), (0, north), (0, west)]
    training = [batch([row], document=1), batch([[(0, east), (0, west)]], document=0)]
    nearest = NearestNeighbour([(each, is_held_out) for each in training], Normalizer(2))
    # Held out: west follows east. In the other documents north followed it: (9 + 4) / 2.
    assert nearest.held_out_mse(Ranks()) == pytest.approx(13 / 2)
    alone = NearestNeighbour([(batch([row], document=0), is_held_out)], Normalizer(2))
    assert alone.held_out_mse(Ranks()) is None


def test_sums_of_no_samples_or_of_one_are_no_error():
    """A small dataset may have hardly any targets."""
    sums = Sums(3, 2)
    assert not sums.solve(1e-3).any()
    assert math.isnan(sums.error(sums.solve(1e-3)))
    sums.add(torch.full((1, 3), 40.0), torch.full((1, 2), 7.0))
    for penalty in PENALTIES:
        assert sums.error(sums.solve(penalty)) < 1e-3
