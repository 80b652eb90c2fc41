"""Checkpoints on disk: complete, or not there.

A save (save.py) writes into `step_XXXXXXXX.partial/`, last of all COMPLETE with the size and sha256 of every file, and
then renames the folder. A folder without COMPLETE, or with a file of another size, is not a checkpoint. Corrupt ones
are moved to `.bad`; `.universal` is a checkpoint converted for another number of ranks (load.py). DeepSpeed reads its
files with pickle: load only checkpoints that you trust; exports are safetensors.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_ds import deepspeed_config
from lcm_ds.config import CheckpointConfig, TrainConfig, load
from lcm_ds.data.remote import fetch as remote
from lcm_ds.errors import InputError
from lcm_ds.files import write_whole

if TYPE_CHECKING:
    from lcm_ds.model.modeling import BaseLCM

logger = logging.getLogger("lcm_ds.train")

PARTIAL, BAD, UNIVERSAL = ".partial", ".bad", ".universal"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    step: int  # steps done

    @property
    def universal(self) -> Path:
        """Its folder in DeepSpeed's universal format, if it was converted."""
        return self.path.with_name(self.path.name + UNIVERSAL)

    def state(self) -> dict[str, Any]:
        """Its state.json: step, concepts, fingerprint, model, ZeRO stage, precision, world size, versions, guard."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))

    def files(self) -> dict[str, dict[str, Any]]:
        """The size (bytes) and sha256 of every file in it, by name. Raises OSError, or ValueError."""
        listed = json.loads((self.path / "COMPLETE").read_text(encoding="utf-8"))
        try:
            return {name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in listed["files"].items()}
        except (KeyError, TypeError, AttributeError):
            raise ValueError("COMPLETE does not list files") from None

    def integrity_error(self) -> str | None:
        """Why it is invalid, by names and sizes of its files; None if it is not."""
        try:
            files = self.files()
        except FileNotFoundError:
            return "COMPLETE is missing"
        except (OSError, ValueError):
            return "COMPLETE cannot be read"
        for name, entry in files.items():
            if not (self.path / name).is_file():
                return f"{name} is missing"
            size = (self.path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
        return None

    def delete(self) -> None:
        """Delete it and its conversion. If interrupted, what is left is not a checkpoint."""
        shutil.rmtree(self.universal, ignore_errors=True)
        (self.path / "COMPLETE").unlink()
        partial = self.path.with_name(self.path.name + PARTIAL)
        os.rename(self.path, partial)
        shutil.rmtree(partial)

    def quarantine(self) -> Path:
        """Rename it to `.bad`; returns the new path."""
        shutil.rmtree(self.universal, ignore_errors=True)
        bad = self.path.with_name(self.path.name + BAD)
        shutil.rmtree(bad, ignore_errors=True)
        os.rename(self.path, bad)
        return bad


def saves_in_background(rules: CheckpointConfig, ds: dict[str, Any]) -> bool:
    """checkpoint.background, or its default: unless the optimizer is offloaded.

    With offload, host memory holds the optimizer states already, and those on NVMe are copied from file to file.
    """
    return not deepspeed_config.offloads_optimizer(ds) if rules.background is None else rules.background


def folder_name(step: int) -> str:
    """The name of the checkpoint taken after `step` steps."""
    return f"step_{step:08d}"


def candidates(run_dir: Path) -> list[Checkpoint]:
    """Every folder named as a checkpoint, oldest first, valid or not."""
    paths = [path for path in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted((Checkpoint(path, int(path.name[5:])) for path in paths), key=lambda checkpoint: checkpoint.step)


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The run's valid checkpoints, oldest first; errors of the others are logged."""
    valid = []
    for checkpoint in candidates(run_dir):
        if error := checkpoint.integrity_error():
            logger.error("checkpoint %s is incomplete or corrupt and not used: %s", checkpoint.path, error)
        else:
            valid.append(checkpoint)
    return valid


