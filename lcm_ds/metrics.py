"""The metrics: a table that names them all, and their formulas as functions on tensors.

`EVALUATION` and `LOGGED` are read by evaluation, the console, TensorBoard, an export's model card, and the test of
docs/evaluation.md and docs/monitoring.md. "LCM paper" is arXiv 2412.08821, section 2.4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Version of the metrics' definitions: evaluations of different versions are neither compared nor reused.
VERSION = 3
# Most targets that contrastive accuracy compares with each other: the paper's batch.
BLOCK = 256
# Relative to squared lengths: distances that differ by less are equal. Far above fp64 rounding, far below what matters.
SAME = 1e-11
# Variance, summed over dimensions, up to which vectors are constant: what rounding of fp64 sums leaves.
CONSTANT = 1e-12

NORMALISED, RAW = "normalised", "raw"
LOWER, HIGHER = "↓", "↑"
PAPER = "LCM paper"


class Metric(NamedTuple):
    """A row of the table."""

    key: str  # in evaluation.json or metrics.jsonl
    label: str
    about: str  # its definition in the docs
    source: str = ""
    space: str = ""  # of evaluation.json
    form: str = "{:.4f}"
    better: str = ""  # LOWER, HIGHER, or neither
    in_card: bool = False  # shown by an export's model card
    unit: str = ""
    tag: str = ""  # in TensorBoard
    curve: str = ""  # its name in TensorBoard's chart of the MSE


# evaluation.json: scores → predictor → space → key. It has further metrics in the other space, which nothing shows.
EVALUATION = (
    Metric("mse", "MSE", "mean over dimensions of (x̂ − x)², normalised space: the training loss", "",
           NORMALISED, "{:.4f}", LOWER, in_card=True),
    Metric("mse", "MSE raw", "the same in raw space", "",
           RAW, "{:.3g}", LOWER),
    Metric("l2", "ℓ2", "‖x̂ − x‖", PAPER,
           RAW, "{:.4f}", LOWER, in_card=True),
    Metric("l2_round_trip", "ℓ2-r", "‖encode(decode(x̂)) − x‖: the round trip through text, of `--samples` targets",
           PAPER, RAW, "{:.4f}", LOWER),
    Metric("cosine", "cosine", "cosine similarity of x̂ and x", "",
           RAW, "{:.4f}", HIGHER, in_card=True),
    Metric("ca", "CA %", "contrastive accuracy: share of the other targets of a batch that are further from x̂ than x "
           "is, without x's two neighbours and vectors equal to x", PAPER,
           RAW, "{:.2%}", HIGHER, in_card=True),
    Metric("recall_at_1", "R@1 %", "share of targets x that are the concept of the validation dataset nearest to x̂",
           "TREC-8", RAW, "{:.2%}", HIGHER),
    Metric("recall_at_10", "R@10 %", "share of targets x that are among the 10 nearest", "TREC-8",
           RAW, "{:.2%}", HIGHER),
    Metric("mrr", "MRR", "mean reciprocal rank of x among all concepts of the validation dataset", "TREC-8",
           RAW, "{:.4f}", HIGHER),
    Metric("par", "PAR", "paraphrasing: largest cosine of x̂ to a concept of its context, over that of x; above 1 the "
           "model repeats itself", PAPER,
           RAW, "{:.3f}"),
    Metric("mi", "MI", "mutual information: (log p(ŝ given the 10 sentences before it) − log p(ŝ)) / tokens of ŝ, by "
           "the language model of `--causal-lm`; ŝ is x̂ decoded", PAPER,
           RAW, "{:.3f}", HIGHER),
    Metric("variance_ratio", "variance", "variance of the predictions over that of the targets, each summed over "
           "dimensions", "", NORMALISED, "{:.3f}", in_card=True),
    Metric("effective_rank", "eff. rank", "exp of the entropy of the spectrum of the predictions' covariance; the last "
           "row has that of the targets", "Roy & Vetterli 2007", NORMALISED, "{:.1f}"),
)  # fmt: skip


def _logged(
    key: str, about: str, tag: str = "", *, unit: str = "", label: str = "", curve: str = "", form: str = "{:.4f}"
) -> Metric:
    tag = tag or (f"val/{key.removeprefix('val_')}" if key.startswith("val_") else "")
    return Metric(key, label or key, about, form=form, unit=unit, tag=tag, curve=curve)


# metrics.jsonl. A key without a tag is in that file only.
LOGGED = {
    metric.key: metric
    for metric in (
        _logged("step", "steps done so far; every line has it", unit="steps"),
        _logged("loss", "mean squared error of the last step, normalised space, mean over dimensions and targets",
                "loss/train", curve="training"),
        _logged("loss_sum", "`loss` summed over dimensions, as in the LCM paper", "loss/train_sum_over_dimensions"),
        _logged("losses", "`loss` of each step since the previous line; null: not finite, or without targets"),
        _logged("targets", "concepts predicted by the last step, over all ranks", "data/targets", unit="concepts",
                label="Targets per step"),
        _logged("lr", "learning rate of the step", "optim/lr"),
        _logged("grad_norm", "gradient norm of the last step before clipping; null if DeepSpeed does not report it",
                "optim/grad_norm"),
        _logged("clipped", "steps since the previous line whose gradient norm was above `optim.max_grad_norm`",
                "optim/clipped_share", unit="share"),
        _logged("adam_eps_share", "share of eps in Adam's denominator (an estimate): eps / (eps + g), "
                "g = min(grad_norm, max_grad_norm) / √parameters", "optim/adam_eps_share", unit="share"),
        _logged("skipped_steps", "steps with a non-finite gradient since the process started", "optim/skipped_steps",
                unit="steps"),
        _logged("concepts", "concepts read so far, over all ranks", "data/concepts", unit="concepts"),
        _logged("missing_concepts", "concepts of unreadable shards since the process started", "data/missing_concepts",
                unit="concepts"),
        _logged("epoch", "concepts read so far over concepts in the dataset", "data/epoch", unit="epochs"),
        _logged("concepts_per_second", "over all ranks, since the previous line", "speed/concepts_per_second",
                unit="1/s", label="Throughput (concepts/s)"),
        _logged("mfu", "model FLOPs utilization; null if the device's peak is unknown", "speed/mfu", unit="share",
                label="Model FLOPs utilization (MFU)"),
        _logged("step_time", "mean time of a step since the previous line", "speed/step_seconds", unit="s"),
        _logged("data_wait", "mean time per step that rank 0 waited for data", "data/wait_seconds", unit="s"),
        _logged("slowest_rank", "the rank whose forward passes took longest since the previous line; null with one "
                "rank", "speed/slowest_rank"),
        _logged("slowest_rank_share", "how much longer than the median rank's, as a share of the step; its backward "
                "passes come on top", "speed/slowest_rank_share", unit="share"),
        _logged("memory", "peak memory of rank 0: of its GPU, or else resident", "memory/gib", unit="GiB"),
        _logged("checkpoint_time", "time that the last save held up training", "checkpoint/stall_seconds", unit="s"),
        _logged("checkpoint_share", "time that saves held up training, of the time since the start",
                "checkpoint/stall_share", unit="share"),
        _logged("val_loss", "`loss` over the validation's targets", "loss/validation", label="MSE", curve="model"),
        _logged("val_loss_sum", "`loss_sum` over the validation's targets", "val/loss_sum_over_dimensions"),
        _logged("val_loss_of_mean", "`val_loss` of the mean of these targets", "loss/validation_of_mean",
                label="mean of targets", curve="mean of targets"),
        _logged("val_loss_of_copy", "`val_loss` of a copy of the concept before each target", "loss/validation_of_copy",
                label="copy"),  # no curve: its error is so high that the others would be one line
        _logged("val_loss_of_ridge", "`val_loss` of the ridge regression that is best on held-out training documents",
                "loss/validation_of_ridge", label="ridge", curve="best ridge"),
        _logged("val_cosine", "mean cosine similarity of prediction and target, raw space",
                label="Cosine similarity (validation)"),
        _logged("val_l2", "mean ℓ2 distance of prediction and target, raw space"),
        _logged("val_variance_ratio", "variance of the predictions over that of the targets",
                label="Variance ratio (validation)"),
        _logged("val_error_by_position", "list: `val_loss` of targets with 1, 2, … concepts before them; null if there "
                "are none", "val/error_by_position"),
        _logged("val_targets", "concepts predicted by the validation", unit="concepts"),
        _logged("val_ca", "CA, over the first rows of the validation (about 2,048 concepts)"),
        _logged("val_par", "PAR, over the same rows"),
        _logged("val_batch_recall_at_1", "R@1 among the targets of the same rows"),
        _logged("val_batch_recall_at_10", "R@10 among the targets of the same rows"),
        _logged("val_batch_mrr", "MRR among the targets of the same rows"),
        _logged("val_effective_rank", "effective rank of the predictions of the same rows"),
        _logged("val_effective_rank_of_targets", "effective rank of the targets of the same rows"),
    )
}  # fmt: skip


def squared_error(predicted: Tensor, truth: Tensor) -> Tensor:
    """Mean over dimensions of the squared error, [n] of [n, embed_dim]: in normalised space the training loss."""
    return (predicted - truth).square().mean(dim=-1)


def l2(predicted: Tensor, truth: Tensor) -> Tensor:
    """ℓ2 = ‖x̂ − x‖, [n] of [n, embed_dim]: LCM paper, "ℓ2 distance", in raw space.

    If x̂ has been decoded and encoded again, it is the paper's round-trip distance ‖encode(decode(x̂)) − x‖.
    """
    return (predicted - truth).norm(dim=-1)


def cosine(predicted: Tensor, truth: Tensor) -> Tensor:
    """Cosine similarity, [n] of [n, embed_dim]; 0 if a vector has length 0."""
    return F.cosine_similarity(predicted, truth, dim=-1)


def compare(predicted: Tensor, truth: Tensor, candidates: Tensor) -> Tensor:
    """Compare candidates with the truth by their Euclidean distance to a prediction, in fp64.

    Args:
        predicted: [n, embed_dim].
        truth: [n, embed_dim].
        candidates: [m, embed_dim].

    Returns:
        int8 [n, m]: -1 if the candidate is nearer than the truth, 0 if it is as near (to rounding), 1 if further.
    """
    # ‖x̂ − c‖² less ‖x̂‖², which is the same for all candidates.
    exact, true, others = predicted.double(), truth.double(), candidates.double()
    distances = torch.addmm(others.square().sum(1), exact, others.T, alpha=-2)
    own = (true.square() - 2 * exact * true).sum(1)
    same = SAME * (true.square().sum(1) + exact.square().sum(1))
    further = (distances > (own + same).unsqueeze(1)).to(torch.int8)
    return further - (distances < (own - same).unsqueeze(1)).to(torch.int8)


def equal(vectors: Tensor) -> Tensor:
    """Which vectors, [n, embed_dim], are equal to rounding: bool [n, n]."""
    exact = vectors.double()
    squares = exact.square().sum(1)
    both = squares.unsqueeze(1) + squares
    return both - 2 * exact @ exact.T <= SAME * both


def others(truth: Tensor, document: Tensor, position: Tensor, block: int = BLOCK) -> list[Tensor]:
    """The targets that contrastive accuracy compares with each target; all predictors of the same targets share them.

    Args:
        truth: [n, embed_dim].
        document: int64 [n].
        position: int64 [n].
        block: targets are compared in the fewest equal parts of at most this size, in their order.

    Returns:
        bool [size, size] of each part: not the target itself, its neighbours and targets equal to it (to rounding).
    """
    counted = []
    for part in torch.arange(len(truth), device=truth.device).tensor_split(max(1, -(-len(truth) // block))):
        same = document[part].unsqueeze(1) == document[part].unsqueeze(0)
        apart = (position[part].unsqueeze(1) - position[part].unsqueeze(0)).abs()
        counted.append(~(same & (apart <= 1)) & ~equal(truth[part]))
    return counted


def contrastive_accuracy(predicted: Tensor, truth: Tensor, counted: Sequence[Tensor]) -> Tensor:
    """CA: the share of other targets that are further from a prediction than its truth is.

    LCM paper, section 2.4.1, "Contrastive accuracy": "the ratio of embeddings in a batch that are further away (in
    terms of ℓ2) from the predicted embedding x̂ₙ than the ground truth xₙ (for each n, we exclude xₙ and its two
    neighboring ground truth embeddings from the comparison)".

    Targets equal to xₙ (to rounding) are excluded as well, because the end of text is the same vector in every
    document; so a perfect prediction has 1. A vector as far from the prediction as the truth does not count as further.

    Args:
        predicted: [n, embed_dim].
        truth: [n, embed_dim], same space.
        counted: which targets each one is compared with, see `others`.

    Returns:
        [n], 0 to 1; NaN for a target without others to compare with.
    """
    accuracies = []
    sizes = [len(part) for part in counted]
    for values, true, compared in zip(predicted.split(sizes), truth.split(sizes), counted, strict=True):
        further = compare(values, true, true) > 0
        accuracies.append((further & compared).sum(1) / compared.sum(1))
    return torch.cat(accuracies)


def context_cosine(vectors: Tensor, concepts: Tensor, segment_ids: Tensor) -> Tensor:
    """The largest cosine of each vector to its context.

    Args:
        vectors: [rows, row_length - 1, embed_dim]; entry t stands for concept t + 1, and its context is concept t and
            those before it in the segment.
        concepts: [rows, row_length, embed_dim].
        segment_ids: int [rows, row_length].

    Returns:
        [rows, row_length - 1].
    """
    length = concepts.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=concepts.device).tril()[:-1]
    largest = []
    for row, context, ids in zip(vectors, concepts, segment_ids, strict=True):  # [row_length, row_length] at a time
        cosines = F.normalize(row.float(), dim=-1) @ F.normalize(context.float(), dim=-1).T
        seen = earlier & (ids[:-1].unsqueeze(1) == ids.unsqueeze(0))
        largest.append(cosines.masked_fill(~seen, -1.0).amax(1))
    return torch.stack(largest)


def paraphrasing(of_prediction: Tensor, of_truth: Tensor) -> Tensor:
    """PAR: the largest cosine of a prediction to its context over that of its truth, each [n] (`context_cosine`).

    LCM paper, "Paraphrasing": maxₘ CS(x̂ₙ, xₘ) / maxₘ CS(xₙ, xₘ), m < n, in raw space. Above 1 the prediction repeats
    its context more than the text does. NaN if the truth's cosine is not positive.
    """
    return torch.where(of_truth > 0, of_prediction / of_truth, torch.nan)


def mutual_information(conditional: Tensor, unconditional: Tensor, tokens: Tensor) -> Tensor:
    """MI of a sentence with its context, in nats per token: LCM paper, "Mutual information".

    (log p(s | k = 10 sentences before) − log p(s)) / |s|; positive if the context makes the sentence more likely.

    Args:
        conditional: [n], log-probabilities of the sentences given their contexts.
        unconditional: [n], log-probabilities without them.
        tokens: [n], lengths of the sentences.

    Returns:
        [n].
    """
    return (conditional - unconditional) / tokens


def recall_at(k: int, nearer: Tensor) -> Tensor:
    """Recall at k: 1 if the truth is among the k candidates nearest to the prediction, else 0.

    nearer: int64 [n], number of candidates strictly nearer than the truth; vectors equal to it are not.
    """
    return (nearer < k).double()


def reciprocal_rank(nearer: Tensor) -> Tensor:
    """1 / rank of the truth among the candidates (TREC-8, Voorhees 1999); its mean is the MRR. nearer: as above."""
    return 1.0 / (1 + nearer.double())


def variance(count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """Variance of vectors, summed over dimensions, from their sums.

    Args:
        count: […], number of vectors.
        total: […, embed_dim], their sum.
        squares: […], the sum of their squared lengths.

    Returns:
        […].
    """
    # Rounding can make a constant's slightly negative.
    return (squares / count - (total / count.unsqueeze(-1)).square().sum(-1)).clamp(min=0)


def covariance(count: Tensor | float, total: Tensor, products: Tensor) -> Tensor:
    """Covariance, fp64 [embed_dim, embed_dim], from the sum, [embed_dim], and the sum of outer products of vectors."""
    mean = total.double() / count
    return products.double() / count - torch.outer(mean, mean)


def effective_rank(matrix: Tensor) -> float | None:
    """exp of the entropy of a covariance's spectrum (Roy & Vetterli 2007, "The effective rank").

    From 1 to embed_dim: the number of directions, roughly, in which vectors vary. None if they are constant.
    """
    if not matrix.trace() > CONSTANT:
        return None
    return float(rank_of(torch.linalg.eigvalsh(matrix.double())))


def rank_of(spectrum: Tensor) -> Tensor:
    """The effective rank, […], of spectra […, embed_dim] of covariances."""
    known = spectrum.clamp(min=0)
    return torch.special.entr(known / known.sum(-1, keepdim=True)).sum(-1).exp()
