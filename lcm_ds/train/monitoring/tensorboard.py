"""A run in TensorBoard: scalars, a custom layout, hparams, histograms, a figure of the error by position, samples.

Promises: the x axis is the step; after a resume no step appears twice. RUN/tensorboard is one run of TensorBoard, and
each curve of the MSE chart is a run below it, because TensorBoard always shows the names of runs, but not of tags.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lcm_ds.metrics import LOGGED

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    from lcm_ds.train.monitoring.histograms import Histogram
    from lcm_ds.train.monitoring.text_samples import Sample

logger = logging.getLogger("lcm_ds")

Setting = str | bool | int | float

# Suffix of the event file with layout and hparams, which a resume replaces.
RUN_SUFFIX = ".about"
ERROR_BY_POSITION = "val_error_by_position"
FLUSH_SECONDS = 30
# Tag → name of its curve in the MSE chart; in the curve's own run the tag is MSE.
CURVES = {metric.tag: metric.curve for metric in LOGGED.values() if metric.curve}
MSE = "mse"
CHARTS = ("val_cosine", "val_variance_ratio", "mfu", "concepts_per_second", "targets")
# Title → tags, as regular expressions that match from the beginning of a tag.
LAYOUT = {
    "Overview": {
        "Mean squared error (normalised space)": ["Multiline", [f"{MSE}$"]],
        **{LOGGED[key].label: ["Multiline", [f"{LOGGED[key].tag}$"]] for key in CHARTS},
    }
}


class TensorBoardWriter:
    """Writes RUN/tensorboard. On a full disk it skips points and tries again later.

    Args:
        folder: RUN/tensorboard.
        settings: hparams, by which the HPARAMS tab compares runs.
        start: the step that the run starts or resumes from; points of later steps are removed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Setting], start: int) -> None:
        self._folder, self._settings, self._purge_step = folder, settings, start + 1
        self._writers: dict[str, SummaryWriter] = {}  # curve → writer; "": the run itself
        self._about: SummaryWriter | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by their tags."""
        with self._writing(step) as writer:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
                if tag in CURVES:
                    self._open(CURVES[tag]).add_scalar(MSE, value, step)

    def errors(self, step: int, by_position: Sequence[float | None]) -> None:
        """Write a figure of the validation's error by position in the segment."""
        with self._writing(step) as writer:
            writer.add_image("val/error_by_position", error_figure(by_position, step), step, dataformats="HWC")

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Write histograms by their tags."""
        with self._writing(step) as writer:
            for tag, histogram in values.items():
                writer.add_histogram_raw(
                    tag, histogram.min, histogram.max, histogram.count, histogram.sum, histogram.sum_of_squares,
                    histogram.limits, histogram.counts, step,
                )  # fmt: skip

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write the model's predictions for fixed prompts, as text."""
        with self._writing(step) as writer:
            for i, sample in enumerate(samples):
                writer.add_text(f"samples/{i}", sample_markdown(sample), step)

    def flush(self, step: int) -> None:
        """Write everything to disk, after the points of `step`."""
        if self._writers:
            with self._writing(step):
                for writer in self._writers.values():
                    writer.flush()

    def close(self, done: bool) -> None:
        """Write everything and close the files; done: whether the run has finished."""
        if self._about is not None and done:
            with contextlib.suppress(OSError):
                _add(self._about, _hparams(self._settings)[2])
        for writer in (self._about, *self._writers.values()):
            if writer is not None:
                with contextlib.suppress(OSError):
                    writer.close()

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[SummaryWriter]:
        try:
            yield self._open()
        except OSError as error:
            logger.error("tensorboard: %s", error)
            self._writers, self._purge_step = {}, step + 1

    def _open(self, curve: str = "") -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        if self._about is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._folder.rglob("*tfevents*"):
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
        if curve not in self._writers:
            self._writers[curve] = SummaryWriter(
                self._folder / curve, purge_step=self._purge_step, flush_secs=FLUSH_SECONDS
            )
        return self._writers[curve]


def drop_later(path: Path, last_step: int) -> None:
    """Remove the points of steps after `last_step` from an event file.

    TensorBoard's fast loader shows them even if a later file has a purge step.
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
    """The complete records of an event file, each with its step; a truncated record ends the file.

    A record is a TFRecord: length (uint64), checksum of the length (4 bytes), an Event, its checksum (4 bytes).
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
    """The summaries of the HPARAMS tab: experiment, start of the session, end of the session.

    TensorBoard takes the metrics' values from the run's last scalars.
    """
    from torch.utils.tensorboard.summary import hparams

    return hparams(dict(settings), dict.fromkeys(("loss/train", "loss/validation", "val/cosine", "speed/mfu"), 0.0))


def error_figure(by_position: Sequence[float | None], step: int) -> np.ndarray:
    """Plot the error by position: uint8 [height, width, 3]; None is a gap."""
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
    """A sample as Markdown, with the sentences escaped."""
    before = [f"… {_plain(sentence)}" for sentence in sample.context]
    return "\n\n".join(
        [
            f"*{_plain(sample.document)}*",
            *before,
            f"**truth** (cosine {sample.cosine_of_truth:.3f}, rank {sample.rank_of_truth}): {_plain(sample.truth)}",
            f"**nearest to the prediction** (cosine {sample.cosine:.3f}): {_plain(sample.nearest)}",
        ]
    )


def _plain(text: str) -> str:
    """Text with Markdown's special characters escaped."""
    return "".join("\\" + char if char in "\\`*_{}[]<>()#+-.!|~" else char for char in " ".join(text.split()))
