"""Targets that are held for retrieval: which ones, and their places among candidates that are never held."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_ds.baselines.targets import Targets
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.evaluate.target_sample import BottomKSampler, TargetSample, count_nearer


def targets(documents, length):
    """As many documents of `length` targets each, whose vectors say which they are."""
    document = torch.arange(documents).repeat_interleave(length)
    position = torch.arange(1, length + 1).repeat(documents)
    truth = torch.stack([document, position], dim=1).float()
    return Targets(truth, truth, truth, truth, document, position)


def held_of(parts, size):
    holder = BottomKSampler(size)
    for part in parts:
        holder.add(part, part.truth, {"model": part.truth + 0.5})
    return holder.gather(Ranks())


def part_of(whole, which):
    fields = (whole.truth, whole.last, whole.before, whole.context, whole.document, whole.position)
    return Targets(*(values[which] for values in fields))


def test_the_same_targets_are_held_in_whatever_order_they_come():
    whole = targets(300, 7)
    expected = held_of([whole], 100)
    shuffled = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).split(90)
    found = held_of([part_of(whole, which) for which in shuffled], 100)
    assert len(found) == 100
    assert torch.equal(found.truth, expected.truth)
    assert torch.equal(found.truth, torch.stack([found.document, found.position], dim=1).float())
    assert torch.equal(found.predicted["model"], expected.truth + 0.5)
    assert len(held_of([whole], 5000)) == 2100  # there are no more


def test_what_is_held_is_spread_over_documents_and_positions():
    found = held_of([targets(1000, 40)], 4000)
    assert (found.document.float().mean() / 1000).item() == pytest.approx(0.5, abs=0.02)
    per_position = found.position.bincount(minlength=41)[1:]
    assert per_position.min() > 50
    assert per_position.max() < 150


def random_held(count, dims, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(count, dims, generator=generator)
    numbers = torch.arange(count)
    predicted = {"near": truth + 0.5 * torch.randn(count, dims, generator=generator), "copy": truth.clone()}
    return TargetSample(numbers, numbers, numbers, truth, predicted)


def test_places_are_those_that_all_distances_give():
    held = random_held(300, 8)
    candidates = torch.cat([held.truth, torch.randn(5000, 8)])
    nearer = count_nearer(held, candidates.split(700), Ranks())
    distances = torch.cdist(held.predicted["near"].double(), candidates.double())
    own = (held.predicted["near"] - held.truth).double().norm(dim=1, keepdim=True)
    assert torch.equal(nearer["near"], (distances < own - 1e-6).sum(1))
    assert nearer["near"].max() > 10
    assert (nearer["copy"] == 0).all()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made while it is on."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.bytes = max(self.bytes, made.numel() * made.element_size())
        return made


def test_recall_over_100000_candidates_makes_no_matrix_of_them_all():
    held = random_held(1000, 4)
    del held.predicted["copy"]
    with Largest() as largest:
        nearer = count_nearer(held, (torch.randn(20_000, 4) for _ in range(5)), Ranks())
    assert nearer["near"].max() > 1000  # they were compared with many
    assert largest.bytes <= 2048 * 2048 * 8  # against 1000 × 100,000 numbers: 800 MB
