"""A strict reader of DeepSpeed JSON (0.19), which rejects what DeepSpeed would silently ignore.

The JSON owns precision, ZeRO, offload, activation checkpointing and communication; the run's YAML owns the rest and
fills the JSON's "auto" values. Contradictions between the two are errors.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcm_ds import resources
from lcm_ds.config import TrainConfig, validation_error
from lcm_ds.errors import Collector, InputError, did_you_mean

# deepspeed takes seconds to import: only `check` and `resolve` do, when they are called with a JSON of the user's own.

# `digest` of each file in ds_configs/; a test prints the list to paste.
SHIPPED = frozenset(
    {
        "1847c5e92554f83f",  # zero1_bf16.json
        "6f1174ebbed65180",  # zero1_fp16.json
        "dfe4ee16269f8eb2",  # zero1_fp32.json
        "9404ebc1eaadf2b5",  # zero1_muon.json
        "c322249ca6ecf977",  # zero2_bf16.json
        "86ca4ccccab4ecf3",  # zero2_fp16.json
        "faac0580eaf5f034",  # zero2_fp32.json
        "80409d42793c36aa",  # zero2_offload.json
        "97b28dcb18f74e43",  # zero3_bf16.json
        "90cbcceb07744d57",  # zero3_fp16.json
        "7cdd2d8c804c93b5",  # zero3_fp32.json
        "29837b60fcfbaa74",  # zero3_nvme.json
        "e6d825d356e01cd9",  # zero3_offload.json
        "cb394160d1c67d55",  # zeropp.json
    }
)

# Keys that may be "auto": those that the run's YAML sets …
FILLED_FROM_YAML = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer.params.lr",
    "optimizer.params.betas",
    "optimizer.params.eps",
    "optimizer.params.weight_decay",
)
# … and those that depend on the model's hidden size, as in the Hugging Face Trainer.
FILLED_FROM_HIDDEN_SIZE = {
    "zero_optimization.reduce_bucket_size": lambda size: size * size,
    "zero_optimization.stage3_prefetch_bucket_size": lambda size: size * size * 9 // 10,
    "zero_optimization.stage3_param_persistence_threshold": lambda size: size * 10,
}

MUON_CLIPPING = "has to be 0 with Muon: DeepSpeed's clipping would also scale Muon's normalised updates"


# --- reading ----------------------------------------------------------------------------------------------------------


def find(value: str, config_path: Path | None) -> Path:
    """The file of `deepspeed: value`, looked up from here, the config's folder, its parents, and lcm-ds's own files.

    Raises InputError if there is none.
    """
    folders = [Path()]
    if config_path is not None and not Path(value).is_absolute():
        folders += Path(config_path).resolve().parents
    for folder in folders:
        if (folder / value).is_file():
            return folder / value
    if (shipped := resources.find(value)) is not None:
        return shipped
    parents = f", the folder of {config_path} or its parents" if len(folders) > 1 else ""
    raise InputError(f"{value}: no such DeepSpeed JSON in {Path.cwd()}{parents}")


def read(value: str | dict[str, Any], config_path: Path | None = None) -> dict[str, Any]:
    """The checked content of a DeepSpeed JSON, given by path or inline.

    Raises InputError if the file is missing or not JSON, repeats a key, or does not pass `check`, as those shipped do.
    """
    if isinstance(value, dict):
        mapping, origin = value, f"{config_path}: deepspeed" if config_path else "deepspeed"
    else:
        mapping, origin = _parse(find(value, config_path), value), value
    mapping = _without_nulls(mapping)
    if not is_shipped(mapping):
        check(mapping, origin)
    return mapping


def _parse(path: Path, origin: str) -> dict[str, Any]:
    """A JSON file as a mapping, without repeated keys and NaN."""
    errors: list[str] = []

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        keys = [key for key, _ in pairs]
        errors.extend(f"{origin}: {key}: is repeated in a block" for key in mapping if keys.count(key) > 1)
        return mapping

    def reject_constant(text: str) -> None:
        errors.append(f"{origin}: {text}: is not a JSON number")

    try:
        text = path.read_text(encoding="utf-8")
        mapping = json.loads(text, object_pairs_hook=unique_keys, parse_constant=reject_constant)
    except json.JSONDecodeError as error:
        raise InputError(f"{origin}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{origin}: cannot be read: {error}") from None
    if not isinstance(mapping, dict):
        errors.append(f"{origin}: has to be a JSON object, not a {type(mapping).__name__}")
    if errors:
        raise InputError(errors)
    assert isinstance(mapping, dict)
    return mapping


# --- checking ---------------------------------------------------------------------------------------------------------


def check(mapping: dict[str, Any], origin: str | Path) -> None:
    """Check keys, types and ranges at every depth, and that each "auto" can be filled in.

    Raises InputError with a line for every error.
    """
    from pydantic import ValidationError

    from lcm_ds.deepspeed_config.schema import REFUSED, DeepSpeedJson

    errors: list[str] = []
    rest = copy.deepcopy(mapping)
    for key, value in list(_leaves_and_blocks(mapping)):
        dotted = ".".join(key)
        if dotted in REFUSED:
            errors.append(f"{dotted}: {REFUSED[dotted]}")
            _remove(rest, key)
        elif value == "auto":
            if dotted in FILLED_FROM_YAML or dotted in FILLED_FROM_HIDDEN_SIZE:
                _remove(rest, key)
            elif dotted != "data_types.keep_in_fp32_modules" and "zenflow" not in key:
                errors.append(f'{dotted}: cannot be "auto": set a value or remove the key')
                _remove(rest, key)
    try:
        DeepSpeedJson.model_validate(rest)
    except ValidationError as error:
        for item in error.errors():
            message = validation_error(DeepSpeedJson, item, hidden=REFUSED)
            errors.append(message.replace("2, 3 or 3", "2 or 3"))  # DeepSpeed's enum has two names for stage 3
    errors.extend(_optimizer_errors(rest))
    keys = {error.split(": ")[0] for error in errors}
    errors.extend(error for error in _combination_errors(rest) if error.split(": ")[0] not in keys)
    if errors:
        raise InputError([f"{origin}: {error}" for error in errors])


def is_shipped(mapping: dict[str, Any]) -> bool:
    """Whether a JSON has the very content of one in ds_configs/, which the tests have checked against DeepSpeed."""
    return digest(mapping) in SHIPPED


def digest(mapping: dict[str, Any]) -> str:
    """Of the content of a JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:16]


