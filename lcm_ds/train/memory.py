"""Memory of a device in training, by arithmetic; tests/train/test_memory.py compares it with what PyTorch allocates.

Not counted: CUDA's context, and what the allocator loses to fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lcm_ds import deepspeed_config
from lcm_ds.checkpoint.format import saves_in_background
from lcm_ds.config import TrainConfig
from lcm_ds.model.sizes import Sizes, count_parameters, largest_parameter

GIB = 2**30
# Share of a GPU's memory that a plan fills: the rest is for what is not counted. An allowance, not a measurement.
USABLE = 0.92
RANKS_PER_HOST = 8  # of a usual one, at most
# Elements; DeepSpeed 0.19.8's defaults, which would take seconds to import. tests/train/test_memory.py compares them.
MEMORY_OPT_ALLREDUCE_SIZE = 500_000_000
PIECE, UNDER_WAY = 1 << 24, 4  # of train/gradients/reduction.py, which imports DeepSpeed
ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "sub_group_size": 1_000_000_000,
}

# Of a communicator of NCCL on a GPU, at most: a buffer of 10 MiB to receive (for its three protocols 4 MiB, 512 KiB and
# 120 × 640 × 8 × 8 bytes: src/include/device.h) and one of 2 MiB to send, of a ring and a tree, in 32 channels
# (github.com/NVIDIA/nccl/issues/1685 lists both sizes on 8 × H100).
NCCL_BUFFERS = 32 * 2 * (10 + 2) * 2**20


class States(NamedTuple):
    """Bytes of a rank without activations."""

    parameters: float
    gradients: float  # accumulated between micro-batches
    optimizer: float
    communication: float  # buffers in the backward pass, beside gradients and activations
    step: float  # gradients and their copies in the optimizer's step

    @classmethod
    def of(cls, parameters: int, stage: int, ranks: int, ds: dict[str, Any], largest: int = 0) -> States:
        """Under ZeRO and AdamW: the ZeRO paper (arXiv 1910.02054, section 3.1), and what DeepSpeed 0.19.8 adds to it.

        A parameter takes 2 bytes in half precision and 4 in fp32, its gradient the same (4 if accumulated in fp32), its
        master weight and two moments 12. Stage 1 partitions the optimizer's states among the ranks, stage 2 also the
        gradients, stage 3 also the parameters. DeepSpeed adds buckets and copies. Under stage 1 with bf16 and
        accumulation in fp32 (BF16_Optimizer) each rank has all gradients in fp32. There, and under stage 2, several
        ranks hold the pieces that are under way, and one that gets ready (gradients/reduction.py).

        Args:
            parameters: Of the model.
            stage: 0 to 3.
            ranks: Number of ranks.
            ds: The resolved DeepSpeed JSON, but for its stage.
            largest: Values of the largest parameter.
        """
        half = deepspeed_config.precision(ds) != "float32"
        size, share = (2.0 if half else 4.0), parameters / ranks
        in_fp32 = half and ds.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        accumulated, accumulates = (4.0 if in_fp32 else size), ds.get("gradient_accumulation_steps", 1) > 1
        zero = {**ZERO_DEFAULTS, **ds.get("zero_optimization", {})}
        bucket = size * min(parameters, zero["reduce_bucket_size"])
        reduced = size * min(parameters, MEMORY_OPT_ALLREDUCE_SIZE)  # without buckets of ZeRO
        if stage == 0:
            # torch's own optimizer in fp32, without master weights; FP16_UnfusedOptimizer copies gradients to fp32.
            step = parameters * (size + 4 if half else size)
            return cls(parameters * size, parameters * size, parameters * (12.0 if half else 8.0), reduced, step)
        in_pieces = deepspeed_config.precision(ds) == "bfloat16" and not deepspeed_config.offloads_optimizer(ds)
        if stage in (1, 2) and in_fp32 and in_pieces:
            gradients = (parameters if stage == 1 else share) * 4.0
            if not (ds.get("prescale_gradients") or ds.get("gradient_predivide_factor", 1.0) != 1.0):
                sent = min(parameters, (UNDER_WAY + 1) * max(largest, min(PIECE, zero["reduce_bucket_size"])))
                sent *= 0 if ranks == 1 else 4 if ds.get("communication_data_type") == "fp32" else 2
                return cls(parameters * size, gradients, share * 12, sent, gradients)
            if stage == 1:  # DeepSpeed's own way
                gradients += parameters * size
                return cls(parameters * size, gradients, share * 12, reduced, gradients)
        if stage == 3:
            # Parameters stay gathered that are needed again before so many others, in the backward pass.
            ahead = zero["stage3_max_reuse_distance"] // 2 + zero["stage3_prefetch_bucket_size"]
            gathered = min(parameters, ahead) if ranks > 1 else 0
            group = min(share, zero["sub_group_size"])  # its gradients in fp32, beside those in half precision
            copies = group * (6 if half and not in_fp32 else 4)
            gradients = share * accumulated
            step = gradients + copies + bucket
            return cls(share * size, gradients, share * 12, 2 * bucket + size * gathered, step)
        gradients = (parameters if stage == 1 else share) * accumulated
        buckets = 3 if zero.get("overlap_comm") else 2
        if accumulates and stage == 1:
            buckets += 1
        elif accumulates and not in_fp32:
            gradients += share * size  # those of the last micro-batch
        copies = 4 if in_fp32 else 2 * size + 4 if half else 2 * size
        return cls(parameters * size, gradients, share * 12, buckets * bucket, share * copies)

    def peak(self, activations: float) -> float:
        """The most that exists at once: in the backward pass or in the optimizer's step."""
        return self.parameters + self.optimizer + max(self.gradients + self.communication + activations, self.step)


