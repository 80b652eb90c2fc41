"""A run in TensorBoard: scalars, a layout that opens with what matters, hparams, histograms, a figure, samples.

Promises: the x axis is the step; after a resume nothing is there twice; one folder is one run of TensorBoard's.
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

# What is said of the run as a whole is in a file of its own, so that a resume replaces it.
RUN_SUFFIX = ".about"
ERROR_BY_POSITION = "val_error_by_position"
FLUSH_SECONDS = 30
# Each chart's tags are regular expressions from the beginning of a tag on.
LAYOUT = {
    "the run": {
        "loss, and that of mean, copy and ridge": ["Multiline", ["loss/train$", "loss/validation.*"]],
        "model FLOPs utilisation": ["Multiline", ["speed/mfu$"]],
        "validation": ["Multiline", ["val/cosine$", "val/variance_ratio$"]],
        "concepts a second": ["Multiline", ["speed/concepts_per_second$"]],
        "targets a step": ["Multiline", ["data/targets$"]],
    }
}


class TensorBoardWriter:
    """RUN/tensorboard, from the step `start` on. settings: what the table of hparams compares runs by.

    Where the disk is full it goes without, and tries again later.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Setting], start: int) -> None:
        self._folder, self._settings, self._purge_step = folder, settings, start + 1
        self._writer: SummaryWriter | None = None
        self._about: SummaryWriter | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by their tags."""
        with self._writing(step) as writer:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

    def errors(self, step: int, by_position: Sequence[float | None]) -> None:
        """The figure of the validation's error by position in the segment."""
        with self._writing(step) as writer:
            writer.add_image("val/error_by_position", error_figure(by_position, step), step, dataformats="HWC")

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Histograms by their tags."""
        with self._writing(step) as writer:
            for tag, found in values.items():
                writer.add_histogram_raw(
                    tag, found.min, found.max, found.count, found.sum, found.sum_of_squares, found.limits, found.counts,
                    step,
                )  # fmt: skip

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """What the model predicts for fixed prompts, in words."""
        with self._writing(step) as writer:
            for number, sample in enumerate(samples):
                writer.add_text(f"samples/{number}", sample_markdown(sample), step)

    def flush(self) -> None:
        """To the disk with it."""
        if self._writer is not None:
            with self._writing(self._purge_step) as writer:
                writer.flush()

    def close(self, done: bool) -> None:
        """Write out what waits; done: whether the run came to its end."""
        with contextlib.suppress(OSError):
            if self._about is not None:
                if done:
                    _add(self._about, _hparams(self._settings)[2])
                self._about.close()
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

        if self._about is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._folder.glob("*tfevents*"):
                if old.name.endswith(RUN_SUFFIX):
                    old.unlink()
                else:
                    drop_later(old, self._purge_step - 1)
            about = SummaryWriter(self._folder, filename_suffix=RUN_SUFFIX)
            about.add_custom_scalars(LAYOUT)
            for summary in _hparams(self._settings)[:2]:
                _add(about, summary)
            about.flush()
            self._about = about
        if self._writer is None:
            self._writer = SummaryWriter(self._folder, purge_step=self._purge_step, flush_secs=FLUSH_SECONDS)
        return self._writer


def drop_later(path: Path, last_step: int) -> None:
    """Take what is of steps after `last_step` out of an event file.

    TensorBoard's loader, the fast one, keeps such points even where a later file says that they are to be purged.
    """
    with path.open("rb") as file:
        if all(step <= last_step for _, step in _records(file)):
            return
    partial = path.with_name("purged.partial")  # a name that TensorBoard does not read
    with path.open("rb") as file, partial.open("wb") as kept:
        kept.writelines(record for record, step in _records(file) if step <= last_step)
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(partial, path)


def _records(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """The records of an event file, whole, and the step of each; one that a crash cut short ends them.

    A record is TFRecord's: its length (uint64), a checksum of that (4 bytes), an Event, a checksum (4 bytes).
    """
    from tensorboard.compat.proto.event_pb2 import Event

    while len(head := file.read(12)) == 12:
        (size,) = struct.unpack("<Q", head[:8])
        body = file.read(size + 4)
        if len(body) < size + 4:
            return
        yield head + body, Event.FromString(body[:-4]).step


def _add(writer: SummaryWriter, summary: Any) -> None:
    assert writer.file_writer is not None  # it is open
    writer.file_writer.add_summary(summary)


def _hparams(settings: Mapping[str, Setting]) -> Any:
    """The summaries of the HPARAMS tab: of the experiment, of the session's start and of its end.

    The metrics' values are those of the scalars of the same run, the last ones.
    """
    from torch.utils.tensorboard.summary import hparams

    return hparams(dict(settings), dict.fromkeys(("loss/train", "loss/validation", "val/cosine", "speed/mfu"), 0.0))


def error_figure(by_position: Sequence[float | None], step: int) -> np.ndarray:
    """Error over position, as a picture: uint8 [height, width, 3]; gaps where a position has no targets (None)."""
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
    """A sample as Markdown; a sentence is no markup, whatever it holds."""
    before = [f"… {_plain(sentence)}" for sentence in sample.context]
    return "\n\n".join(
        [
            f"*{_plain(sample.document)}*",
            *before,
            f"**truth** (cosine {sample.cosine_of_truth:.3f}, place {sample.rank_of_truth}): {_plain(sample.truth)}",
            f"**nearest to the prediction** (cosine {sample.cosine:.3f}): {_plain(sample.nearest)}",
        ]
    )


def _plain(text: str) -> str:
    """Text without what Markdown would take for markup."""
    return "".join("\\" + letter if letter in "\\`*_{}[]<>()#+-.!|~" else letter for letter in " ".join(text.split()))
