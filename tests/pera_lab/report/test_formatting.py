"""How numbers and settings are written."""

import math

import pytest

from pera_lab.report.formatting import duration, flatten, number, percent, points, shortened, signed, size


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.20150086, "0.2015"), (1.2e-5, "1.2e-05"), (-0.5, "−0.5"), (123456.0, "123,456"), (None, "–"),
     (math.nan, "not a number"), (-math.inf, "−infinite")],
)  # fmt: skip
def test_number(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0.0 s"), (59.97, "60.0 s"), (125.0, "2 min 5 s"), (3600.0, "1 h 0 min"), (None, "–"), (math.nan, "–")],
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown


def test_shares_changes_and_bytes():
    assert (percent(0.795), percent(None), percent(math.nan)) == ("79.5\N{NO-BREAK SPACE}%", "–", "–")
    assert (points(0.0042), points(-0.013), points(math.nan)) == ("+0.42", "−1.30", "–")
    assert (signed(0.012), signed(-0.003), signed(0.0)) == ("+0.012", "−0.003", "0")
    assert (size(3 * 2**29), size(2**21), size(None)) == ("1.5 GB", "2.0 MB", "–")


def test_nested_settings_are_flattened():
    settings = {"model": {"name": "x", "dtype": None}, "layers": [1, 2], "resume": True, "options": {}}
    assert flatten(settings) == {
        "model.name": "x",
        "model.dtype": "none",
        "layers": "1, 2",
        "resume": "true",
        "options": "none",
    }


def test_long_text_is_shortened():
    assert shortened("abc", 3) == "abc"
    assert shortened("abcde", 3) == "abc … (2 more characters)"
