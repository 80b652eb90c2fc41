"""How good predicted concepts are: the LCM paper's figures and those of retrieval, as functions on tensors.

Validation during training and `lcm-ds evaluate` use the same ones. "LCM paper" is arXiv 2412.08821, section 2.4.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the definitions of all figures: those of another version are not compared, nor shown again.
VERSION = 3
# Targets that contrastive accuracy tells apart from one another, at most: the paper's batch.
BLOCK = 256
# Of squared lengths: distances that differ by less are the same. Far above what fp64 rounds, far below what matters.
SAME = 1e-11
# Variance, summed over dimensions, up to which vectors are all the same: what the rounding of fp64 sums leaves.
CONSTANT = 1e-12


def squared_error(predicted: Tensor, truth: Tensor) -> Tensor:
    """Mean over dimensions of the squared error, [n] of [n, embed_dim]: in normalised space the training loss."""
    return (predicted - truth).square().mean(dim=-1)


def l2(predicted: Tensor, truth: Tensor) -> Tensor:
    """ℓ2 = ‖x̂ − x‖, [n] of [n, embed_dim]; in raw space the LCM paper's (its section 2.4.1, "ℓ2 distance").

    With x̂ decoded to a sentence and encoded again it is the paper's round-trip distance ‖encode(decode(x̂)) − x‖.
    """
    return (predicted - truth).norm(dim=-1)


def cosine(predicted: Tensor, truth: Tensor) -> Tensor:
    """[n] of [n, embed_dim]; 0 where one of them is of length 0."""
    return F.cosine_similarity(predicted, truth, dim=-1)


def compare(predicted: Tensor, truth: Tensor, candidates: Tensor) -> Tensor:
    """Whether each candidate is nearer (−1) to a prediction than its truth is, as near (0), or further (1).

    predicted, truth: [n, embed_dim]; candidates: [m, embed_dim]; by Euclidean distance. Returns int8 [n, m]. In fp64: a
    candidate that is equal to the truth is as near as it, wherever it stands.
    """
    # ‖x̂ − c‖² less ‖x̂‖², which is the same for all candidates of a prediction.
    exact, true, others = predicted.double(), truth.double(), candidates.double()
    distances = torch.addmm(others.square().sum(1), exact, others.T, alpha=-2)
    own = (true.square() - 2 * exact * true).sum(1)
    same = SAME * (true.square().sum(1) + exact.square().sum(1))
    further = (distances > (own + same).unsqueeze(1)).to(torch.int8)
    return further - (distances < (own - same).unsqueeze(1)).to(torch.int8)


def equal(vectors: Tensor) -> Tensor:
    """Which of vectors, [n, embed_dim], are the same, to rounding: bool [n, n]."""
    exact = vectors.double()
    squares = exact.square().sum(1)
    both = squares.unsqueeze(1) + squares
    return both - 2 * exact @ exact.T <= SAME * both


def contrastive_accuracy(
    predicted: Tensor, truth: Tensor, document: Tensor, position: Tensor, block: int = BLOCK
) -> Tensor:
    """CA: the share of other targets that are further from a prediction than its truth is: [n], 0 to 1.

    LCM paper, section 2.4.1, "Contrastive accuracy": "the ratio of embeddings in a batch that are further away (in
    terms of ℓ2) from the predicted embedding x̂ₙ than the ground truth xₙ (for each n, we exclude xₙ and its two
    neighboring ground truth embeddings from the comparison)".

    predicted, truth: [n, embed_dim], one space. document, position: int64 [n]; neighbours are those of the same
    document whose positions differ by 1. Targets that are equal to xₙ, to rounding, are excluded as xₙ itself is: the
    end of text is the same vector in every document. So a perfect prediction has 1. The targets are compared in their
    order, in the fewest equal parts of at most `block`, so that who calls this decides what is compared. Another vector
    that is as far from the prediction as the truth is not further. NaN for a target that has no others in its part.
    """
    shares = []
    for part in torch.arange(len(truth), device=truth.device).tensor_split(max(1, -(-len(truth) // block))):
        further = compare(predicted[part], truth[part], truth[part]) > 0
        same = document[part].unsqueeze(1) == document[part].unsqueeze(0)
        apart = (position[part].unsqueeze(1) - position[part].unsqueeze(0)).abs()
        counted = ~(same & (apart <= 1)) & ~equal(truth[part])  # neither itself nor a neighbour nor the same again
        shares.append((further & counted).sum(1) / counted.sum(1))
    return torch.cat(shares)


def context_cosine(vectors: Tensor, concepts: Tensor, segment_ids: Tensor) -> Tensor:
    """The largest cosine of a vector to the concepts that its prediction is made from: [rows, row_length - 1].

    vectors: [rows, row_length - 1, embed_dim], entry t in the place of concept t + 1; concepts: [rows, row_length,
    embed_dim]; the context of entry t is concept t and those before it in its segment (segment_ids: int [rows,
    row_length]).
    """
    length = concepts.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=concepts.device).tril()[:-1]
    found = []
    for row, context, ids in zip(vectors, concepts, segment_ids, strict=True):  # [row_length, row_length] at a time
        cosines = F.normalize(row.float(), dim=-1) @ F.normalize(context.float(), dim=-1).T
        seen = earlier & (ids[:-1].unsqueeze(1) == ids.unsqueeze(0))
        found.append(cosines.masked_fill(~seen, -1.0).amax(1))
    return torch.stack(found)


def paraphrasing(of_prediction: Tensor, of_truth: Tensor) -> Tensor:
    """PAR: the largest cosine of a prediction to its context over that of its truth, each [n] (`context_cosine`).

    LCM paper, section 2.4.1, "Paraphrasing": maxₘ CS(x̂ₙ, xₘ) / maxₘ CS(xₙ, xₘ), m < n, in raw space. Above 1 the
    prediction repeats its context more than the text itself does. NaN where the truth's is not above 0, which no ratio
    is told of.
    """
    return torch.where(of_truth > 0, of_prediction / of_truth, torch.nan)


def mutual_information(conditional: Tensor, unconditional: Tensor, tokens: Tensor) -> Tensor:
    """MI of a sentence with what stands before it, in nats a token: [n].

    LCM paper, section 2.4.1, "Mutual information": how much likelier a language model finds the sentence after the k =
    10 sentences before it than alone, over its tokens: (log p(s | before) − log p(s)) / |s|. Above 0 the context helps.
    conditional, unconditional: [n], log-probabilities of the sentence; tokens: [n], its length.
    """
    return (conditional - unconditional) / tokens


def recall_at(k: int, nearer: Tensor) -> Tensor:
    """1 where the truth is among the k candidates nearest to the prediction, else 0.

    nearer: int64 [n], how many candidates are strictly nearer than the truth; its equals count as it.
    """
    return (nearer < k).double()


def reciprocal_rank(nearer: Tensor) -> Tensor:
    """1 over the truth's place among the candidates, from 1 (TREC-8, Voorhees 1999); its mean is the MRR. See above."""
    return 1.0 / (1 + nearer.double())


