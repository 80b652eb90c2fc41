"""The training loop, top to bottom in the order in which things happen.

What it promises: a resumed run goes on bit for bit on the same number of ranks (on one kind of device, with one number
of threads a rank), and to rounding on another; all ranks agree before any of them stops, saves or goes back.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from lcm_ds import deepspeed_config
from lcm_ds.baselines.linear import Linear
from lcm_ds.checkpoint import format as checkpoints
from lcm_ds.checkpoint import load as resume
from lcm_ds.checkpoint.format import Checkpoint
from lcm_ds.checkpoint.save import Saver, saves_in_background
from lcm_ds.data.format import read_normalizer
from lcm_ds.data.loader import Batch, Loader
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.errors import InputError
from lcm_ds.signals import DONE, FAILED, STOPPED
from lcm_ds.train.engine import build_engine, build_model, init_distributed
from lcm_ds.train.init_from import load_initial_weights
from lcm_ds.train.job import TrainJob
from lcm_ds.train.memory import count_parameters
from lcm_ds.train.monitoring.console import console, set_up_logging
from lcm_ds.train.monitoring.console_format import bar_line, step_line, summary, validation_line
from lcm_ds.train.monitoring.gradient_scale import GradientMeter
from lcm_ds.train.monitoring.histograms import histograms
from lcm_ds.train.monitoring.metrics_log import RunLog
from lcm_ds.train.monitoring.profiler import StepProfiler
from lcm_ds.train.monitoring.text_samples import Samples
from lcm_ds.train.monitoring.throughput import ThroughputMeter, memory_gib, peak_tflops
from lcm_ds.train.reliability.loss_guard import Rollback, SkippedSteps, StepMonitor, tell
from lcm_ds.train.reliability.run_lock import RunLock
from lcm_ds.train.reliability.stop_signal import StopRequest
from lcm_ds.train.reliability.watchdog import Watchdog
from lcm_ds.train.run_metadata import identity, log_run_header, prepare_run_folder
from lcm_ds.train.step import StepOutcome, Stepper
from lcm_ds.train.validation import fit_ridge, validate

logger = logging.getLogger("lcm_ds.train")


def train(job: TrainJob, place: DistEnv, stop: StopRequest) -> int:
    """Train until the run is done or somebody asks it to stop; returns the exit code: 0, 75, or 1 where what was to be
    saved could not be.

    Raises InputError where the run's folder has an owner, its checkpoints belong to another run, or a shard turns out
    not to be what was written; RunFailedError where no checkpoint is whole, or going back did not help.
    """
    job.run_dir.mkdir(parents=True, exist_ok=True)
    set_up_logging(job.run_dir, place.rank)
    with contextlib.ExitStack() as stack:
        if place.rank == 0:
            stack.enter_context(RunLock(job.run_dir))
        watchdog = Watchdog(job.config.guard.stall_minutes)
        stack.callback(watchdog.close)
        device = init_distributed(place, job.config.guard.stall_minutes)
        if place.rank == 0:
            checkpoints.clear_partial(job.run_dir)
            stop.watch(job.run_dir / "STOP")
        code = _train(job, place, device, stop, watchdog)
        # Not after an error: other ranks may wait in a collective, and this one would wait with them.
        dist.destroy_process_group()
    return code


def _train(job: TrainJob, place: DistEnv, device: torch.device, stop: StopRequest, watchdog: Watchdog) -> int:
    """Go on from the newest checkpoint, as often as the guard asks for it."""
    newest = resume.newest_complete(job.run_dir, job.config.checkpoint)
    if newest is not None:
        errors = resume.errors(newest, identity(job, place))
        if errors:
            raise InputError(errors if place.rank == 0 else [])  # said once
        if newest.step >= job.total_steps:
            if place.rank == 0:
                console.line(f"{job.run_dir}: already trained for {newest.step} steps, nothing to do")
            return DONE
    if place.rank == 0:
        changed = None if newest is None else resume.changes(newest, job.run_dir, identity(job, place))
        prepare_run_folder(job, place)
        if changed is not None:
            console.line(changed)
    left_out = SkippedSteps(job.run_dir)
    while True:
        try:
            return _attempt(job, place, device, stop, watchdog, newest, left_out.ranges)
        except Rollback as back:
            incident = back.incident
        # Out here nothing holds the engine any more.
        gc.collect()
        get_accelerator().empty_cache()
        newest = resume.newest_complete(job.run_dir, job.config.checkpoint)
        left_out.add(incident, 0 if newest is None else newest.step)


def _attempt(
    job: TrainJob,
    place: DistEnv,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
    newest: Checkpoint | None,
    left_out: list[range],
) -> int:
    """Train from a checkpoint, or from the beginning; raises GoBack, having let go of everything, where it is to start
    from another one.
    """
    run_dir, config, ds = job.run_dir, job.config, job.ds
    state: dict[str, Any] = {"concepts": 0, "losses": [], "learned": False} if newest is None else newest.state()
    start = 0 if newest is None else newest.step
    convert = newest is not None and resume.needs_conversion(state, identity(job, place))
    if newest is not None and convert:
        resume.convert(newest, count_parameters(job.model), config.checkpoint, watchdog.beat, console.line)
        ds = {**ds, "checkpoint": {**ds.get("checkpoint", {}), "load_universal": True}}
    watchdog.beat("building the model")
    initial = job.initial if newest is None else None
    model = build_model(job.model, read_normalizer(job.datasets[0].path), config.seed if initial is None else None, ds)
    begun = None if initial is None else load_initial_weights(model, initial, deepspeed_config.zero_stage(ds) == 3)
    engine = build_engine(model, config, ds)
    if newest is not None:
        resume.restore(engine, newest, convert)
    if place.rank == 0:
        log_run_header(job, place, engine, start, begun)
    with contextlib.ExitStack() as stack:
        run_log = RunLog(job, place.world_size, start) if place.rank == 0 else None
        if run_log is not None:
            stack.callback(run_log.close)
        loader = Loader(
            job.datasets,
            job.plan,
            config.data.max_segment,
            place.rank,
            place.world_size,
            config.batch.micro_batch_rows,
            workers=config.data.workers,
            start_step=start,
            pinned=device.type == "cuda",
            local_ranks=place.local_world_size,
            left_out=left_out,
        )
        stack.callback(loader.close)
        saver = Saver(engine, run_dir, config.checkpoint, saves_in_background(config.checkpoint, ds))
        stack.callback(saver.close)
        stack.callback(console.end_bar)
        run = Run(Stepper(job, place, engine, device), loader, saver, watchdog, run_log, stop, state, left_out)
        try:
            return run.steps(start)
        except Rollback:
            if saver.pending:
                saver.finish()
            engine.destroy()
            raise


class Run:
    """One process's part in a run: what happens before and after each step.

    state: of the checkpoint that it goes on from. left_out: steps that are passed over.
    """

    def __init__(
        self,
        stepper: Stepper,
        loader: Loader,
        saver: Saver,
        watchdog: Watchdog,
        run_log: RunLog | None,
        stop: StopRequest,
        state: dict[str, Any],
        left_out: list[range],
    ) -> None:
        self.stepper, self.loader, self.saver, self.watchdog = stepper, loader, saver, watchdog
        self.job, self.place, self.engine = stepper.job, stepper.place, stepper.engine
        self.run_log, self.stop, self.left_out = run_log, stop, left_out
        self.concepts_seen: int = state["concepts"]
        self.concepts_missing = 0  # since this process started
        self.losses: list[float | None] = []  # of the steps since the last report
        self.targets = 0  # of the last step
        self.learned: bool = state.get("learned", True)  # whether a step has had targets; earlier versions did not say
        self.guard = StepMonitor(self.job.config.guard, state["losses"])
        self.save_is_due = False
        self.ridge: Linear | None = None  # from the first validation on
        self.samples: Samples | None = None  # from then on, too
        self.started = self.last_save = time.monotonic()
        self.stalled = self.stalled_by_this_save = 0.0  # seconds
        peak = peak_tflops(stepper.device, self.job.config.log.peak_tflops)
        self.speed = ThroughputMeter(self.job.model, self.place.world_size, peak)
        parameters, eps = count_parameters(self.job.model), self.job.ds["optimizer"]["params"].get("eps")
        self.gradients = GradientMeter(parameters, eps, self.job.config.optim.max_grad_norm)
        self.profiler = StepProfiler(
            self.job.run_dir, self.job.config.train.profile_steps if self.place.rank == 0 else None
        )

    def steps(self, start: int) -> int:
        """Every step from `start` to the end of the run; returns the exit code. Raises GoBack."""
        config, total = self.job.config, self.job.total_steps
        batches = iter(self.loader)
        self.stop.steps_begin()
        stopping = False
        for step in range(start, total):
            done = step + 1
            self.save_is_due |= _due(done, config.checkpoint.every, total)
            if not any(step in steps for steps in self.left_out):
                stopping = self.step(batches, step)
            else:
                self.report(step)  # the losses of a line are those of steps one after the other
                if done < total:
                    continue
            last = stopping or done == total
            if done % config.log.every == 0 or last or self.saves_now:
                self.report(done)  # what is not reported when it is saved is lost on a resume
            if done == total and not self.learned:  # before it is saved as done
                mistake = f"{self.job.run_dir}: none of the {total} steps had a target: nothing was learned"
                raise InputError([mistake] if self.place.rank == 0 else [])
            if _due(done, config.evaluate.every, total) and self.job.validation is not None:
                self.validate(done)
            if (last or self.saves_now) and not self.save(done, wait=last) and last:
                return FAILED
            if stopping and done < total:
                break
        self.profiler.close()
        return self.end(done, total)

    def step(self, batches: Iterator[Batch], step: int) -> bool:
        """One step, and what there is to be said of it; whether the run was asked to stop. Raises GoBack."""
        self.watchdog.beat(f"step {step}")
        self.profiler.begin(step)
        every = self.job.config.log.histograms
        look = (lambda: self.look(step + 1)) if every is not None and (step + 1) % every == 0 else None
        minutes = self.job.config.checkpoint.every_minutes
        by_the_clock = minutes is not None and time.monotonic() - self.last_save > 60 * minutes
        asks = (self.stop.requested(), by_the_clock and self.place.rank == 0, self.saver.busy())
        outcome = self.stepper.step(batches, step, asks, look)
        self.profiler.end(step)
        self.concepts_seen += outcome.concepts
        self.concepts_missing += outcome.missing
        self.losses.append(outcome.loss)
        self.gradients.add(self.engine.get_global_grad_norm())
        self.targets, self.learned = outcome.targets, self.learned or outcome.targets > 0
        self.speed.add(outcome.concepts, outcome.pairs, outcome.waited)
        self.show_bar(step + 1)
        self.check(step, outcome)
        stops, saves, busy = outcome.asked
        if self.saver.pending and not busy:
            self.finish_save(step + 1)
        self.save_is_due |= saves > 0
        return stops > 0

    def look(self, done: int) -> None:
        """Histograms of the weights before a step, and of its gradients."""
        found = histograms(self.engine, counts=self.run_log is not None)
        if self.run_log is not None:
            self.run_log.histograms(done, found)

    def show_bar(self, done: int, doing: str = "") -> None:
        """The bar of rank 0, on a terminal."""
        if self.run_log is not None:
            total = self.job.total_steps
            seconds = (total - done) * self.speed.read(overall=True)["step_time"]
            console.bar(bar_line(done, total, seconds, doing), now=bool(doing))

    def check(self, step: int, outcome: StepOutcome) -> None:
        """Say what is wrong with a step, and go back where that is what the guard wants. Raises GoBack."""
        incident = self.guard.check(step, outcome.loss, outcome.applied)
        if incident is None:
            return
        if deepspeed_config.precision(self.job.ds) == "float16" and not outcome.applied and incident.leave_out is None:
            logger.info("step %d: %s (fp16: the scale of the loss goes down)", step, incident.what)
            return
        where = ""
        if incident.leave_out is not None:
            first, last = incident.leave_out.start, incident.leave_out.stop - 1
            where = f": back to the last checkpoint, and on without the steps {first} to {last}"
        tell(incident, self.job, self.loader, where)
        if incident.leave_out is not None:
            raise Rollback(incident)

    def report(self, done: int) -> None:
        """A line of metrics after `done` steps."""
        if self.run_log is not None and self.losses:
            loss = self.losses[-1]
            values = {
                "concepts": self.concepts_seen,
                "missing_concepts": self.concepts_missing,
                "epoch": self.job.plan.epoch(done),
                "loss": loss,
                "loss_sum": None if loss is None else loss * self.job.model.embed_dim,
                "targets": self.targets,
                "losses": list(self.losses),  # of all steps since the line before
                **self.gradients.read(),
                "lr": self.engine.basic_optimizer.param_groups[0]["lr"],
                **self.speed.read(),
                "skipped_steps": self.engine.skipped_steps,
                "memory": memory_gib(self.stepper.device),
            }
            self.run_log.write(done, values)
            console.line(step_line(done, self.job.total_steps, values))
            if wrong := self.gradients.eps_warning(self.job.model.embed_dim):
                console.warning(wrong)
        self.losses.clear()
        self.gradients.reset()
        self.speed.reset()

    def validate(self, done: int) -> None:
        """A line of validation metrics after `done` steps, and what is predicted for a few prompts, in words."""
        config, dataset = self.job.config.log, self.job.validation
        assert dataset is not None
        self.show_bar(done, "validating")
        moved = partial(self.watchdog.beat, f"validation, step {done}")
        if self.ridge is None:
            self.ridge = fit_ridge(self.stepper, moved)
        found = validate(self.stepper, dataset, self.ridge, moved)
        if self.samples is None and config.samples:
            self.samples = Samples(self.stepper, dataset, config.samples)
        samples = self.samples.predict() if self.samples is not None else []
        if self.run_log is not None:
            self.run_log.write(done, found)
            self.run_log.samples(done, samples)
            console.line(validation_line(done, self.job.total_steps, found))
        self.speed.reset()

    @property
    def saves_now(self) -> bool:
        """Whether to save after this step: not while steps are not finite, or the run would go back to here."""
        return self.save_is_due and self.guard.skipped_in_a_row == 0

    def save(self, done: int, wait: bool) -> bool:
        """Begin a checkpoint after `done` steps, and `wait` until it is one; False where it could not be made."""
        self.watchdog.beat(f"saving after step {done}")
        self.show_bar(done, "saving")
        if self.saver.pending:
            self.finish_save(done)
        started = time.monotonic()
        state = {
            "step": done,
            "concepts": self.concepts_seen,
            "left_out": [[steps.start, steps.stop - 1] for steps in self.left_out],  # first and last
            "losses": self.guard.state(),
            "learned": self.learned,
            **identity(self.job, self.place),
        }
        self.saver.begin(done, state)
        self.save_is_due, self.last_save = False, time.monotonic()
        self.stalled_by_this_save = self.last_save - started
        made = True
        if wait or not self.saver.in_background:
            made = self.finish_save(done)
        self.speed.reset()
        return made

    def finish_save(self, done: int) -> bool:
        """Make a checkpoint of what was begun; `done` steps are done by now. False where it could not be made."""
        self.watchdog.beat(f"making a checkpoint, step {done}")
        started = time.monotonic()
        made = self.saver.finish()
        now = time.monotonic()
        self.stalled_by_this_save += now - started
        self.stalled += self.stalled_by_this_save
        if self.run_log is not None:
            share = self.stalled / (now - self.started)
            self.run_log.write(done, {"checkpoint_time": self.stalled_by_this_save, "checkpoint_share": share})
        return made

    def end(self, done: int, total: int) -> int:
        """The last lines of the run, and its exit code."""
        console.end_bar()
        if self.run_log is not None:
            self.stop.clear()
            if done < total:
                who = self.stop.reason or "another rank's"
                console.line(f"stopped at step {done} on request ({who}); a checkpoint is saved, start again to go on")
            else:
                self.run_log.done = True
                console.line(f"done: {total} steps, {self.concepts_seen:,} concepts; {self.job.run_dir}")
                speed, losses = self.speed.read(overall=True), self.run_log.validation_losses()
                seconds = time.monotonic() - self.started
                console.line("\n".join(summary(self.job.run_dir, speed, seconds, losses)))
        return STOPPED if done < total else DONE


def _due(done: int, every: int | None, total: int) -> bool:
    """Whether something that happens every so many steps, and at the end, is due."""
    return done == total or (every is not None and done % every == 0)
