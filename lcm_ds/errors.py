"""Exceptions for problems that a user can fix; the command line turns them into exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """One or more errors in a call, a config or the input: exit code 2.

    Each error is one line with the file, the key, the value and what would be right.
    """

    exit_code = 2

    def __init__(self, errors: str | Iterable[str]) -> None:
        self.errors: list[str] = [errors] if isinstance(errors, str) else list(errors)
        super().__init__("\n".join(self.errors))


class TransientError(InputError):
    """A remote service does not answer; a retry may succeed: exit code 1."""

    exit_code = 1


class RunFailedError(InputError):
    """A correctly started run that cannot continue; a retry may not help: exit code 1."""

    exit_code = 1


class PeerFailed(Exception):
    """Another rank of a preparation has failed with an exit code; `message` is empty if that rank prints the reason."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Collector:
    """Collects the errors of independent checks, so that a user sees all of them at once.

    >>> errors = Collector()
    >>> with errors:
    ...     check_one()
    >>> with errors:
    ...     check_two()
    >>> errors.raise_if_any()
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._outages: set[str] = set()  # those of TransientErrors

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
        """Take over the errors of another collector."""
        self.errors.extend(other.errors)
        self._outages.update(other._outages)

    def raise_if_any(self) -> None:
        """Raise one `InputError` with all errors, each once; a `TransientError` if all of them are transient."""
        if self.errors:
            kind = TransientError if self._outages.issuperset(self.errors) else InputError
            raise kind(dict.fromkeys(self.errors))


def did_you_mean(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """'; did you mean X?' if a known name is similar; else `otherwise`, or the known names in brackets."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f" (known here: {', '.join(known)})" if otherwise is None else otherwise


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
