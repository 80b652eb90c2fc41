"""Baselines are fitted on training data and are as good as linear algebra makes them."""

import pytest
import torch

from lcm_ds.data.loader import Batch
from lcm_ds.evaluate.baselines import Nearest, Sums, fit_baselines, ridge
from lcm_ds.evaluate.ranks import Ranks
from lcm_ds.evaluate.targets import Targets
from lcm_ds.model.normalizer import Normalizer


def made(n, seed, noise=0.1, dims=6):
    """Targets that are a fixed linear map of the last concept plus noise; the context's mean carries nothing."""
    world = torch.Generator().manual_seed(99)
    matrix = torch.randn(dims, dims, generator=world) / dims**0.5
    draw = torch.Generator().manual_seed(seed)
    last = torch.randn(n, dims, generator=draw)
    truth = last @ matrix + 2.0 + noise * torch.randn(n, dims, generator=draw)
    context = torch.randn(n, dims, generator=draw)
    numbers = torch.arange(n)
    return Targets(truth, last, context, numbers, torch.ones_like(numbers)), matrix


def mse(predicted, truth):
    return (predicted - truth).square().mean().item()


def test_baselines_do_what_their_names_say():
    training = [made(256, seed)[0] for seed in range(20)]
    held_out, _ = made(1000, 500)
    # Of consecutive targets, each a document.
    fitted, count = fit_baselines(training, Normalizer(6), Ranks())
    assert count == 20 * 256
    assert list(fitted) == ["mean concept", "copy of the last", "ridge from the last", "ridge from the context's mean"]
    mean = torch.cat([targets.truth for targets in training]).mean(0)
    assert torch.allclose(fitted["mean concept"](held_out), mean.expand(1000, 6), atol=1e-4)
    assert torch.equal(fitted["copy of the last"](held_out), held_out.last)
    # At the noise floor, which is 0.1²; the context's mean tells nothing, so its ridge is the mean.
    assert mse(fitted["ridge from the last"](held_out), held_out.truth) == pytest.approx(0.01, rel=0.1)
    of_mean = mse(fitted["mean concept"](held_out), held_out.truth)
    assert mse(fitted["ridge from the context's mean"](held_out), held_out.truth) == pytest.approx(of_mean, rel=0.02)


def test_the_squared_error_of_sums_is_that_of_the_data():
    targets, _ = made(300, 1)
    sums = Sums(6, 6)
    sums.add(targets.last, targets.truth)
    weights = sums.solve(0.1)
    predicted = targets.last.double() @ weights[:-1] + weights[-1]
    assert sums.squared_error(weights) == pytest.approx((predicted - targets.truth).square().sum().item(), rel=1e-9)


def test_a_small_penalty_recovers_the_map():
    targets, matrix = made(5000, 2, noise=0.0)
    parts = [Sums(6, 6), Sums(6, 6)]
    for part in (0, 1):
        parts[part].add(targets.last[part::2], targets.truth[part::2])
    weights = ridge(*parts)
    assert torch.allclose(weights[:-1].float(), matrix, atol=1e-2)
    assert torch.allclose(weights[-1].float(), torch.full((6,), 2.0), atol=1e-2)


def batch(rows):
    """Rows of (segment, concept): a batch as the loader gives it."""
    ids = torch.tensor([[segment for segment, _ in row] for row in rows], dtype=torch.int32)
    return Batch(torch.tensor([[concept for _, concept in row] for row in rows]).half(), ids, 0, 0, 0)


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
    nearest = Nearest(training, normalizer)
    assert len(nearest) == 6
    last = torch.tensor([[0.9, 0.1], [0.3, 5.0], [-1.0, -1.1]])
    zeros = torch.zeros(3, dtype=torch.long)
    targets = Targets(last, normalizer.normalize(last), last, zeros, zeros)
    # by direction: east, which north followed first; north; south, which west followed first
    expected = torch.tensor([north, west, west])
    assert torch.allclose(normalizer.denormalize(nearest(targets)), expected)
