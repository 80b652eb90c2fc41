"""The sample of targets for retrieval, and their ranks among candidates that stream past."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_ds.baselines.targets import Targets
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.evaluate.target_sample import BottomKSampler, TargetSample, count_nearer
from lcm_ds.metrics import compare


def targets(documents, length):
    """Documents of `length` targets each, whose vectors are (document, position)."""
    document = torch.arange(documents).repeat_interleave(length)
    position = torch.arange(1, length + 1).repeat(documents)
    truth = torch.stack([document, position], dim=1).float()
    return Targets(truth, truth, truth, truth, document, position)


def sample_of(parts, size):
    sampler = BottomKSampler(size)
    for part in parts:
        sampler.add(part, part.truth, {"model": part.truth + 0.5})
    return sampler.gather(Ranks())


def part_of(full, which):
    fields = (full.truth, full.last, full.before, full.context, full.document, full.position)
    return Targets(*(values[which] for values in fields))


def test_the_sample_does_not_depend_on_the_order_of_targets():
    full = targets(300, 7)
    expected = sample_of([full], 100)
    shuffled = torch.randperm(len(full), generator=torch.Generator().manual_seed(0)).split(90)
    found = sample_of([part_of(full, which) for which in shuffled], 100)
    assert len(found) == 100
    assert torch.equal(found.truth, expected.truth)
    assert torch.equal(found.truth, torch.stack([found.document, found.position], dim=1).float())
    assert torch.equal(found.predicted["model"], expected.truth + 0.5)
    assert len(sample_of([full], 5000)) == 2100  # there are no more


def test_the_sample_is_spread_over_documents_and_positions():
    found = sample_of([targets(1000, 40)], 4000)
    assert (found.document.float().mean() / 1000).item() == pytest.approx(0.5, abs=0.02)
    per_position = found.position.bincount(minlength=41)[1:]
    assert per_position.min() > 50
    assert per_position.max() < 150


def random_sample(count, dims, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(count, dims, generator=generator)
    numbers = torch.arange(count)
    predicted = {"near": truth + 0.5 * torch.randn(count, dims, generator=generator), "copy": truth.clone()}
    return TargetSample(numbers, numbers, numbers, truth, predicted)


def test_ranks_are_those_of_all_distances():
    sample = random_sample(300, 8)
    drawn = torch.randn(5000, 8, generator=torch.Generator().manual_seed(1))  # with others 1e-6 may be too much
    candidates = torch.cat([sample.truth, drawn])
    nearer = count_nearer(sample, candidates.split(700), Ranks())
    distances = torch.cdist(sample.predicted["near"].double(), candidates.double())
    own = (sample.predicted["near"] - sample.truth).double().norm(dim=1, keepdim=True)
    assert torch.equal(nearer["near"], (distances < own - 1e-6).sum(1))
    assert nearer["near"].max() > 10
    assert (nearer["copy"] == 0).all()


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_ranks_are_those_of_fp64_also_where_fp32_cannot_tell_distances_apart(precision):
    sample = random_sample(200, 384, seed=3)
    generator = torch.Generator().manual_seed(4)
    # On the sphere around each prediction that goes through its truth, to a few roundings of fp32: which of them are
    # nearer is decided by the last bits.
    away = sample.truth - sample.predicted["near"]
    turned = torch.randn(200, 384, generator=generator)
    turned *= (away.norm(dim=1) / turned.norm(dim=1)).unsqueeze(1)
    factors = 1 + 1e-7 * torch.randn(200, 1, generator=generator)
    candidates = torch.cat([sample.predicted["near"] + turned * factors, sample.truth, torch.randn(3000, 384)])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        nearer = count_nearer(sample, candidates.split(700), Ranks())
    finally:
        torch.set_float32_matmul_precision(before)
    for name, predicted in sample.predicted.items():
        expected = (compare(predicted, sample.truth, candidates) < 0).sum(1)
        assert torch.equal(nearer[name], expected)
    single = torch.cdist(sample.predicted["near"], candidates)
    own = away.norm(dim=1, keepdim=True)
    assert not torch.equal(nearer["near"], (single < own).sum(1))  # what fp32 alone would count


def test_equal_predictions_are_ranked_as_others_are():
    sample = random_sample(300, 8)
    sample.predicted["near"][:] = sample.predicted["near"][0].clone()
    others = torch.cat([sample.truth, torch.randn(3000, 8, generator=torch.Generator().manual_seed(1))])
    nearer = count_nearer(sample, others.split(700), Ranks())["near"]
    assert torch.equal(nearer, (compare(sample.predicted["near"], sample.truth, others) < 0).sum(1))
    assert len(nearer.unique()) > 200


def test_predictions_that_are_not_finite_have_nothing_nearer():
    sample = random_sample(4, 8)
    sample.predicted["near"][1] = torch.nan
    nearer = count_nearer(sample, [torch.randn(50, 8)], Ranks())
    assert nearer["near"][1] == 0


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is created."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.bytes = max(self.bytes, made.numel() * made.element_size())
        return made


def test_recall_over_100000_candidates_makes_no_matrix_of_them_all():
    sample = random_sample(1000, 4)
    del sample.predicted["copy"]
    with Largest() as largest:
        nearer = count_nearer(sample, (torch.randn(20_000, 4) for _ in range(5)), Ranks())
    assert nearer["near"].max() > 1000  # they were compared with many
    assert largest.bytes <= 2048 * 512 * 8  # against 1000 × 100,000 numbers: 800 MB
