"""A run in TensorBoard: scalars with a custom layout, hparams, histograms, the error by position, text samples.

The x axis is the step; after a resume every step is there once; the folder is a single run of TensorBoard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    from lcm_ds.train.monitoring.histograms import Histogram
    from lcm_ds.train.monitoring.text_samples import Sample

logger = logging.getLogger("lcm_ds")

Setting = str | bool | int | float

# Layout and hparams are in a separate event file, which a resume replaces.
RUN_SUFFIX = ".about"
ERROR_BY_POSITION = "val_error_by_position"
FLUSH_SECONDS = 30
# A chart's tags are regular expressions, matched from the start of a tag.
LAYOUT = {
    "overview": {
        "loss: model, mean, copy, best ridge": ["Multiline", ["loss/train$", "loss/validation.*"]],
        "model FLOPs utilisation": ["Multiline", ["speed/mfu$"]],
        "validation: cosine, variance ratio": ["Multiline", ["val/cosine$", "val/variance_ratio$"]],
        "throughput (concepts/s)": ["Multiline", ["speed/concepts_per_second$"]],
        "targets per step": ["Multiline", ["data/targets$"]],
    }
}


class TensorBoardWriter:
    """Writes RUN/tensorboard from step `start` on. Errors are logged, and the next write tries again.

    settings: hyperparameters for the hparams table.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Setting], start: int) -> None:
        self._folder, self._settings, self._purge_step = folder, settings, start + 1
        self._writer: SummaryWriter | None = None
        self._run_writer: SummaryWriter | None = None  # of layout and hparams

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars by tag."""
        with self._writing(step) as writer:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

    def errors(self, step: int, by_position: Sequence[float | None]) -> None:
        """A figure of the validation error by position in the segment."""
        with self._writing(step) as writer:
            writer.add_image("val/error_by_position", error_figure(by_position, step), step, dataformats="HWC")

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Histograms by tag."""
        with self._writing(step) as writer:
            for tag, h in values.items():
                writer.add_histogram_raw(
                    tag, h.min, h.max, h.count, h.sum, h.sum_of_squares, h.limits, h.counts, step
                )  # fmt: skip

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Predictions for fixed prompts, as text."""
        with self._writing(step) as writer:
            for index, sample in enumerate(samples):
                writer.add_text(f"samples/{index}", sample_markdown(sample), step)

    def flush(self) -> None:
        """Write to disk."""
        if self._writer is not None:
            with self._writing(self._purge_step) as writer:
                writer.flush()

    def close(self, done: bool) -> None:
        """Flush and close; done: whether the run is complete."""
        with contextlib.suppress(OSError):
            if self._run_writer is not None:
                if done:
                    _add(self._run_writer, _hparams(self._settings)[2])
                self._run_writer.close()
            if self._writer is not None:
                self._writer.close()

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[SummaryWriter]:
        try:
            yield self._open()
        except OSError as error:
            logger.error("tensorboard: %s", error)
            self._writer, self._purge_step = None, step + 1

    def _open(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        if self._run_writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._folder.glob("*tfevents*"):
                if old.name.endswith(RUN_SUFFIX):
                    old.unlink()
                else:
                    drop_later(old, self._purge_step - 1)
            writer = SummaryWriter(self._folder, filename_suffix=RUN_SUFFIX)
            writer.add_custom_scalars(LAYOUT)
            for summary in _hparams(self._settings)[:2]:
                _add(writer, summary)
            writer.flush()
            self._run_writer = writer
        if self._writer is None:
            self._writer = SummaryWriter(self._folder, purge_step=self._purge_step, flush_secs=FLUSH_SECONDS)
        return self._writer


def drop_later(path: Path, last_step: int) -> None:
    """Remove entries of steps after `last_step` from an event file.

    TensorBoard's fast loader shows them even if a later file purges them.
    """
    with path.open("rb") as file:
        if all(step <= last_step for _, step in _records(file)):
            return
    partial = path.with_name("purged.partial")  # TensorBoard ignores this name
    with path.open("rb") as file, partial.open("wb") as kept:
        kept.writelines(record for record, step in _records(file) if step <= last_step)
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(partial, path)


def _records(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """The raw records of an event file with their steps, up to one truncated by a crash.

    The format is TFRecord's: length (uint64), its checksum (4 bytes), an Event, its checksum (4 bytes).
    """
    from tensorboard.compat.proto.event_pb2 import Event

    while len(head := file.read(12)) == 12:
        (size,) = struct.unpack("<Q", head[:8])
        body = file.read(size + 4)
        if len(body) < size + 4:
            return
        yield head + body, Event.FromString(body[:-4]).step


def _add(writer: SummaryWriter, summary: Any) -> None:
    assert writer.file_writer is not None
    writer.file_writer.add_summary(summary)


def _hparams(settings: Mapping[str, Setting]) -> Any:
    """The summaries of the HPARAMS tab: experiment, session start, session end.

    TensorBoard shows the last scalars of the run as its metrics.
    """
    from torch.utils.tensorboard.summary import hparams

    return hparams(dict(settings), dict.fromkeys(("loss/train", "loss/validation", "val/cosine", "speed/mfu"), 0.0))


def error_figure(by_position: Sequence[float | None], step: int) -> np.ndarray:
    """A plot of error over position, uint8 [height, width, 3], with gaps at positions without targets (None)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    errors = np.array([np.nan if error is None else error for error in by_position], float)
    axes.plot(np.arange(1, len(errors) + 1), errors, marker=".", linewidth=1)
    axes.set(
        xlabel="concepts before the target",
        ylabel="squared error (normalised)",
        title=f"Validation after {step:,} steps",
    )
    axes.grid(alpha=0.3)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def sample_markdown(sample: Sample) -> str:
    """A sample as Markdown, its sentences escaped."""
    context = [f"… {_escape(sentence)}" for sentence in sample.context]
    return "\n\n".join(
        [
            f"*{_escape(sample.document)}*",
            *context,
            f"**truth** (cosine {sample.cosine_of_truth:.3f}, rank {sample.rank_of_truth}): {_escape(sample.truth)}",
            f"**nearest to the prediction** (cosine {sample.cosine:.3f}): {_escape(sample.nearest)}",
        ]
    )


def _escape(text: str) -> str:
    """Text on one line with Markdown's special characters escaped."""
    return "".join("\\" + letter if letter in "\\`*_{}[]<>()#+-.!|~" else letter for letter in " ".join(text.split()))
