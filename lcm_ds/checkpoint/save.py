"""Saving: DeepSpeed's files, random states and state.json, then COMPLETE; older checkpoints go once all ranks agree.

Training pauses while the state is copied into host memory (host_copy.py). A thread of each rank writes the copy, and
the ranks commit the checkpoint at the first step at which all have written. A failed write does not end the run: it is
logged as an error, its files are deleted, and existing checkpoints stay.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from lcm_ds.checkpoint import format as checkpoints
from lcm_ds.checkpoint.format import PARTIAL, Checkpoint, folder_name
from lcm_ds.checkpoint.host_copy import HostBuffer
from lcm_ds.config import CheckpointConfig
from lcm_ds.distributed.collectives import from_first
from lcm_ds.files import sha256_of, sync, write_whole

logger = logging.getLogger("lcm_ds.train")

# ds_to_universal requires this in the client state of ZeRO 1 and 2.
CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


class Saver:
    """Writes checkpoints of an engine; all ranks call every method but `busy` together."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        run_dir: Path,
        rules: CheckpointConfig,
        background: bool,
        on_complete: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._run_dir, self._rules, self._on_complete = engine, run_dir, rules, on_complete
        self._rank = dist.get_rank()
        self._writer = ThreadPoolExecutor(1, "lcm-ds-save") if background else None
        self._files = HashingCheckpointEngine(self._writer)
        self._pending: int | None = None  # step of the checkpoint that is being written
        engine.checkpoint_engine = self._files
        if isinstance(
            engine.optimizer, BF16_Optimizer
        ):  # zero_to_fp32.py, which DeepSpeed would copy, refuses its files
            engine._copy_recovery_script = lambda save_path: None

    @property
    def in_background(self) -> bool:
        """Whether training continues while a checkpoint is written."""
        return self._writer is not None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was started and not committed."""
        return self._pending is not None

    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._files.busy()

    def save_async(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy the state after `step` steps and start writing it; `commit` makes it a checkpoint.

        state: content of state.json.
        """
        partial = self._partial(step)
        self._files.start(partial, first=self._rank == 0)
        dist.barrier()  # the folder exists
        self._files.save(random_states(), str(partial / random_states_name(self._rank)))
        if self._rank == 0:
            self._files.save_text(json.dumps(state, indent=1), partial / "state.json")
        try:
            self._engine.save_checkpoint(
                str(partial.parent), tag=partial.name, client_state=CLIENT_STATE, save_latest=False
            )
        except OSError as error:
            # Copying offloaded files is DeepSpeed's last action; the other ranks are waiting in the barrier after it.
            self._files.errors.append(str(error))
            if self._engine._optimizer_has_ckpt_event_epilogue():
                self._engine.optimizer.checkpoint_event_epilogue()
            dist.barrier()
        self._files.add_copied(partial, self._rank)
        self._pending = step

    def commit(self) -> bool:
        """Wait until every rank has written, and complete the checkpoint; False if anything failed."""
        assert self._pending is not None
        step, self._pending = self._pending, None
        written: list[tuple[dict[str, Any], list[str]]] = [({}, [])] * dist.get_world_size()
        dist.all_gather_object(written, self._files.result())
        errors = [f"rank {rank}: {error}" for rank, (_, own_errors) in enumerate(written) for error in own_errors]
        if self._rank == 0 and not errors:
            try:
                self._complete(step, {name: entry for files, _ in written for name, entry in sorted(files.items())})
            except OSError as error:
                errors = [str(error)]
        errors = from_first(errors)
        if self._rank == 0:
            if errors:
                logger.error("checkpoint of step %d was not written: %s; the run continues", step, "; ".join(errors))
                shutil.rmtree(self._partial(step), ignore_errors=True)
            else:
                logger.info("saved %s", self._final(step))
                self._on_complete()
                self._retain()
        return not errors

    def close(self) -> None:
        """End the thread; a checkpoint that is not committed is abandoned."""
        if self._writer is not None:
            self._writer.shutdown(wait=True)
        self._files.host_buffer.release()

    def _final(self, step: int) -> Path:
        return self._run_dir / "checkpoints" / folder_name(step)

    def _partial(self, step: int) -> Path:
        return self._run_dir / "checkpoints" / (folder_name(step) + PARTIAL)

    def _complete(self, step: int, files: dict[str, Any]) -> None:
        partial, final = self._partial(step), self._final(step)
        write_whole(partial / "COMPLETE", json.dumps({"files": files}, indent=1))
        integrity_error = Checkpoint(partial, step).integrity_error()
        if integrity_error:  # a file of another rank's: not all hosts share the folder
            raise OSError(f"{partial}: {integrity_error}")
        for former in (final, Checkpoint(final, step).universal):
            shutil.rmtree(former, ignore_errors=True)
        os.rename(partial, final)
        sync(final.parent)

    def _retain(self) -> None:
        def retain() -> None:
            try:
                checkpoints.write_latest(self._run_dir)
                checkpoints.retain(self._run_dir, self._rules)
            except OSError as error:
                logger.error("an old checkpoint could not be deleted, or checkpoints/latest not be written: %s", error)

        if self._writer is None:
            retain()
        else:
            self._writer.submit(retain)


