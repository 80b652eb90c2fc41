"""What reaches the terminal: no words of libraries to programmers, and nothing in a text that it would obey."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def hide_warnings() -> None:
    """What libraries warn programmers of stays away from users, unless Python was asked for it (-W, PYTHONWARNINGS)."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def hide_deprecations() -> None:
    """What libraries will rename stays out of a run's log, unless Python was asked for it (-W, PYTHONWARNINGS).

    A user can change nothing about what DeepSpeed calls of torch.
    """
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)


@contextmanager
def silence_transformers(reports: bool = False) -> Iterator[None]:
    """Loading without transformers' bars, and unless they are asked for, without its reports of missing weights."""
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


# They join letters or keep them apart, in Persian, Hindi and emoji: a terminal only draws them.
_JOINERS = "\u200c\u200d"


def strip_control_chars(text: str) -> str:
    """The text without what a terminal would obey: texts of the web hold escape sequences, too."""
    return "".join(letter if letter.isprintable() or letter in _JOINERS else "�" for letter in text)
