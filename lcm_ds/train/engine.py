"""From a checked config to a DeepSpeed engine: process group, model, parameter groups."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import linear as zero3_linear
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from lcm_ds import deepspeed_config
from lcm_ds.config import TrainConfig
from lcm_ds.distributed.collectives import from_first
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.distributed.gloo import use_fast_collectives
from lcm_ds.distributed.rendezvous import wait_for_all_ranks
from lcm_ds.model import kernels
from lcm_ds.model.float8 import use_float8
from lcm_ds.model.fused import enable_fusion, gpu_compiles
from lcm_ds.model.modeling import BaseLCM, DecoderLayer
from lcm_ds.model.parameter_groups import parameter_groups
from lcm_ds.model.sizes import Sizes
from lcm_ds.processes import keep_freed_memory, program_path, remove_left_over_locks
from lcm_ds.train.gradients.norms import fuse_norms
from lcm_ds.train.gradients.reduction import reduce_in_backward
from lcm_ds.train.job import ConfiguredRun
from lcm_ds.train.monitoring.console import console

logger = logging.getLogger("lcm_ds.train")


def init_distributed(env: DistEnv, stall_minutes: float | None = None) -> torch.device:
    """Join the process group described by `env`; returns this rank's device.

    stall_minutes: guard.stall_minutes, which collectives outlast. Raises TransientError if a rank does not join.
    """
    wait_for_all_ranks(env, "train")
    accelerator = get_accelerator()
    devices = 0 if accelerator.device_name() == "cpu" else accelerator.device_count()
    env.enter(os.environ, devices)
    share_compile_threads(env.local_world_size)
    os.environ["PATH"] = program_path()
    if env.local_rank == 0:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
        for lock in remove_left_over_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache))):
            logger.warning("%s: stale lock removed: the process that compiled there was killed", lock)
    if devices:
        accelerator.set_device(env.device_index(devices))
        ask_cuda_for_free_memory(accelerator)
    else:
        keep_freed_memory()
        leave_out_kernels_of_inference()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=collective_timeout(stall_minutes))
    if dist.get_backend() == "gloo":
        use_fast_collectives(deepspeed.comm.comm.cdb)
    return torch.device(accelerator.current_device_name())


def leave_out_kernels_of_inference() -> None:
    """Have DeepSpeed compile nothing when it joins ranks on CPUs.

    It would compile an all-reduce in shared memory, for most of a minute at the first start, which takes g++ and which
    only tensor-parallel inference calls.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def share_compile_threads(local_ranks: int) -> None:
    """Give each rank of this host its share of the processors for compiling kernels, unless the user chose a number.

    Each would start 32 processes or as many as there are processors. A launcher may have bound this rank to its share,
    which is not divided again.
    """
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        threads = max(1, min(32, len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // local_ranks))
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
        if "torch._inductor.config" in sys.modules:  # it has read the environment
            from torch._inductor import config as inductor_config

            inductor_config.compile_threads = threads


@contextmanager
def without_compiler() -> Iterator[None]:
    """Build an engine in here, not with Muon, and it never imports torch's compiler: a second and 70 MB of each rank.

    What has to be kept out of compiled code, such as torch's optimizers and the hooks of ZeRO-3, would import it to say
    so, at the first call or when it is defined: it is called as it is, from now on. DeepSpeed imports its Muon, which
    it has compiled, to see whether the optimizer is one. Does nothing if the compiler is imported already. Other
    versions of the libraries may lack some of these functions.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    coordinator = partitioned_param_coordinator
    holders = [coordinator, getattr(coordinator, "PartitionedParameterCoordinator", None), deepspeed.checkpointing]
    optimizers = [part for part in vars(torch.optim).values() if isinstance(part, type)]
    for holder in [*filter(None, holders), *optimizers]:
        for name, function in list(vars(holder).items()):
            inner, code = getattr(function, "__wrapped__", None), getattr(function, "__code__", None)
            if inner is None or code is None:
                continue
            if Path(code.co_filename).name == "_compile.py":
                vars(inner).setdefault("__dynamo_disable", inner)  # what torch calls from then on
            elif code.co_name == "_use_grad":
                setattr(holder, name, _with_grad(inner))
    with (
        patch.object(torch.compiler, "disable", lambda fn=None, *_, **__: fn or (lambda function: function)),
        patch.object(deepspeed.runtime.compiler, "compile", lambda: _compiled_when_called, create=True),
    ):
        yield


def _compiled_when_called(function: Any) -> Any:
    """torch.compile for a function, at its first call."""
    compiled = cache(lambda: torch.compile(function))
    return wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


def _with_grad(step: Any) -> Any:
    """An optimizer's step that computes gradients of itself if the optimizer is differentiable, as torch's own does."""

    @wraps(step)
    def call(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return call


def ask_cuda_for_free_memory(accelerator: Any) -> None:
    """Have DeepSpeed's accelerator ask CUDA for the free memory of a device.

    ZeRO 1 and 2 need it. If nvidia-ml-py is installed, DeepSpeed asks NVML, which numbers devices in another order, and
    reads CUDA_VISIBLE_DEVICES as numbers: it fails on GPU-… and MIG-….
    """
    if accelerator.device_name() == "cuda":
        accelerator.available_memory = lambda device_index=None: torch.cuda.mem_get_info(device_index)[0]


def make_deterministic() -> None:
    """Have every operation of this process give the same bits for the same inputs; call it before CUDA starts.

    Operations that cannot do so raise an error.
    """
    from torch._inductor import config as inductor_config  # a thousand modules, which other runs may not need

    # cuBLAS reads this when it starts; torch refuses products with other workspaces than these two.
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    inductor_config.deterministic = True  # no kernel is chosen by its measured time, as with torch 2.13's line above
    # torch would fill all new memory, which costs time; nothing reads memory before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def collective_timeout(stall_minutes: float | None) -> timedelta:
    """Timeout of collectives: longer than the watchdog's, which reports where each rank hangs (None: no watchdog)."""
    return timedelta(minutes=stall_minutes + 10) if stall_minutes is not None else timedelta(days=1)


def build_model(
    sizes: Sizes, normalizer: tuple[np.ndarray, np.ndarray], seed: int | None, ds: dict[str, Any]
) -> BaseLCM:
    """A Base-LCM with fresh weights on this rank's device, in the dtype of training; partitioned under ZeRO-3.

    Host memory holds a few MB of it at a time: the ranks of a node would otherwise need 4 bytes per parameter each.

    Args:
        sizes: Its sizes.
        normalizer: Center and scale, [embed_dim] each.
        seed: The weights are a function of (sizes, seed): the same for any world size and ZeRO stage. None: the
            caller fills them.
        ds: The resolved DeepSpeed JSON.
    """
    partitioned = deepspeed_config.zero_stage(ds) == 3
    if partitioned:
        with deepspeed.zero.Init(config_dict_or_path=ds):
            model = BaseLCM(sizes)
    else:
        with torch.device("meta"):
            model = BaseLCM(sizes)
        model.to(dtype=getattr(torch, deepspeed_config.precision(ds)))
        device = get_accelerator().current_device_name()
        # As model.to_empty, which would import sympy.
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    for parameters, fill in model.initialization(seed) if seed is not None else ():
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=partitioned):
            fill()
    model.normalizer.set(*normalizer)
    return model


def build_engine(model: BaseLCM, config: TrainConfig, ds: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed engine around `model`, with optimizer, fp8 and activation checkpointing as configured.

    Args:
        model: Of `build_model`.
        config: The run's config.
        ds: The resolved DeepSpeed JSON.
    """
    if "activation_checkpointing" in ds:
        deepspeed.checkpointing.configure(None, deepspeed_config=ds)
        model.recompute = deepspeed.checkpointing.checkpoint
        model.recompute_every = config.train.recompute_every or 1
    if config.train.precision is not None:
        use_float8(model, emulated=config.train.precision == "fp8-emulated")
    for layer in model.layers if config.train.recompute == "swiglu" else ():
        layer.mlp.recompute = True
    if config.train.compile and deepspeed_config.zero_stage(ds) == 3:
        logger.warning("train.compile: no layers: ZeRO-3 gathers parameters by hooks, which break compiled layers")
    elif config.train.compile:
        model.compile_layers()
    compiles = config.train.compile or (get_accelerator().device_name() != "cpu" and gpu_compiles())
    enable_fusion(compiles)
    groups: Any = parameter_groups(model, config.optim, ds["optimizer"]["type"])
    optimizer = None
    if ds["optimizer"]["type"].lower() == "muon":
        optimizer = muon(groups, ds["optimizer"]["params"])
        groups, ds = None, {key: block for key, block in ds.items() if key != "optimizer"}
    if partitioned := deepspeed_config.zero_stage(ds) == 3:
        use_fewer_calls(model)
    with nullcontext() if compiles or optimizer is not None else without_compiler():
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, optimizer=optimizer, config=ds)
    # Public since torch 2.14, which deprecates the private name.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(dist.distributed_c10d._world.pg_map):  # DeepSpeed's have torch's default timeout
        set_timeout(collective_timeout(config.guard.stall_minutes), group)
    fuse_norms(engine.optimizer)
    reduce_in_backward(engine)
    if partitioned and not ds["zero_optimization"].get("zero_quantized_weights"):
        gather_small_parameters_together(engine.optimizer)
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        skip_nonfinite_steps(engine.optimizer)
    if deepspeed_config.offloads_optimizer(ds) and deepspeed_config.zero_stage(ds) in (1, 2):
        forget_skipped_gradients(engine.optimizer)
    return engine


def use_fewer_calls(model: BaseLCM) -> None:
    """Have DeepSpeed's ZeRO-3 add a bias within the product, and on CPUs gather a decoder layer at a time.

    DeepSpeed 0.19.8 adds a bias to the product's result, which rounds twice in half precision and reads it once more;
    and it calls hooks of each module that has parameters, of which a decoder layer has ten. It takes the gradients of a
    layer that is gathered at once when that of its input is there, which has to be computed.

    Args:
        model: Of `build_model`, before its engine is built.
    """
    zero3_linear.LinearFunctionForZeroStage3.forward = staticmethod(_linear)
    if dist.get_backend() == "gloo" and all(parameter.requires_grad for parameter in model.parameters()):
        deepspeed.utils.set_z3_leaf_modules(model, [DecoderLayer])


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if bias is not None and bias.dtype != weight.dtype:
        return input.matmul(weight.t()) + bias
    return torch._C._nn.linear(input, weight, bias)


def gather_small_parameters_together(optimizer: Any) -> None:
    """Have DeepSpeed's ZeRO-3 gather what it keeps gathered, biases and norms, at once after each step, not one by one.

    Args:
        optimizer: A DeepSpeedZeroOptimizer_Stage3. With one that offloads, or parameters in groups of ranks or
            stored quantized, nothing changes.
    """
    parameters, after_step = optimizer.persistent_parameters, optimizer._post_step
    if optimizer.offload_optimizer or any(
        parameter.nvme_swapper is not None
        or parameter.ds_secondary_tensor is not None
        or hasattr(parameter.ds_tensor, "ds_quant_scale")
        for parameter in parameters
    ):
        return

    def gather_first(*args: Any, **kwargs: Any) -> None:
        apart = [parameter for parameter in parameters if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if apart:
            apart[0].all_gather_coalesced(apart).wait()
        after_step(*args, **kwargs)

    optimizer._post_step = gather_first


def choose_kernels(job: ConfiguredRun, device: torch.device, stored: dict[str, str] | None = None) -> None:
    """Choose the ways that all ranks compute with (model/kernels.py): fixed, those of the checkpoint, or measured.

    Args:
        job: The run; its config may fix ways.
        device: Of this rank.
        stored: `kernels.in_use()` when the checkpoint was saved from which the run resumes.
    """
    wanted, data = job.config.train.kernels, job.config.data
    fixed: dict[str, str] = {} if wanted.attention == "measured" else {"attention": wanted.attention}
    if wanted.products != "measured":
        fixed |= dict.fromkeys(kernels.PRODUCTS, wanted.products)
    elif deepspeed_config.zero_stage(job.ds) == 3:  # DeepSpeed's hooks need PyTorch's own linear layers
        fixed |= {piece: kernels.WAYS[piece][0] for piece in kernels.PRODUCTS}
    ways = {**(stored or {}), **fixed}
    reasons = [f"{piece} by {way}" for piece, way in ways.items() if way != kernels.WAYS[piece][0]]
    if not stored and device.type == "cpu" and not job.config.train.deterministic:
        dtype = getattr(torch, deepspeed_config.precision(job.ds))
        shape = job.config.batch.micro_batch_rows, data.row_length, data.max_segment, dtype
        ways, reasons = from_first(kernels.measure(job.model, *shape, fixed) if dist.get_rank() == 0 else ({}, []))
    kernels.use(ways)
    if reasons and device.type == "cpu" and dist.get_rank() == 0:
        console.line(f"kernels: {'; '.join(reasons)}")


def forget_skipped_gradients(optimizer: Any) -> None:
    """Drop the gradients of a skipped step under ZeRO 1 and 2 with offload.

    DeepSpeed 0.19.8 keeps them if it accumulates half-precision gradients in fp32, and adds those of the next step to
    what is not finite: it would skip all steps from then on.
    """
    reset = optimizer.reset_cpu_buffers  # called when a step is skipped

    def reset_and_forget() -> None:
        reset()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None

    optimizer.reset_cpu_buffers = reset_and_forget


def skip_nonfinite_steps(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer skip steps with non-finite gradients and report that to DeepSpeed, as DeepSpeed's own do.

    Needed for ZeRO 0 in fp32, for which DeepSpeed uses torch's optimizer unwrapped.
    """
    optimizer.overflow = False  # type: ignore[attr-defined]

    def skip(optimizer: Any, arguments: Any, keywords: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([p.grad for p in parameters]))
        optimizer.overflow = not norms.isfinite().all().item()
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None  # torch's optimizers skip parameters without a gradient

    optimizer.register_step_pre_hook(skip)


def muon(groups: list[dict[str, Any]], params: dict[str, Any]) -> torch.optim.Optimizer:
    """DeepSpeed's Muon with AdamW, from `parameter_groups` and optimizer.params of the DeepSpeed JSON."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    settings: dict[bool, dict[str, Any]] = {  # by use_muon
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
    """Set every parameter group's learning rate for the next step.

    Args:
        engine: Of `build_engine`.
        params: optimizer.params of the DeepSpeed JSON; with Muon, muon_lr and adam_lr may differ from lr.
        factor: Share of those peak rates.
    """

    for group in engine.basic_optimizer.param_groups:
        own = {True: "muon_lr", False: "adam_lr"}.get(group.get("use_muon"), "lr")
        group["lr"] = factor * params.get(own, params["lr"])
