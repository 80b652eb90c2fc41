"""Memory of a device in training, by arithmetic; tests/train/test_memory.py compares it with what PyTorch allocates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from lcm_ds import deepspeed_config
from lcm_ds.checkpoint.save import saves_in_background
from lcm_ds.config import TrainConfig
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM

GIB = 2**30


class States(NamedTuple):
    """Bytes of a rank without activations."""

    parameters: float
    gradients: float
    optimizer: float

    @classmethod
    def of(cls, parameters: int, stage: int, ranks: int, half: bool, fp32_gradients: bool) -> States:
        """Under ZeRO and AdamW, by the ZeRO paper (arXiv 1910.02054, section 3.1).

        A parameter takes 2 bytes in half precision and 4 in fp32, its gradient the same (4 if accumulated in fp32), its
        master weight (which DeepSpeed keeps in fp32 runs, too) and two moments 12. Stage 1 partitions the optimizer's
        states among the ranks, stage 2 also the gradients, stage 3 also the parameters.

        Args:
            parameters: Of the model.
            stage: 0 to 3.
            ranks: Number of ranks.
            half: Parameters in half precision.
            fp32_gradients: Gradients accumulate in fp32.
        """
        shares = [parameters / (ranks if stage >= first else 1) for first in (3, 2, 1)]
        return cls(
            shares[0] * (2 if half else 4), shares[1] * (2 if half and not fp32_gradients else 4), shares[2] * 12
        )


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
    fp32_gradients = ds.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    concepts = config.batch.micro_batch_rows * config.data.row_length
    every = (config.train.recompute_every or 1) if "activation_checkpointing" in ds else None
    kept = activations(model, concepts, half, every, config.train.recompute == "swiglu")
    zero = ds.get("zero_optimization", {})
    offload_blocks = {"parameters": "offload_param", "optimizer": "offload_optimizer"}
    for stage in range(4):
        states = States.of(parameters, stage, ranks, half, fp32_gradients)
        this = stage == deepspeed_config.zero_stage(ds)
        parts, on_device = [], float(kept)
        for name, size in states._asdict().items():
            offload = zero.get(offload_blocks.get(name), {}) if this else {}
            target = offload.get("device", "none")
            on_device += size if target == "none" else 0
            parts.append(f"{name} {size / GIB:.3g}" + ("" if target == "none" else f" on {target}"))
        yield (
            f"ZeRO {stage}        {on_device / GIB:.3g} GiB per rank ({', '.join(parts)}, activations {kept / GIB:.3g})"
            + ("  <- this run" if this else "")
        )
    yield (
        f"activations   of {concepts:,} concepts, "
        + ("every layer's" if every is None else f"one layer in {every} recomputed" if every > 1 else "all recomputed")
        + (", SwiGLU recomputed" if config.train.recompute == "swiglu" else "")
        + ("; compiled layers keep less" if config.train.compile and deepspeed_config.zero_stage(ds) < 3 else "")
    )
    if saves_in_background(config.checkpoint, ds):
        copied = background_copy(parameters, ds, ranks) / GIB
        yield f"host memory   at most {copied:.3g} GiB per rank for saves in the background (checkpoint.background)"
