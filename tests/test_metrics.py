"""Each metric on a case worked by hand."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lcm_ds import metrics


def in_one_document(n):
    return torch.zeros(n, dtype=torch.long), torch.arange(n)


def in_documents_of_their_own(n):
    return torch.arange(n), torch.ones(n, dtype=torch.long)


def contrastive_accuracy(predicted, truth, document, position, **block):
    return metrics.contrastive_accuracy(predicted, truth, metrics.others(truth, document, position, **block))


def test_squared_error_l2_and_cosine():
    truth = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    predicted = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    # errors (0, -4) and (-1, 2)
    assert metrics.squared_error(predicted, truth).tolist() == pytest.approx([16 / 2, 5 / 2])
    assert metrics.l2(predicted, truth).tolist() == pytest.approx([4, math.sqrt(5)])
    assert metrics.cosine(predicted, truth).tolist() == pytest.approx([0.6, 0.0])


def test_contrastive_accuracy_leaves_out_the_neighbours_in_the_document():
    # Six concepts of one document on a line at 0, 1, … 5; each prediction lies 1.5 to the right of its truth: nearer to
    # both that follow than to its truth, of which one is a neighbour and left out.
    truth = torch.arange(6.0).unsqueeze(1)
    shares = contrastive_accuracy(truth + 1.5, truth, *in_one_document(6))
    # counted: 4 for the ends, 3 inside; not further: the second that follows, and the third as far as the truth is
    assert shares.tolist() == pytest.approx([2 / 4, 1 / 3, 1 / 3, 2 / 3, 1.0, 1.0])


def test_concepts_of_other_documents_are_no_neighbours():
    truth = torch.arange(4.0).unsqueeze(1)
    shares = contrastive_accuracy(truth + 0.75, truth, *in_documents_of_their_own(4))
    assert shares.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1.0])


def test_contrastive_accuracy_compares_inside_equal_parts():
    # Five targets in parts of three at most: the first three, and the last two, which have one other each.
    truth = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    shares = contrastive_accuracy(truth + 0.75, truth, *in_documents_of_their_own(5), block=3)
    assert shares.tolist() == pytest.approx([1 / 2, 1 / 2, 1, 0, 1])


def test_a_perfect_prediction_wins_every_comparison_and_a_constant_one_half():
    truth = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    separate = in_documents_of_their_own(200)
    assert contrastive_accuracy(truth, truth, *separate).mean().item() == 1.0
    constant = torch.zeros_like(truth)
    assert contrastive_accuracy(constant, truth, *separate).mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("sentences", [2, 3, 8, 30])
def test_a_perfect_prediction_has_all_of_it_although_every_document_ends_with_the_same_concept(sentences):
    draw = torch.Generator().manual_seed(0)
    end = F.normalize(torch.randn(1, 64, generator=draw))
    documents = [
        torch.cat([F.normalize(torch.randn(sentences, 64, generator=draw)), end])[1:] for _ in range(600 // sentences)
    ]
    truth = torch.cat(documents)
    document = torch.arange(len(documents)).repeat_interleave(sentences)
    position = torch.arange(1, sentences + 1).repeat(len(documents))
    perfect = contrastive_accuracy(truth, truth, document, position)
    assert perfect.min().item() == perfect.max().item() == 1.0
    chance = contrastive_accuracy(torch.randn(truth.shape, generator=draw), truth, document, position)
    assert chance.mean().item() == pytest.approx(0.5, abs=0.03)
    nearer = (metrics.compare(truth, truth, truth) < 0).sum(1)
    assert metrics.reciprocal_rank(nearer).min().item() == 1.0


def test_a_target_that_all_others_equal_has_no_contrastive_accuracy():
    # Documents of one sentence and the end of text: every target is the same vector.
    truth = torch.ones(5, 3)
    assert contrastive_accuracy(truth, truth, *in_documents_of_their_own(5)).isnan().all()


def test_a_target_without_others_has_no_contrastive_accuracy():
    truth = torch.randn(2, 3)
    assert contrastive_accuracy(truth[:1], truth[:1], *in_one_document(1)).isnan().all()
    assert contrastive_accuracy(truth, truth, *in_one_document(2)).isnan().all()  # two neighbours
    assert len(contrastive_accuracy(truth[:0], truth[:0], *in_one_document(0))) == 0


def test_paraphrasing_is_the_best_cosine_to_the_context_over_that_of_the_truth():
    # One row of two segments: (1, 0), (0.6, 0.8), (0, 1) and (-1, 0), (1, 0).
    concepts = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]]])
    ids = torch.tensor([[0, 0, 0, 1, 1]])
    predicted = torch.tensor([[[2.0, 0.0], [3.0, 3.0], [9.0, 9.0], [0.0, 5.0]]])  # for concepts 1, 2, 3 and 4
    of_truth = metrics.context_cosine(concepts[:, 1:], concepts, ids)
    of_prediction = metrics.context_cosine(predicted, concepts, ids)
    targets = torch.tensor([0, 1, 3])  # concept 3 begins a segment
    # contexts: concept 0; concepts 0 and 1; concept 3 only, because a segment begins with it
    assert of_truth[0, targets].tolist() == pytest.approx([0.6, 0.8, -1.0])
    assert of_prediction[0, targets].tolist() == pytest.approx([1.0, 1.4 / math.sqrt(2), 0.0], abs=1e-6)
    ratio = metrics.paraphrasing(of_prediction, of_truth)[0, targets]
    assert ratio[:2].tolist() == pytest.approx([1 / 0.6, 1.4 / math.sqrt(2) / 0.8])
    assert ratio[2].isnan()  # the truth is opposite to its context: no ratio


def test_copying_the_context_shows_in_paraphrasing():
    concepts = torch.rand(2, 9, 6, generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(2, 9, dtype=torch.int)
    copied = metrics.context_cosine(concepts[:, :-1], concepts, ids)
    assert torch.allclose(copied, torch.ones(2, 8))
    itself = metrics.context_cosine(concepts[:, 1:], concepts, ids)
    assert torch.equal(metrics.paraphrasing(itself, itself), torch.ones(2, 8))


def test_mutual_information_is_what_the_context_adds_a_token():
    conditional, separate = torch.log(torch.tensor([0.5, 0.1])), torch.log(torch.tensor([0.125, 0.2]))
    # 0.5 is 4 times 0.125: log 4 over 2 tokens; 0.1 is half of 0.2: the context misleads.
    found = metrics.mutual_information(conditional, separate, torch.tensor([2, 1]))
    assert found.tolist() == pytest.approx([math.log(4) / 2, -math.log(2)])


def test_places_among_candidates_count_those_that_are_strictly_nearer():
    candidates = torch.tensor([[0.0], [1.0], [2.0], [3.0], [3.0]])
    truth, predicted = candidates[3:4], torch.tensor([[2.2]])
    # distances 2.2, 1.2, 0.2, 0.8, 0.8: one is nearer; the truth's equal counts as the truth
    order = metrics.compare(predicted, truth, candidates)
    assert order.tolist() == [[1, 1, -1, 0, 0]]
    nearer = (order < 0).sum(1)
    assert metrics.recall_at(1, nearer).tolist() == [0.0]
    assert metrics.recall_at(2, nearer).tolist() == [1.0]
    assert metrics.reciprocal_rank(nearer).tolist() == [0.5]


def test_equals_of_the_truth_are_as_near_wherever_they_stand():
    generator = torch.Generator().manual_seed(2)
    truth = torch.randn(37, 384, generator=generator)
    predicted = truth + torch.randn(37, 384, generator=generator)
    many = torch.cat([truth] * 11)
    assert ((metrics.compare(predicted, truth, many) == 0).sum(1) == 11).all()


def test_variance_shows_a_collapse_to_the_mean():
    truth = torch.randn(500, 4, dtype=torch.float64)

    def of(vectors):
        return metrics.variance(torch.tensor(float(len(vectors))), vectors.sum(0), vectors.square().sum())

    assert of(truth).item() == pytest.approx(truth.var(dim=0, correction=0).sum().item())
    for shrink in (1.0, 0.5, 0.0):
        assert (of(shrink * truth + 3.0) / of(truth)).item() == pytest.approx(shrink**2, abs=1e-6)
    assert of(torch.full((7, 4), 0.1, dtype=torch.float64)) >= 0


def test_effective_rank_counts_the_directions():
    assert metrics.effective_rank(torch.eye(5)) == pytest.approx(5.0)
    assert metrics.effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))) == pytest.approx(2.0)
    # shares 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics.effective_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0]))) == pytest.approx(math.exp(entropy))
    assert metrics.effective_rank(torch.zeros(3, 3)) is None


def test_covariance_of_sums_is_that_of_the_vectors():
    vectors = torch.randn(50, 3, dtype=torch.float64) + 2
    found = metrics.covariance(50.0, vectors.sum(0), vectors.T @ vectors)
    assert torch.allclose(found, torch.cov(vectors.T, correction=0))


# --- the table --------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[1] / "docs"


def row(*cells):
    return " ".join(["|", *(f"{cell} |".lstrip() for cell in cells)])


def test_the_docs_define_every_metric_as_the_table_does():
    evaluation, monitoring = ((DOCS / page).read_text(encoding="utf-8") for page in ("evaluation.md", "monitoring.md"))
    for metric in metrics.EVALUATION:
        assert row(metric.label, metric.about, metric.source) in evaluation
    for metric in metrics.LOGGED.values():
        assert row(f"`{metric.key}`", f"`{metric.tag}`" if metric.tag else "–", metric.unit, metric.about) in monitoring


def test_each_metric_is_in_the_table_once():
    keys = [(metric.space, metric.key) for metric in metrics.EVALUATION]
    assert len(set(keys)) == len(keys)
    tags = [metric.tag for metric in metrics.LOGGED.values() if metric.tag]
    assert len(set(tags)) == len(tags)
