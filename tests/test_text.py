"""Text from outside is shown, never obeyed."""

import pytest

from pera.text import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext, ümläuts, 中文, 👩‍🚀", "plain\n\ttext, ümläuts, 中文, 👩‍🚀"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("bell\a and \x00", "bell␇ and ␀"),
        ("carriage\rreturn and windows\r\nline", "carriage␍return and windows\nline"),
        ("\x9b31m", "‹U+009B›31m"),
        ("abc\u202edef", "abc‹U+202E›def"),
    ],
)
def test_control_characters_become_visible(text, shown):
    assert visible(text) == shown
