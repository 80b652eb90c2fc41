"""The training loop, top to bottom in the order in which things happen.

What it promises: the loss of a step, and its gradient, do not depend on how the global batch's rows fall on devices; a
resumed run goes on bit for bit on the same number of ranks; all ranks agree before any of them stops or saves.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers

import lcm_ds
from lcm_ds import ds_config
from lcm_ds.config import dump
from lcm_ds.data.format import read_normalizer
from lcm_ds.data.loader import Batch, Loader, validation_batches
from lcm_ds.errors import InputError
from lcm_ds.files import write_whole
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.train import checkpoint as checkpoints
from lcm_ds.train.check import Job
from lcm_ds.train.checkpoint import Checkpoint
from lcm_ds.train.engine import build_engine, build_model, connect, set_learning_rate
from lcm_ds.train.loss import dropout_keys, input_noise, squared_error, target_mask
from lcm_ds.train.metrics import RunLog, prints_to_log, set_up_logging
from lcm_ds.train.place import Place
from lcm_ds.train.profile import StepProfiler
from lcm_ds.train.schedule import learning_rate_factor
from lcm_ds.train.speed import SpeedMeter, memory_gib, peak_tflops
from lcm_ds.train.stop import StopRequest

logger = logging.getLogger("lcm_ds.train")

DONE, STOPPED = 0, 75


def resume_point(job: Job, place: Place) -> Checkpoint | None:
    """The run's newest complete checkpoint, None where there is none yet.

    Raises InputError where it does not belong to this config or number of ranks.
    """
    found = checkpoints.list_checkpoints(job.run_dir)
    if not found:
        return None
    mistakes = checkpoints.resume_mistakes(found[-1], identity(job, place))
    if mistakes:
        raise InputError(mistakes)
    return found[-1]


def train(job: Job, place: Place, newest: Checkpoint | None) -> int:
    """Train until the run is done or somebody asks it to stop; returns the exit code, 0 or 75.

    newest: the checkpoint to start from. Raises InputError for a shard that turns out not to be what was written,
    RuntimeError where training cannot go on.
    """
    run_dir, first = job.run_dir, place.rank == 0
    if newest is not None and newest.step >= job.total_steps:
        if first:
            print(f"{run_dir}: already trained for {newest.step} steps, nothing to do")
        return DONE
    run_dir.mkdir(parents=True, exist_ok=True)
    set_up_logging(run_dir, place.rank)
    with prints_to_log(run_dir):
        device = connect(place)
    if first:
        prepare_run_folder(job, place)
    start = 0
    with prints_to_log(run_dir):
        model = build_model(job.model, read_normalizer(job.datasets[0].path), job.config.seed, job.ds)
        engine = build_engine(model, job.config, job.ds)
        if newest is not None:
            checkpoints.restore(engine, newest)
            start = newest.step
    concepts_seen = newest.state()["concepts"] if newest is not None else 0
    if first:
        announce(job, place, engine, start)
    run_log = RunLog(run_dir, start, job.total_steps) if first else None
    stop = StopRequest(run_dir, watch_file=first)
    loader = Loader(
        job.datasets,
        job.plan,
        job.config.data.max_segment,
        place.rank,
        place.world_size,
        job.config.batch.micro_batch_rows,
        workers=job.config.data.workers,
        start_step=start,
        pinned=device.type == "cuda",
        local_ranks=place.local_world_size,
    )
    try:
        run = Run(job, place, engine, device, run_log, stop, concepts_seen)
        code = run.steps(iter(loader), start)
        run.profiler.close()
        # Not after an error: other ranks may wait in a collective, and this one would wait with them.
        dist.destroy_process_group()
        return code
    finally:
        loader.close()
        stop.close()
        if run_log is not None:
            run_log.close()


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did, over all ranks."""

    loss: torch.Tensor  # this rank's share of the loss: summed over ranks it is the loss
    concepts: int
    missing: int  # concepts of shards that could not be read
    pairs: int  # of a concept and one that it sees
    waited: float  # seconds this rank waited for data
    stop: bool  # some rank was asked to stop
    save: bool  # rank 0's clock says it is time to save


