"""Saving: DeepSpeed's files, what this process alone knows, then COMPLETE; all ranks agree before anything older goes.

The run stands still while its state is copied into the host's memory; a thread of each rank writes the copy, and the
ranks make a checkpoint of it at the first step at which all have written. Nothing that goes wrong with a file ends the
run: it is told at ERROR, what was written is taken away, and the checkpoints that are there stay.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from lcm_ds import deepspeed_config
from lcm_ds.checkpoint import format as checkpoints
from lcm_ds.checkpoint.format import PARTIAL, Checkpoint, folder_name
from lcm_ds.config import CheckpointConfig
from lcm_ds.files import sha256_of, sync, write_whole

logger = logging.getLogger("lcm_ds.train")

# What ds_to_universal looks for in the client state of ZeRO 1 and 2 before it converts a checkpoint.
CONVERTIBLE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def saves_in_background(rules: CheckpointConfig, ds: dict[str, Any]) -> bool:
    """Whether a save is written while the run goes on: as the config says, else under every ZeRO stage.

    Not by default where the optimizer is offloaded: then the host's memory holds its states already, and NVMe's
    are copied from file to file.
    """
    return not deepspeed_config.offloads_optimizer(ds) if rules.background is None else rules.background


class Saver:
    """The checkpoints that an engine writes; every method but `busy` is called by all ranks together."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, run_dir: Path, rules: CheckpointConfig, background: bool
    ) -> None:
        self._engine, self._run_dir, self._rules = engine, run_dir, rules
        self._rank = dist.get_rank()
        self._writer = ThreadPoolExecutor(1, "lcm-ds-save") if background else None
        self._files = Files(self._writer)
        self._pending: int | None = None  # steps done in the save that is being written
        engine.checkpoint_engine = self._files

    @property
    def in_background(self) -> bool:
        """Whether a save is written while the run goes on."""
        return self._writer is not None

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is no checkpoint yet."""
        return self._pending is not None

    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._files.busy()

    def begin(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy everything there is after `step` steps, and start to write it; `finish` makes it a checkpoint.

        state: what goes into state.json.
        """
        partial = self._partial(step)
        self._files.start(partial, first=self._rank == 0)
        dist.barrier()  # the folder is there
        self._files.save(random_states(), str(partial / random_states_name(self._rank)))
        if self._rank == 0:
            self._files.save_text(json.dumps(state, indent=1), partial / "state.json")
        try:
            self._engine.save_checkpoint(
                str(partial.parent), tag=partial.name, client_state=CONVERTIBLE, save_latest=False
            )
        except OSError as error:
            # What DeepSpeed copies itself, as its last act; the other ranks wait in what comes then.
            self._files.errors.append(str(error))
            if self._engine._optimizer_has_ckpt_event_epilogue():
                self._engine.optimizer.checkpoint_event_epilogue()
            dist.barrier()
        self._files.add_copied(partial, self._rank)
        self._pending = step

    def finish(self) -> bool:
        """Wait until every rank has written, and make it a checkpoint; whether it is one now."""
        assert self._pending is not None
        step, self._pending = self._pending, None
        written: list[tuple[dict[str, Any], list[str]]] = [({}, [])] * dist.get_world_size()
        dist.all_gather_object(written, self._files.result())
        wrong = [f"rank {rank}: {error}" for rank, (_, errors) in enumerate(written) for error in errors]
        if self._rank == 0 and not wrong:
            try:
                self._complete(step, {name: entry for files, _ in written for name, entry in sorted(files.items())})
            except OSError as error:
                wrong = [str(error)]
        outcome = [wrong]
        dist.broadcast_object_list(outcome, src=0)
        if self._rank == 0:
            if outcome[0]:
                logger.error("checkpoint of step %d was not written: %s; the run goes on", step, "; ".join(outcome[0]))
                shutil.rmtree(self._partial(step), ignore_errors=True)
            else:
                logger.info("saved %s", self._final(step))
                self._retain()
        return not outcome[0]

    def close(self) -> None:
        """End the thread; a save that is no checkpoint yet is given up."""
        if self._writer is not None:
            self._writer.shutdown(wait=True)

    def _final(self, step: int) -> Path:
        return self._run_dir / "checkpoints" / folder_name(step)

    def _partial(self, step: int) -> Path:
        return self._run_dir / "checkpoints" / (folder_name(step) + PARTIAL)

    def _complete(self, step: int, files: dict[str, Any]) -> None:
        partial, final = self._partial(step), self._final(step)
        write_whole(partial / "COMPLETE", json.dumps({"files": files}, indent=1))
        integrity_error = Checkpoint(partial, step).integrity_error()
        if integrity_error:  # of another rank's: a folder that not all hosts share
            raise OSError(f"{partial}: {integrity_error}")
        for former in (final, Checkpoint(final, step).universal):
            shutil.rmtree(former, ignore_errors=True)
        os.rename(partial, final)
        sync(final.parent)

    def _retain(self) -> None:
        def retain() -> None:
            try:
                checkpoints.retain(self._run_dir, self._rules)
            except OSError as error:
                logger.error("an old checkpoint could not be deleted: %s", error)

        if self._writer is None:
            retain()
        else:
            self._writer.submit(retain)


