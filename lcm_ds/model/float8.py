"""Products of the decoder's layers in fp8, by torchao (arXiv 2209.05433 for the formats).

Inputs, weights and gradients are rounded to e4m3, with a scale for each row of one factor and each column of the other,
a power of two; sums are fp32 and results bf16. Parameters keep their names and dtype, so checkpoints and exports are
those of a bf16 run. Only training rounds to fp8: validation measures what evaluation and export see.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from deepspeed.accelerator import get_accelerator

from lcm_ds.model.modeling import BaseLCM

CAPABILITY = (8, 9)  # of the first NVIDIA GPUs that have it (Ada)


def use_float8(model: BaseLCM, emulated: bool) -> None:
    """Compute the products of all decoder layers in fp8, three per linear; pre-net and post-net stay as they are.

    emulated: round the same, but multiply in fp32, which any device can.
    """
    # Its kernels for inference, which training does not use, warn on other builds of torch.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulated)
    for layer in model.layers:
        convert_to_float8_training(layer, config=config)


def device_without_float8() -> str | None:
    """The first of this machine's devices that has no fp8 products; None if all have."""
    device = get_accelerator()
    if device.device_name() != "cuda" or torch.version.cuda is None:  # DeepSpeed's name for AMD is cuda, too
        return device.device_name() if torch.version.hip is None else "ROCm"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if (major, minor) < CAPABILITY:
            return f"{torch.cuda.get_device_name(index)} ({major}.{minor})"
    return None
