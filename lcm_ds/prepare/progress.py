"""The progress of a preparation over all ranks: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

from lcm_ds.terminal import is_terminal

LINE_SECONDS = 10.0


class Progress:
    """Counts documents.

    Args:
        total: Documents of the source, None if unknown.
        given: Documents that are done at the start.
        ranks: The number of ranks.
        started: time.monotonic() when the preparation started.
    """

    def __init__(self, total: int | None, given: int, ranks: int, started: float) -> None:
        self.total, self.given, self.ranks = total, given, ranks
        self._started, self._given_before = started, given
        self._encoding_since = started
        self._last_line = time.monotonic()
        self._sums: dict[str, float] = {}
        self._bar: Any = None
        if is_terminal(sys.stdout):
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("documents, {task.fields[speed]}"),
                progress.TextColumn("{task.fields[left]}"),
            )
            self._task = self._bar.add_task("encoding", total=total, completed=given, speed="", left="")

    def __enter__(self) -> Progress:
        self._encoding_since = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, documents: int) -> None:
        """Count documents that are done."""
        self.given += documents

    def say(self, line: str) -> None:
        """Print a line beside the bar."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def show(self, figures: Sequence[dict[str, float]]) -> None:
        """Update the view with the figures of all ranks."""
        self._sums = {key: sum(each[key] for each in figures) for key in (figures[0] if figures else {})}
        if self._bar is not None:
            speed = self._speed(self._encoding_since)
            self._bar.update(self._task, completed=self.given, speed=speed, left=self._left())
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            share = "" if self.total is None else f" of {self.total:,} ({self.given / max(1, self.total):.0%})"
            left = self._left()
            speed = self._speed(self._encoding_since)
            print(f"{self.given:,} documents{share}, {speed}{left and ', ' + left}", flush=True)

    def summary(self) -> str | None:
        """A line about the encoders' work and how busy they were; None if nothing was encoded."""
        sums, seconds = self._sums, max(1e-9, time.monotonic() - self._started)
        if not sums.get("sentences") or "encoded" not in sums:  # concepts that exist already are not encoded
            return None
        deduplicated = 1 - sums["encoded"] / sums["sentences"]
        processes = f" in {self.ranks} processes" if self.ranks > 1 else ""
        return (
            f"encoded {sums['sentences']:,.0f} sentences in {seconds:.0f} s{processes}, {self._speed(self._started)}; "
            f"{deduplicated:.1%} duplicates skipped; "
            f"padding {1 - sums['tokens'] / max(1, sums['padded_tokens']):.1%} of {sums['padded_tokens']:,.0f} tokens; "
            f"encoder busy {sums['busy'] / (seconds * self.ranks):.0%} of the time"
        )

    def _speed(self, since: float) -> str:
        seconds = max(1e-9, time.monotonic() - since)
        return f"{self._sums.get('sentences', 0) / seconds:,.0f} sentences/s"

    def _left(self) -> str:
        """The time left at the average speed, to which the start-up does not belong."""
        done = self.given - self._given_before
        if self.total is None or done == 0:
            return ""
        seconds = (time.monotonic() - self._encoding_since) / done * (self.total - self.given)
        return f"{timedelta(seconds=round(seconds))} left"
