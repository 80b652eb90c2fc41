"""A worker's console: our lines, with a progress bar below them on a terminal; output of libraries goes to the log.

From `redirect` on only this module writes to the terminal: output of C++ and compilers is caught as well. Neither a
closed terminal nor a full disk ends a run.
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

from lcm_ds.terminal import hide_deprecations, is_terminal

logger = logging.getLogger("lcm_ds")

STDOUT, STDERR = 1, 2
CLEAR = "\x1b[K"  # from the cursor to the end of the line
SECONDS_A_BAR = 0.1
MEGABYTE = 1 << 20


class Console:
    """The console of this process, of which `console` is the only instance.

    Rank 0 draws the bar and leaves the cursor at its start, so that lines of other ranks replace it.
    """

    def __init__(self) -> None:
        self._out: TextIO | None = None  # the real streams, once file descriptors 1 and 2 are redirected
        self._err: TextIO | None = None
        self._buffer: int | None = None  # memory file with the output before there is a log
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
        """Buffer what is written to file descriptors 1 and 2 until there is a log (see `log_to`)."""
        if self._out is not None:
            return
        self._before = (sys.stdout, sys.stderr)
        for stream in self._before:
            stream.flush()
        self._out, self._err = _writer(os.dup(STDOUT)), _writer(os.dup(STDERR))
        self._buffer = os.memfd_create("lcm-ds-output")
        self._redirect_to(self._buffer)
        sys.stdout, sys.stderr = _writer(STDOUT), _writer(STDERR)
        faulthandler.enable(self._err)  # stacks of a crash go to the terminal

    def log_to(self, path: Path) -> None:
        """Append the buffered output to this file, and all later output."""
        if self._buffer is None:
            return
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        _write(log, self._buffered())
        self._redirect_to(log)
        for descriptor in (log, self._buffer):
            os.close(descriptor)
        self._buffer = None

    def restore(self, show: bool = False) -> None:
        """Undo `redirect`, unless output goes to a log by now; `show` prints the buffered output, e.g. after errors."""
        if self._buffer is None or self._out is None or self._err is None:
            return
        output = self._buffered() if show else b""
        sys.stdout, sys.stderr = self._before
        for real, descriptor in ((self._out, STDOUT), (self._err, STDERR)):
            os.dup2(real.fileno(), descriptor)
        _write(STDERR, output)
        faulthandler.disable()
        os.close(self._buffer)
        self._out = self._err = self._buffer = None

    def line(self, text: str) -> None:
        """A line on stdout, above the bar, and in the log."""
        self._show(self.out, text)
        logger.info(text)

    def warning(self, text: str) -> None:
        """Like `line`, for warnings."""
        self._show(self.out, f"warning: {text}")
        logger.warning(text)

    def error(self, text: str) -> None:
        """A line on stderr, not in the log."""
        self._show(self.err, text)

    def bar(self, text: str, now: bool = False) -> None:
        """Show `text` below the lines, on a terminal; at most every SECONDS_A_BAR unless `now`."""
        if not is_terminal(self.out) or not (now or time.monotonic() - self._drawn >= SECONDS_A_BAR):
            return
        with contextlib.suppress(OSError):  # the terminal was closed just now
            width = os.get_terminal_size(self.out.fileno()).columns
            self._bar, self._drawn = text[: max(0, width - 1)], time.monotonic()
            self._draw()

    def end_bar(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar = ""
            self.out.write(CLEAR)
            self.out.flush()

    def _show(self, stream: TextIO, text: str) -> None:
        # This line may overwrite another rank's bar.
        clear = CLEAR if is_terminal(stream) else ""
        stream.write("".join(f"{clear}{line}\n" for line in text.splitlines()))
        stream.flush()
        self._draw()

    def _draw(self) -> None:
        if self._bar:
            self.out.write(self._bar + CLEAR + "\r")
            self.out.flush()

    def _redirect_to(self, descriptor: int) -> None:
        for standard in (STDOUT, STDERR):
            os.dup2(descriptor, standard)

    def _buffered(self) -> bytes:
        """The first megabyte of the buffered output."""
        assert self._buffer is not None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return os.pread(self._buffer, MEGABYTE, 0)


class ConsoleHandler(logging.Handler):
    """Prints log records as errors on the console."""

    def emit(self, record: logging.LogRecord) -> None:
        """One record."""
        console.error(self.format(record))


class _Forgiving(io.FileIO):
    """A file that ignores errors of writing, e.g. a full disk or a closed terminal."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            if (written := super().write(data)) is not None:  # None: it would block
                return written
        return len(data)


def _writer(descriptor: int) -> TextIO:
    """A line-buffered text stream on a file descriptor, which it does not close."""
    raw = _Forgiving(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)


def _write(descriptor: int, data: bytes) -> None:
    with _Forgiving(descriptor, "w", closefd=False) as file:
        file.write(data)


console = Console()


def set_up_logging(run_dir: Path, rank: int) -> None:
    """Log to RUN/log.txt, libraries included; the console shows only errors.

    Rank 0 logs from INFO up; the others log warnings and errors, with their rank.
    """
    handler = logging.FileHandler(run_dir / "log.txt", mode="a", encoding="utf-8")
    of_rank = "" if rank == 0 else f" rank {rank}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{of_rank} %(name)s: %(message)s"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    errors = ConsoleHandler(logging.ERROR)
    errors.setFormatter(logging.Formatter(f"%(levelname)s{of_rank}: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler, errors]
    root.setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a full disk is reported by whatever needs it
    logging.captureWarnings(True)
    hide_deprecations()
    logger.setLevel(logging.INFO)
    for name in ("DeepSpeed", "deepspeed", "transformers", "torch.distributed"):
        library = logging.getLogger(name)
        library.handlers = []
        library.propagate = True
        library.setLevel(logging.INFO if name.lower() == "deepspeed" else logging.WARNING)
    console.log_to(run_dir / "log.txt")
