"""Control characters and library warnings do not reach the terminal."""

import fcntl
import os
import struct
import subprocess
import sys
import termios

import pytest

from lcm_ds.terminal import is_terminal, rich_console, strip_control_chars


@pytest.mark.parametrize("text", ["plain", "می‌روم", "क्‍ष", "👩‍🔬"])
def test_a_text_is_printed_as_it_is_where_letters_are_joined_or_kept_apart(text):
    assert strip_control_chars(text) == text


@pytest.mark.parametrize("character", ["\x1b", "\x00", "\x07", "\x9b", "\n", "\r", "\u202e"])
def test_what_a_terminal_would_obey_is_replaced(character):
    assert strip_control_chars(f"a{character}b") == "a�b"


@pytest.mark.parametrize(("options", "said"), [([], False), (["-W", "default"], True)])
@pytest.mark.parametrize("silence", ["hide_warnings", "hide_deprecations"])
def test_warnings_of_libraries_are_said_to_those_alone_who_asked_python_for_them(options, said, silence):
    code = f"import warnings, lcm_ds.terminal as q; q.{silence}(); warnings.warn('gone soon', FutureWarning)"
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)
    assert ("gone soon" in done.stderr) == said


@pytest.mark.parametrize(
    ("columns", "term", "expected"), [(80, "xterm", True), (0, "xterm", False), (80, "dumb", False)]
)
def test_a_pseudo_terminal_of_no_size_is_no_terminal(monkeypatch, columns, term, expected):
    """Open MPI gives such a one to each process."""
    monkeypatch.setenv("TERM", term)
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    with os.fdopen(theirs, "w") as stream:
        assert is_terminal(stream) is expected
        monkeypatch.setattr(sys, "stdout", stream)
        assert (rich_console().is_terminal and term != "dumb") is expected
    os.close(ours)


def test_a_file_is_no_terminal(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        assert not is_terminal(stream)
    assert not is_terminal(stream)  # closed
