"""Where a run goes on: the newest checkpoint that is whole, converted where ranks or ZeRO stage are others than then.

All ranks call the functions here together and come to the same.
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
from lcm_ds.checkpoint.format import BAD, PARTIAL, Checkpoint, candidates
from lcm_ds.checkpoint.save import restore_random_states
from lcm_ds.config import CheckpointConfig
from lcm_ds.distributed.collectives import from_first
from lcm_ds.errors import RunFailedError
from lcm_ds.files import sha256_of, sync, write_whole
from lcm_ds.model.normalizer import Normalizer
from lcm_ds.processes import set_parent_death_signal

logger = logging.getLogger("lcm_ds.train")

POLL_SECONDS = 0.5
TELL_SECONDS = 10.0
# Bytes that a conversion needs for each parameter: fp32 weight and two moments, once in pieces and once put together.
CONVERTED_BYTES = 24

MODEL_STATES = {"mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"}


def newest_complete(run_dir: Path, rules: CheckpointConfig) -> Checkpoint | None:
    """The run's newest checkpoint that is whole, None where it has none at all yet.

    Those that are not are told at ERROR and set aside as `.bad`. Raises RunFailedError, and leaves everything as it is,
    where there are some and none is whole.
    """
    found = from_first(candidates(run_dir) if dist.get_rank() == 0 else [])
    bad: list[tuple[Checkpoint, str]] = []
    for checkpoint in reversed(found):
        integrity_error = _integrity_error(checkpoint, full=rules.verify == "full")
        if integrity_error is None:
            if dist.get_rank() == 0:
                _quarantine(bad, [older for older in found if older.step < checkpoint.step], checkpoint)
            return checkpoint
        bad.append((checkpoint, integrity_error))
    aside = from_first(sorted(map(str, (run_dir / "checkpoints").glob(f"step_*{BAD}"))))
    if bad or aside:
        told = [f"{checkpoint.path}: {integrity_error}" for checkpoint, integrity_error in bad] + [
            f"{path}: set aside" for path in aside
        ]
        raise RunFailedError(
            f"{run_dir}: no checkpoint is whole ({'; '.join(told)}); nothing was changed; take another run_dir to "
            f"start anew, or move {run_dir / 'checkpoints'} away"
        )
    return None


def _integrity_error(checkpoint: Checkpoint, full: bool) -> str | None:
    """Why a checkpoint is not whole, None where it is; `full`: every file's checksum, shared out among the ranks."""
    integrity_error = from_first(checkpoint.integrity_error() if dist.get_rank() == 0 else None)
    if integrity_error is not None or not full:
        return integrity_error
    mine = None
    try:
        files = sorted(checkpoint.files().items())
        for name, entry in files[dist.get_rank() :: dist.get_world_size()]:
            if sha256_of(checkpoint.path / name) != entry["sha256"]:
                mine = f"{name} is not what was written (its sha256 differs)"
    except (OSError, ValueError) as error:
        mine = str(error)
    every: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return next((integrity_error for integrity_error in every if integrity_error is not None), None)


def _quarantine(bad: list[tuple[Checkpoint, str]], older: list[Checkpoint], used: Checkpoint) -> None:
    for checkpoint, integrity_error in bad:
        aside = checkpoint.quarantine()
        logger.error(
            "checkpoint %s is not whole: %s; it is set aside as %s", checkpoint.path, integrity_error, aside.name
        )
    if bad:
        logger.error("going on from %s", used.path)
    for checkpoint in older:
        if not (checkpoint.path / "COMPLETE").exists():  # it was being deleted
            logger.info("removing the rest of %s", checkpoint.path)
            shutil.rmtree(checkpoint.path, ignore_errors=True)


# --- may it go on -----------------------------------------------------------------------------------------------------


def errors(checkpoint: Checkpoint, now: dict[str, Any]) -> list[str]:
    """What keeps a run with the identity `now` (run_folder.py) from going on there: a line each, both values shown."""
    then = checkpoint.state()
    what = {
        "fingerprint": "the data plan's fingerprint (shards, seed, rows_per_step, row_length, max_segment)",
        "model": "the model",
        "init_from": "model.init_from",
        "precision": "the precision",
        "optimizer": "the optimizer",
    }
    lines = [
        f"{checkpoint.path}: {name} was {then.get(key)!r} and is now {now.get(key)!r}; start a new run_dir or go back"
        for key, name in what.items()
        if then.get(key) != now.get(key)
    ]
    if not lines and needs_conversion(then, now):
        reasons = {
            "ZeRO 0 keeps the optimizer whole, and DeepSpeed cannot convert it": 0
            in (then["zero_stage"], now["zero_stage"]),
            "DeepSpeed converts the states of Adam alone": now["optimizer"].lower() not in ("adam", "adamw"),
            "what is offloaded to NVMe cannot be converted": then["nvme"] or now["nvme"],
            "DeepSpeed mixes parameters up under round_robin_gradients": any(
                deepspeed_config.shuffles_parameters(state["deepspeed"])
                for state in (then, now)
                if "deepspeed" in state
            ),
        }
        lines = [
            f"{checkpoint.path}: was saved by {_shape(then)} and would go on with {_shape(now)}: {reason}; "
            "go on as it was"
            for reason, holds in reasons.items()
            if holds
        ]
    return lines


