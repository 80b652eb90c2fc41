"""The schema of a DeepSpeed JSON, as one pydantic model.

For some blocks DeepSpeed has pydantic models, which are used here. It reads the others with `dict.get`, and ignores
misspelt keys: their schema is below. A test compares it with the keys that the installed DeepSpeed reads.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Dtype = Literal["fp32", "fp16", "bf16"]
# DeepSpeed accepts these in upper and lower case.
TagValidation = Annotated[Literal["WARN", "IGNORE", "FAIL"], BeforeValidator(lambda value: _upper(value))]
WriterType = Annotated[Literal["MOCK", "PYTHON", "FAST"], BeforeValidator(lambda value: _upper(value))]
WriterUnit = Annotated[Literal["REPLICA", "SOCKET", "MACHINE"], BeforeValidator(lambda value: _upper(value))]


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


class Block(BaseModel):
    """A block that DeepSpeed itself does not validate."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class OptimizerBlock(Block):
    type: str
    params: dict[str, Any] = {}  # checked against the optimizer's signature: see optimizer_params
    legacy_fusion: bool = False


class DataTypesBlock(Block):
    grad_accum_dtype: Dtype | None = None
    param_dtype: Dtype | None = None
    buffer_dtype: Dtype | None = None
    keep_in_fp32_modules: Literal["auto"] | list[str] = "auto"


class ActivationCheckpointingBlock(Block):
    partition_activations: bool = False
    number_checkpoints: int | None = Field(None, gt=0)
    contiguous_memory_optimization: bool = False
    cpu_checkpointing: bool = False
    profile: bool = False
    synchronize_checkpoint_boundary: bool = False


class FlopsProfilerBlock(Block):
    enabled: bool = False
    recompute_fwd_factor: float = Field(0.0, ge=0)
    profile_step: int = Field(1, ge=1)
    module_depth: int = -1
    top_modules: int = Field(1, ge=1)
    detailed: bool = True
    output_file: str | None = None


class AioBlock(Block):
    block_size: int = Field(1048576, gt=0)
    queue_depth: int = Field(8, gt=0)
    intra_op_parallelism: int = Field(1, gt=0)
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class ParallelWriteBlock(Block):
    pipeline_stage: bool = False


class CheckpointWriterBlock(Block):
    type: WriterType = "FAST"
    decoupled: bool = False
    io_buffer_size: int = Field(64 * 1024**2, gt=0)
    io_buffer_double: bool = True
    show_statistics: bool = False
    data_parallel: WriterUnit | None = None
    io_multiplier: int = Field(1, gt=0)


class CheckpointBlock(Block):
    tag_validation: TagValidation = "WARN"
    load_universal: bool = False
    parallel_write: ParallelWriteBlock | None = None
    checkpoint_serialization: bool = True
    writer: CheckpointWriterBlock | None = None


class TimersBlock(Block):
    throughput: DeepSpeedThroughputTimerConfig | None = None


class DeepSpeedJson(Block):
    """The complete file."""

    # filled in from the run's YAML if missing or "auto"
    train_batch_size: int | None = Field(None, gt=0)
    train_micro_batch_size_per_gpu: int | None = Field(None, gt=0)
    gradient_accumulation_steps: int | None = Field(None, gt=0)
    gradient_clipping: float | None = Field(None, ge=0)

    optimizer: OptimizerBlock | None = None  # AdamW
    zero_optimization: DeepSpeedZeroConfig | None = None
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    bf16: DeepSpeedBF16Config | None = None
    fp16: DeepSpeedFP16Config | None = None
    data_types: DataTypesBlock | None = None
    communication_data_type: Dtype | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(1.0, gt=0)
    # The loss is a sum over the targets of all ranks and relies on DeepSpeed averaging over ranks.
    gradient_allreduce_op: Literal["mean"] = "mean"
    managed_gradient_accumulation: Literal[True] = True
    disable_allgather: bool = False
    activation_checkpointing: ActivationCheckpointingBlock | None = None
    aio: AioBlock | None = None
    checkpoint: CheckpointBlock | None = None
    compile: CompileConfig | None = None
    comms_logger: CommsLoggerConfig | None = None
    flops_profiler: FlopsProfilerBlock | None = None
    tensorboard: TensorBoardConfig | None = None
    wandb: WandbConfig | None = None
    csv_monitor: CSVConfig | None = None
    comet: CometConfig | None = None
    timers: TimersBlock | None = None
    steps_per_print: int | None = Field(None, gt=0)
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None


_GONE = "was removed from DeepSpeed 0.19"
_ORDER = "lcm-ds reads the data itself, in the order of its plan; leave it out"