def activations(
    config: Sizes, concepts: int, half: bool, recompute_every: int | None = None, swiglu: bool = False
) -> int:
    """Bytes that the forward pass keeps for the backward pass, without compilation.

    Args:
        config: The model.
        concepts: Of one micro-batch.
        half: Half precision.
        recompute_every: Every k-th layer, from the first on, keeps only its input; while it is recomputed, all
            activations of this one layer exist.
        swiglu: SwiGLU's output is recomputed.
    """
    width, inner, size = config.hidden_size, config.intermediate_size, 2 if half else 4
    # Inputs of both norms, of both blocks' projections and of attention's output projection; queries, keys, values;
    # attention's output. Gate, up; SiLU of the gate, input of the down projection.
    layer = 8 * width * size + (2 if swiglu else 4) * inner * size
    # The log-sum-exp of each head; the statistics of both norms.
    layer += 4 * config.num_attention_heads + 2 * 4
    layer += 2 * width if config.dropout > 0 else 0  # dropout masks
    layers = config.num_hidden_layers
    recomputed = 0 if recompute_every is None else -(-layers // recompute_every)
    kept = (layers - recomputed) * layer + recomputed * width * size + (layer if recomputed else 0)
    # Inputs of pre-net, last norm and post-net; the loss's differences.
    ends = config.embed_dim * size + 2 * width * size + 4 + config.embed_dim * 4
    return concepts * (kept + ends)


def checkpoint_bytes(parameters: int, ds: dict[str, Any]) -> int:
    """The size of a checkpoint: the model's parameters (not under ZeRO 3), fp32 weights and Adam's two moments."""
    stage, half = deepspeed_config.zero_stage(ds), deepspeed_config.precision(ds) != "float32"
    return parameters * (_saved_weights(ds) + (12 if half or stage else 8))  # torch's own has no master weights


def _saved_weights(ds: dict[str, Any]) -> int:
    """Bytes of a parameter as the model has it, in a checkpoint."""
    if deepspeed_config.zero_stage(ds) == 3:
        return 0
    return 2 if deepspeed_config.precision(ds) != "float32" else 4


def background_copy(parameters: int, ds: dict[str, Any], ranks: int) -> float:
    """Bytes of host memory that rank 0 keeps for saves in the background: a copy of what it writes.

    Only rank 0 writes parameters, and none does under ZeRO 3. Under ZeRO 0 the other ranks write nothing.

    Args:
        parameters: Of the model.
        ds: The resolved DeepSpeed JSON.
        ranks: Number of ranks.
    """
    weights = parameters * _saved_weights(ds)
    states = checkpoint_bytes(parameters, ds) - weights
    return weights + states / (ranks if deepspeed_config.zero_stage(ds) else 1)


def kept_for_backward(config: TrainConfig, model: Sizes, ds: dict[str, Any], micro_batch_rows: int) -> int:
    """Bytes of activations of a micro-batch, as the run recomputes them.

    Args:
        config: The run.
        model: Its model.
        ds: The resolved DeepSpeed JSON.
        micro_batch_rows: Rows of the micro-batch, instead of the config's.
    """
    concepts, half = micro_batch_rows * config.data.row_length, deepspeed_config.precision(ds) != "float32"
    return activations(model, concepts, half, _recomputed_every(config, ds), config.train.recompute == "swiglu")


def _recomputed_every(config: TrainConfig, ds: dict[str, Any]) -> int | None:
    return (config.train.recompute_every or 1) if "activation_checkpointing" in ds else None


def offloaded(ds: dict[str, Any]) -> dict[str, str]:
    """Where a rank's parameters and optimizer states are, "cpu" or "nvme", if not on the device."""
    zero = ds.get("zero_optimization", {})
    blocks = {"parameters": "offload_param", "optimizer": "offload_optimizer"}
    targets = {name: zero.get(block, {}).get("device", "none") for name, block in blocks.items()}
    return {name: target for name, target in targets.items() if target != "none"}


def device_peak(config: TrainConfig, model: Sizes, ds: dict[str, Any], ranks: int, micro_batch_rows: int) -> float:
    """The most bytes of a device that a run needs at once.

    Args:
        config: The run.
        model: Its model.
        ds: The resolved DeepSpeed JSON.
        ranks: Number of ranks.
        micro_batch_rows: Instead of the config's; the number of micro-batches per step follows.
    """
    accumulated = config.batch.rows_per_step // (ranks * micro_batch_rows)
    ds = {**ds, "gradient_accumulation_steps": accumulated}
    states = States.of(count_parameters(model), deepspeed_config.zero_stage(ds), ranks, ds, largest_parameter(model))
    states = states._replace(**dict.fromkeys(offloaded(ds), 0.0))
    return states.peak(kept_for_backward(config, model, ds, micro_batch_rows))


def largest_micro_batch(
    config: TrainConfig, model: Sizes, ds: dict[str, Any], ranks: int, gigabytes: float
) -> int | None:
    """The largest micro_batch_rows that divides a rank's rows of a step and fits a device; None if not even 1 does.

    Args:
        config: The run.
        model: Its model.
        ds: The resolved DeepSpeed JSON.
        ranks: Number of ranks.
        gigabytes: Memory of a device in 10⁹ bytes, of which `USABLE` is filled.
    """
    rows = config.batch.rows_per_step // ranks
    fitting = (
        micro_batch
        for micro_batch in range(rows, 0, -1)
        if rows % micro_batch == 0 and device_peak(config, model, ds, ranks, micro_batch) <= USABLE * gigabytes * 1e9
    )
    return next(fitting, None)


def memory_lines(config: TrainConfig, model: Sizes, ds: dict[str, Any], ranks: int) -> Iterator[str]:
    """A rank's memory: a line for each ZeRO stage, the run's own marked, for activations, for GPUs, for the host.

    Args:
        config: The run.
        model: Its model.
        ds: The resolved DeepSpeed JSON.
        ranks: Number of ranks.
    """
    parameters, every = count_parameters(model), _recomputed_every(config, ds)
    kept = kept_for_backward(config, model, ds, config.batch.micro_batch_rows)
    for stage in range(4):
        states = States.of(parameters, stage, ranks, ds, largest_parameter(model))
        this = stage == deepspeed_config.zero_stage(ds)
        elsewhere = offloaded(ds) if this else {}
        parts = [
            f"{name} {size / GIB:.3g}" + (f" on {elsewhere[name]}" if name in elsewhere else "")
            for name, size in states._asdict().items()
        ]
        states = states._replace(**dict.fromkeys(elsewhere, 0.0))
        parts.insert(-1, f"activations {kept / GIB:.3g}")
        yield (
            f"ZeRO {stage}        {states.peak(kept) / GIB:.3g} GiB per rank ({', '.join(parts)})"
            + ("  <- this run" if this else "")
        )
    if ranks > 1:
        yield f"NCCL          at most {NCCL_BUFFERS / GIB:.3g} GiB more per rank on GPUs, for its buffers"
    yield (
        f"activations   of {config.batch.micro_batch_rows * config.data.row_length:,} concepts, "
        + ("every layer's" if every is None else f"one layer in {every} recomputed" if every > 1 else "all recomputed")
        + (", SwiGLU recomputed" if config.train.recompute == "swiglu" else "")
        + ("; compiled layers keep less" if config.train.compile and deepspeed_config.zero_stage(ds) < 3 else "")
    )
    yield from _host_memory(config, parameters, ds, ranks)


def _host_memory(config: TrainConfig, parameters: int, ds: dict[str, Any], ranks: int) -> Iterator[str]:
    """Host memory that grows with the model; processes, libraries and the loader's rows are not counted."""
    here = min(ranks, RANKS_PER_HOST)
    states = States.of(parameters, deepspeed_config.zero_stage(ds), ranks, ds)._asdict()
    on_cpu = sum(states[name] for name, target in offloaded(ds).items() if target == "cpu")
    if on_cpu:
        yield f"host memory   {on_cpu / GIB:.3g} GiB per rank for what is offloaded there, {_of(here, here * on_cpu)}"
    if saves_in_background(config.checkpoint, ds):
        first = background_copy(parameters, ds, ranks)
        others = first - parameters * _saved_weights(ds) if deepspeed_config.zero_stage(ds) else 0
        yield (
            f"host memory   at most {first / GIB:.3g} GiB per rank for saves in the background "
            f"(checkpoint.background), {_of(here, first + (here - 1) * others)}"
        )


def _of(ranks: int, size: float) -> str:
    return f"{size / GIB:.3g} GiB for the {ranks} rank(s) of a host"
