"""How far a preparation is: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

SECONDS_A_LINE = 10.0


class Progress:
    """Counts documents and sentences from `given` documents on; total: of the source, None where it is not known."""

    def __init__(self, total: int | None, given: int = 0) -> None:
        self.total, self.given = total, given
        self.sentences = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("documents, {task.fields[speed]}"),
                progress.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("encoding", total=total, completed=given, speed="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self.sentences:
            print(f"encoded {self.sentences:,} sentences in {self._seconds():.0f} s, {self._speed()}", flush=True)

    def add(self, documents: int, sentences: int) -> None:
        """So much more is done."""
        self.given += documents
        self.sentences += sentences
        if self._bar is not None:
            self._bar.update(self._task, completed=self.given, speed=self._speed())
        elif time.monotonic() - self._last_line >= SECONDS_A_LINE:
            self._last_line = time.monotonic()
            share = "" if self.total is None else f" of {self.total:,} ({self.given / max(1, self.total):.0%})"
            print(f"{self.given:,} documents{share}, {self._speed()}", flush=True)

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _speed(self) -> str:
        return f"{self.sentences / max(1e-9, self._seconds()):,.0f} sentences/s"