# Keys of DeepSpeed, present or former, that are not supported, with the reason.
REFUSED: dict[str, str] = {
    "scheduler": "the learning rate's schedule is optim.schedule of the run's YAML; leave it out",
    "amp": f"{_GONE}: use bf16 or fp16",
    "elasticity": f"{_GONE}: the batch is batch.rows_per_step of the run's YAML, for any number of ranks",
    "nebula": f"{_GONE}: leave it out",
    "compression_training": f"{_GONE}: leave it out",
    "quantize_training": f"{_GONE}: leave it out",
    "sparse_gradients": f"{_GONE}: leave it out",
    "sparse_attention": f"{_GONE}: leave it out",
    "eigenvalue": f"{_GONE}: leave it out",
    "graph_harvesting": f"{_GONE}: leave it out",
    "curriculum_learning": f"{_GONE}: leave it out",
    "progressive_layer_drop": f"{_GONE}: leave it out",
    "zero_optimization.mics_shard_size": f"{_GONE}: zero_hpz_partition_size shards within groups of ranks",
    "zero_optimization.mics_hierarchical_params_gather": f"{_GONE}: leave it out",
    "zero_optimization.zeropp_loco_param": f"{_GONE}: zero_quantized_gradients works without it",
    "zero_optimization.cpu_offload": "is deprecated: write offload_optimizer",
    "zero_optimization.cpu_offload_param": "is deprecated: write offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "is deprecated: write pin_memory in offload_optimizer",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "is deprecated: write stage3_gather_16bit_weights_on_model_save"
    ),
    "zero_optimization.legacy_stage1": f"{_GONE}: leave it out",
    "zero_optimization.elastic_checkpoint": "is deprecated: leave it out",
    "data_efficiency": _ORDER,
    "dataloader_drop_last": _ORDER,
    "torch_autocast": "autocast is not used: set bf16 or fp16",
    "bfloat16": "the old name of bf16: write bf16",
    "autotuning": "needs DeepSpeed's own launcher and script; leave it out",
    "hybrid_engine": "is for reinforcement learning with generation; leave it out",
    "weight_quantization": "is for inference; leave it out",
    "pipeline": "Base-LCM is not a pipeline module; leave it out",
    "tensor_parallel": "Base-LCM is not split over devices; ZeRO shards it instead",
    "expert_parallel": "Base-LCM has no experts; leave it out",
    "use_data_before_expert_parallelism": "Base-LCM has no experts; leave it out",
    "sequence_parallel_size": "rows are not split over devices; leave it out",
    "data_parallel_size": "every rank is a data-parallel one; leave it out",
    "seq_parallel_communication_data_type": "rows are not split over devices; leave it out",
    "vocabulary_size": "a concept model has no vocabulary; leave it out",
    "datastates_ckpt": "lcm-ds writes checkpoints itself; leave it out",
    "checkpoint.use_node_local_storage": (
        "names files by local rank, which is 0 on every rank that sees one device; leave it out"
    ),
    "optimizer.params.max_grad_norm": "clipping is optim.max_grad_norm of the run's YAML; leave it out",
}

# Keys of `optimizer.params` that DeepSpeed does not pass to the optimizer's constructor.
_ADAM_EXTRAS = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
_MUON_PARAMS = {"lr", "muon_lr", "adam_lr", "momentum", "ns_method", "betas", "eps", "weight_decay", *_ADAM_EXTRAS}
_DEEPSPEED_OPTIMIZERS = ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon")


def optimizer_types() -> list[str]:
    """Valid values of `optimizer.type`: DeepSpeed's own, in any case, and those of torch.optim."""
    torch_names = [name for name, value in vars(torch.optim).items() if inspect.isclass(value) and name != "Optimizer"]
    return sorted({*_DEEPSPEED_OPTIMIZERS, *(name for name in torch_names if name != "LBFGS")})


def optimizer_params(kind: str, params: dict[str, Any], offloaded: bool) -> set[str] | None:
    """Valid keys of `optimizer.params` for an optimizer type; None if there is no such type.

    Args:
        kind: optimizer.type.
        params: optimizer.params: torch_adam and adam_w_mode choose Adam's implementation.
        offloaded: Whether DeepSpeed's CPU implementation is used.
    """
    name = kind.lower()
    if name == "muon":
        return _MUON_PARAMS
    if name in ("adam", "adamw"):
        if params.get("torch_adam"):
            constructor = torch.optim.AdamW if name == "adamw" or params.get("adam_w_mode", True) else torch.optim.Adam
            return _arguments(constructor) | _ADAM_EXTRAS
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        set_by_deepspeed = {"adamw_mode", "set_grad_none"}
        return (_arguments(DeepSpeedCPUAdam if offloaded else FusedAdam) | _ADAM_EXTRAS) - set_by_deepspeed
    if name == "lamb":
        from deepspeed.ops.lamb import FusedLamb

        return _arguments(FusedLamb)
    if name == "lion":
        from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

        return _arguments(DeepSpeedCPULion if offloaded else FusedLion)
    if name == "adagrad":
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

        return _arguments(DeepSpeedCPUAdagrad if offloaded else torch.optim.Adagrad)
    return _arguments(getattr(torch.optim, kind)) if kind in optimizer_types() else None


def needs_permission(kind: str) -> bool:
    """Whether ZeRO needs zero_allow_untested_optimizer for this optimizer."""
    return kind.lower() not in ("adam", "adamw", "adagrad", "lion", "muon")


def _arguments(constructor: Any) -> set[str]:
    return set(inspect.signature(constructor).parameters) - {"params", "model_params", "self"}
