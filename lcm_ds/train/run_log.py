"""What a run reports: metrics.jsonl, TensorBoard, the log, one console line a logged step (rank 0 only)."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_ds.files import write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("lcm_ds")

# metric → its TensorBoard tag; what is not listed stays in metrics.jsonl alone
TAGS = {
    "loss": "loss/train",
    "loss_sum": "loss/train_sum_over_dimensions",
    "val_loss": "loss/validation",
    "val_loss_sum": "val/loss_sum_over_dimensions",
    "val_cosine": "val/cosine",
    "val_variance_ratio": "val/variance_ratio",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "skipped_steps": "optim/skipped_steps",
    "epoch": "data/epoch",
    "concepts": "data/concepts",
    "missing_concepts": "data/missing_concepts",
    "data_wait": "data/wait_seconds",
    "concepts_per_second": "speed/concepts_per_second",
    "step_time": "speed/step_seconds",
    "mfu": "speed/mfu",
    "memory": "memory/gib",
    "checkpoint_time": "checkpoint/stall_seconds",
    "checkpoint_share": "checkpoint/stall_share",
}


def set_up_logging(run_dir: Path, rank: int) -> None:
    """Send the project's log, and what DeepSpeed and its friends say, to RUN/log.txt; the console stays quiet.

    Rank 0 logs everything from INFO up; the others warnings and errors, each line with its rank.
    """
    handler = logging.FileHandler(run_dir / "log.txt", mode="a", encoding="utf-8")
    who = "" if rank == 0 else f" rank {rank}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{who} %(name)s: %(message)s"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter(f"%(levelname)s{who}: %(message)s"))
    console.setLevel(logging.ERROR)
    root = logging.getLogger()
    root.handlers = [handler, console]
    root.setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a disk that is full is told where it matters
    logging.captureWarnings(True)
    logger.setLevel(logging.INFO)
    for name in ("DeepSpeed", "deepspeed", "transformers", "torch.distributed"):
        library = logging.getLogger(name)
        library.handlers = []
        library.propagate = True
        library.setLevel(logging.INFO if name.lower() == "deepspeed" else logging.WARNING)


@contextlib.contextmanager
def prints_to_log(run_dir: Path) -> Iterator[None]:
    """What libraries print goes to RUN/log.txt instead of the console."""
    with (run_dir / "log.txt").open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


class RunLog:
    """Writes a run's metrics. After a resume nothing overlaps: later lines are dropped, TensorBoard is purged.

    Where the disk is full lines of metrics.jsonl wait until it is not, and TensorBoard goes without.
    """

    def __init__(self, run_dir: Path, start_step: int, total_steps: int) -> None:
        self._total_steps = total_steps
        path = run_dir / "metrics.jsonl"
        truncate_metrics(path, start_step)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._run_dir, self._purge_step = run_dir, start_step + 1
        self._board: SummaryWriter | None = None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl for `step` (steps done so far), and its scalars in TensorBoard.

        A number that is not finite becomes null in the JSON, which has no such numbers.
        """
        line = {"step": step, **{key: _finite(value) for key, value in values.items()}}
        self._waiting += (json.dumps(line) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            logger.error("metrics.jsonl: %s; %d bytes wait", error, len(self._waiting))
        try:
            self._to_board(step, values)
        except OSError as error:
            logger.error("tensorboard: %s", error)
            self._board, self._purge_step = None, step + 1

    def _to_board(self, step: int, values: dict[str, Any]) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self._run_dir / "tensorboard", purge_step=self._purge_step)
        for key, value in values.items():
            if key in TAGS and value is not None:
                self._board.add_scalar(TAGS[key], value, step)

    def say(self, step: int, values: dict[str, Any], eta_seconds: float | None = None) -> None:
        """The console's line for a logged step, or for a validation."""
        width = len(str(self._total_steps))
        if "val_loss" in values:
            text = f"step {step:>{width}}  validation loss {values['val_loss']:.4f}  cosine {values['val_cosine']:.4f}"
        else:
            mfu = "" if values["mfu"] is None else f"  mfu {values['mfu']:.1%}"
            eta = "" if eta_seconds is None else f"  eta {_clock(eta_seconds)}"
            grad_norm = values["grad_norm"]
            text = (
                f"step {step:>{width}}/{self._total_steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}"
                f"  grad norm {math.nan if grad_norm is None else grad_norm:.3f}"
                f"  {values['concepts_per_second']:,.0f} concepts/s{mfu}{eta}"
            )
        print(text, flush=True)
        logger.info(text)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()


def read_losses(path: Path) -> dict[int, float]:
    """The loss of each step, counted from 0, that a run has logged so far; nan where it was not finite."""
    losses: dict[int, float] = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a last line that is being written
                line = json.loads(text)
                some: list[float | None] = line.get("losses", [])
                first = line["step"] - len(some)
                losses.update((first + i, math.nan if loss is None else loss) for i, loss in enumerate(some))
    return losses


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    write_whole(path, "".join(line + "\n" for line in kept))


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
