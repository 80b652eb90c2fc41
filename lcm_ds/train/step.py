"""One optimizer step: its loss, and its gradient, do not depend on how the global batch's rows fall on devices."""

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
    """What one optimizer step did, over all ranks: the same on each of them."""

    loss: float | None  # None: without targets there is none
    targets: int
    applied: bool  # False: not finite, so that the weights are as they were
    concepts: int
    missing: int  # concepts of shards that could not be read
    pairs: int  # of a concept and one that it sees
    asked: tuple[int, ...]  # how many ranks asked for each of the things they can ask for
    waited: float  # seconds this rank waited for data


class Stepper:
    """Takes steps with an engine; all ranks together."""

    def __init__(self, job: TrainJob, place: DistEnv, engine: deepspeed.DeepSpeedEngine, device: torch.device) -> None:
        self.job, self.place, self.engine, self.device = job, place, engine, device

    def step(
        self,
        batches: Iterator[Batch],
        step: int,
        asks: Sequence[bool] = (),
        look: Callable[[], None] | None = None,
    ) -> StepOutcome:
        """One optimizer step over the micro-batches of this rank. asks: what this rank wants the others to know.

        look: is called when all gradients are there and the weights are still those of before.
        """
        config, engine = self.job.config, self.engine
        started = time.perf_counter()
        taken = [next(batches) for _ in range(engine.gradient_accumulation_steps())]
        waited = time.perf_counter() - started
        micro_batches = [(batch, self.layout(batch)) for batch in taken]
        counts = self._counts(micro_batches, asks)
        # DeepSpeed averages gradients over ranks: multiplied by their number it is the sum that the loss asks for.
        share = self.place.world_size / counts[0].clamp(min=1)
        factor = learning_rate_factor(step, self.job.total_steps, config.optim.schedule)
        set_learning_rate(engine, self.job.ds["optimizer"]["params"], factor)
        engine.train()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, layout in micro_batches:
            error = self.error(batch, layout, step)
            # DeepSpeed skips a step, on all ranks, whose gradients are not finite; a loss that is not may have some
            # that are.
            finite = error.detach().isfinite()
            engine.backward(error * torch.where(finite, share, torch.nan), scale_wrt_gas=False)
            if look is not None and engine.is_gradient_accumulation_boundary():
                look()
            engine.step()
            loss += error.detach()
        dist.all_reduce(loss)
        targets, concepts, missing, pairs, *asked = counts.tolist()
        mean = (loss / targets).item() if targets else None
        return StepOutcome(mean, targets, engine.was_step_applied(), concepts, missing, pairs, tuple(asked), waited)

    def _counts(self, micro_batches: list[tuple[Batch, SegmentLayout]], asks: Sequence[bool]) -> torch.Tensor:
        """The step's global counts: the one all-reduce before it.

        Returns int64: targets, concepts, missing concepts, pairs of a concept and one that it sees, and how many ranks
        ask for each of the things they can ask for.
        """
        counts = torch.tensor(
            [
                sum(batch.targets for batch, _ in micro_batches),
                sum(batch.real_concepts for batch, _ in micro_batches),
                sum(batch.missing for batch, _ in micro_batches),
                sum(int((layout.positions + 1)[batch.segment_ids >= 0].sum()) for batch, layout in micro_batches),
                *asks,
            ],
            dtype=torch.int64,
            device=self.device,
        )
        dist.all_reduce(counts)
        return counts

    def layout(self, batch: Batch) -> SegmentLayout:
        """Where the segments of a micro-batch lie."""
        return SegmentLayout.from_ids(batch.segment_ids, self.job.config.data.max_segment, self.job.model.attention)

    def error(self, batch: Batch, layout: SegmentLayout, step: int) -> torch.Tensor:
        """Summed squared error of one micro-batch (see loss.py)."""
        predictions, targets, mask = self.predict(batch, layout, step)
        return squared_error(predictions, targets, mask)

    def predict(
        self, batch: Batch, layout: SegmentLayout, step: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predictions [rows, row_length, embed_dim], clean concepts but the first of each row, in fp32, and which of
        them are targets; in normalised space. Without noise where `step` is None.
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
