"""Control characters and library warnings do not reach the terminal."""

import subprocess
import sys

import pytest

from lcm_ds.terminal import strip_control_chars


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
