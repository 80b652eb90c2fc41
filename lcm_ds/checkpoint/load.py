"""Resuming: the newest valid checkpoint, converted if the number of ranks or the ZeRO stage has changed.

All ranks call these functions together and reach the same result.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import yaml

from lcm_ds import deepspeed_config
from lcm_ds.checkpoint.format import BAD, PARTIAL, Checkpoint, candidates, write_latest
from lcm_ds.checkpoint.save import restore_random_states
from lcm_ds.config import CheckpointConfig
from lcm_ds.distributed.collectives import from_first
from lcm_ds.errors import RunFailedError
from lcm_ds.files import link_or_copy, sha256_of, sync, write_whole
from lcm_ds.model.normalizer import Normalizer
from lcm_ds.processes import set_parent_death_signal

logger = logging.getLogger("lcm_ds.train")

POLL_SECONDS = 0.5
REPORT_SECONDS = 10.0
# Disk space of a conversion per parameter: fp32 weight and two moments, both in fragments and merged.
CONVERTED_BYTES = 24

MODEL_STATES = {"mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"}


def newest_complete(run_dir: Path, rules: CheckpointConfig) -> Checkpoint | None:
    """The run's newest valid checkpoint; None if the run has none yet.

    Invalid ones are logged as errors and moved to `.bad`. Raises RunFailedError, and changes nothing, if there are
    checkpoints and none is valid.
    """
    existing = from_first(candidates(run_dir) if dist.get_rank() == 0 else [])
    bad: list[tuple[Checkpoint, str]] = []
    for checkpoint in reversed(existing):
        integrity_error = _integrity_error(checkpoint, full=rules.verify == "full")
        if integrity_error is None:
            if dist.get_rank() == 0:
                _quarantine(bad, [older for older in existing if older.step < checkpoint.step], checkpoint)
            return checkpoint
        bad.append((checkpoint, integrity_error))
    quarantined = from_first(sorted(map(str, (run_dir / "checkpoints").glob(f"step_*{BAD}"))))
    if bad or quarantined:
        reasons = [f"{checkpoint.path}: {integrity_error}" for checkpoint, integrity_error in bad]
        reasons += [f"{path}: found corrupt before" for path in quarantined]
        raise RunFailedError(
            f"{run_dir}: no checkpoint is valid ({'; '.join(reasons)}); nothing was changed; choose another run_dir to "
            f"start over, or move {run_dir / 'checkpoints'} away"
        )
    return None


def _integrity_error(checkpoint: Checkpoint, full: bool) -> str | None:
    """Why a checkpoint is invalid, None if it is not; `full`: by every file's checksum, each rank hashing its share."""
    integrity_error = from_first(checkpoint.integrity_error() if dist.get_rank() == 0 else None)
    if integrity_error is not None or not full:
        return integrity_error
    errors: list[str] = []
    try:
        files = sorted(checkpoint.files().items())
        for name, entry in files[dist.get_rank() :: dist.get_world_size()]:
            if sha256_of(checkpoint.path / name) != entry["sha256"]:
                errors.append(f"{name} is not what was written (its sha256 differs)")
    except (OSError, ValueError) as error:
        errors.append(str(error))
    errors_by_rank: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(errors_by_rank, errors)
    return next((error for own_errors in errors_by_rank for error in own_errors), None)


def _quarantine(bad: list[tuple[Checkpoint, str]], older: list[Checkpoint], used: Checkpoint) -> None:
    for checkpoint, integrity_error in bad:
        moved_to = checkpoint.quarantine().name
        logger.error(
            "checkpoint %s is incomplete or corrupt (%s); moved to %s", checkpoint.path, integrity_error, moved_to
        )
    if bad:
        logger.error("resuming from %s", used.path)
        write_latest(used.path.parent.parent)
    for checkpoint in older:
        if not (checkpoint.path / "COMPLETE").exists():  # its deletion was interrupted
            logger.info("removing the rest of %s", checkpoint.path)
            shutil.rmtree(checkpoint.path, ignore_errors=True)


# --- compatibility ----------------------------------------------------------------------------------------------------


