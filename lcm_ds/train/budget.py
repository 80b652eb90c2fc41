"""What a run takes: hours, money, disk. By arithmetic, before it starts and even before its data is there.

Every line names what it stands on: a formula, a datasheet, a key of the config or an option.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lcm_ds import deepspeed_config
from lcm_ds.config import CheckpointConfig
from lcm_ds.devices import Gpu, Prices
from lcm_ds.model.flops import training_flops
from lcm_ds.model.sizes import count_parameters
from lcm_ds.terminal import figure, in_bytes
from lcm_ds.train.job import ConfiguredRun
from lcm_ds.train.memory import USABLE, checkpoint_bytes, largest_micro_batch

# Model FLOPs utilisations to plan with: poor, what is published for 1.3 to 1.6B on H100 (42 to 49 %), out of reach.
MFU = (0.2, 0.4, 0.6)
GIGABYTES = (24, 40, 80, 141)  # memory of common GPUs
MAX_EPOCHS = 4  # up to so many, repeated data is nearly as good as new (arXiv 2305.16264, section 5)


def step_flops(run: ConfiguredRun) -> int:
    """Model FLOPs of an optimizer step, at most: with segments of the maximum length."""
    longest = run.config.data.max_segment if run.model.attention == "document" else run.config.data.row_length
    return training_flops(run.model, run.step_concepts, run.step_concepts * (longest + 1) // 2)


def gpu_hours(run: ConfiguredRun, tflops: float, mfu: float) -> float | None:
    """GPU-hours of a run, without its start, validations and saves; None if its steps are unknown.

    Args:
        run: The run.
        tflops: Peak of one device in TFLOP/s.
        mfu: Model FLOPs utilisation, a share.
    """
    if run.total_steps is None:
        return None
    return run.total_steps * step_flops(run) / (tflops * 1e12 * mfu) / 3600


def checkpoint_size(run: ConfiguredRun) -> int:
    """The approximate bytes of a checkpoint of a run."""
    return checkpoint_bytes(count_parameters(run.model), run.ds)


def checkpoints_on_disk(rules: CheckpointConfig, total_steps: int) -> tuple[int, int]:
    """How many checkpoints of a run are on the disk at most: (those that stay at its end, one more while it saves).

    Args:
        rules: The block `checkpoint`.
        total_steps: Of the run, which ends with a save.
    """
    permanent = 0 if rules.keep_every is None else total_steps // rules.keep_every
    if rules.every is None and rules.every_minutes is None:
        return 1, 1
    if rules.every_minutes is not None or rules.every is None:  # the newest may all lie between multiples
        return rules.keep + permanent, rules.keep + permanent + 1
    saves = [*range(rules.every, total_steps, rules.every), total_steps]
    stay = {step for step in saves if rules.keep_every and step % rules.keep_every == 0}
    return len(stay | set(saves[-rules.keep :])), len(stay | set(saves[-rules.keep - 1 :]))


def budget_lines(run: ConfiguredRun, ranks: int, prices: Prices) -> Iterator[str]:
    """Hours, costs and disk of a run.

    Args:
        run: The run.
        ranks: Number of ranks.
        prices: The GPU and its price, checked.
    """
    if run.epochs is not None and run.epochs > MAX_EPOCHS:
        yield (
            f"warning: {run.epochs:.1f} epochs: beyond {MAX_EPOCHS}, reading the same data again helps less and less "
            "(arXiv 2305.16264); prepare more data, or train fewer steps or a smaller model"
        )
    yield from _fit_lines(run, ranks, prices.gpu)
    yield from _hour_lines(run, ranks, prices)
    yield from _disk_lines(run)


def _fit_lines(run: ConfiguredRun, ranks: int, gpu: Gpu | None) -> Iterator[str]:
    sizes = sorted({*GIGABYTES, *([] if gpu is None else [gpu.gigabytes])})
    largest = {size: largest_micro_batch(run.config, run.model, run.ds, ranks, size) for size in sizes}
    found = " / ".join("none" if rows is None else str(rows) for rows in largest.values())
    yield (
        f"fits          micro_batch_rows up to {found} on {' / '.join(map(str, sizes))} GB, of the divisors of "
        f"{run.config.batch.rows_per_step // ranks} (rows_per_step / ranks); {1 - USABLE:.0%} is left for CUDA, NCCL "
        "and fragmentation"
    )
    rows = run.config.batch.micro_batch_rows
    if gpu is not None and (fits := largest[gpu.gigabytes] or 0) < rows:
        advice = f"at most {fits} will do" if fits else "use more ranks, ZeRO 2 or 3, or train.recompute=layer"
        yield f"warning: batch.micro_batch_rows: {rows} does not fit {gpu.part} ({gpu.gigabytes} GB); {advice}"


def _hour_lines(run: ConfiguredRun, ranks: int, prices: Prices) -> Iterator[str]:
    stated = run.config.log.peak_tflops
    if run.total_steps is None:
        yield "hours         not known: --concepts N, the size of an epoch, or steps=N gives the length of the run"
    elif stated is None and prices.gpu is None:
        yield "hours         not known: --gpu h100, or log.peak_tflops of another device, gives its speed"
    else:
        tflops = stated or (prices.gpu.tflops if prices.gpu else 0.0)
        name = "devices" if prices.gpu is None else prices.gpu.part
        hours = [gpu_hours(run, tflops, mfu) or 0.0 for mfu in MFU]
        utilisation = " / ".join(f"{100 * mfu:.0f}" for mfu in MFU)
        origin = "log.peak_tflops" if stated else "dense bf16, datasheet"
        yield f"hours         {_row(value / ranks for value in hours)} at {utilisation} % MFU on {ranks} × {name}"
        yield (
            f"GPU-hours     {_row(hours)}: steps × work / ({tflops:g} TFLOP/s ({origin}) × MFU), "
            "without start, validation and saves"
        )
        if prices.per_gpu_hour is not None:
            price = prices.per_gpu_hour
            costs = _row(value * price for value in hours)
            yield f"cost          {costs}: GPU-hours × {price:g} (--price-per-gpu-hour)"


def _disk_lines(run: ConfiguredRun) -> Iterator[str]:
    size, rules = checkpoint_size(run), run.config.checkpoint
    per_parameter, stage = size // count_parameters(run.model), deepspeed_config.zero_stage(run.ds)
    yield (
        f"checkpoint    {in_bytes(size)}: {per_parameter} bytes per parameter, weights and AdamW's states under "
        f"ZeRO {stage}"
    )
    if run.total_steps is not None:
        stay, most = checkpoints_on_disk(rules, run.total_steps)
        kept = f"the {rules.keep} newest (checkpoint.keep)"
        kept += f" and every {rules.keep_every:,} steps (keep_every)" if rules.keep_every else ""
        yield (
            f"disk          {in_bytes(stay * size)} at the end, {in_bytes(most * size)} while saving: "
            f"{stay} and {most} checkpoints, {kept}"
        )


def _row(values: Iterable[float]) -> str:
    return " / ".join(map(figure, values))
