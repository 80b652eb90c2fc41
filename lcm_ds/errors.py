"""The exception for what a user can put right; the command line turns it into exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """One or more mistakes in a call, a config or the input.

    Each mistake is one line that names the file, the key, the value and what would be right.
    """

    exit_code = 2

    def __init__(self, errors: str | Iterable[str]) -> None:
        self.errors: list[str] = [errors] if isinstance(errors, str) else list(errors)
        super().__init__("\n".join(self.errors))


class TransientError(InputError):
    """What is elsewhere gives no answer: nobody's mistake, and another try may find it."""

    exit_code = 1


class RunFailedError(InputError):
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
        self.errors: list[str] = []
        self._outages: set[str] = set()  # those of them that are nobody's mistake

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, InputError):
            self.errors.extend(error.errors)
            if isinstance(error, TransientError):
                self._outages.update(error.errors)
            return True
        return False

    def add(self, other: Collector) -> None:
        """Take over what another has gathered."""
        self.errors.extend(other.errors)
        self._outages.update(other._outages)

    def raise_if_any(self) -> None:
        """Raise one `InputError` with all gathered errors, each once; `TransientError` if all of them are that."""
        if self.errors:
            kind = TransientError if self._outages.issuperset(self.errors) else InputError
            raise kind(dict.fromkeys(self.errors))


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
