"""Control characters in text are shown, not executed."""

import pytest

from pera_lab.text import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext, ümläuts, 中文, 👩‍🚀", "plain\n\ttext, ümläuts, 中文, 👩‍🚀"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("bell\a and \x00", r"bell\x07 and \x00"),
        ("carriage\rreturn and windows\r\nline", "carriage\\x0dreturn and windows\\x0d\nline"),
        ("\x9b31m", r"\x9b31m"),
        ("abc\u202edef", r"abc\u202edef"),
        ("\x7f\u2066\ufeff\u2028\ud800", r"\x7f\u2066\ufeff\u2028\ud800"),
    ],
)
def test_control_characters_are_shown_as_codes(text, shown):
    assert visible(text) == shown