class Run:
    """One process's part in a run: the engine and what it reports to."""

    def __init__(
        self,
        job: Job,
        place: Place,
        engine: deepspeed.DeepSpeedEngine,
        device: torch.device,
        run_log: RunLog | None,
        stop: StopRequest,
        concepts_seen: int,
    ) -> None:
        self.job, self.place, self.engine, self.device = job, place, engine, device
        self.run_log, self.stop = run_log, stop
        self.concepts_seen = concepts_seen
        self.concepts_missing = 0  # since this process started
        self.losses: list[torch.Tensor] = []  # this rank's shares of the steps since the last report
        self.skipped_in_a_row = 0
        self.saved_at: int | None = None
        self.last_save = time.monotonic()
        peak = peak_tflops(device, job.config.log.peak_tflops)
        self.speed = SpeedMeter(job.model, place.world_size, peak)
        self.profiler = StepProfiler(job.run_dir, job.config.train.profile_steps if place.rank == 0 else None)

    def steps(self, batches: Iterator[Batch], start: int) -> int:
        """Every step from `start` to the end of the run; returns the exit code."""
        config, total = self.job.config, self.job.total_steps
        for step in range(start, total):
            self.profiler.begin(step)
            outcome = self.step(batches, step)
            self.profiler.end(step)
            done = step + 1
            self.concepts_seen += outcome.concepts
            self.concepts_missing += outcome.missing
            self.losses.append(outcome.loss)
            self.speed.add(outcome.concepts, outcome.pairs, outcome.waited)
            self.guard(step)
            saves = outcome.stop or outcome.save or _due(done, config.checkpoint.every, total)
            if done % config.log.every == 0 or saves:  # what is not reported when it is saved is lost on a resume
                self.report(done)
            if _due(done, config.evaluate.every, total) and self.job.validation is not None:
                self.validate(done)
            if saves:
                self.save(done)
            if outcome.stop and done < total:
                if self.place.rank == 0:
                    who = self.stop.reason or "another rank's"
                    print(f"stopped at step {done} on request ({who}); a checkpoint is saved, start again to go on")
                    self.stop.file.unlink(missing_ok=True)
                return STOPPED
        if self.place.rank == 0:
            self.stop.file.unlink(missing_ok=True)
            print(f"done: {total} steps, {self.concepts_seen:,} concepts; {self.job.run_dir}", flush=True)
        return DONE

    def step(self, batches: Iterator[Batch], step: int) -> StepOutcome:
        """One optimizer step over the micro-batches of this rank."""
        config, engine = self.job.config, self.engine
        started = time.perf_counter()
        taken = [next(batches) for _ in range(engine.gradient_accumulation_steps())]
        waited = time.perf_counter() - started
        micro_batches = [(batch, self.layout(batch)) for batch in taken]
        counts = self.agree(micro_batches)
        # DeepSpeed averages gradients over ranks: multiplied by their number it is the sum that the loss asks for.
        share = self.place.world_size / counts[0].clamp(min=1)
        factor = learning_rate_factor(step, self.job.total_steps, config.optim.schedule)
        set_learning_rate(engine, self.job.ds["optimizer"]["params"], factor)
        engine.train()
        loss = torch.zeros((), device=self.device)
        for batch, layout in micro_batches:
            error = self.error(batch, layout, step)
            engine.backward(error * share, scale_wrt_gas=False)
            engine.step()
            loss += error.detach()
        targets, concepts, missing, pairs, stop, save = counts.tolist()
        return StepOutcome(loss / max(1, targets), concepts, missing, pairs, waited, stop > 0, save > 0)

    def agree(self, micro_batches: list[tuple[Batch, SegmentLayout]]) -> torch.Tensor:
        """The step's global counts, and whether any rank was asked to stop or save: the one all-reduce before it.

        Returns int64 [6]: targets, concepts, missing concepts, pairs of a concept and one that it sees, stop requests,
        save requests.
        """
        minutes = self.job.config.checkpoint.every_minutes
        save_now = self.place.rank == 0 and minutes is not None and time.monotonic() - self.last_save > 60 * minutes
        counts = torch.tensor(
            [
                sum(batch.targets for batch, _ in micro_batches),
                sum(batch.real_concepts for batch, _ in micro_batches),
                sum(batch.missing for batch, _ in micro_batches),
                sum(int((layout.positions + 1)[batch.segment_ids >= 0].sum()) for batch, layout in micro_batches),
                self.stop.requested(),
                save_now,
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
        segment_ids = batch.segment_ids.to(self.device, non_blocking=True)
        noise = keys = None
        if step is not None:
            noise = input_noise(raw, config.noise_std, config.seed, step, batch.first_lane)
            keys = dropout_keys(len(raw), config.seed, step, batch.first_lane).to(self.device)
        predictions = self.engine(raw, layout, noise, keys)
        return predictions, self.engine.module.normalizer.normalize(raw[:, 1:]), target_mask(segment_ids)

    def guard(self, step: int) -> None:
        """Count steps that DeepSpeed skipped on all ranks because a gradient was not finite; give up after too many."""
        if self.engine.was_step_applied():
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        logger.warning("step %d: gradients are not finite, the step is skipped", step + 1)
        if self.skipped_in_a_row >= self.job.config.guard.max_skipped:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row up to step {step + 1} had gradients that are not finite "
                f"(guard.max_skipped = {self.job.config.guard.max_skipped}); "
                f"lcm-ds trace {self.job.run_dir} --step {step} names their documents"
            )

    def report(self, done: int) -> None:
        """A line of metrics after `done` steps."""
        mine = torch.stack(self.losses)
        shares = mine.new_empty(self.place.world_size * len(mine))
        dist.all_gather_into_tensor(shares, mine)
        self.losses.clear()
        if self.run_log is not None:
            # fsum is exact, so that a loss does not depend on how many are reported at a time.
            losses = [math.fsum(step) for step in shares.view(self.place.world_size, -1).T.tolist()]
            norm = self.engine.get_global_grad_norm()
            values = {
                "concepts": self.concepts_seen,
                "missing_concepts": self.concepts_missing,
                "epoch": self.job.plan.epoch(done),
                "loss": losses[-1],
                "loss_sum": losses[-1] * self.job.model.embed_dim,
                "losses": losses,  # of all steps since the line before
                "grad_norm": None if norm is None else float(norm),
                "lr": self.engine.basic_optimizer.param_groups[0]["lr"],
                **self.speed.read(),
                "skipped_steps": self.engine.skipped_steps,
                "memory": memory_gib(self.device),
            }
            self.run_log.write(done, values)
            self.run_log.say(done, values, (self.job.total_steps - done) * values["step_time"])
        self.speed.reset()

    @torch.no_grad()
    def validate(self, done: int) -> None:
        """Loss, cosine and spread of the predictions on the validation set, in normalised space."""
        assert self.job.validation is not None
        config = self.job.config
        self.engine.eval()
        dims = self.job.model.embed_dim
        # per dimension: sum and sum of squares of predictions, the same of targets
        moments = torch.zeros(4, dims, dtype=torch.float64, device=self.device)
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # squared error, cosine, targets
        for batch in validation_batches(
            self.job.validation,
            config.data.row_length,
            config.data.max_segment,
            config.batch.micro_batch_rows,
            self.place.rank,
            self.place.world_size,
            config.evaluate.rows,
        ):
            predictions, targets, mask = self.predict(batch, self.layout(batch))
            predicted, truth = predictions[:, :-1][mask].float(), targets[mask]
            totals[0] += (predicted - truth).square().mean(dim=-1).sum()
            totals[1] += torch.nn.functional.cosine_similarity(predicted, truth, dim=-1).sum()
            totals[2] += len(truth)
            for index, values in enumerate((predicted, truth)):
                moments[2 * index] += values.sum(0)
                moments[2 * index + 1] += values.double().square().sum(0)
        dist.all_reduce(totals)
        dist.all_reduce(moments)
        if self.run_log is not None:
            count = totals[2].clamp(min=1)
            loss = (totals[0] / count).item()
            variances = moments[1::2] / count - (moments[0::2] / count).square()  # predictions, targets
            spread = (variances[0].sum() / variances[1].sum()).item()
            found = {
                "val_loss": loss,
                "val_loss_sum": loss * dims,
                "val_cosine": (totals[1] / count).item(),
                "val_variance_ratio": spread,
                "val_targets": int(totals[2].item()),
            }
            self.run_log.write(done, found)
            self.run_log.say(done, found)
        self.speed.reset()

    def save(self, done: int) -> None:
        """A checkpoint after `done` steps, and the retention of the older ones."""
        if self.saved_at == done:
            return
        state = {"step": done, "concepts": self.concepts_seen, **identity(self.job, self.place)}
        path = checkpoints.save(self.engine, self.job.run_dir, done, state)
        if self.place.rank == 0:
            logger.info("saved %s", path)
            checkpoints.retain(self.job.run_dir, self.job.config.checkpoint)
        self.saved_at, self.last_save = done, time.monotonic()
        self.speed.reset()


def identity(job: Job, place: Place) -> dict[str, Any]:
    """What a checkpoint has to agree with to be resumed, and the versions it was made with."""
    return {
        "fingerprint": job.fingerprint,
        "model": job.model.sizes(),
        "precision": ds_config.precision(job.ds),
        "zero_stage": ds_config.zero_stage(job.ds),
        "world_size": place.world_size,
        "versions": versions(),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers, and the project's git commit where it runs from a checkout."""
    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "lcm_ds": lcm_ds.__version__,
        "git_commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
    }


def prepare_run_folder(job: Job, place: Place) -> None:
    """Leftovers go; the config as resolved, with versions and world size, comes (rank 0)."""
    checkpoints.clear_partial(job.run_dir)
    (job.run_dir / "STOP").unlink(missing_ok=True)
    write_whole(job.run_dir / "config.yaml", dump(job.config, world_size=place.world_size, **versions()))
    write_whole(job.run_dir / "ds_config.json", json.dumps(job.ds, indent=2) + "\n")


def announce(job: Job, place: Place, engine: deepspeed.DeepSpeedEngine, start: int) -> None:
    """The few lines a run begins with."""
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    lanes = job.plan.lanes_per_source
    reads = ", ".join(
        f"{dataset.path} ({sum(shard.concepts for shard in dataset.shards):,} concepts, {count} of {sum(lanes)} lanes)"
        for dataset, count in zip(job.datasets, lanes, strict=True)
    )
    lines = [
        f"{job.run_dir}: {parameters:,} parameters, {place.world_size} rank(s), ZeRO {ds_config.zero_stage(job.ds)}, "
        f"{ds_config.precision(job.ds)}",
        f"reads {reads}",
        f"step {start} of {job.total_steps}, {job.config.batch.rows_per_step} rows of "
        f"{job.config.data.row_length} concepts a step" + (", resumed" if start else ""),
    ]
    for line in lines:
        print(line, flush=True)
        logger.info(line)


def _due(done: int, every: int | None, total: int) -> bool:
    """Whether something that happens every so many steps, and at the end, is due."""
    return done == total or (every is not None and done % every == 0)
