"""Memory of a device in training, by arithmetic; tests/train/test_memory.py compares it with what PyTorch allocates.

Not counted: CUDA's context, and what the allocator loses to fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from lcm_ds import deepspeed_config
from lcm_ds.checkpoint.save import saves_in_background
from lcm_ds.config import TrainConfig
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM

GIB = 2**30

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
    def of(cls, parameters: int, stage: int, ranks: int, ds: dict[str, Any]) -> States:
        """Under ZeRO and AdamW: the ZeRO paper (arXiv 1910.02054, section 3.1), and what DeepSpeed 0.19.8 adds to it.

        A parameter takes 2 bytes in half precision and 4 in fp32, its gradient the same (4 if accumulated in fp32), its
        master weight and two moments 12. Stage 1 partitions the optimizer's states among the ranks, stage 2 also the
        gradients, stage 3 also the parameters. DeepSpeed adds buckets, copies, and under stage 1 with bf16 and
        accumulation in fp32 (BF16_Optimizer) a complete fp32 gradient beside the bf16 one, on every rank.

        Args:
            parameters: Of the model.
            stage: 0 to 3.
            ranks: Number of ranks.
            ds: The resolved DeepSpeed JSON, but for its stage.
        """
        half = deepspeed_config.precision(ds) != "float32"
        size, share = (2.0 if half else 4.0), parameters / ranks
        in_fp32 = half and ds.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        accumulated, accumulates = (4.0 if in_fp32 else size), ds.get("gradient_accumulation_steps", 1) > 1
        zero = DeepSpeedZeroConfig(**{**ds.get("zero_optimization", {}), "stage": stage})
        bucket = size * min(parameters, zero.reduce_bucket_size)
        reduced = size * min(parameters, MEMORY_OPT_ALLREDUCE_SIZE)  # without buckets of ZeRO
        if stage == 0:
            # torch's own optimizer in fp32, without master weights; FP16_UnfusedOptimizer copies gradients to fp32.
            step = parameters * (size + 4 if half else size)
            return cls(parameters * size, parameters * size, parameters * (12.0 if half else 8.0), reduced, step)
        if stage == 1 and in_fp32 and deepspeed_config.precision(ds) == "bfloat16":
            gradients = parameters * (size + 4)
            return cls(parameters * size, gradients, share * 12, reduced, gradients)
        if stage == 3:
            # Parameters stay gathered that are needed again before so many others, in the backward pass.
            gathered = min(parameters, zero.max_reuse_distance // 2 + zero.prefetch_bucket_size) if ranks > 1 else 0
            group = min(share, zero.sub_group_size)  # its gradients in fp32, beside those in half precision
            copies = group * (6 if half and not in_fp32 else 4)
            gradients = share * accumulated
            step = gradients + copies + bucket
            return cls(share * size, gradients, share * 12, 2 * bucket + size * gathered, step)
        gradients = (parameters if stage == 1 else share) * accumulated
        buckets = 3 if zero.overlap_comm else 2
        if accumulates and stage == 1:
            buckets += 1
        elif accumulates and not in_fp32:
            gradients += share * size  # those of the last micro-batch
        copies = 4 if in_fp32 else 2 * size + 4 if half else 2 * size
        return cls(parameters * size, gradients, share * 12, buckets * bucket, share * copies)

    def peak(self, activations: float) -> float:
        """The most that exists at once: in the backward pass or in the optimizer's step."""
        return self.parameters + self.optimizer + max(self.gradients + self.communication + activations, self.step)


def count_parameters(config: BaseLCMConfig) -> int:
    """The number of trainable parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in BaseLCM(config).parameters())


def activations(
    config: BaseLCMConfig, concepts: int, half: bool, recompute_every: int | None = None, swiglu: bool = False
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


def background_copy(parameters: int, ds: dict[str, Any], ranks: int) -> float:
    """Bytes of host memory that a rank keeps for saves in the background: a copy of what it writes.

    Only rank 0 writes parameters, and none does under ZeRO 3. Under ZeRO 0 the other ranks write nothing.

    Args:
        parameters: Of the model.
        ds: The resolved DeepSpeed JSON.
        ranks: Number of ranks.
    """
    stage, half = deepspeed_config.zero_stage(ds), deepspeed_config.precision(ds) != "float32"
    states = 12 if half or stage else 8  # torch's own optimizer in fp32 has no master weights
    size = 0 if stage == 3 else 2 if half else 4
    return parameters * (size + states / (ranks if stage else 1))


def memory_lines(config: TrainConfig, model: BaseLCMConfig, ds: dict[str, Any], ranks: int) -> Iterator[str]:
    """A rank's memory: a line for each ZeRO stage, the run's own marked, one for activations, one for background saves.

    Args:
        config: The run.
        model: Its model.
        ds: The resolved DeepSpeed JSON.
        ranks: Number of ranks.
    """
    parameters = count_parameters(model)
    half = deepspeed_config.precision(ds) != "float32"
    concepts = config.batch.micro_batch_rows * config.data.row_length
    every = (config.train.recompute_every or 1) if "activation_checkpointing" in ds else None
    kept = activations(model, concepts, half, every, config.train.recompute == "swiglu")
    zero = ds.get("zero_optimization", {})
    offload_blocks = {"parameters": "offload_param", "optimizer": "offload_optimizer"}
    for stage in range(4):
        states = States.of(parameters, stage, ranks, ds)
        this = stage == deepspeed_config.zero_stage(ds)
        parts = []
        for name, size in states._asdict().items():
            offload = zero.get(offload_blocks.get(name), {}) if this else {}
            target = offload.get("device", "none")
            parts.append(f"{name} {size / GIB:.3g}" + ("" if target == "none" else f" on {target}"))
            if target != "none":
                states = states._replace(**{name: 0.0})
        parts.insert(-1, f"activations {kept / GIB:.3g}")
        yield (
            f"ZeRO {stage}        {states.peak(kept) / GIB:.3g} GiB per rank ({', '.join(parts)})"
            + ("  <- this run" if this else "")
        )
    if ranks > 1:
        yield f"NCCL          at most {NCCL_BUFFERS / GIB:.3g} GiB more per rank on GPUs, for its buffers"
    yield (
        f"activations   of {concepts:,} concepts, "
        + ("every layer's" if every is None else f"one layer in {every} recomputed" if every > 1 else "all recomputed")
        + (", SwiGLU recomputed" if config.train.recompute == "swiglu" else "")
        + ("; compiled layers keep less" if config.train.compile and deepspeed_config.zero_stage(ds) < 3 else "")
    )
    if saves_in_background(config.checkpoint, ds):
        copied = background_copy(parameters, ds, ranks) / GIB
        yield f"host memory   at most {copied:.3g} GiB per rank for saves in the background (checkpoint.background)"
