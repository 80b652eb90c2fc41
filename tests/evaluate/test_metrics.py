"""Each metric on a case worked by hand."""

import math

import pytest
import torch

from lcm_ds.evaluate.metrics import Score, Targets, contrastive_accuracy


def targets(truth, segment=None, position=None):
    n = len(truth)
    return Targets(
        truth=truth,
        last=torch.zeros_like(truth),
        context=torch.zeros_like(truth),
        segment=torch.zeros(n, dtype=torch.long) if segment is None else torch.tensor(segment),
        position=torch.arange(1, n + 1) if position is None else torch.tensor(position),
    )


def test_mse_l2_and_cosine_by_hand():
    truth = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    predicted = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    predicted[0] = torch.tensor([3.0, 0.0])
    score = Score()
    score.add(predicted, truth, targets(truth))
    figures = score.read()
    # errors (0, -4) and (-1, 2)
    assert figures["mse"] == pytest.approx((16 / 2 + 5 / 2) / 2)
    assert figures["l2"] == pytest.approx((4 + math.sqrt(5)) / 2)
    assert figures["cosine"] == pytest.approx((0.6 + 0.0) / 2)


def test_figures_do_not_depend_on_the_blocks_they_come_in():
    truth, predicted = torch.randn(20, 3), torch.randn(20, 3)
    whole, parts = Score(), Score()
    whole.add(predicted, truth, targets(truth))
    for first in (0, 5, 10, 15):
        part = slice(first, first + 5)
        parts.add(predicted[part], truth[part], targets(truth[part]))
    for name in ("mse", "l2", "cosine", "variance_ratio"):
        assert parts.read()[name] == pytest.approx(whole.read()[name])


def test_contrastive_accuracy_leaves_out_the_neighbours_in_the_document():
    # Six concepts of one document on a line at 0, 1, … 5; each prediction lies 1.5 to the right of its truth: nearer to
    # both that follow than to its truth, of which one is a neighbour and left out.
    truth = torch.arange(6.0).unsqueeze(1)
    shares = contrastive_accuracy(truth + 1.5, targets(truth), truth)
    # counted: 4 for the ends, 3 inside; not further: the second that follows, and the third as far as the truth is
    assert shares.tolist() == pytest.approx([2 / 4, 1 / 3, 1 / 3, 2 / 3, 1.0, 1.0])


def test_concepts_of_other_documents_are_no_neighbours():
    truth = torch.arange(4.0).unsqueeze(1)
    apart = targets(truth, segment=[0, 1, 2, 3], position=[1, 1, 1, 1])
    shares = contrastive_accuracy(truth + 0.75, apart, truth)
    assert shares.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1.0])


def test_a_perfect_prediction_wins_every_comparison_and_a_constant_one_half():
    torch.manual_seed(0)
    truth = torch.randn(200, 8)
    alone = targets(truth, segment=list(range(200)), position=[1] * 200)
    assert contrastive_accuracy(truth, alone, truth).mean().item() == 1.0
    constant = torch.zeros_like(truth)
    assert contrastive_accuracy(constant, alone, truth).mean().item() == pytest.approx(0.5, abs=0.01)


def test_variance_ratio_shows_a_collapse_to_the_mean():
    truth = torch.randn(500, 4)
    for shrink in (1.0, 0.5, 0.0):
        score = Score()
        score.add(shrink * truth + 3.0, truth, targets(truth))
        assert score.read()["variance_ratio"] == pytest.approx(shrink**2, abs=1e-6)


def test_a_target_without_others_beside_it_does_not_count_as_told_apart_wrongly():
    truth = torch.randn(4, 3)
    score = Score()
    score.add(truth, truth, targets(truth, segment=[0, 1, 2, 3], position=[1, 1, 1, 1]))
    score.add(truth[:1], truth[:1], targets(truth[:1]))  # a last block of one
    assert score.read()["ca"] == 1.0
    neighbours = Score()
    neighbours.add(truth[:2], truth[:2], targets(truth[:2]))  # two, next to each other in a document
    assert neighbours.read()["ca"] is None


def test_the_variance_of_a_constant_is_not_below_0():
    score = Score()
    for _ in range(50):
        truth = torch.randn(7, 4)
        score.add(torch.full_like(truth, 0.1), truth, targets(truth))
    assert 0 <= score.read()["variance_ratio"] < 1e-12
