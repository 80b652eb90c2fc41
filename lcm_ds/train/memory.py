"""What a device holds in training: arithmetic, checked against what PyTorch keeps by tests/train/test_memory.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from lcm_ds import deepspeed_config
from lcm_ds.config import TrainConfig
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM

GIB = 2**30


class States(NamedTuple):
    """Bytes that a rank holds apart from activations."""

    parameters: float
    gradients: float
    optimizer: float

    @classmethod
    def of(cls, parameters: int, stage: int, ranks: int, half: bool, fp32_gradients: bool) -> States:
        """Of a model with so many parameters under a ZeRO stage (0 to 3) and AdamW.

        Bytes a parameter as in the ZeRO paper (arXiv 1910.02054, section 3.1): 2 in half precision and 4 in fp32 for
        the parameter and for its gradient (4 where gradients accumulate in fp32), 12 for the master weight, which
        DeepSpeed keeps in fp32, too, and the two moments. Stage 1 shares the optimizer's states among the ranks, stage
        2 the gradients, too, stage 3 everything.
        """
        shares = [parameters / (ranks if stage >= first else 1) for first in (3, 2, 1)]
        return cls(
            shares[0] * (2 if half else 4), shares[1] * (2 if half and not fp32_gradients else 4), shares[2] * 12
        )


def count_parameters(config: BaseLCMConfig) -> int:
    """Trainable parameters, counted on a model without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in BaseLCM(config).parameters())


def activations(config: BaseLCMConfig, concepts: int, half: bool, recompute_every: int | None = None) -> int:
    """Bytes that the forward pass of one micro-batch keeps for the backward pass, without compilation.

    concepts: of a micro-batch; recompute_every: every so many layers, from the first on, keep their input alone, and
    one of them is kept whole while it is computed again.
    """
    width, inner, size = config.hidden_size, config.intermediate_size, 2 if half else 4
    # Inputs of both norms, of the projections of either block and of the last product of attention; queries, keys and
    # values; what attention gives. Gate, up, the gate's SiLU, and what goes into the last product.
    layer = 8 * width * size + 4 * inner * size
    # The log-sum-exp of each head; the statistics of both norms.
    layer += 4 * config.num_attention_heads + 2 * 4
    layer += 2 * width if config.dropout > 0 else 0  # which values are dropped
    layers = config.num_hidden_layers
    recomputed = 0 if recompute_every is None else -(-layers // recompute_every)
    kept = (layers - recomputed) * layer + recomputed * width * size + (layer if recomputed else 0)
    # Inputs of pre-net, last norm and post-net; the loss's differences.
    ends = config.embed_dim * size + 2 * width * size + 4 + config.embed_dim * 4
    return concepts * (kept + ends)


def lines(config: TrainConfig, model: BaseLCMConfig, ds: dict[str, Any], ranks: int) -> Iterator[str]:
    """A line for each ZeRO stage, and one for activations: what a rank needs, the run's own stage marked."""
    parameters = count_parameters(model)
    half = deepspeed_config.precision(ds) != "float32"
    fp32_gradients = ds.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    concepts = config.batch.micro_batch_rows * config.data.row_length
    every = (config.train.recompute_every or 1) if "activation_checkpointing" in ds else None
    kept = activations(model, concepts, half, every)
    zero = ds.get("zero_optimization", {})
    moved = {"parameters": "offload_param", "optimizer": "offload_optimizer"}
    for stage in range(4):
        states = States.of(parameters, stage, ranks, half, fp32_gradients)
        this = stage == deepspeed_config.zero_stage(ds)
        places = {name: zero.get(block, {}).get("device", "none") if this else "none" for name, block in moved.items()}
        parts, here = [], float(kept)
        for name, held in states._asdict().items():
            place = places.get(name, "none")
            here += held if place == "none" else 0
            parts.append(f"{name} {held / GIB:.3g}" + ("" if place == "none" else f" on {place}"))
        yield (
            f"ZeRO {stage}        {here / GIB:.3g} GiB a rank ({', '.join(parts)}, activations {kept / GIB:.3g})"
            + ("  <- this run" if this else "")
        )
    yield (
        f"activations   of {concepts:,} concepts, "
        + ("every layer's" if every is None else f"one layer in {every} recomputed" if every > 1 else "all recomputed")
        + ("; compiled layers keep less" if config.train.compile and deepspeed_config.zero_stage(ds) < 3 else "")
    )
