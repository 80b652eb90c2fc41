"""One optimizer step: its loss and gradient do not depend on how the global batch's rows are split over devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from lcm_ds.data.batch import Batch
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.train.engine import set_learning_rate
from lcm_ds.train.job import TrainJob
from lcm_ds.train.loss import dropout_keys, input_noise, squared_error
from lcm_ds.train.schedule import learning_rate_factor


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did, summed over all ranks: the same on each of them."""

    loss: float | None  # mean over targets; None without targets
    targets: int
    applied: bool  # False: gradients were not finite, the weights are unchanged
    concepts: int
    missing: int  # concepts of shards that could not be read
    attended_pairs: int  # (concept, concept that it attends to)
    rank_flags: tuple[int, ...]  # for each flag, the number of ranks that raised it
    waited: float  # seconds this rank waited for data


class Stepper:
    """Takes optimizer steps; all ranks call its methods together."""

    def __init__(self, job: TrainJob, env: DistEnv, engine: deepspeed.DeepSpeedEngine, device: torch.device) -> None:
        self.job, self.env, self.engine, self.device = job, env, engine, device

    def step(
        self,
        batches: Iterator[Batch],
        step: int,
        rank_flags: Sequence[bool] = (),
        on_gradients_ready: Callable[[], None] | None = None,
    ) -> StepOutcome:
        """One optimizer step over this rank's micro-batches.

        Args:
            batches: This rank's micro-batches; gradient_accumulation_steps of them are taken.
            step: Its number, from 0, which sets learning rate, noise and dropout.
            rank_flags: Flags of this rank, to be summed over ranks.
            on_gradients_ready: Called after the last backward, before the weights change.
        """
        config, engine = self.job.config, self.engine
        started = time.perf_counter()
        taken = [next(batches) for _ in range(engine.gradient_accumulation_steps())]
        waited = time.perf_counter() - started
        micro_batches = [(batch, self.layout(batch)) for batch in taken]
        counts = self._global_counts(micro_batches, rank_flags)
        # DeepSpeed averages gradients over ranks: times their number, divided by all targets, gives the global mean.
        share = self.env.world_size / counts[0].clamp(min=1)
        factor = learning_rate_factor(step, self.job.total_steps, config.optim.schedule)
        set_learning_rate(engine, self.job.ds["optimizer"]["params"], factor)
        engine.train()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, layout in micro_batches:
            predictions, targets, mask = self.predict(batch, layout, step)
            error = squared_error(predictions, targets, mask)
            # DeepSpeed skips a step, on all ranks, if a gradient is not finite; gradients of a loss that is not finite
            # may be.
            finite = error.detach().isfinite()
            engine.backward(error * torch.where(finite, share, torch.nan), scale_wrt_gas=False)
            if on_gradients_ready is not None and engine.is_gradient_accumulation_boundary():
                on_gradients_ready()
            engine.step()
            loss += error.detach()
        dist.all_reduce(loss)
        target_count, concepts, missing, attended_pairs, *flags = counts.tolist()
        mean = (loss / target_count).item() if target_count else None
        applied = engine.was_step_applied()
        return StepOutcome(mean, target_count, applied, concepts, missing, attended_pairs, tuple(flags), waited)

    def _global_counts(
        self, micro_batches: list[tuple[Batch, SegmentLayout]], rank_flags: Sequence[bool]
    ) -> torch.Tensor:
        """The one all-reduce before a step: targets, concepts, missing concepts, attended pairs, flags; int64."""
        counts = torch.tensor(
            [
                sum(batch.targets for batch, _ in micro_batches),
                sum(batch.real_concepts for batch, _ in micro_batches),
                sum(batch.missing for batch, _ in micro_batches),
                sum(int((layout.positions + 1)[batch.segment_ids >= 0].sum()) for batch, layout in micro_batches),
                *rank_flags,
            ],
            dtype=torch.int64,
            device=self.device,
        )
        dist.all_reduce(counts)
        return counts

    def layout(self, batch: Batch) -> SegmentLayout:
        """The segments of a micro-batch, as attention needs them."""
        return SegmentLayout.from_ids(batch.segment_ids, self.job.config.data.max_segment, self.job.model.attention)

    def predict(
        self, batch: Batch, layout: SegmentLayout, step: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The model's predictions for a micro-batch, with the targets.

        Args:
            batch: Concepts in raw space.
            layout: Of `layout(batch)`.
            step: Seeds noise and dropout; None adds no noise.

        Returns:
            Predictions [rows, row_length, embed_dim]; clean concepts [rows, row_length - 1, embed_dim] from the second
            of each row on, fp32; which of them are targets, bool [rows, row_length - 1]. All in normalised space.
        """
        config = self.job.config
        raw = batch.concepts.to(self.device, non_blocking=True)
        noise = keys = None
        if step is not None:
            noise = input_noise(raw, config.noise_std, config.seed, step, batch.first_lane)
            keys = dropout_keys(len(raw), config.seed, step, batch.first_lane).to(self.device)
        mask = batch.target_mask.to(self.device, non_blocking=True)
        predictions = self.engine(raw, layout, noise, keys)
        return predictions, self.engine.module.normalizer.normalize(raw[:, 1:]), mask
