"""Copies of a run's checkpoints on an object store (`checkpoint.dir`): complete, or not there.

A checkpoint is completed in RUN/checkpoints first. Then a thread of rank 0 uploads its files, and COMPLETE last: an
object store renames nothing. A run that starts takes the newest checkpoint of the two places.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch.distributed as dist

from lcm_ds.checkpoint.format import Checkpoint, folder_name, list_checkpoints
from lcm_ds.config import CheckpointConfig
from lcm_ds.data.remote import fetch as remote
from lcm_ds.distributed.collectives import from_first
from lcm_ds.errors import InputError, RunFailedError, TransientError
from lcm_ds.files import sha256_of, sync, write_whole

logger = logging.getLogger("lcm_ds.train")

FETCHED = ".fetched"  # of a folder that is being filled
PROBE = "lcm-ds-may-write"
RETRY_SECONDS = 60.0  # after an outage
LAST_SECONDS = 600.0  # that the end of a run waits for its last upload


def why_not_writable(url: str) -> str | None:
    """Why checkpoints cannot be uploaded to a URL, tried with a small file; None if they can.

    A server that gives no answer is no reason: the run goes on without it, and uploads when it is back.
    """
    probe = remote.join(url, PROBE)
    try:
        remote.write_bytes(probe, b"")
        remote.remove(probe)
    except TransientError as error:
        logger.error("checkpoint.dir: %s; the run goes on without it", error)
    except InputError as error:
        return f"checkpoint.dir: {error}"
    return None


@contextmanager
def uploads(run_dir: Path, rules: CheckpointConfig) -> Iterator[Callable[[], None]]:
    """Rank 0's `Uploader` of a run, if it has a checkpoint.dir: yields what is called after each checkpoint.

    At the end it waits for the last upload; not after an error, with which other ranks end as well.
    """
    if rules.dir is None or dist.get_rank():
        yield lambda: None
        return
    uploader = Uploader(run_dir, rules)
    uploader.wake()  # what the last start had no time for
    yield uploader.wake
    uploader.close()


class Uploader:
    """A thread that uploads the checkpoints of a run; errors are logged, and it tries again.

    Args:
        run_dir: The run.
        rules: checkpoint.dir, and which checkpoints are kept there: as many as here.
    """

    def __init__(self, run_dir: Path, rules: CheckpointConfig) -> None:
        assert rules.dir is not None
        self._run_dir, self._rules, self._url = run_dir, rules, rules.dir
        self._due, self._stopped = Event(), Event()
        self._last = False
        self._thread = Thread(target=self._work, name="lcm-ds-upload", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Upload what is not there yet."""
        self._due.set()

    def close(self, seconds: float = LAST_SECONDS) -> None:
        """End, when all is uploaded or after `seconds`."""
        self._last = True
        self._due.set()
        self._thread.join(seconds)
        self._stopped.set()
        self._thread.join(remote.READ_TIMEOUT)
        if self._thread.is_alive():
            logger.error("checkpoint.dir: %s gives no answer", self._url)

    def _work(self) -> None:
        pause: float | None = None
        while not self._stopped.is_set():
            self._due.wait(pause)
            self._due.clear()
            last = self._last
            try:
                pause = None if upload(self._run_dir, self._rules, self._stopped) else 0.0
            except remote.Stopped:
                logger.error("checkpoint.dir: the newest checkpoint is not uploaded; the next start does it")
                return
            except (InputError, OSError) as error:
                pause = RETRY_SECONDS
                logger.error("checkpoint.dir: %s", error)
                if last:
                    return
            if last and pause is None:
                return


