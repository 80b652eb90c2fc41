"""One optimizer step: its loss and gradient do not depend on how the global batch's rows are split over devices.

In a step the host waits for the device only where DeepSpeed's optimizer decides whether to skip it. All that can be
computed on the CPU is part of a `MicroBatch`, which the loader's threads make, and a step's results are copied to the
host when they are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from lcm_ds import deepspeed_config
from lcm_ds.data.batch import Batch
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.train.engine import set_learning_rate
from lcm_ds.train.job import TrainJob
from lcm_ds.train.loss import input_noise, row_keys, squared_error
from lcm_ds.train.monitoring.stragglers import ForwardTimer
from lcm_ds.train.schedule import learning_rate_factor


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch with all that a step computes on the CPU; on a GPU's host in page-locked memory."""

    concepts: Tensor  # as in `Batch`
    layout: SegmentLayout
    target_mask: Tensor  # bool [rows, row_length - 1]
    keys: Tensor  # int64 [2, rows]: for noise and for dropout
    targets: int
    real_concepts: int
    missing: int
    attended_pairs: int  # (concept, concept that it attends to)


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did, summed over all ranks: the same on each of them."""

    loss: float | None  # mean over targets; None without targets
    grad_norm: float | None  # before clipping; None if DeepSpeed does not compute it
    targets: int
    applied: bool  # False: gradients were not finite, the weights are unchanged
    concepts: int
    missing: int  # concepts of shards that could not be read
    attended_pairs: int
    rank_flags: tuple[int, ...]  # for each flag, the number of ranks that raised it
    forward_times: tuple[int, ...]  # microseconds, of each rank in an earlier step (`ForwardTimer`); () with one rank
    waited: float  # seconds this rank waited for data


class PendingStep:
    """A step whose results may still be computed by the device."""

    def __init__(self, results: Tensor, ranks: int, grad_norm: float | None, applied: bool, waited: float) -> None:
        """Start copying results to the host.

        Args:
            results: float64: targets, concepts, missing concepts, attended pairs, flags; each rank's time if there are
                several; the loss summed over targets.
            ranks: Number of ranks.
            grad_norm: As in `StepOutcome`.
            applied: As in `StepOutcome`.
            waited: As in `StepOutcome`.
        """
        self._ranks, self._grad_norm, self._applied, self._waited = ranks, grad_norm, applied, waited
        self._results = results.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if results.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> StepOutcome:
        """The outcome; waits until the device has finished the step."""
        if self._copied is not None:
            self._copied.synchronize()
        *counts, loss = self._results.tolist()
        targets, concepts, missing, pairs, *flags = map(int, counts)
        times = [flags.pop() for _ in range(self._ranks if self._ranks > 1 else 0)][::-1]
        return StepOutcome(
            loss / targets if targets else None,
            self._grad_norm,
            targets,
            self._applied,
            concepts,
            missing,
            pairs,
            tuple(flags),
            tuple(times),
            self._waited,
        )


class Stepper:
    """Takes optimizer steps; all ranks call its methods together."""

    def __init__(self, job: TrainJob, env: DistEnv, engine: deepspeed.DeepSpeedEngine, device: torch.device) -> None:
        self.job, self.env, self.engine, self.device = job, env, engine, device
        self.timer = ForwardTimer(engine.module, deepspeed_config.zero_stage(job.ds), device)

    def step(
        self,
        batches: Iterator[MicroBatch],
        step: int,
        rank_flags: Sequence[bool] = (),
        on_gradients_ready: Callable[[], None] | None = None,
    ) -> PendingStep:
        """One optimizer step over this rank's micro-batches.

        Args:
            batches: This rank's micro-batches; gradient_accumulation_steps of them are taken.
            step: Its number, from 0, which sets the learning rate.
            rank_flags: Flags of this rank, to be summed over ranks.
            on_gradients_ready: Called after the last backward, before the weights change.
        """
        config, engine = self.job.config, self.engine
        started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(engine.gradient_accumulation_steps())]
        waited = time.perf_counter() - started
        counts = self._global_counts(micro_batches, rank_flags)
        # DeepSpeed averages gradients over ranks: times their number, divided by all targets, gives the global mean.
        share = self.env.world_size / counts[0].clamp(min=1)
        factor = learning_rate_factor(step, self.job.total_steps, config.optim.schedule)
        set_learning_rate(engine, self.job.ds["optimizer"]["params"], factor)
        engine.train()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro_batch in micro_batches:
            predictions, targets, mask = self.predict(micro_batch, training=True)
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
        results = torch.cat([counts.to(loss.dtype), loss.unsqueeze(0)])
        # The host knows the norm, because DeepSpeed decides by it whether to skip the step.
        norm = engine.get_global_grad_norm()
        norm = None if norm is None else float(norm)
        return PendingStep(results, self.env.world_size, norm, engine.was_step_applied(), waited)

    def _global_counts(self, micro_batches: list[MicroBatch], rank_flags: Sequence[bool]) -> Tensor:
        """The one all-reduce before a step: targets, concepts, missing ones, attended pairs, flags, times; int64."""
        times = [0] * (self.env.world_size if self.env.world_size > 1 else 0)
        if times:
            times[self.env.rank] = self.timer.next_step()
        columns = zip(*((m.targets, m.real_concepts, m.missing, m.attended_pairs) for m in micro_batches), strict=True)
        counts = self._on_device(
            self._on_host(torch.tensor([*map(sum, columns), *rank_flags, *times], dtype=torch.int64))
        )
        dist.all_reduce(counts)
        return counts

    def prepare(self, batch: Batch) -> MicroBatch:
        """What a step needs of a batch, computed on the CPU: in training, by the loader's threads."""
        config = self.job.config
        layout = SegmentLayout.from_ids(batch.segment_ids, config.data.max_segment, self.job.model.attention)
        mask, real = batch.target_mask, batch.segment_ids >= 0
        draw = len(real), config.seed, batch.step, batch.first_lane
        keys = torch.stack([row_keys("noise", *draw), row_keys("dropout", *draw)])
        starts, positions, cu_seqlens, mask, keys = map(
            self._on_host, (layout.starts, layout.positions, layout.cu_seqlens, mask, keys)
        )
        return MicroBatch(
            batch.concepts,
            layout._replace(starts=starts, positions=positions, cu_seqlens=cu_seqlens),
            mask,
            keys,
            targets=int(mask.sum()),
            real_concepts=int(real.sum()),
            missing=batch.missing,
            attended_pairs=int((layout.positions + 1)[real].sum()),
        )

    def predict(self, micro_batch: MicroBatch, training: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The model's predictions for a micro-batch, with the targets.

        Args:
            micro_batch: Of `prepare`.
            training: Whether noise is added and dropout has its keys.

        Returns:
            Predictions [rows, row_length, embed_dim]; clean concepts [rows, row_length - 1, embed_dim] from the second
            of each row on, fp32; which of them are targets, bool [rows, row_length - 1]. All in normalised space.
        """
        raw, mask = self._on_device(micro_batch.concepts), self._on_device(micro_batch.target_mask)
        noise = keys = None
        if training:
            of_noise, keys = self._on_device(micro_batch.keys)
            noise = input_noise(raw, self.job.config.noise_std, of_noise)
        predictions = self.engine(raw, micro_batch.layout, noise, keys)
        return predictions, self.engine.module.normalizer.normalize(raw[:, 1:]), mask

    def _on_host(self, tensor: Tensor) -> Tensor:
        """In page-locked memory, if the device is a GPU, which then copies it without making this process wait."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