def errors(checkpoint: Checkpoint, now: dict[str, Any]) -> list[str]:
    """Why a run with the identity `now` (run_metadata.py) cannot resume from a checkpoint: a line each, both values."""
    then = checkpoint.state()
    if (order := then.get("order", 1)) != now.get("order", 1):
        version = then.get("versions", {}).get("lcm_ds", "unknown")
        return [
            f"{checkpoint.path}: was trained in data order {order}, and this version of lcm-ds has only "
            f"order {now['order']}: continue with the version that began it ({version}), or "
            "start a new run with model.init_from"
        ]
    lines = [
        f"{checkpoint.path}: {name} was {_as_yaml(before)} and is now {_as_yaml(after)}; undo that or use a new run_dir"
        for name, before, after in _incompatible(then, now)
    ]
    if then.get("fingerprint") != now.get("fingerprint") and not any(_order_changes(then, now)):
        lines.append(
            f"{checkpoint.path}: the shards of data.train are not those that it was trained on; restore them, or use a "
            "new run_dir"
        )
    if not lines and needs_conversion(then, now):
        shuffled = [deepspeed_config.shuffles_parameters(state.get("deepspeed", {})) for state in (then, now)]
        reasons = {
            "DeepSpeed cannot convert the unpartitioned optimizer of ZeRO 0": 0
            in (then["zero_stage"], now["zero_stage"]),
            "DeepSpeed converts only Adam's states": now["optimizer"].lower() not in ("adam", "adamw"),
            "states offloaded to NVMe cannot be converted": then["nvme"] or now["nvme"],
            "DeepSpeed mixes up parameters under round_robin_gradients": any(shuffled),
        }
        lines = [
            f"{checkpoint.path}: was saved by {_shape(then)} and would resume with {_shape(now)}: {reason}; "
            "resume with the former settings"
            for reason, applies in reasons.items()
            if applies
        ]
    return lines


# The keys of a config that the order of the data depends on, with the contents of the datasets (data/plan.py).
_ORDER_KEYS = (
    "seed",
    "batch.rows_per_step",
    "data.row_length",
    "data.max_segment",
    "data.shuffle_shards",
    "data.streams",
    "data.train",
)


