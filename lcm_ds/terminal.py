"""Keeps library warnings and terminal control characters away from the user; numbers for display."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def hide_warnings() -> None:
    """Hide library warnings, unless Python was started with -W or PYTHONWARNINGS.

    The hub's libraries print two lines for each retry. HF_HUB_VERBOSITY and DATASETS_VERBOSITY keep values they have.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        for variable in ("HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
            os.environ.setdefault(variable, "error")


def hide_deprecations() -> None:
    """Hide deprecation warnings, such as those of DeepSpeed's calls of torch, unless Python was started with -W."""
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)


@contextmanager
def silence_transformers(reports: bool = False) -> Iterator[None]:
    """Load models without transformers' progress bars and, unless `reports`, its reports of missing weights."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if not reports:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal with a movable cursor.

    Open MPI gives each process a pseudo-terminal of 0 × 0 characters, whose output often goes to a file.
    """
    try:
        if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
            return False
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # closed, or a notebook's stream without a descriptor
        return False


def rich_console(width: int | None = None) -> Console:
    """rich's console on stdout, without colours unless that is a terminal.

    width: In columns; default: the terminal's.
    """
    from rich.console import Console

    no_terminal = sys.stdout.isatty() and not is_terminal(sys.stdout)
    return Console(force_terminal=False if no_terminal else None, width=width)


# Zero-width (non-)joiners of Persian, Hindi and emoji are safe.
_JOINERS = "\u200c\u200d"


def strip_control_chars(text: str) -> str:
    """Replace control characters: text from the web can contain terminal escape sequences."""
    return "".join(char if char.isprintable() or char in _JOINERS else "�" for char in text)


def figure(value: float) -> str:
    """A number with three digits, or with all those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def in_bytes(size: float) -> str:
    """A size in MB, GB or TB: 10⁶, 10⁹ or 10¹² bytes."""
    unit, name = next(pair for pair in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size >= pair[0] or pair[1] == "MB")
    return f"{figure(size / unit)} {name}"
