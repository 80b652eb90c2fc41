"""The exception for what a user can put right; the command line turns it into exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """One or more mistakes in a call, a config or the input.

    Each mistake is one line that names the file, the key, the value and what would be right.
    """

    exit_code = 2

    def __init__(self, mistakes: str | Iterable[str]) -> None:
        self.mistakes: list[str] = [mistakes] if isinstance(mistakes, str) else list(mistakes)
        super().__init__("\n".join(self.mistakes))


class Unavailable(InputError):
    """What is elsewhere gives no answer: nobody's mistake, and another try may find it."""

    exit_code = 1


class CannotGoOn(InputError):
    """A run that was right to start and cannot go on; no other call would help, and another try may not."""

    exit_code = 1


class Collector:
    """Gathers the mistakes of several independent checks, so that a user sees all of them in one go.

    >>> mistakes = Collector()
    >>> with mistakes:
    ...     check_one()
    >>> with mistakes:
    ...     check_two()
    >>> mistakes.raise_if_any()
    """

    def __init__(self) -> None:
        self.mistakes: list[str] = []
        self._outages: set[str] = set()  # those of them that are nobody's mistake

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, InputError):
            self.mistakes.extend(error.mistakes)
            if isinstance(error, Unavailable):
                self._outages.update(error.mistakes)
            return True
        return False

    def add(self, other: Collector) -> None:
        """Take over what another has gathered."""
        self.mistakes.extend(other.mistakes)
        self._outages.update(other._outages)

    def raise_if_any(self) -> None:
        """Raise one `InputError` with everything gathered so far, each mistake once; `Unavailable` if all are that."""
        if self.mistakes:
            kind = Unavailable if self._outages.issuperset(self.mistakes) else InputError
            raise kind(dict.fromkeys(self.mistakes))


def nearest(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """'; did you mean X?' where a known name is near; else `otherwise`, or the known names in brackets."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f" (known here: {', '.join(known)})" if otherwise is None else otherwise


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