def _optimizer_errors(mapping: dict[str, Any]) -> Iterator[str]:
    from lcm_ds.deepspeed_config.schema import needs_permission, optimizer_params, optimizer_types

    block = mapping.get("optimizer")
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        return
    kind, params = block["type"], block.get("params", {})
    if not isinstance(params, dict):
        return
    known = optimizer_params(kind, params, offloads_optimizer(mapping))
    if known is None:
        yield f"optimizer.type: unknown optimizer {kind!r}{did_you_mean(kind, optimizer_types())}"
        return
    for key in params:
        if key not in known:
            yield f"optimizer.params.{key}: {kind} has no such argument{did_you_mean(key, known)}"
    if kind.lower() == "muon" and mapping.get("gradient_clipping") not in (None, 0, 0.0, "auto"):
        yield f"gradient_clipping: {MUON_CLIPPING}"
    if needs_permission(kind) and zero_stage(mapping) > 0 and not mapping.get("zero_allow_untested_optimizer"):
        yield f"optimizer.type: {kind} under ZeRO needs zero_allow_untested_optimizer: true"


def _combination_errors(mapping: dict[str, Any]) -> Iterator[str]:
    """Settings that are invalid together, or that DeepSpeed would convert from another type."""
    for block, key, kind in (("bf16", "enabled", bool), ("fp16", "enabled", bool), ("zero_optimization", "stage", int)):
        value = _block(mapping, block).get(key, kind())
        if type(value) is not kind:
            yield f"{block}.{key}: has to be {'true or false' if kind is bool else '0, 1, 2 or 3'}, not {value!r}"
    if _enabled(mapping, "bf16") and _enabled(mapping, "fp16"):
        yield "bf16.enabled, fp16.enabled: only one of them can be true"
        return
    if _enabled(mapping, "fp16") and zero_stage(mapping) == 0:
        # DeepSpeed 0.19 divides gradients by the loss scale under stage 0, and does not multiply the loss by it.
        yield "fp16.enabled: needs zero_optimization.stage 1, 2 or 3: DeepSpeed does not scale the loss under stage 0"
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[precision(mapping)]
    accumulated = _block(mapping, "data_types").get("grad_accum_dtype")
    if accumulated in ("fp16", "bf16") and accumulated != dtype:
        yield (
            f"data_types.grad_accum_dtype: {accumulated!r} loses precision of {dtype} gradients; "
            f"use 'fp32' or {dtype!r}"
        )
    if accumulated == "fp32" and dtype != "fp32" and zero_stage(mapping) == 0:
        yield f"data_types.grad_accum_dtype: 'fp32' with {dtype} needs zero_optimization.stage 1, 2 or 3"


# --- filling in -------------------------------------------------------------------------------------------------------