def needs_conversion(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether DeepSpeed's own files do not fit: another number of ranks, ZeRO stage or layout (ds_config.py)."""
    if then["zero_stage"] == now["zero_stage"] == 0:
        return False
    if any(then[key] != now[key] for key in ("world_size", "zero_stage")):
        return True
    known = "deepspeed" in then  # not in checkpoints of older versions
    return known and deepspeed_config.layout(then["deepspeed"]) != deepspeed_config.layout(now["deepspeed"])


def _shape(state: dict[str, Any]) -> str:
    return f"{state['world_size']} rank(s) under ZeRO {state['zero_stage']}"


def changes(checkpoint: Checkpoint, run_dir: Path, now: dict[str, Any]) -> str | None:
    """What the config and the DeepSpeed JSON say otherwise than when a checkpoint was saved, in a line; None: nothing.

    Args:
        checkpoint: Where the run resumes.
        run_dir: Its config.yaml and ds_config.json, of the run's last start, stand in for what the checkpoints of older
            versions do not hold.
        now: The run's identity (run_folder.py).
    """
    then = checkpoint.state()
    if "config" not in then:
        try:
            then["config"] = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
            then["deepspeed"] = json.loads((run_dir / "ds_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
    config = {key: now["config"][key] for key in now["config"] if key not in ("run_dir", "deepspeed")}
    lines = [
        *_differences("", _common(then["config"], config), _common(config, then["config"])),
        *_differences("deepspeed", *(deepspeed_config.without_owned(state["deepspeed"]) for state in (then, now))),
        *_differences("ranks", then["world_size"], now["world_size"]),
    ]
    return f"changed since step {checkpoint.step}: {', '.join(lines)}" if lines else None


def _common(mapping: Any, other: Any) -> Any:
    """The keys that both have: others are not of both versions of lcm-ds."""
    if not (isinstance(mapping, dict) and isinstance(other, dict)):
        return mapping
    return {key: _common(value, other[key]) for key, value in mapping.items() if key in other}


def _differences(name: str, then: Any, now: Any) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from _differences(f"{name}.{key}".lstrip("."), then.get(key), now.get(key))
    elif then != now:
        yield f"{name} {_as_yaml(then)} → {_as_yaml(now)}"


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- conversion -------------------------------------------------------------------------------------------------------


def convert(
    checkpoint: Checkpoint,
    parameters: int,
    rules: CheckpointConfig,
    moved: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Convert a checkpoint to DeepSpeed's universal format, beside it, unless that was done before and is whole.

    Rank 0 does it and tells how far it is; the others wait, in no collective, for it may take longer than those wait.
    moved: is told what goes on, again and again; say: lines for people. Raises RunFailedError on all ranks if it fails.
    """
    if checkpoint.universal.exists():
        integrity_error = _integrity_error(
            Checkpoint(checkpoint.universal, checkpoint.step), full=rules.verify == "full"
        )
        if integrity_error is None:
            return
        if dist.get_rank() == 0:
            logger.error("%s is not whole: %s; it is made again", checkpoint.universal, integrity_error)
            shutil.rmtree(checkpoint.universal)
        dist.barrier()
    store, key = dist.distributed_c10d._get_default_store(), f"lcm-ds/converted/{checkpoint.step}"
    if dist.get_rank() == 0:
        try:
            _convert(checkpoint, parameters, moved, say)
            store.set(key, "")
        except (RunFailedError, OSError, RuntimeError) as error:
            store.set(key, str(error) or repr(error))
    while not store.check([key]):  # raises where rank 0 has died
        moved("waiting for the conversion")
        time.sleep(POLL_SECONDS)
    if error_text := store.get(key).decode():
        raise RunFailedError(error_text)
    dist.barrier()


def _convert(checkpoint: Checkpoint, parameters: int, moved: Callable[[str], None], say: Callable[[str], None]) -> None:
    free = shutil.disk_usage(checkpoint.path).free
    if free < parameters * CONVERTED_BYTES:
        raise RunFailedError(
            f"{checkpoint.path}: to be converted it needs about {parameters * CONVERTED_BYTES / 1e9:,.1f} GB, "
            f"and {free / 1e9:,.1f} GB are free"
        )
    partial = checkpoint.path.with_name(f"{checkpoint.universal.name}.{os.getpid()}{PARTIAL}")
    workers = str(max(1, min(8, len(os.sched_getaffinity(0)))))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(checkpoint.path)]
    command += ["--output_folder", str(partial), "--num_extract_workers", workers, "--num_merge_workers", workers]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    say(f"converting {checkpoint.path.name} to DeepSpeed's universal format, once")
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environ, preexec_fn=set_parent_death_signal())
        told = started = time.monotonic()
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            moved(f"converting {checkpoint.path.name}")
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                done = sum(1 for _ in (partial / "zero").glob("*/fp32.pt"))
                say(f"converting {checkpoint.path.name}: {done} parameters done, {told - started:.0f} s")
        log.seek(0)
        said = log.read().decode("utf-8", errors="replace")
    if child.returncode:
        raise RunFailedError(f"{checkpoint.path}: cannot be converted to DeepSpeed's universal format:\n{said[-4000:]}")
    (partial.parent / "latest_universal").unlink()
    normalize_universal_checkpoint(partial)
    files = {}
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            moved(f"converting {checkpoint.path.name}: {path.name}")
            sync(path)
            name = str(path.relative_to(partial))
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_whole(partial / "COMPLETE", json.dumps({"files": files}, indent=1))
    os.rename(partial, checkpoint.universal)
    sync(checkpoint.universal.parent)


def normalize_universal_checkpoint(folder: Path) -> None:
    """What DeepSpeed looks for besides weights and moments has other names under ZeRO 3 than under ZeRO 1 and 2."""
    found, *others = sorted(folder.glob("*model_states.pt"))
    for name in MODEL_STATES - {found.name}:
        os.link(found, folder / name)
    for path in {*others} - {folder / name for name in MODEL_STATES}:
        path.unlink()
    states = folder / "zero" / "optimizer_state.pt"
    saved = torch.load(states, weights_only=False)
    if "optimizer_state_dict" in saved:  # of ZeRO 3, with all that rank 0 had
        step = saved["optimizer_state_dict"]["state"][0]["step"]
        del saved["fp32_flat_groups"]
        for group in torch.load(found, weights_only=False, mmap=True)["param_shapes"]:
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
    """Load weights, optimizer and random states into a fresh engine, whose settings stay those of the config.

    Args:
        engine: Was built with the config, and has taken no step.
        checkpoint: What to load.
        universal: From what `convert` made of it, into an engine that was built for that.
    """
    path = checkpoint.universal if universal else checkpoint.path
    settings = LaunchOptions(engine)
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name, load_lr_scheduler_states=False)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load the checkpoint {path}")
    settings.put_back(engine)
    groups = engine.basic_optimizer.param_groups
    on_device = any(group.get("fused") or group.get("capturable") for group in groups)
    for parameter, state in engine.basic_optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):  # one for all of them, or where another optimizer wants it
            state["step"] = state["step"].to(parameter.device if on_device else "cpu", copy=True)
    if universal:
        _restore_normalizer(engine.module.normalizer, path)
    else:
        restore_random_states(checkpoint.path, dist.get_rank())


class LaunchOptions:
    """What the config says of a fresh engine's optimizer, which DeepSpeed's loading replaces by the checkpoint's."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self._groups = [
            {key: value for key, value in group.items() if key not in ("params", "step")}
            for group in engine.basic_optimizer.param_groups
        ]
        held = {name: getattr(engine.optimizer, name, None) for name in ("clip_grad", "dynamic_loss_scale")}
        self._held = {name: value for name, value in held.items() if value is not None}
        self._scalers = {
            name: copy.copy(getattr(engine.optimizer, name))
            for name in ("loss_scaler", "loss_scale_config")  # under ZeRO, and without
            if hasattr(engine.optimizer, name)
        }

    def put_back(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Make them the settings of the engine again; how far a dynamic scale of the loss has come stays."""
        for group, own in zip(engine.basic_optimizer.param_groups, self._groups, strict=True):
            group.update(own)
        for name, value in self._held.items():
            setattr(engine.optimizer, name, value)
        for name, own in self._scalers.items():
            setattr(engine.optimizer, name, scaler_as_configured(own, getattr(engine.optimizer, name)))


def scaler_as_configured(own: Any, loaded: Any) -> Any:
    """A scaler of the loss, or its settings, as the config says, as far as the loaded one had come.

    Args:
        own: One as the config says, which is changed.
        loaded: The checkpoint's.
    """
    dynamic = [getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)) for scaler in (own, loaded)]
    if all(dynamic):  # else the scale is what the config says
        for name in ("cur_scale", "cur_iter", "last_overflow_iter"):
            setattr(own, name, getattr(loaded, name))
        own.cur_scale = max(own.cur_scale, getattr(own, "min_scale", getattr(own, "min_loss_scale", 0)))
        if hasattr(own, "cur_hysteresis"):
            own.cur_hysteresis = min(loaded.cur_hysteresis, own.delayed_shift)
    return own


def _restore_normalizer(normalizer: Normalizer, universal: Path) -> None:
    """Take it from the checkpoint: of the universal format DeepSpeed loads parameters alone, and no buffers.

    It need not be that of the training data: a run that started from another model has that model's.
    """
    states = universal / min(MODEL_STATES)  # the same under either name
    saved = torch.load(states, map_location="cpu", mmap=True, weights_only=False)["module"]
    normalizer.set(*(saved[f"normalizer.{name}"].float().numpy() for name in ("center", "scale")))