def variance(count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """Variance summed over dimensions, of vectors of which there are sums.

    count: […] vectors; total: […, embed_dim], their sum; squares: […], the sum of their squared lengths.
    """
    # That of a constant may come out a rounding below 0.
    return (squares / count - (total / count.unsqueeze(-1)).square().sum(-1)).clamp(min=0)


def covariance(count: Tensor | float, total: Tensor, products: Tensor) -> Tensor:
    """Covariance [embed_dim, embed_dim], fp64: from the sum [embed_dim] and the sum of outer products of vectors."""
    mean = total.double() / count
    return products.double() / count - torch.outer(mean, mean)


def effective_rank(matrix: Tensor) -> float | None:
    """exp of the entropy of a covariance's spectrum (Roy & Vetterli 2007, "The effective rank").

    From 1 to embed_dim: in how many directions, about, vectors vary. None where they do not vary at all.
    """
    if not matrix.trace() > CONSTANT:
        return None
    return float(rank_of(torch.linalg.eigvalsh(matrix.double())))


def rank_of(spectrum: Tensor) -> Tensor:
    """The effective rank of spectra [..., embed_dim] of covariances: [...]."""
    known = spectrum.clamp(min=0)
    return torch.special.entr(known / known.sum(-1, keepdim=True)).sum(-1).exp()