def resolve(
    mapping: dict[str, Any],
    config: TrainConfig,
    world_size: int,
    origin: str | Path,
    config_path: str | Path = "the run's YAML",
    hidden_size: int | None = None,
) -> dict[str, Any]:
    """A checked JSON with "auto" and missing values filled in from the run's config.

    Args:
        mapping: Of `read`.
        config: The run.
        world_size: Number of ranks.
        origin: The JSON, for messages.
        config_path: The YAML, for messages.
        hidden_size: For bucket sizes that are "auto"; None leaves them to DeepSpeed's defaults.

    Raises:
        InputError: JSON and YAML contradict each other, or the batch cannot be divided among the ranks.
    """
    shipped = is_shipped(mapping)
    resolved = copy.deepcopy(mapping)
    errors = Collector()
    batch, optim = config.batch, config.optim
    yaml_values: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch.rows_per_step, "batch.rows_per_step"),
        "train_micro_batch_size_per_gpu": (batch.micro_batch_rows, "batch.micro_batch_rows"),
        "gradient_clipping": (optim.max_grad_norm, "optim.max_grad_norm"),
        "optimizer.params.lr": (optim.lr, "optim.lr"),
        "optimizer.params.betas": (list(optim.betas), "optim.betas"),
        "optimizer.params.eps": (optim.eps, "optim.eps"),
        "optimizer.params.weight_decay": (optim.weight_decay, "optim.weight_decay"),
    }
    with errors:
        steps = accumulation_steps(batch.rows_per_step, batch.micro_batch_rows, world_size, config_path)
        source = f"rows_per_step / ({world_size} ranks * micro_batch_rows)"
        yaml_values["gradient_accumulation_steps"] = steps, source
    optimizer = resolved.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    params = optimizer.setdefault("params", {})
    known = _known_params(optimizer["type"], params, offloads_optimizer(resolved)) if not shipped else None
    for dotted, (value, yaml_key) in yaml_values.items():
        *path, key = dotted.split(".")
        block = _block(resolved, *path)
        if path and known is not None and key not in known:
            block.pop(key, None)  # "auto" for an optimizer without this argument
            continue
        if block.get(key, "auto") != "auto" and block[key] != value:
            errors.errors.append(
                f"{origin}: {dotted}: {block[key]!r} contradicts {yaml_key} = {value!r} of {config_path}; "
                'write "auto" in the JSON'
            )
        block[key] = value
    if optimizer["type"].lower() == "muon" and optim.max_grad_norm:
        errors.errors.append(f"{config_path}: optim.max_grad_norm: {optim.max_grad_norm}: {MUON_CLIPPING}")
    for dotted, from_hidden_size in FILLED_FROM_HIDDEN_SIZE.items():
        *path, key = dotted.split(".")
        block = _block(resolved, *path)
        if block.get(key) == "auto":
            block.pop(key)
            if hidden_size is not None:
                block[key] = from_hidden_size(hidden_size)
    if config.train.recompute == "layer":
        resolved.setdefault("activation_checkpointing", {})
    elif config.train.recompute == "swiglu" and "activation_checkpointing" in resolved:
        errors.errors.append(
            f'{config_path}: train.recompute: swiglu: contradicts "activation_checkpointing" in {origin}, which '
            "recomputes whole layers; remove one of them"
        )
    errors.raise_if_any()
    if not shipped:
        _validate_with_deepspeed(resolved, origin)
    return resolved


def _known_params(kind: str, params: dict[str, Any], offloaded: bool) -> set[str]:
    from lcm_ds.deepspeed_config.schema import optimizer_params

    return optimizer_params(kind, params, offloaded) or set()