def _incompatible(then: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two identities that cannot resume each other: name, value then, value now."""
    model, own_model = then.get("model") or {}, now.get("model") or {}
    for key in {**model, **own_model}:
        if model.get(key) != own_model.get(key):
            yield f"model.{key}", model.get(key), own_model.get(key)
    for key, name in (("init_from", "model.init_from"), ("precision", "the precision"), ("optimizer", "the optimizer")):
        if then.get(key) != now.get(key):
            yield name, then.get(key), now.get(key)
    if then.get("fingerprint") != now.get("fingerprint"):
        yield from _order_changes(then, now)


def _order_changes(then: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The changed config keys that the order of the data depends on; none if only the datasets' contents changed.

    Checkpoints of older versions lack the config, or some of its keys.
    """
    for key in _ORDER_KEYS:
        before, after = then.get("config"), now.get("config")
        for part in key.split("."):
            before, after = (block.get(part) if isinstance(block, dict) else None for block in (before, after))
        if before is not None and before != after:
            yield key, before, after


def needs_conversion(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether DeepSpeed's own files do not fit: number of ranks, ZeRO stage or file layout differ."""
    if then["zero_stage"] == now["zero_stage"] == 0:
        return False
    if any(then[key] != now[key] for key in ("world_size", "zero_stage")):
        return True
    if "deepspeed" not in then:  # a checkpoint of an older version
        return False
    return deepspeed_config.layout(then["deepspeed"]) != deepspeed_config.layout(now["deepspeed"])


def _shape(state: dict[str, Any]) -> str:
    return f"{state['world_size']} rank(s) under ZeRO {state['zero_stage']}"


def changes(checkpoint: Checkpoint, run_dir: Path, now: dict[str, Any]) -> str | None:
    """Config and DeepSpeed settings that changed since a checkpoint was saved, as a table; None if none did.

    Args:
        checkpoint: The run resumes from it.
        run_dir: Its config.yaml and ds_config.json, of the run's last start, replace what checkpoints of older versions
            do not contain.
        now: The run's identity (run_metadata.py).
    """
    then = checkpoint.state()
    if "config" not in then:
        try:
            then["config"] = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
            then["deepspeed"] = json.loads((run_dir / "ds_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
    config = {key: now["config"][key] for key in now["config"] if key not in ("run_dir", "deepspeed")}
    changed = [
        *_differences("", _common(then["config"], config), _common(config, then["config"])),
        *_differences("deepspeed", *(deepspeed_config.without_owned(state["deepspeed"]) for state in (then, now))),
        *_differences("ranks", then["world_size"], now["world_size"]),
    ]
    width = max((len(key) for key, _ in changed), default=0)
    lines = "".join(f"\n  {key:{width}}  {how}" for key, how in changed)
    return f"changed since step {checkpoint.step}:{lines}" if lines else None


def _common(mapping: Any, other: Any) -> Any:
    """The keys that `other` has, too: the rest is of another version of lcm-ds."""
    if not (isinstance(mapping, dict) and isinstance(other, dict)):
        return mapping
    return {key: _common(value, other[key]) for key, value in mapping.items() if key in other}


def _differences(name: str, then: Any, now: Any) -> Iterator[tuple[str, str]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from _differences(f"{name}.{key}".lstrip("."), then.get(key), now.get(key))
    elif then != now:
        yield name, f"{_as_yaml(then)} → {_as_yaml(now)}"


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- conversion -------------------------------------------------------------------------------------------------------


def convert(
    checkpoint: Checkpoint,
    parameters: int,
    rules: CheckpointConfig,
    on_progress: Callable[[str], None],
    print_line: Callable[[str], None],
) -> None:
    """Convert a checkpoint to DeepSpeed's universal format, beside it, unless a valid conversion exists.

    Rank 0 converts; the others wait outside of collectives, whose timeout may be shorter.

    Args:
        checkpoint: What to convert.
        parameters: Number of the model's parameters, for the disk space needed.
        rules: `verify` decides how an existing conversion is checked.
        on_progress: Called again and again with what is being done.
        print_line: Prints a line for the user.

    Raises:
        RunFailedError: On all ranks, if it fails.
    """
    if checkpoint.universal.exists():
        integrity_error = _integrity_error(
            Checkpoint(checkpoint.universal, checkpoint.step), full=rules.verify == "full"
        )
        if integrity_error is None:
            return
        if dist.get_rank() == 0:
            logger.error(
                "%s is incomplete or corrupt (%s); it is converted again", checkpoint.universal, integrity_error
            )
            shutil.rmtree(checkpoint.universal)
        dist.barrier()
    store, key = dist.distributed_c10d._get_default_store(), f"lcm-ds/converted/{checkpoint.step}"
    if dist.get_rank() == 0:
        try:
            _convert(checkpoint, parameters, on_progress, print_line)
            store.set(key, "")
        except (RunFailedError, OSError, RuntimeError) as error:
            store.set(key, str(error) or repr(error))
    while not store.check([key]):  # raises if rank 0 has died
        on_progress("waiting for the conversion")
        time.sleep(POLL_SECONDS)
    if error_text := store.get(key).decode():
        raise RunFailedError(error_text)
    dist.barrier()


def _convert(
    checkpoint: Checkpoint, parameters: int, on_progress: Callable[[str], None], print_line: Callable[[str], None]
) -> None:
    free = shutil.disk_usage(checkpoint.path).free
    if free < parameters * CONVERTED_BYTES:
        raise RunFailedError(
            f"{checkpoint.path}: its conversion needs about {parameters * CONVERTED_BYTES / 1e9:,.1f} GB, "
            f"and only {free / 1e9:,.1f} GB are free"
        )
    partial = checkpoint.path.with_name(f"{checkpoint.universal.name}.{os.getpid()}{PARTIAL}")
    workers = str(max(1, min(8, len(os.sched_getaffinity(0)))))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(checkpoint.path)]
    command += ["--output_folder", str(partial), "--num_extract_workers", workers, "--num_merge_workers", workers]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    print_line(f"converting {checkpoint.path.name} to DeepSpeed's universal format, once")
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environ, preexec_fn=set_parent_death_signal())
        reported = started = time.monotonic()
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            on_progress(f"converting {checkpoint.path.name}")
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                done = sum(1 for _ in (partial / "zero").glob("*/fp32.pt"))
                print_line(f"converting {checkpoint.path.name}: {done} parameters done, {reported - started:.0f} s")
        log.seek(0)
        output = log.read().decode("utf-8", errors="replace")
    if child.returncode:
        raise RunFailedError(
            f"{checkpoint.path}: cannot be converted to DeepSpeed's universal format:\n{output[-4000:]}"
        )
    (partial.parent / "latest_universal").unlink()
    normalize_universal_checkpoint(partial)
    files = {}
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            on_progress(f"converting {checkpoint.path.name}: {path.name}")
            sync(path)
            name = str(path.relative_to(partial))
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_whole(partial / "COMPLETE", json.dumps({"files": files}, indent=1))
    os.rename(partial, checkpoint.universal)
    sync(checkpoint.universal.parent)


def normalize_universal_checkpoint(folder: Path) -> None:
    """Make a universal checkpoint loadable under any stage: ZeRO 3 expects other files and keys than ZeRO 1 and 2."""
    model_states, *others = sorted(folder.glob("*model_states.pt"))
    for name in MODEL_STATES - {model_states.name}:
        link_or_copy(model_states, folder / name)
    for path in {*others} - {folder / name for name in MODEL_STATES}:
        path.unlink()
    states = folder / "zero" / "optimizer_state.pt"
    saved = torch.load(states, weights_only=False)
    if "optimizer_state_dict" in saved:  # of ZeRO 3, with all of rank 0's state
        step = saved["optimizer_state_dict"]["state"][0]["step"]
        del saved["fp32_flat_groups"]
        for group in torch.load(model_states, weights_only=False, mmap=True)["param_shapes"]:
            for parameter, shape in group.items():
                torch.save(step, folder / "zero" / parameter / "step.pt")
                for path in (folder / "zero" / parameter / f"{name}.pt" for name in ("fp32", "exp_avg", "exp_avg_sq")):
                    torch.save({"param": torch.load(path).view(shape)}, path)
    else:
        step = torch.load(next((folder / "zero").glob("*/step.pt")), weights_only=False)
    saved["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": saved["param_groups"]}
    saved.setdefault("ds_version", deepspeed.__version__)
    torch.save(saved, states)


# --- loading ----------------------------------------------------------------------------------------------------------


def restore(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint, universal: bool) -> None:
    """Load weights, optimizer and random states into a fresh engine, and keep the settings of its config.

    Args:
        engine: Built with the config; has taken no step.
        checkpoint: What to load.
        universal: Load the universal checkpoint of `convert`, into an engine built for that.
    """
    path = checkpoint.universal if universal else checkpoint.path
    settings = OptimizerSettings(engine)
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name, load_lr_scheduler_states=False)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load the checkpoint {path}")
    settings.restore(engine)
    groups = engine.basic_optimizer.param_groups
    on_device = any(group.get("fused") or group.get("capturable") for group in groups)
    for parameter, state in engine.basic_optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):  # loaded as one shared tensor, or for another optimizer
            state["step"] = state["step"].to(parameter.device if on_device else "cpu", copy=True)
    if universal:
        _restore_normalizer(engine.module.normalizer, path)
    else:
        restore_random_states(checkpoint.path, dist.get_rank())


class OptimizerSettings:
    """A fresh engine's optimizer settings, of the config; DeepSpeed's loading replaces them by the checkpoint's."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self._groups = [
            {key: value for key, value in group.items() if key not in ("params", "step")}
            for group in engine.basic_optimizer.param_groups
        ]
        attributes = {name: getattr(engine.optimizer, name, None) for name in ("clip_grad", "dynamic_loss_scale")}
        self._attributes = {name: value for name, value in attributes.items() if value is not None}
        self._scalers = {
            name: copy.copy(getattr(engine.optimizer, name))
            for name in ("loss_scaler", "loss_scale_config")  # with and without ZeRO
            if hasattr(engine.optimizer, name)
        }

    def restore(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Give the engine these settings again; the current value of a dynamic loss scale stays."""
        for group, own in zip(engine.basic_optimizer.param_groups, self._groups, strict=True):
            group.update(own)
        for name, value in self._attributes.items():
            setattr(engine.optimizer, name, value)
        for name, own in self._scalers.items():
            setattr(engine.optimizer, name, scaler_as_configured(own, getattr(engine.optimizer, name)))


def scaler_as_configured(own: Any, loaded: Any) -> Any:
    """The loss scaler `own` of the config, or its settings, with the progress of the `loaded` one."""
    dynamic = [getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)) for scaler in (own, loaded)]
    if all(dynamic):  # else the scale is the config's
        for name in ("cur_scale", "cur_iter", "last_overflow_iter"):
            setattr(own, name, getattr(loaded, name))
        own.cur_scale = max(own.cur_scale, getattr(own, "min_scale", getattr(own, "min_loss_scale", 0)))
        if hasattr(own, "cur_hysteresis"):
            own.cur_hysteresis = min(loaded.cur_hysteresis, own.delayed_shift)
    return own


def _restore_normalizer(normalizer: Normalizer, universal: Path) -> None:
    """Load the normaliser: from the universal format DeepSpeed loads no buffers.

    It may differ from that of the training data: a run with model.init_from has that model's.
    """

    states = universal / min(MODEL_STATES)  # the same under either name
    saved = torch.load(states, map_location="cpu", mmap=True, weights_only=False)["module"]
    normalizer.set(*(saved[f"normalizer.{name}"].float().numpy() for name in ("center", "scale")))
