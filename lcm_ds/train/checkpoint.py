"""Checkpoints: whole or not there at all.

A save writes DeepSpeed's files and state.json into `step_XXXXXXXX.partial/`, then COMPLETE with the size and sha256 of
every file, then renames the folder. A folder without COMPLETE, or with a file of another size, is not a checkpoint.
DeepSpeed reads its files with pickle: load only checkpoints that you trust; exports are safetensors.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_ds.config import CheckpointConfig, TrainConfig, load
from lcm_ds.errors import InputError
from lcm_ds.files import sha256_of, sync_folder, write_whole

if TYPE_CHECKING:
    import deepspeed

    from lcm_ds.model.modeling import BaseLCM

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
# What ds_to_universal looks for in the client state of ZeRO 1 and 2 before it converts a checkpoint.
UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int  # steps done

    def state(self) -> dict[str, Any]:
        """Its state.json: step, concepts, fingerprint, model, ZeRO stage, precision, world size, versions."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))


def folder_name(step: int) -> str:
    """The name of the checkpoint taken after `step` steps."""
    return f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The run's complete checkpoints, oldest first. Those that are not whole are named in the log and left out."""
    found = []
    for path in sorted((run_dir / "checkpoints").glob("step_*")):
        if path.name.endswith(PARTIAL) or not path.is_dir():
            continue
        wrong = _incomplete(path)
        if wrong:
            logger.error("checkpoint %s is not whole and is not used: %s", path, wrong)
        else:
            found.append(Checkpoint(path, int(path.name.removeprefix("step_"))))
    return found


def _incomplete(path: Path) -> str | None:
    """Why the folder is no checkpoint, or None where it is one."""
    try:
        files = json.loads((path / "COMPLETE").read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "COMPLETE is missing"
    except (OSError, ValueError, KeyError):
        return "COMPLETE cannot be read"
    for name, entry in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        size = (path / name).stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
    return None


def save(engine: deepspeed.DeepSpeedEngine, run_dir: Path, step: int, state: dict[str, Any]) -> Path:
    """Save the engine after `step` steps; all ranks call this. Returns the finished folder.

    Raises RuntimeError on every rank where any rank failed; what was there before is untouched then.
    """
    import torch.distributed as dist

    folder = run_dir / "checkpoints"
    final, partial = folder / folder_name(step), folder / (folder_name(step) + PARTIAL)
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=partial.name, client_state={**UNIVERSAL, **state}, save_latest=False)
    error: str | None = None
    if first:
        try:
            write_whole(partial / "state.json", json.dumps(state, indent=1))
            files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(partial.iterdir())}
            write_whole(partial / "COMPLETE", json.dumps({"files": files}, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            sync_folder(folder)
        except OSError as failure:
            error = f"{failure}"
    outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise RuntimeError(f"checkpoint {final} was not written: {outcome[0]}")
    return final


def retain(run_dir: Path, rules: CheckpointConfig) -> None:
    """Delete what the rules no longer keep: all but the last `keep` and the multiples of `keep_every`."""
    checkpoints = list_checkpoints(run_dir)
    for old in checkpoints[: -rules.keep]:
        if rules.keep_every is None or old.step % rules.keep_every:
            # Without COMPLETE it is no checkpoint any more, should the deletion be cut short.
            (old.path / "COMPLETE").unlink()
            shutil.rmtree(old.path)


def clear_partial(run_dir: Path) -> None:
    """Remove what a save that was cut short left behind."""
    for path in (run_dir / "checkpoints").glob(f"step_*{PARTIAL}"):
        logger.info("removing the unfinished checkpoint %s", path)
        shutil.rmtree(path)


def restore(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Load weights and optimizer state into a fresh engine; all ranks call this."""
    loaded, _ = engine.load_checkpoint(
        str(checkpoint.path.parent), tag=checkpoint.path.name, load_lr_scheduler_states=False
    )
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load the checkpoint {checkpoint.path}")


def resume_mistakes(checkpoint: Checkpoint, now: dict[str, Any]) -> list[str]:
    """What keeps a run with state `now` from going on at `checkpoint`: one line a difference, both values shown."""
    then = checkpoint.state()
    what = {
        "fingerprint": "the data plan's fingerprint (shards, seed, rows_per_step, row_length, max_segment)",
        "model": "the model",
        "precision": "the precision",
        "zero_stage": "the ZeRO stage",
        "world_size": "the number of ranks",
    }
    return [
        f"{checkpoint.path}: {name} was {then.get(key)!r} and is now {now[key]!r}; start a new run_dir or go back"
        for key, name in what.items()
        if then.get(key) != now[key]
    ]


def find(run_dir: str | Path, step: int | None = None) -> Checkpoint:
    """The newest checkpoint of a run, or the one of `step`. Raises InputError where there is none."""
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"{run_dir}: no run here (config.yaml is missing)")
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise InputError(f"{run_dir}/checkpoints: no complete checkpoint yet")
    if step is None:
        return checkpoints[-1]
    for checkpoint in checkpoints:
        if checkpoint.step == step:
            return checkpoint
    there = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
    raise InputError(f"{run_dir}/checkpoints: no checkpoint of step {step} (there are: {there})")


def load_model(run_dir: str | Path, step: int | None = None) -> tuple[BaseLCM, TrainConfig, int]:
    """The model of a run in fp32 on the CPU, in evaluation mode, with its config and the steps it was trained for.

    Works for any ZeRO stage and world size. Raises InputError where there is no such run or checkpoint.
    """
    from lcm_ds.model.config import BaseLCMConfig
    from lcm_ds.model.modeling import BaseLCM

    checkpoint = find(run_dir, step)
    config = load(TrainConfig, Path(run_dir) / "config.yaml")
    model = BaseLCM(BaseLCMConfig(**checkpoint.state()["model"]))
    model.load_state_dict(fp32_weights(checkpoint))
    return model.eval(), config, checkpoint.step


def fp32_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """The full state dict of a checkpoint, put together from its ranks' fp32 master weights."""
    import torch

    if checkpoint.state()["zero_stage"] == 0:
        saved = torch.load(checkpoint.path / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: value.float() for name, value in saved["module"].items()}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it tells its progress
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
