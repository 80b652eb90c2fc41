"""From a checked config to a DeepSpeed engine: process group, model, parameter groups."""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from lcm_ds import deepspeed_config
from lcm_ds.config import TrainConfig
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.distributed.rendezvous import wait_for_all_ranks
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.model.parameter_groups import parameter_groups
from lcm_ds.processes import keep_freed_memory, remove_left_over_locks

logger = logging.getLogger("lcm_ds.train")


def init_distributed(place: DistEnv, stall_minutes: float | None = None) -> torch.device:
    """Join the process group as `place` says and return this rank's device.

    stall_minutes: after how long a watchdog ends a rank that stands still. Raises TransientError if a
    rank does not come.
    """
    wait_for_all_ranks(place, "train")
    os.environ.update(place.environment())
    # DeepSpeed compiles with the ninja that it finds: the one of this environment, which need not be activated. Two
    # versions in turn would compile everything anew each time.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    if place.local_rank == 0:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
        for lock in remove_left_over_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache))):
            logger.warning("%s: removed: who was compiling there was killed", lock)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        # Under srun --gpus-per-task=1 each process sees one device, whatever its local rank.
        accelerator.set_device(place.local_rank % accelerator.device_count())
    else:
        keep_freed_memory()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=patience(stall_minutes))
    return torch.device(accelerator.current_device_name())


def patience(stall_minutes: float | None) -> timedelta:
    """How long a collective waits: longer than the watchdog (guard.stall_minutes; None: there is none).

    So that what is told of a run that stands still is where each rank is, and not that others have waited for it.
    """
    return timedelta(minutes=stall_minutes + 10) if stall_minutes is not None else timedelta(days=1)


def build_model(
    config: BaseLCMConfig, normalizer: tuple[np.ndarray, np.ndarray], seed: int | None, ds: dict[str, Any]
) -> BaseLCM:
    """A Base-LCM with fresh weights and the dataset's normaliser; partitioned as it is made under ZeRO-3.

    The weights are a function of (config, seed) alone: the same for any world size and ZeRO stage. seed None: whoever
    calls this fills them.
    """
    partitioned = deepspeed_config.zero_stage(ds) == 3
    with deepspeed.zero.Init(config_dict_or_path=ds, enabled=partitioned):
        model = BaseLCM(config)
    for parameters, fill in model.initialization(seed) if seed is not None else ():
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=partitioned):
            fill()
    model.normalizer.set(*normalizer)
    return model


def build_engine(model: BaseLCM, config: TrainConfig, ds: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed engine around `model`, with the optimizer and the activation checkpointing that the JSON names."""
    if "activation_checkpointing" in ds:
        deepspeed.checkpointing.configure(None, deepspeed_config=ds)
        model.recompute = deepspeed.checkpointing.checkpoint
        model.recompute_every = config.train.recompute_every or 1
    if config.train.compile and deepspeed_config.zero_stage(ds) == 3:
        logger.warning("train.compile: off, for the hooks with which ZeRO-3 gathers parameters break what is compiled")
    elif config.train.compile:
        model.compile_layers()
    groups: Any = parameter_groups(model, config.optim, ds["optimizer"]["type"])
    optimizer = None
    if ds["optimizer"]["type"].lower() == "muon":
        optimizer = muon(groups, ds["optimizer"]["params"])
        groups, ds = None, {key: block for key, block in ds.items() if key != "optimizer"}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, optimizer=optimizer, config=ds)
    # Public since torch 2.14, which warns of the name that it had before.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(dist.distributed_c10d._world.pg_map):  # DeepSpeed makes its own with torch's default
        set_timeout(patience(config.guard.stall_minutes), group)
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        skip_what_is_not_finite(engine.optimizer)
    return engine


def skip_what_is_not_finite(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer skip steps whose gradients are not finite, and tell DeepSpeed of it, as its own do.

    For ZeRO 0 in fp32, where DeepSpeed takes torch's optimizer as it is.
    """
    plain: Any = optimizer
    plain.overflow = False

    def skip(optimizer: Any, arguments: Any, keywords: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([p.grad for p in parameters]))
        optimizer.overflow = not norms.isfinite().all().item()
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None  # torch's optimizers pass over what has none

    optimizer.register_step_pre_hook(skip)


def muon(groups: list[dict[str, Any]], params: dict[str, Any]) -> torch.optim.Optimizer:
    """DeepSpeed's Muon with AdamW. groups: of `parameter_groups`; params: optimizer.params of the DeepSpeed JSON."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    settings: dict[bool, dict[str, Any]] = {  # by Muon or not
        True: {key: params[key] for key in ("momentum", "ns_method") if key in params},
        False: {key: params[key] for key in ("betas", "eps")},
    }
    settings[True]["lr"] = params.get("muon_lr", params["lr"])
    settings[False]["lr"] = params.get("adam_lr", params["lr"])
    for group in groups:
        group.update(settings[group["use_muon"]])
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    return MuonWithAuxAdam(groups, torch.optim.AdamW, {"fused": True})


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, params: dict[str, Any], factor: float) -> None:
    """Give every parameter group the learning rate of the coming step: `factor` of the highest, which `params` says.

    params: optimizer.params of the DeepSpeed JSON, where Muon may have a rate of its own for either of its halves.
    """
    for group in engine.basic_optimizer.param_groups:
        own = {True: "muon_lr", False: "adam_lr"}.get(group.get("use_muon"), "lr")
        group["lr"] = factor * params.get(own, params["lr"])
