"""The training loop, top to bottom in the order in which things happen.

A run resumed on the same number of ranks is bit-identical to one that was never interrupted (on CPUs with the same
number of threads per rank, on GPUs of the same kind with `train.deterministic`); otherwise it agrees to rounding. All
ranks agree before any of them stops, saves or rolls back.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from lcm_ds import deepspeed_config
from lcm_ds.baselines.linear import Linear
from lcm_ds.checkpoint import load as resume
from lcm_ds.checkpoint.format import Checkpoint, clear_partial, saves_in_background
from lcm_ds.checkpoint.remote import fetch_newest, uploads, why_not_writable
from lcm_ds.checkpoint.save import Saver
from lcm_ds.data.format import read_normalizer
from lcm_ds.data.loader import Loader
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.errors import InputError
from lcm_ds.files import why_no_checkpoints
from lcm_ds.model import kernels
from lcm_ds.model.sizes import count_parameters
from lcm_ds.signals import DONE, FAILED, STOPPED
from lcm_ds.train.engine import build_engine, build_model, choose_kernels, init_distributed
from lcm_ds.train.init_from import load_initial_weights
from lcm_ds.train.job import TrainJob
from lcm_ds.train.monitoring.console import console, set_up_logging
from lcm_ds.train.monitoring.console_format import progress_bar, step_line, summary, validation_line
from lcm_ds.train.monitoring.gradient_scale import GradientMeter
from lcm_ds.train.monitoring.histograms import histograms
from lcm_ds.train.monitoring.metrics_log import RunLog
from lcm_ds.train.monitoring.profiler import StepProfiler
from lcm_ds.train.monitoring.stragglers import StragglerWatch
from lcm_ds.train.monitoring.text_samples import Samples
from lcm_ds.train.monitoring.throughput import ThroughputMeter, memory_gib, peak_tflops
from lcm_ds.train.reliability.loss_guard import Rollback, SkippedSteps, StepMonitor, record_incident
from lcm_ds.train.reliability.run_lock import RunLock
from lcm_ds.train.reliability.stop_signal import StopRequest
from lcm_ds.train.reliability.watchdog import Watchdog
from lcm_ds.train.run_metadata import identity, log_run_header, write_run_config
from lcm_ds.train.step import PendingStep, StepOutcome, Stepper
from lcm_ds.train.validation import fit_ridge, validate

logger = logging.getLogger("lcm_ds.train")


def train(job: TrainJob, env: DistEnv, stop: StopRequest) -> int:
    """Train from the newest checkpoint to the end of the run, or until a stop is requested.

    Args:
        job: The run, checked.
        env: This process's rank and rendezvous.
        stop: Stop requests of this process; the ranks agree on them at the next step.

    Returns:
        The exit code: 0 done, 75 stopped on request, 1 if the last checkpoint could not be saved.

    Raises:
        InputError: The run directory is locked, its checkpoints belong to another run, or a shard is damaged.
        RunFailedError: No checkpoint is valid, or rolling back did not help.
    """
    gc.freeze()  # what the imports made is searched for garbage no more, as DeepSpeed does whenever it builds an engine
    rules = job.config.checkpoint
    with session(job, env, stop) as (device, watchdog), uploads(job.run_dir, rules) as on_checkpoint:
        if rules.dir is not None:
            fetch_newest(job.run_dir, rules, watchdog.beat)
        checkpoint = resume.newest_complete(job.run_dir, rules)
        if checkpoint is not None:
            if errors := resume.errors(checkpoint, identity(job, env)):
                raise InputError(errors if env.rank == 0 else [])  # printed once
            if checkpoint.step >= job.total_steps:
                if env.rank == 0:
                    console.line(f"{job.run_dir}: already trained for {checkpoint.step} steps, nothing to do")
                return DONE
        if env.rank == 0:
            changes = None if checkpoint is None else resume.changes(checkpoint, job.run_dir, identity(job, env))
            write_run_config(job, env)
            if changes is not None:
                console.line(changes)
        choose_kernels(job, device, None if checkpoint is None else checkpoint.state().get("kernels"))
        skipped = SkippedSteps(job.run_dir)
        while True:
            try:
                with ExitStack() as stack:
                    return build_trainer(
                        job, env, device, stop, watchdog, checkpoint, skipped.ranges, on_checkpoint, stack
                    ).run()
            except Rollback as rollback:
                incident = rollback.incident
            # Nothing refers to the engine any more.
            gc.collect()
            get_accelerator().empty_cache()
            checkpoint = resume.newest_complete(job.run_dir, rules)
            skipped.add(incident, 0 if checkpoint is None else checkpoint.step)


@contextmanager
def session(job: TrainJob, env: DistEnv, stop: StopRequest) -> Iterator[tuple[torch.device, Watchdog]]:
    """Log, lock the run directory, start the watchdog and join the process group; yields device and watchdog."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    set_up_logging(job.run_dir, env.rank)
    with ExitStack() as stack:
        if env.rank == 0:
            stack.enter_context(RunLock(job.run_dir))
            if reason := why_no_checkpoints(job.run_dir / "checkpoints"):
                raise InputError(f"{job.run_dir}: {reason}")
            if job.config.checkpoint.dir is not None and (reason := why_not_writable(job.config.checkpoint.dir)):
                raise InputError(reason)
        watchdog = Watchdog(job.config.guard.stall_minutes)
        stack.callback(watchdog.close)
        device = init_distributed(env, job.config.guard.stall_minutes)
        if env.rank == 0:
            clear_partial(job.run_dir)
            stop.watch(job.run_dir / "STOP")
        yield device, watchdog
        # Not after an error: other ranks may wait in a collective, and this one would wait with them.
        dist.destroy_process_group()


