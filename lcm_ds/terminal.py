"""Keeps library warnings and terminal control characters away from the user."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def hide_warnings() -> None:
    """Hide library warnings, unless Python was started with -W or PYTHONWARNINGS."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


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


# Zero-width (non-)joiners of Persian, Hindi and emoji are safe.
_JOINERS = "\u200c\u200d"


def strip_control_chars(text: str) -> str:
    """Replace control characters: text from the web can contain terminal escape sequences."""
    return "".join(char if char.isprintable() or char in _JOINERS else "�" for char in text)
