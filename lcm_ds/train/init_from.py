"""Initial weights from another model (`model.init_from`): an exported folder, a run, or a checkpoint of Meta's code.

The optimizer is new and the run starts at step 0. A run that has a checkpoint of its own resumes from that instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from lcm_ds.checkpoint.model_source import find_model
from lcm_ds.config import ModelConfig
from lcm_ds.convert.base_lcm import read_meta
from lcm_ds.distributed.collectives import from_first
from lcm_ds.errors import InputError
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.model.sizes import Sizes

CENTER, SCALE = "normalizer.center", "normalizer.scale"


@dataclass(frozen=True)
class InitFrom:
    """A model to start from: its sizes, and a function that reads its weights."""

    description: str
    config: Sizes
    read: Callable[[], dict[str, Tensor]]  # fp32, under our names, with the normaliser if there is one
    has_normalizer: bool  # other than the identity; else the run uses that of its training data


def resolve_init_from(model: ModelConfig) -> InitFrom:
    """The model that `model.init_from` names. Raises InputError if there is none."""
    path = Path(str(model.init_from))
    if path.is_file():
        config, weights = read_meta(path, model.num_attention_heads)
        own = _has_normalizer(weights)
        return InitFrom(f"{path} (Meta's)", config, lambda: read_meta(path, model.num_attention_heads)[1], own)
    if not any((path / name).is_file() for name in ("config.yaml", "config.json")):
        raise InputError(
            f"{path}: neither a run (config.yaml is missing), nor an exported model (config.json is missing), "
            "nor a file"
        )
    source = find_model(path, weights_only=True)
    if source.step is not None:
        return InitFrom(f"{path} (step {source.step})", source.config, source.weights, True)
    return InitFrom(str(path), source.config, source.weights, _folder_has_normalizer(path))


def load_initial_weights(model: BaseLCM, initial: InitFrom, partitioned: bool) -> str:
    """Copy another model's weights into a model, rounded to the dtype of its parameters; all ranks call this.

    Only rank 0 reads them. The other ranks receive them here under ZeRO-3, else when DeepSpeed builds its engine. The
    normaliser comes with the weights, which depend on it, unless it is missing or the identity.

    Args:
        model: Of `build_model`.
        initial: The other model.
        partitioned: Whether `model` is partitioned by ZeRO-3.

    Returns:
        A description for the user.
    """
    weights = initial.read() if dist.get_rank() == 0 else {}
    normalizer = from_first((weights[CENTER], weights[SCALE]) if _has_normalizer(weights) else None)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned), torch.no_grad():
            if dist.get_rank() == 0:
                parameter.copy_(weights.pop(name))
    if normalizer is not None:
        model.normalizer.set(normalizer[0].numpy(), normalizer[1].numpy())
    source = "its normaliser" if normalizer is not None else "the normaliser of the training data, as it has none"
    return f"weights from {initial.description}, {source}; new optimizer"


def _folder_has_normalizer(path: Path) -> bool:
    """The same for an exported folder, of which the other weights are not read."""
    normalizer: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            normalizer |= {name: tensors.get_tensor(name) for name in (CENTER, SCALE) if name in tensors.keys()}  # noqa: SIM118
    return _has_normalizer(normalizer)


def _has_normalizer(weights: dict[str, Tensor]) -> bool:
    """Whether there is a normaliser other than the identity, which models imported without one have."""
    return CENTER in weights and SCALE in weights and bool(weights[CENTER].any() or (weights[SCALE] != 1).any())
