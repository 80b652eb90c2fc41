"""The console of a worker: lines of ours, with a bar below them on a terminal; whatever libraries say goes to the log.

Promises: from `redirect` on nothing but what goes through here reaches the terminal, also where C++ or a compiler
writes; a terminal that is gone, and a log on a full disk, end no run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from lcm_ds.terminal import hide_deprecations

logger = logging.getLogger("lcm_ds")

STDOUT, STDERR = 1, 2
CLEAR = "\x1b[K"  # from the cursor to the end of the line
SECONDS_A_BAR = 0.1
MEGABYTE = 1 << 20


class Console:
    """What a process shows. A process has one, `console`.

    Rank 0 draws the bar. The cursor waits at its beginning, so that lines of other ranks take its place.
    """

    def __init__(self) -> None:
        self._out: TextIO | None = None  # the real ones, once 1 and 2 lead elsewhere
        self._err: TextIO | None = None
        self._kept: int | None = None  # what was said before there was a log
        self._before = (sys.stdout, sys.stderr)
        self._bar, self._drawn = "", 0.0

    @property
    def out(self) -> TextIO:
        """The real stdout."""
        return self._out or sys.stdout

    @property
    def err(self) -> TextIO:
        """The real stderr."""
        return self._err or sys.stderr

    def redirect(self) -> None:
        """Keep what is written to the file descriptors 1 and 2 until there is a log (see `log_to`)."""
        if self._out is not None:
            return
        self._before = (sys.stdout, sys.stderr)
        for stream in self._before:
            stream.flush()
        self._out, self._err = _writer(os.dup(STDOUT)), _writer(os.dup(STDERR))
        self._kept = os.memfd_create("lcm-ds-said")
        self._point_at(self._kept)
        sys.stdout, sys.stderr = _writer(STDOUT), _writer(STDERR)
        faulthandler.enable(self._err)  # what the kernel kills has its stacks on the terminal

    def log_to(self, path: Path) -> None:
        """From now on it goes to the end of this file, and first what was kept."""
        if self._kept is None:
            return
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        _write(log, self._said())
        self._point_at(log)
        for descriptor in (log, self._kept):
            os.close(descriptor)
        self._kept = None

    def restore(self, show: bool = False) -> None:
        """Undo `redirect`, unless there is a log by now; show: what was kept, with an error that it may explain."""
        if self._kept is None or self._out is None or self._err is None:
            return
        said = self._said() if show else b""
        sys.stdout, sys.stderr = self._before
        for real, number in ((self._out, STDOUT), (self._err, STDERR)):
            os.dup2(real.fileno(), number)
        _write(STDERR, said)
        faulthandler.disable()
        os.close(self._kept)
        self._out = self._err = self._kept = None

    def line(self, text: str) -> None:
        """A line on stdout, above the bar, and in the log."""
        self._show(self.out, text)
        logger.info(text)

    def warning(self, text: str) -> None:
        """As `line`, for what the user should look at; nothing stops for it."""
        self._show(self.out, f"warning: {text}")
        logger.warning(text)

    def error(self, text: str) -> None:
        """A line on stderr alone."""
        self._show(self.err, text)

    def bar(self, text: str, now: bool = False) -> None:
        """Show `text` below the lines, on a terminal; no more often than eyes can follow, unless it has to be `now`."""
        if not _is_terminal(self.out) or not (now or time.monotonic() - self._drawn >= SECONDS_A_BAR):
            return
        with contextlib.suppress(OSError):  # it was closed just now
            width = os.get_terminal_size(self.out.fileno()).columns
            self._bar, self._drawn = text[: max(0, width - 1)], time.monotonic()
            self._draw()

    def end_bar(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar = ""
            self.out.write(CLEAR)
            self.out.flush()

    def _show(self, stream: TextIO, text: str) -> None:
        # Another rank's bar may be where this line goes.
        clear = CLEAR if _is_terminal(stream) else ""
        stream.write("".join(f"{clear}{line}\n" for line in text.splitlines()))
        stream.flush()
        self._draw()

    def _draw(self) -> None:
        if self._bar:
            self.out.write(self._bar + CLEAR + "\r")
            self.out.flush()

    def _point_at(self, descriptor: int) -> None:
        for number in (STDOUT, STDERR):
            os.dup2(descriptor, number)

    def _said(self) -> bytes:
        """What was kept; a megabyte at most."""
        assert self._kept is not None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return os.pread(self._kept, MEGABYTE, 0)


class ToConsole(logging.Handler):
    """Shows errors of the log on the console, too."""

    def emit(self, record: logging.LogRecord) -> None:
        """One record."""
        console.error(self.format(record))


class _Forgiving(io.FileIO):
    """A file that takes what it cannot write: neither a full disk nor a closed terminal is the speaker's trouble."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            if (written := super().write(data)) is not None:  # None: it would have to wait
                return written
        return len(data)


def _is_terminal(stream: TextIO) -> bool:
    """Whether it is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _writer(descriptor: int) -> TextIO:
    """Text, line by line, to a file descriptor, which stays open."""
    raw = _Forgiving(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)


def _write(descriptor: int, data: bytes) -> None:
    with _Forgiving(descriptor, "w", closefd=False) as file:
        file.write(data)


console = Console()


def set_up_logging(run_dir: Path, rank: int) -> None:
    """Send the project's log, and what DeepSpeed and its friends say, to RUN/log.txt; the console shows errors alone.

    Rank 0 logs everything from INFO up; the others warnings and errors, each line with its rank.
    """
    handler = logging.FileHandler(run_dir / "log.txt", mode="a", encoding="utf-8")
    who = "" if rank == 0 else f" rank {rank}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{who} %(name)s: %(message)s"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    errors = ToConsole(logging.ERROR)
    errors.setFormatter(logging.Formatter(f"%(levelname)s{who}: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler, errors]
    root.setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a disk that is full is told where it matters
    logging.captureWarnings(True)
    hide_deprecations()
    logger.setLevel(logging.INFO)
    for name in ("DeepSpeed", "deepspeed", "transformers", "torch.distributed"):
        library = logging.getLogger(name)
        library.handlers = []
        library.propagate = True
        library.setLevel(logging.INFO if name.lower() == "deepspeed" else logging.WARNING)
    console.log_to(run_dir / "log.txt")