def build_trainer(
    job: TrainJob,
    env: DistEnv,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
    checkpoint: Checkpoint | None,
    skipped_steps: list[range],
    on_checkpoint: Callable[[], None],
    stack: ExitStack,
) -> Trainer:
    """Build model, engine, loader and saver of a run.

    Args:
        job: The run.
        env: This process's rank.
        device: Of this rank.
        stop: Stop requests of this process.
        watchdog: Is told about progress.
        checkpoint: To resume from; None: step 0.
        skipped_steps: Steps to skip.
        on_checkpoint: Called on rank 0 after each checkpoint.
        stack: Closes what is opened here.
    """
    config, ds = job.config, job.ds
    state: dict[str, Any] = {"concepts": 0, "losses": [], "learned": False}
    if checkpoint is not None:
        state = checkpoint.state()
    first_step = 0 if checkpoint is None else checkpoint.step
    universal = checkpoint is not None and resume.needs_conversion(state, identity(job, env))
    if checkpoint is not None and universal:
        resume.convert(checkpoint, count_parameters(job.model), config.checkpoint, watchdog.beat, console.line)
        ds = {**ds, "checkpoint": {**ds.get("checkpoint", {}), "load_universal": True}}
    watchdog.beat("building the model")
    init_from = job.initial if checkpoint is None else None
    model = build_model(job.model, read_normalizer(job.datasets[0].path), None if init_from else config.seed, ds)
    loaded = load_initial_weights(model, init_from, deepspeed_config.zero_stage(ds) == 3) if init_from else None
    engine = build_engine(model, config, ds)
    if checkpoint is not None:
        resume.restore(engine, checkpoint, universal)
    if env.rank == 0:
        log_run_header(job, env, engine, first_step, loaded)
    run_log = RunLog(job, env.world_size, first_step) if env.rank == 0 else None
    if run_log is not None:
        stack.callback(run_log.close)
    loader = Loader(
        job.datasets,
        job.plan,
        env.rank,
        env.world_size,
        config.batch.micro_batch_rows,
        workers=config.data.workers,
        start_step=first_step,
        pinned=device.type == "cuda",
        local_ranks=env.local_world_size,
        skipped_steps=skipped_steps,
    )
    stack.callback(loader.close)
    saver = Saver(engine, job.run_dir, config.checkpoint, saves_in_background(config.checkpoint, ds), on_checkpoint)
    stack.callback(saver.close)
    stack.callback(console.end_bar)
    stepper = Stepper(job, env, engine, device)
    return Trainer(stepper, loader, saver, watchdog, run_log, stop, state, first_step, skipped_steps)