def upload(run_dir: Path, rules: CheckpointConfig, stopped: Event) -> bool:
    """Upload the run's checkpoints that are not at `rules.dir`, and remove those there that the rules do not keep.

    Args:
        run_dir: The run.
        rules: checkpoint.dir, keep and keep_every.
        stopped: When set, it is given up with `remote.Stopped`.

    Returns:
        False if a checkpoint was deleted here before it was uploaded.

    Raises:
        InputError: Something cannot be written there.
    """
    assert rules.dir is not None
    there = steps(rules.dir, stopped)
    complete = True
    for checkpoint in list_checkpoints(run_dir):
        folder = remote.join(rules.dir, folder_name(checkpoint.step))
        started = time.monotonic()
        try:
            if checkpoint.step in there:
                if remote.read_bytes(remote.join(folder, "COMPLETE")) == (checkpoint.path / "COMPLETE").read_bytes():
                    continue
                there.remove(checkpoint.step)  # the run has returned to an earlier step, and come here again
                remote.remove(remote.join(folder, "COMPLETE"), stopped)
            for name in checkpoint.files():
                remote.upload(checkpoint.path / name, remote.join(folder, name), stopped)
            remote.upload(checkpoint.path / "COMPLETE", remote.join(folder, "COMPLETE"), stopped)
        except FileNotFoundError:  # it was not among those to keep any more
            remote.remove(folder, stopped)
            complete = False
            continue
        there.append(checkpoint.step)
        logger.info("uploaded %s in %.0f s", folder, time.monotonic() - started)
    there.sort()
    for step in there[: -rules.keep]:
        if rules.keep_every is None or step % rules.keep_every:
            remote.remove(remote.join(rules.dir, f"{folder_name(step)}/COMPLETE"), stopped)
            remote.remove(remote.join(rules.dir, folder_name(step)), stopped)
    for name in remote.names(rules.dir, stopped):  # an upload was interrupted, and its checkpoint is gone by now
        if _is_checkpoint(name) and int(name[5:]) not in there:
            remote.remove(remote.join(rules.dir, name), stopped)
    return complete


def steps(url: str, stopped: Event | None = None) -> list[int]:
    """The steps of the complete checkpoints at a URL, in order. Raises InputError, TransientError."""
    folders = [name for name in remote.names(url, stopped) if _is_checkpoint(name)]
    complete = [name for name in folders if "COMPLETE" in remote.names(remote.join(url, name), stopped)]
    return [int(name[5:]) for name in complete]


def _is_checkpoint(name: str) -> bool:
    """Whether a folder is named as a checkpoint."""
    return re.fullmatch(r"step_\d+", name) is not None


def fetch_newest(run_dir: Path, rules: CheckpointConfig, on_progress: Callable[[str], None]) -> None:
    """Fetch the newest checkpoint of `rules.dir` into the run's folder, if it is newer than all that are valid there.

    All ranks call it together, and each fetches some of the files. What was fetched before an interruption is kept.

    Args:
        run_dir: The run.
        rules: With checkpoint.dir.
        on_progress: Called with the name of each file that this rank fetches.

    Raises:
        RunFailedError: The URL cannot be read, its server gives no answer and there is no checkpoint here, or a file
            there is not what was uploaded.
    """
    assert rules.dir is not None
    step, files, error = from_first(_newer(run_dir, rules.dir) if dist.get_rank() == 0 else (0, {}, None))
    if error is not None:
        raise RunFailedError(error)
    if not files:
        return
    target, folder = _fetched(run_dir, step), remote.join(rules.dir, folder_name(step))
    own_error = None
    for name, entry in sorted(files.items())[dist.get_rank() :: dist.get_world_size()]:
        on_progress(f"fetching {folder}/{name}")
        try:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
                remote.copy(remote.join(folder, name), path, entry["sha256"], entry["bytes"])
        except (InputError, OSError) as caught:
            own_error = str(caught)
            break
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own_error)
    if errors := [each for each in found if each is not None]:
        raise RunFailedError(f"checkpoint.dir: {errors[0]}")
    if dist.get_rank() == 0:
        write_whole(target / "COMPLETE", json.dumps({"files": files}, indent=1))
        checkpoint = Checkpoint(run_dir / "checkpoints" / folder_name(step), step)
        if checkpoint.path.exists():  # it is not valid
            checkpoint.quarantine()
        os.rename(target, checkpoint.path)
        sync(run_dir / "checkpoints")
        logger.info("fetched %s", folder)
    dist.barrier()


def _newer(run_dir: Path, url: str) -> tuple[int, dict[str, dict[str, Any]], str | None]:
    """The step and the files of the newest checkpoint at a URL if it is newer than those here; why it is not known.

    A server that gives no answer is no error if there are checkpoints here, which are never older than their copies.
    """
    here = [checkpoint.step for checkpoint in list_checkpoints(run_dir)]
    try:
        step = max(steps(url), default=0)
        if step <= max(here, default=0):
            return 0, {}, None
        listed = json.loads(remote.read_bytes(remote.join(url, f"{folder_name(step)}/COMPLETE")) or b"{}")
        _fetched(run_dir, step).mkdir(parents=True, exist_ok=True)
        return step, listed.get("files", {}), None
    except TransientError as error:
        if not here:
            return 0, {}, f"checkpoint.dir: {error}"
        logger.error("checkpoint.dir: %s; the run goes on from its checkpoint of step %d", error, here[-1])
        return 0, {}, None
    except (InputError, OSError, ValueError) as error:
        return 0, {}, f"checkpoint.dir: {error}"


def _fetched(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / (folder_name(step) + FETCHED)