def retain(run_dir: Path, rules: CheckpointConfig) -> None:
    """Delete all checkpoints but the last `keep` and the multiples of `keep_every`."""
    for old in list_checkpoints(run_dir)[: -rules.keep]:
        if rules.keep_every is None or old.step % rules.keep_every:
            old.delete()


def write_latest(run_dir: Path) -> None:
    """Name the newest checkpoint in `checkpoints/latest`, from which DeepSpeed's own tools take it.

    lcm-ds does not read it: the name is that of a complete checkpoint, unless a kill came between the two.
    """
    latest = run_dir / "checkpoints" / "latest"
    if checkpoints := [each for each in candidates(run_dir) if each.integrity_error() is None]:
        write_whole(latest, checkpoints[-1].path.name)
    else:
        latest.unlink(missing_ok=True)


def clear_partial(run_dir: Path) -> None:
    """Remove the remains of interrupted saves, conversions and deletions."""
    folder = run_dir / "checkpoints"
    orphans = [path for path in folder.glob(f"step_*{UNIVERSAL}") if not path.with_suffix("").exists()]
    for path in [*folder.glob(f"step_*{PARTIAL}"), *orphans]:
        logger.info("removing the unfinished %s", path)
        shutil.rmtree(path, ignore_errors=True)  # a converter whose parent was killed may still write for a moment


def find(run_dir: str | Path, step: int | None = None) -> Checkpoint:
    """The newest checkpoint of a run, or the one of `step`. Raises InputError if there is none."""
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
    steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
    raise InputError(f"{run_dir}/checkpoints: no checkpoint of step {step} (available: {steps})")