class Trainer:
    """One process's part in a run: `run` is the loop, the methods below it follow in the order of their use.

    Args:
        stepper: Takes the optimizer steps.
        loader: This rank's batches from `first_step` on.
        saver: Writes checkpoints.
        watchdog: Is told what the process does.
        run_log: Metrics of the run; None on ranks other than 0.
        stop: Stop requests of this process.
        state: state.json of the checkpoint that the run resumes from.
        first_step: Steps done so far.
        skipped_steps: Steps to pass over.
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
        first_step: int,
        skipped_steps: list[range],
    ) -> None:
        self.stepper, self.loader, self.saver, self.watchdog = stepper, loader, saver, watchdog
        self.job, self.env, self.engine = stepper.job, stepper.env, stepper.engine
        self.run_log, self.stop = run_log, stop
        self.first_step, self.skipped_steps = first_step, skipped_steps
        self.concepts_seen: int = state["concepts"]
        self.missing_concepts = 0  # since this process started
        self.losses: list[float | None] = []  # of the steps since the last report
        self.targets = 0  # of the last step
        self.had_targets: bool = state.get("learned", True)  # any step so far; not in checkpoints of earlier versions
        self.monitor = StepMonitor(self.job.config.guard, state["losses"])
        self.pending: deque[tuple[int, PendingStep]] = deque()  # steps whose results were not read yet, at most two
        self.save_due = self.stopping = False
        self.ridge: Linear | None = None  # from the first validation on, as `samples`
        self.samples: Samples | None = None
        self.started = self.last_save = time.monotonic()
        self.stalled = self.stalled_by_this_save = 0.0  # seconds
        peak = peak_tflops(stepper.device, self.job.config.log.peak_tflops)
        self.speed = ThroughputMeter(self.job.model, self.env.world_size, peak)
        self.stragglers = StragglerWatch(self.job.config.guard, self.env, self.job.run_dir)
        parameters, eps = count_parameters(self.job.model), self.job.ds["optimizer"]["params"].get("eps")
        self.gradients = GradientMeter(parameters, eps, self.job.config.optim.max_grad_norm)
        profile_steps = self.job.config.train.profile_steps if self.env.rank == 0 else None
        self.profiler = StepProfiler(self.job.run_dir, profile_steps)

    def run(self) -> int:
        """Every step to the end of the run; returns the exit code. Raises Rollback."""
        config, total = self.job.config, self.job.total_steps
        batches = self.loader.map(self.stepper.prepare)
        self.stop.steps_begin()
        for step in range(self.first_step, total):
            done = step + 1
            self.save_due |= _due(done, config.checkpoint.every, total)
            if any(step in steps for steps in self.skipped_steps):
                self.read_results(done, all_of_them=True)
                self.report(step)  # a line's losses are those of consecutive steps
                if done < total:
                    continue
            else:
                self.watchdog.beat(f"step {step}")
                self.profiler.begin(step)
                pending = self.stepper.step(batches, step, self.rank_flags(), self.histogram_writer(done))
                self.pending.append((step, pending))
                self.profiler.end(step)
                self.read_results(done)
                self.show_bar(done)
            last = self.stopping or done == total
            if done % config.log.every == 0 or last or self.save_now:
                self.report(done)  # a resume would lose what is not reported before a save
            if done == total and not self.had_targets:  # before it is saved as done
                error = f"{self.job.run_dir}: none of the {total} steps had a target: nothing was learned"
                raise InputError([error] if self.env.rank == 0 else [])
            if self.validates_after(done):
                self.validate(done)
            if (last or self.save_now) and not self.save(done, wait=last) and last:
                return FAILED
            if self.stopping:
                break
        self.profiler.close()
        return self.finish(done, total)

    def read_results(self, done: int, all_of_them: bool = False) -> None:
        """Read the results of steps, a step late: the host prepares a step while the device still computes the last.

        Without that step only if nothing else happens after `done` steps, which all ranks decide alike.
        """
        every = self.job.config.log.every
        all_of_them |= done == self.job.total_steps or done % every == 0 or self.validates_after(done)
        while self.pending and (all_of_them or self.save_due or self.stopping or len(self.pending) > 1):
            step, pending = self.pending.popleft()
            outcome = pending.read()
            self.count(step, outcome)
            self.check(step, outcome)
            stops, saves, still_writing = outcome.rank_flags
            if self.saver.pending and not still_writing:
                self.commit_save(done)
            self.save_due |= saves > 0
            self.stopping |= stops > 0

    def rank_flags(self) -> tuple[bool, bool, bool]:
        """What the ranks sum up in a step: stop requested, save due by rank 0's clock, still writing a checkpoint."""
        minutes = self.job.config.checkpoint.every_minutes
        save_due = minutes is not None and time.monotonic() - self.last_save > 60 * minutes
        return self.stop.requested(), save_due and self.env.rank == 0, self.saver.busy()

    def histogram_writer(self, done: int) -> Callable[[], None] | None:
        """Logs histograms of weights and gradients within the step that ends as step `done`; None if not due."""
        every = self.job.config.log.histograms
        if every is None or done % every:
            return None

        def write() -> None:
            values = histograms(self.engine, counts=self.run_log is not None)
            if self.run_log is not None:
                self.run_log.histograms(done, values)

        return write

    def count(self, step: int, outcome: StepOutcome) -> None:
        """Add a step to the figures of the next report."""
        self.concepts_seen += outcome.concepts
        self.missing_concepts += outcome.missing
        self.losses.append(outcome.loss)
        self.gradients.add(outcome.grad_norm)
        self.targets, self.had_targets = outcome.targets, self.had_targets or outcome.targets > 0
        self.speed.add(outcome.concepts, outcome.attended_pairs, outcome.waited)
        self.stragglers.add(step, outcome.forward_times)

    def show_bar(self, done: int, doing: str = "") -> None:
        """The progress bar of rank 0, on a terminal."""
        if self.run_log is not None:
            total = self.job.total_steps
            seconds = (total - done) * self.speed.read(overall=True)["step_time"]
            console.bar(progress_bar(done, total, seconds, doing), now=bool(doing))

    def check(self, step: int, outcome: StepOutcome) -> None:
        """Record a step that went wrong. Raises Rollback, having let go of the engine, if the guard asks for it."""
        incident = self.monitor.check(step, outcome.loss, outcome.applied)
        if incident is None:
            return
        if incident.skip is None and not outcome.applied and deepspeed_config.precision(self.job.ds) == "float16":
            logger.info("step %d: %s (fp16: the loss scale is lowered)", step, incident.what)
            return
        record_incident(incident, self.job, self.loader)
        if incident.skip is not None:
            if self.saver.pending:
                self.saver.commit()
            self.engine.destroy()
            raise Rollback(incident)

    def report(self, done: int) -> None:
        """Log the metrics after `done` steps: a new metric of a step goes into `values`."""
        if self.run_log is not None and self.losses:
            loss = self.losses[-1]
            values = {
                "concepts": self.concepts_seen,
                "missing_concepts": self.missing_concepts,
                "epoch": self.job.plan.epoch(done),
                "loss": loss,
                "loss_sum": None if loss is None else loss * self.job.model.embed_dim,
                "targets": self.targets,
                "losses": list(self.losses),  # of all steps since the line before
                **self.gradients.read(),
                "lr": self.engine.basic_optimizer.param_groups[0]["lr"],
                **(speed := self.speed.read()),
                **self.stragglers.read(speed["step_time"]),
                "skipped_steps": self.engine.skipped_steps,
                "memory": memory_gib(self.stepper.device),
            }
            self.run_log.write(done, values)
            console.line(step_line(done, self.job.total_steps, values))
            if warning := self.gradients.eps_warning(self.job.model.embed_dim):
                console.warning(warning)
        self.losses.clear()
        self.gradients.reset()
        self.stragglers.reset()
        self.speed.reset()

    def validate(self, done: int) -> None:
        """Log validation metrics after `done` steps, and what the model predicts for a few prompts, as text."""
        dataset = self.job.validation
        assert dataset is not None
        self.show_bar(done, "validating")
        on_progress = partial(self.watchdog.beat, f"validation, step {done}")
        if self.ridge is None:
            self.ridge = fit_ridge(self.stepper, on_progress)
        values = validate(self.stepper, dataset, self.ridge, on_progress)
        if self.samples is None and self.job.config.log.samples:
            self.samples = Samples(self.stepper, dataset, self.job.config.log.samples)
        samples = self.samples.predict() if self.samples is not None else []
        if self.run_log is not None:
            self.run_log.write(done, values)
            self.run_log.samples(done, samples)
            console.line(validation_line(done, self.job.total_steps, values))
        self.speed.reset()

    def validates_after(self, done: int) -> bool:
        """Whether a validation is due after `done` steps."""
        return self.job.validation is not None and _due(done, self.job.config.evaluate.every, self.job.total_steps)

    @property
    def save_now(self) -> bool:
        """Whether to save after this step: not while steps are skipped, or a rollback would lead back to here."""
        return self.save_due and self.monitor.skipped_in_a_row == 0

    def save(self, done: int, wait: bool) -> bool:
        """Start a checkpoint after `done` steps, and `wait` until it is complete; False if it could not be written."""
        self.watchdog.beat(f"saving after step {done}")
        self.show_bar(done, "saving")
        if self.saver.pending:
            self.commit_save(done)
        started = time.monotonic()
        state = {
            "step": done,
            "concepts": self.concepts_seen,
            "left_out": [[steps.start, steps.stop - 1] for steps in self.skipped_steps],  # first and last
            "losses": self.monitor.state(),
            "learned": self.had_targets,
            "kernels": kernels.in_use(),
            **identity(self.job, self.env),
        }
        self.saver.save_async(done, state)
        self.save_due, self.last_save = False, time.monotonic()
        self.stalled_by_this_save = self.last_save - started
        committed = self.commit_save(done) if wait or not self.saver.in_background else True
        self.speed.reset()
        return committed

    def commit_save(self, done: int) -> bool:
        """Complete the checkpoint that was started, `done` steps being done by now; False if it failed."""
        self.watchdog.beat(f"making a checkpoint, step {done}")
        started = time.monotonic()
        committed = self.saver.commit()
        now = time.monotonic()
        self.stalled_by_this_save += now - started
        self.stalled += self.stalled_by_this_save
        if self.run_log is not None:
            share = self.stalled / (now - self.started)
            self.run_log.write(done, {"checkpoint_time": self.stalled_by_this_save, "checkpoint_share": share})
        return committed

    def finish(self, done: int, total: int) -> int:
        """Print the run's last lines; returns its exit code."""
        console.end_bar()
        if self.run_log is not None:
            self.stop.clear()
            if done < total:
                reason = self.stop.reason or "another rank's"
                console.line(f"stopped at step {done} on request ({reason}); checkpoint saved, start again to resume")
            else:
                self.run_log.done = True
                console.line(f"done: {total} steps, {self.concepts_seen:,} concepts; {self.job.run_dir}")
                speed, losses = self.speed.read(overall=True), self.run_log.validation_losses()
                seconds = time.monotonic() - self.started
                console.line("\n".join(summary(self.job.run_dir, speed, seconds, losses)))
        return STOPPED if done < total else DONE


def _due(done: int, every: int | None, total: int) -> bool:
    """Whether something that happens every `every` steps, and at the end, is due."""
    return done == total or (every is not None and done % every == 0)
