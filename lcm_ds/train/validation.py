"""Validation during training: the metrics of lcm_ds.metrics, the same for any number of ranks.

Sums cover all rows that are validated on; metrics that compare targets with each other use those of the first rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcm_ds import metrics
from lcm_ds.baselines.linear import RIDGES, Linear, Training, best_of, training_targets
from lcm_ds.baselines.targets import ROWS, Reader, Rows, Targets
from lcm_ds.data.batch import Batch
from lcm_ds.data.format import Dataset
from lcm_ds.data.loader import validation_batches
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.model.normalizer import Normalizer
from lcm_ds.train.step import Stepper

CPU = torch.device("cpu")

RIDGE_CONCEPTS = 100_000  # the ridge is fitted on at most this many concepts of the training data
COMPARED_CONCEPTS = 2048  # targets of the first rows with about this many concepts are compared with each other


@torch.no_grad()
def fit_ridge(stepper: Stepper, on_progress: Callable[[], None]) -> Linear:
    """The ridge regression that is best on held-out training documents, as `lcm-ds evaluate` fits and chooses it.

    All ranks call this and get the same. on_progress: called after each batch.
    """
    job, env, device = stepper.job, stepper.env, stepper.device
    rows = min(ROWS, job.config.batch.micro_batch_rows)
    reader = Reader(job.config.data, env.rank, env.world_size, rows)
    normalizer: Normalizer = stepper.engine.module.normalizer

    def targets() -> Iterator[Targets]:
        for batch in training_targets(reader, job.datasets, job.config.data.train, normalizer, RIDGE_CONCEPTS):
            on_progress()
            yield batch

    def add_up(tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor)

    sums = Training.of(targets(), job.model.embed_dim, device, add_up)
    best: list[Any] = [None]
    if env.rank == 0:
        # On the CPU, to leave the GPU's memory to the model.
        ridges = Training(sums.fit.to(CPU), sums.held_out.to(CPU)).predictors(tuple(RIDGES))
        best = [ridges[best_of(ridges)]]
    dist.broadcast_object_list(best, device=device)
    return replace(best[0], weights=best[0].weights.to(device))


@torch.no_grad()
def validate(stepper: Stepper, dataset: Dataset, ridge: Linear, on_progress: Callable[[], None]) -> dict[str, Any]:
    """The val_* metrics over a dataset, or over its first `evaluate.rows` rows; all ranks call this.

    Losses are in normalised space; val_l2, CA, PAR and retrieval in raw space. val_loss_of_copy, val_loss_of_mean and
    val_loss_of_ridge are the losses of predicting the last concept, the mean of these very targets, and by `ridge`.
    val_error_by_position: entry i is the loss of targets with i + 1 concepts before them in their segment, None without
    such targets. val_ca, val_par, val_batch_* and val_effective_rank* are those of the first rows; val_batch_* retrieve
    among the targets of these rows, while `lcm-ds evaluate` does among all concepts of the dataset. Without targets
    metrics are None.

    Args:
        stepper: Makes the predictions.
        dataset: To validate on.
        ridge: Of `fit_ridge`.
        on_progress: Called after each batch.
    """
    config, env = stepper.job.config, stepper.env
    stepper.engine.eval()
    sums, first_rows = _ValidationSums(stepper), _FirstRows(stepper)
    for batch in validation_batches(
        dataset,
        config.data.row_length,
        config.data.max_segment,
        config.batch.micro_batch_rows,
        env.rank,
        env.world_size,
        config.evaluate.rows,
        origins=True,
    ):
        predictions, _, mask = stepper.predict(batch, stepper.layout(batch))
        rows = Rows.of(batch, stepper.engine.module.normalizer, config.data.max_segment)
        positions = SegmentLayout.from_ids(batch.segment_ids, config.data.max_segment).positions[:, 1:]
        sums.add(
            predictions[:, :-1][mask].float(), rows.targets, ridge(rows.targets), positions.to(stepper.device)[mask]
        )
        first_rows.add(batch, predictions, mask)
        on_progress()
    return {**sums.read(), **first_rows.read()}


class _ValidationSums:
    """Sums over all targets of this rank, and the metrics of all ranks."""

    def __init__(self, stepper: Stepper) -> None:
        config, self.dims = stepper.job.config, stepper.job.model.embed_dim
        self.normalizer: Normalizer = stepper.engine.module.normalizer
        zeros = partial(torch.zeros, dtype=torch.float64, device=stepper.device)
        self.totals = zeros(6)  # squared error, cosine, ℓ2, squared errors of the copy and the ridge, targets
        self.moments = zeros(4, self.dims)  # of predictions and of targets: sums, and sums of squares
        longest = min(config.data.max_segment, config.data.row_length)
        self.by_position = zeros(2, longest)  # squared error, targets

    def add(self, predicted: Tensor, targets: Targets, of_ridge: Tensor, positions: Tensor) -> None:
        """Add targets.

        Args:
            predicted: [n, embed_dim], normalised space.
            targets: n of them.
            of_ridge: Predictions of the ridge, as `predicted`.
            positions: int64 [n], in the segment.
        """
        truth = targets.truth
        errors = metrics.squared_error(predicted, truth).double()
        self.totals[0] += errors.sum()
        self.totals[1] += metrics.cosine(predicted, truth).sum()
        self.totals[2] += metrics.l2(*map(self.normalizer.denormalize, (predicted, truth))).sum()
        self.totals[3] += metrics.squared_error(targets.last, truth).sum()
        self.totals[4] += metrics.squared_error(of_ridge, truth).sum()
        self.totals[5] += len(truth)
        self.by_position[0].index_add_(0, positions, errors)
        self.by_position[1].index_add_(0, positions, torch.ones_like(errors))
        for index, values in enumerate((predicted, truth)):
            self.moments[2 * index] += values.sum(0)
            self.moments[2 * index + 1] += values.double().square().sum(0)

    def read(self) -> dict[str, Any]:
        """The metrics over all ranks, which all call this."""
        for sums in (self.totals, self.moments, self.by_position):
            dist.all_reduce(sums)
        count = self.totals[5]
        if not count:
            return {**dict.fromkeys(("val_loss", "val_loss_sum", "val_cosine", "val_l2")), "val_targets": 0}
        loss, cosine, l2, of_copy, of_ridge, _ = (self.totals / count).tolist()
        of_predictions, of_targets = metrics.variance(count.repeat(2), self.moments[::2], self.moments[1::2].sum(1))
        errors, counts = self.by_position[:, 1:].tolist()  # the first of a segment is no target
        return {
            "val_loss": loss,
            "val_loss_sum": loss * self.dims,
            "val_cosine": cosine,
            "val_l2": l2,
            "val_loss_of_copy": of_copy,
            "val_loss_of_ridge": of_ridge,
            "val_loss_of_mean": of_targets.item() / self.dims,
            "val_variance_ratio": (of_predictions / of_targets).item(),
            "val_targets": int(count.item()),
            "val_error_by_position": [
                error / count if count else None for error, count in zip(errors, counts, strict=True)
            ],
        }


class _FirstRows:
    """The first validation rows, in order, gathered from all ranks."""

    def __init__(self, stepper: Stepper) -> None:
        config, dims = stepper.job.config.data, stepper.job.model.embed_dim
        self.max_segment = config.max_segment
        self.normalizer: Normalizer = stepper.engine.module.normalizer
        rows = -(-COMPARED_CONCEPTS // config.row_length)
        # A row is filled by one rank and zero on all others: an all-reduce gathers it.
        self.concepts = torch.zeros(rows, config.row_length, dims, device=stepper.device)  # raw space
        self.predictions = torch.zeros_like(self.concepts)  # normalised space
        self.segment_ids = torch.zeros(rows, config.row_length, dtype=torch.int32, device=stepper.device)
        self.targets = torch.zeros_like(self.segment_ids)[:, 1:].contiguous()

    def add(self, batch: Batch, predictions: Tensor, mask: Tensor) -> None:
        """Keep those in a batch: predictions [rows, row_length, embed_dim], mask bool [rows, row_length - 1]."""
        count = min(len(mask), len(self.concepts) - batch.first_lane)
        if count > 0:
            part = slice(batch.first_lane, batch.first_lane + count)
            self.concepts[part] = batch.concepts[:count].to(self.concepts.device, torch.float32)
            self.segment_ids[part] = batch.segment_ids[:count].to(self.segment_ids.device)
            self.predictions[part], self.targets[part] = predictions[:count].float(), mask[:count].int()

    def read(self) -> dict[str, float | None]:
        """The metrics, none without targets; all ranks call this."""
        for rows in (self.concepts, self.predictions, self.segment_ids, self.targets):
            dist.all_reduce(rows)
        mask, ids = self.targets.bool(), self.segment_ids
        predicted, truth = self.predictions[:, :-1][mask], self.concepts[:, 1:][mask]
        if not len(truth):
            return {}
        ranks_of = {
            "val_effective_rank": predicted,
            "val_effective_rank_of_targets": self.normalizer.normalize(truth),
        }
        predictions = self.normalizer.denormalize(self.predictions[:, :-1])
        predicted = predictions[mask]
        segments = torch.arange(len(ids), device=ids.device).unsqueeze(1) * ids.shape[1] + ids  # unique over rows
        positions = SegmentLayout.from_ids(ids.cpu(), self.max_segment).positions.to(ids.device)
        shares = metrics.contrastive_accuracy(predicted, truth, segments[:, 1:][mask], positions[:, 1:][mask])
        of_prediction, of_truth = (
            metrics.context_cosine(vectors, self.concepts, ids)[mask] for vectors in (predictions, self.concepts[:, 1:])
        )
        nearer = (metrics.compare(predicted, truth, truth) < 0).sum(1)
        return {
            "val_ca": _mean(shares),
            "val_par": _mean(metrics.paraphrasing(of_prediction, of_truth)),
            "val_batch_recall_at_1": metrics.recall_at(1, nearer).mean().item(),
            "val_batch_recall_at_10": metrics.recall_at(10, nearer).mean().item(),
            "val_batch_mrr": metrics.reciprocal_rank(nearer).mean().item(),
            **{
                key: metrics.effective_rank(torch.cov(vectors.double().T, correction=0))
                for key, vectors in ranks_of.items()
            },
        }


def _mean(values: Tensor) -> float | None:
    mean = values.nanmean()
    return None if mean.isnan() else mean.item()