class HashingCheckpointEngine(CheckpointEngine):
    """Writes DeepSpeed's files: synced, hashed on the way, errors kept for `result`.

    writer: the thread that writes; None: the caller waits.
    """

    def __init__(self, writer: ThreadPoolExecutor | None) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.errors: list[str] = []
        self.host_buffer = HostBuffer()  # for the background
        self._writer = writer
        self._written: dict[str, dict[str, Any]] = {}
        self._writes: list[Future[None]] = []

    def start(self, folder: Path, first: bool) -> None:
        """Begin a checkpoint in `folder`, which the `first` rank creates, empty."""
        self.result()  # nothing is written from the buffer any more
        self.host_buffer.rewind()
        self._written, self.errors, self._writes = {}, [], []
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            self.makedirs(str(folder), exist_ok=True)

    def save(self, state_dict: Any, path: str) -> None:
        """Write an object with torch.save; in the background a copy of it, after this has returned."""
        if self._writer is None:
            self._write(state_dict, Path(path))
        else:
            self._writes.append(self._writer.submit(self._write, self.host_buffer.copy_of(state_dict), Path(path)))

    def save_text(self, text: str, path: Path) -> None:
        """Write a text."""
        self._write(text, path)

    def add_copied(self, folder: Path, rank: int) -> None:
        """Hash what DeepSpeed copied itself: optimizer states that are offloaded to NVMe."""
        for path in sorted((folder / "offloaded_tensors" / f"rank{rank:02d}").rglob("*")):
            if path.is_file() and not self.errors:
                entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                self._written[str(path.relative_to(folder))] = entry

    def busy(self) -> bool:
        """Whether a write is pending."""
        return not all(future.done() for future in self._writes)

    def result(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Wait until everything is written; returns size and sha256 by name, and the errors."""
        for future in self._writes:
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
        except Exception as error:  # of any kind: the other ranks have to know of it
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
        """Nothing: `start` makes the folder."""

    def commit(self, info: Any) -> bool:
        """Nothing: `Saver.commit` completes the checkpoint when all ranks have written."""
        return True


class _Hashed(io.RawIOBase):
    """Writes to a file and computes the sha256 of what it writes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self._file.write(data)


def _cause(error: BaseException) -> str:
    while error.__context__ is not None:
        error = error.__context__
    return str(error)


# --- random numbers ---------------------------------------------------------------------------------------------------


def random_states_name(rank: int) -> str:
    """The file with a rank's random states."""
    return f"random_rank_{rank:05d}.pt"


def random_states() -> dict[str, Any]:
    """The states of all random generators of this process, loadable by torch.load with weights_only.

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
    """Restore the random states that this rank saved in `folder`, if there was such a rank."""
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