def accumulation_steps(rows_per_step: int, micro_batch_rows: int, world_size: int, config_path: str | Path) -> int:
    """Micro-batches of each rank in an optimizer step.

    Raises InputError, with valid alternatives, if the rows cannot be divided evenly.
    """
    group = world_size * micro_batch_rows
    if rows_per_step % group == 0:
        return rows_per_step // group
    alternatives = []
    if rows_per_step % micro_batch_rows == 0:
        alternatives.append(f"{_divisors(rows_per_step // micro_batch_rows, world_size)} ranks")
    if rows_per_step % world_size == 0:
        alternatives.append(f"micro_batch_rows {_divisors(rows_per_step // world_size, micro_batch_rows)}")
    multiples = sorted({max(1, rows_per_step // group) * group, (rows_per_step // group + 1) * group})
    alternatives.append(f"rows_per_step {' or '.join(str(rows) for rows in multiples)}")
    raise InputError(
        f"{config_path}: batch.rows_per_step: {rows_per_step} rows are not a multiple of {world_size} ranks * "
        f"{micro_batch_rows} micro_batch_rows; use {'; or '.join(alternatives)}"
    )


def precision(mapping: dict[str, Any]) -> str:
    """The dtype of the model's parameters and activations: "float32", "bfloat16" or "float16"."""
    if _enabled(mapping, "bf16"):
        return "bfloat16"
    return "float16" if _enabled(mapping, "fp16") else "float32"


def zero_stage(mapping: dict[str, Any]) -> int:
    """The ZeRO stage, 0 to 3; 0 for an invalid one."""
    stage = _block(mapping, "zero_optimization").get("stage", 0)
    return stage if stage in (0, 1, 2, 3) else 0


def offloads_to_nvme(mapping: dict[str, Any]) -> bool:
    """Whether parameters or optimizer states are offloaded to a disk."""
    zero = _block(mapping, "zero_optimization")
    return any(_block(zero, key).get("device") == "nvme" for key in ("offload_optimizer", "offload_param"))


def layout(mapping: dict[str, Any]) -> dict[str, Any]:
    """Settings that, besides stage and number of ranks, determine the layout of optimizer states on disk."""
    zero = _block(mapping, "zero_optimization")
    if zero_stage(mapping) == 3:
        return {"sub_group_size": zero.get("sub_group_size", 1_000_000_000)}
    settings = {key: zero.get(key, False) for key in ("round_robin_gradients", "parameter_alignment")}
    if _block(mapping, "optimizer").get("type", "").lower() == "muon":  # BF16_Optimizer stores its momentum differently
        in_fp32 = _block(mapping, "data_types").get("grad_accum_dtype") == "fp32"
        settings["by_bf16_optimizer"] = (
            zero_stage(mapping) == 1 and _enabled(mapping, "bf16") and in_fp32 and not offloads_optimizer(mapping)
        )
    return settings


def shuffles_parameters(mapping: dict[str, Any]) -> bool:
    """Whether DeepSpeed stores parameters in another order than their names (0.19.8: link_hp_params)."""
    return zero_stage(mapping) in (1, 2) and layout(mapping)["round_robin_gradients"]


def without_owned(mapping: dict[str, Any]) -> dict[str, Any]:
    """A copy of a resolved JSON without the keys that the run's YAML sets."""
    rest = copy.deepcopy(mapping)
    for dotted in FILLED_FROM_YAML:
        _remove(rest, tuple(dotted.split(".")))
    return rest


def _validate_with_deepspeed(resolved: dict[str, Any], origin: str | Path) -> None:
    """Let DeepSpeed parse the resolved JSON, for its assertions across blocks."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger

    # Without train_batch_size: the world size is unknown before there is a process group.
    content = {key: copy.deepcopy(value) for key, value in resolved.items() if key != "train_batch_size"}
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        DeepSpeedConfig(content)
    except Exception as error:  # AssertionError, ValueError, TypeError or its own, all about this JSON
        raise InputError(f"{origin}: DeepSpeed: {' '.join(str(error).split())}") from None
    finally:
        logger.setLevel(level)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _divisors(number: int, near: int) -> str:
    """The divisors of `number`, at most the eight nearest to `near`, as '1, 2, 4'."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    nearest_first = sorted(divisors, key=lambda divisor: abs(divisor - near))
    return ", ".join(str(divisor) for divisor in sorted(nearest_first[:8]))


def _leaves_and_blocks(mapping: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key at every depth, as a path, with its value."""
    for key, value in mapping.items():
        yield (*above, str(key)), value
        if isinstance(value, dict):
            yield from _leaves_and_blocks(value, (*above, str(key)))


def _without_nulls(mapping: dict[str, Any]) -> dict[str, Any]:
    """A copy without keys whose value is null, which DeepSpeed accepts in few blocks."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in mapping.items()
        if value is not None
    }


def _remove(mapping: dict[str, Any], path: tuple[str, ...]) -> None:
    _block(mapping, *path[:-1]).pop(path[-1], None)


def _block(mapping: dict[str, Any], *path: str) -> dict[str, Any]:
    """The block at `path`; empty if there is none."""
    block: Any = mapping
    for key in path:
        block = block.get(key) if isinstance(block, dict) else None
    return block if isinstance(block, dict) else {}


def offloads_optimizer(mapping: dict[str, Any]) -> bool:
    """Whether optimizer states are offloaded, so that the optimizer steps on the CPU."""
    return _block(mapping, "zero_optimization", "offload_optimizer").get("device", "none") != "none"


def _enabled(mapping: dict[str, Any], key: str) -> bool:
    return _block(mapping, key).get("enabled") is True
