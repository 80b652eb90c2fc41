"""Validation during training: loss, cosine and spread of the predictions, in normalised space."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from lcm_ds.data.format import Dataset
from lcm_ds.data.loader import validation_batches
from lcm_ds.train.step import Stepper


@torch.no_grad()
def validate(stepper: Stepper, dataset: Dataset, moved: Callable[[], None]) -> dict[str, float]:
    """The val_* metrics over a dataset, or over its first `evaluate.rows` rows; all ranks call this.

    moved: is called after each batch.
    """
    config, place = stepper.job.config, stepper.place
    stepper.engine.eval()
    dims = stepper.job.model.embed_dim
    # per dimension: sum and sum of squares of predictions, the same of targets
    moments = torch.zeros(4, dims, dtype=torch.float64, device=stepper.device)
    totals = torch.zeros(3, dtype=torch.float64, device=stepper.device)  # squared error, cosine, targets
    for batch in validation_batches(
        dataset,
        config.data.row_length,
        config.data.max_segment,
        config.batch.micro_batch_rows,
        place.rank,
        place.world_size,
        config.evaluate.rows,
    ):
        predictions, targets, mask = stepper.predict(batch, stepper.layout(batch))
        predicted, truth = predictions[:, :-1][mask].float(), targets[mask]
        totals[0] += (predicted - truth).square().mean(dim=-1).sum()
        totals[1] += torch.nn.functional.cosine_similarity(predicted, truth, dim=-1).sum()
        totals[2] += len(truth)
        for index, values in enumerate((predicted, truth)):
            moments[2 * index] += values.sum(0)
            moments[2 * index + 1] += values.double().square().sum(0)
        moved()
    dist.all_reduce(totals)
    dist.all_reduce(moments)
    count = totals[2].clamp(min=1)
    loss = (totals[0] / count).item()
    variances = moments[1::2] / count - (moments[0::2] / count).square()  # predictions, targets
    return {
        "val_loss": loss,
        "val_loss_sum": loss * dims,
        "val_cosine": (totals[1] / count).item(),
        "val_variance_ratio": (variances[0].sum() / variances[1].sum()).item(),
        "val_targets": int(totals[2].item()),
    }