def load_run_config(run_dir: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """RUN/config.yaml, with data that is found from any folder, also after the run was moved together with it.

    A relative path of data.train and data.validation that does not exist from here is taken from the folder in which
    the run was started, or else from the one that now contains run_dir as that folder did then; so is an absolute one
    that does not exist any more, if it was beside run_dir or in a folder above it that was moved as a whole.

    Args:
        run_dir: The run.
        overrides: `key=value` with dotted keys.

    Returns:
        The config. A path that was not found is given from the folder in which the run was started, if that is known.

    Raises:
        InputError: The file is missing or invalid.
    """
    path = Path(run_dir) / "config.yaml"
    config = load(TrainConfig, path, overrides)
    started = re.search(r"^# started_in: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    folders = [Path(started[1])] if started else []
    relative, now = Path(config.run_dir), Path(run_dir).resolve()
    if (
        not relative.is_absolute()
        and ".." not in relative.parts
        and now.parts[-len(relative.parts) :] == relative.parts
    ):
        folders.append(Path(*now.parts[: -len(relative.parts)]))
    moved_from, moved_to = _without_common_end(relative, now)

    def resolve(data: str) -> str:
        if remote.is_remote(data) or Path(data).exists():
            return data
        if Path(data).is_absolute():
            moved = Path(data).is_relative_to(moved_from) and moved_to / Path(data).relative_to(moved_from)
            return str(moved) if moved and moved.exists() else data
        there = next((folder / data for folder in folders if (folder / data).exists()), None)
        return str(there or (folders[0] / data if started else data))

    train = [entry.model_copy(update={"path": resolve(entry.path)}) for entry in config.data.train]
    validation = None if config.data.validation is None else resolve(config.data.validation)
    data = config.data.model_copy(update={"train": train, "validation": validation})
    return config.model_copy(update={"data": data})


def _without_common_end(one: Path, other: Path) -> tuple[Path, Path]:
    """Two paths without the last parts that are the same in both."""
    while one.name and one.name == other.name:
        one, other = one.parent, other.parent
    return one, other


def load_model(run_dir: str | Path, step: int | None = None) -> tuple[BaseLCM, TrainConfig, int]:
    """The model of a run in fp32 on the CPU, in evaluation mode, with its config and the steps it was trained for.

    Works for any ZeRO stage and world size. Raises InputError if there is no such run or checkpoint.
    """
    import torch

    from lcm_ds.model.modeling import BaseLCM
    from lcm_ds.model.sizes import ModelSizes

    checkpoint = find(run_dir, step)
    config = load_run_config(run_dir)
    with torch.device("meta"):  # the tensors that are read become the model's, without a copy
        model = BaseLCM(ModelSizes(**checkpoint.state()["model"]))
    model.load_state_dict(fp32_weights(checkpoint), assign=True)
    return model.eval(), config, checkpoint.step


def fp32_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """The full state dict of a checkpoint: its fp32 master weights, bit for bit, and its buffers.

    For any number of ranks and each of DeepSpeed's optimizers: ZeRO 0 to 3 and, in half precision, those that it uses
    for ZeRO 0 and for ZeRO 1 with fp32 gradients. Raises InputError if the masters do not round to the weights.
    """
    if checkpoint.state()["zero_stage"] == 3:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its progress
            return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    saved = _read(checkpoint.path / "mp_rank_00_model_states.pt")
    weights = saved["module"]
    shapes = saved.get("param_shapes")  # None under ZeRO 0
    masters = _replicated_masters(checkpoint, saved) if shapes is None else _sharded_masters(checkpoint, shapes)
    for name, master in masters.items():
        if not master.to(weights[name].dtype).equal(weights[name].flatten()):
            raise InputError(f"{checkpoint.path}: the fp32 weights of {name} do not round to the weights of the model")
    return {name: masters.get(name, value).float().view(value.shape) for name, value in weights.items()}


def _sharded_masters(checkpoint: Checkpoint, shapes: list[dict[str, Any]]) -> dict[str, Any]:
    """Flat master weights by name, which ZeRO 1 and 2 divide among the files of the ranks.

    DeepSpeed's own reader does not support its BF16_Optimizer, which it uses for ZeRO 1 with fp32 gradients.

    shapes: of the parameters of each group, in the order in which they are concatenated.
    """
    import torch

    ranks = []
    for rank in range(checkpoint.state()["world_size"]):
        (path,) = checkpoint.path.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")  # or bf16_zero_pp_rank_…
        ranks.append(_read(path)["optimizer_state_dict"])
    masters = {}
    for group_index, group in enumerate(shapes):
        flat = torch.cat([rank["single_partition_of_fp32_groups"][group_index].detach() for rank in ranks])
        paddings, start = ranks[0].get("param_alignment_paddings"), 0
        for index, (name, shape) in enumerate(group.items()):
            masters[name] = flat[start : start + shape.numel()]
            start += shape.numel() + (paddings[group_index][index] if paddings else 0)
    return masters


def _replicated_masters(checkpoint: Checkpoint, saved: dict[str, Any]) -> dict[str, Any]:
    """Flat master weights by name, which ZeRO 0 stores with the weights; empty for fp32 weights."""
    import torch

    from lcm_ds.config import OptimConfig
    from lcm_ds.model.modeling import BaseLCM
    from lcm_ds.model.parameter_groups import parameter_groups
    from lcm_ds.model.sizes import ModelSizes

    optimizer = saved.get("optimizer") or {}
    groups = optimizer.get("fp32_groups") or [[flat] for flat in optimizer.get("fp32_groups_flat", [])]
    if not groups:
        return {}
    state = checkpoint.state()
    with torch.device("meta"):  # only for the order of the optimizer's parameters
        model = BaseLCM(ModelSizes(**state["model"]))
    names = {parameter: name for name, parameter in model.named_parameters()}
    masters: dict[str, Any] = {}
    optim = OptimConfig(lr=1.0)  # type: ignore[call-arg]
    for group, tensors in zip(parameter_groups(model, optim, state["optimizer"]), groups, strict=True):
        sizes = [parameter.numel() for parameter in group["params"]]
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])[: sum(sizes)]  # the rest is padding
        masters.update(zip((names[parameter] for parameter in group["params"]), flat.split(sizes), strict=True))
    return masters


def _read(path: Path) -> dict[str, Any]:
    """One of DeepSpeed's files (a pickle), memory-mapped."""

    import torch

    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