class Files(CheckpointEngine):
    """What DeepSpeed writes its files with: synced, their checksums taken on the way, errors kept for `result`.

    writer: the thread that writes; None: the caller waits.
    """

    def __init__(self, writer: ThreadPoolExecutor | None) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.errors: list[str] = []
        self._writer = writer
        self._written: dict[str, dict[str, Any]] = {}
        self._coming: list[Future[None]] = []

    def start(self, folder: Path, first: bool) -> None:
        """Begin a checkpoint in `folder`, which the `first` rank makes anew."""
        self._written, self.errors, self._coming = {}, [], []
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            self.makedirs(str(folder), exist_ok=True)

    def save(self, state_dict: Any, path: str) -> None:
        """Write an object as torch.save does; with a writer, a copy of it, after this has returned."""
        if self._writer is None:
            self._write(state_dict, Path(path))
        else:
            self._coming.append(self._writer.submit(self._write, on_host(state_dict, {}), Path(path)))

    def save_text(self, text: str, path: Path) -> None:
        """Write a text."""
        self._write(text, path)

    def add_copied(self, folder: Path, rank: int) -> None:
        """Take in what DeepSpeed copied itself: the states of an optimizer that is offloaded to NVMe."""
        for path in sorted((folder / "offloaded_tensors" / f"rank{rank:02d}").rglob("*")):
            if path.is_file() and not self.errors:
                entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                self._written[str(path.relative_to(folder))] = entry

    def busy(self) -> bool:
        """Whether something is still to be written."""
        return not all(future.done() for future in self._coming)

    def result(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Wait until all is written: size and sha256 by name, and what went wrong."""
        for future in self._coming:
            future.result()
        return self._written, self.errors

    def _write(self, content: Any, path: Path) -> None:
        try:
            with path.open("wb") as file:
                hashed: Any = _Hashed(file)
                if isinstance(content, str):
                    hashed.write(content.encode())
                else:
                    torch.save(content, hashed)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:  # whatever it is, the other ranks have to hear of it
            self.errors.append(f"{path.name}: {_cause(error)}")
        else:
            self._written[path.name] = {"bytes": hashed.bytes, "sha256": hashed.sha256.hexdigest()}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.errors.append(str(error))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read what `save` wrote. It is a pickle."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def create(self, info: Any) -> None:
        """Nothing: the folder is made in `start`."""

    def commit(self, info: Any) -> bool:
        """Nothing: COMPLETE and the new name come when all ranks have written."""
        return True


class _Hashed(io.RawIOBase):
    """Writes on to a file and takes the sha256 of what it writes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self._file.write(data)


def on_host(value: Any, known: dict[int, Any]) -> Any:
    """A copy of a state with all its tensors in the host's memory; a tensor's copy holds no more than the tensor.

    known: copies by the id of what was copied, for what occurs twice.
    """
    if id(value) in known:
        return known[id(value)]
    made: Any
    if isinstance(value, torch.Tensor):
        made = value.detach().to("cpu", copy=True)
    elif type(value) in (list, tuple):
        made = type(value)(on_host(item, known) for item in value)
    elif isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
        made = copy.copy(value)
        made.update((key, on_host(item, known)) for key, item in value.items())
    else:
        made = copy.deepcopy(value)
    known[id(value)] = made
    return made


def _cause(error: BaseException) -> str:
    while error.__context__ is not None:
        error = error.__context__
    return str(error)


# --- random numbers ---------------------------------------------------------------------------------------------------


def random_states_name(rank: int) -> str:
    """The file with a rank's random states."""
    return f"random_rank_{rank:05d}.pt"


def random_states() -> dict[str, Any]:
    """The states of all generators of random numbers of this process, as torch.load takes them with weights_only.

    The run itself draws from none of them: its noise and dropout are functions of (seed, step, lane).
    """
    numbers = np.random.get_state(legacy=False)
    assert isinstance(numbers, dict)
    key = torch.from_numpy(numbers["state"]["key"].astype(np.int64))
    device = get_accelerator()
    return {
        "python": random.getstate(),
        "numpy": {**numbers, "state": {**numbers["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "device": None if device.device_name() == "cpu" else device.get_rng_state().cpu(),
    }


def restore_random_states(folder: Path, rank: int) -> None:
    """Put back what `random_states` gave when this rank saved into `folder`; nothing where there was no such rank."""
    path = folder / random_states_name(rank)
    if not path.exists():
        return
    saved = torch.load(path, weights_only=True)
    random.setstate(saved["python"])
    numbers = saved["numpy"]
    np.random.set_state({**numbers, "state": {**numbers["state"], "key": numbers["state"]["key"].numpy()}})
    torch.set_rng_state(saved["torch"])
    if saved["device"] is not None and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(saved["device"])
