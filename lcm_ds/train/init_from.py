"""First weights of another model's (`model.init_from`): an exported folder, a run, or a checkpoint of Meta's code.

The optimizer is fresh and the run begins at step 0. A run that has a checkpoint of its own goes on from that.
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

from lcm_ds.checkpoint.format import candidates
from lcm_ds.checkpoint.model_source import find_model
from lcm_ds.config import ModelConfig
from lcm_ds.convert.base_lcm import read_meta
from lcm_ds.distributed.collectives import from_first
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM

CENTER, SCALE = "normalizer.center", "normalizer.scale"


@dataclass(frozen=True)
class InitFrom:
    """A model to start from: its sizes, and its weights once they are asked for."""

    says: str  # what it is, for people
    config: BaseLCMConfig
    read: Callable[[], dict[str, Tensor]]  # fp32, under this project's names; the normaliser where it has one
    has_normalizer: bool  # that does something; else the run takes that of its training data


def resolve_init_from(model: ModelConfig) -> InitFrom:
    """The model that `model.init_from` names. Raises InputError if there is none."""
    path = Path(str(model.init_from))
    if path.is_file():
        config, weights = read_meta(path, model.num_attention_heads)
        own = _has_normalizer(weights)
        return InitFrom(f"{path} (Meta's)", config, lambda: read_meta(path, model.num_attention_heads)[1], own)
    source = find_model(path)
    if source.step is not None:
        return InitFrom(f"{path} (step {source.step})", source.config, source.weights, True)
    return InitFrom(str(path), source.config, source.weights, _folder_has_normalizer(path))


def sizes_of_run(run_dir: Path) -> BaseLCMConfig | None:
    """The model of a run that has a checkpoint of its own, from which it goes on; None where it has none yet."""
    for checkpoint in reversed(candidates(run_dir)):
        if checkpoint.integrity_error() is None:
            return BaseLCMConfig(**checkpoint.state()["model"])
    return None


def load_initial_weights(model: BaseLCM, initial: InitFrom, partitioned: bool) -> str:
    """Fill a model with the weights of another one; all ranks call this. Returns what was done, for people.

    Rank 0 reads them; the others get theirs from it, here (partitioned: under ZeRO-3) or, as all first weights, when
    DeepSpeed makes its engine. They are rounded to the dtype of the model's parameters. The normaliser is the other
    model's, for it says what its weights mean; where it has none, or does nothing, it stays as it is.
    """
    weights = initial.read() if dist.get_rank() == 0 else {}
    own = from_first((weights[CENTER], weights[SCALE]) if _has_normalizer(weights) else None)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned), torch.no_grad():
            if dist.get_rank() == 0:
                parameter.copy_(weights.pop(name))
    if own is not None:
        model.normalizer.set(own[0].numpy(), own[1].numpy())
    whose = "its normaliser" if own is not None else "the normaliser of the training data, for it has none"
    return f"weights from {initial.says}, {whose}; the optimizer is fresh"


def _folder_has_normalizer(path: Path) -> bool:
    """Whether an exported folder has one that does something; its other weights are not read."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in (CENTER, SCALE) if name in tensors.keys()}  # noqa: SIM118
    return _has_normalizer(found)


def _has_normalizer(weights: dict[str, Tensor]) -> bool:
    """Whether there is a normaliser that does something, unlike that of a model which was imported without one."""
    return CENTER in weights and SCALE in weights and bool(weights[CENTER].any() or (weights[SCALE] != 1).any())
