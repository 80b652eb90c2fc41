"""What is printed of texts from elsewhere."""

import pytest

from lcm_ds.quiet import printable


@pytest.mark.parametrize("text", ["plain", "می‌روم", "क्‍ष", "👩‍🔬"])
def test_a_text_is_printed_as_it_is_where_letters_are_joined_or_kept_apart(text):
    assert printable(text) == text


@pytest.mark.parametrize("character", ["\x1b", "\x00", "\x07", "\x9b", "\n", "\r", "\u202e"])
def test_what_a_terminal_would_obey_is_replaced(character):
    assert printable(f"a{character}b") == "a�b"
