"""What long operations show: bars on a terminal, plain lines in a log."""

import io
import re
import time
from contextlib import suppress

import pytest
from rich.console import Console

from pera_lab import progress
from pera_lab.progress import ProgressBar, about, say, showing, stage


@pytest.fixture
def shown():
    """Runs a function where progress is shown, and returns what it printed."""

    def of(function, *, terminal=False, width=200):
        file = io.StringIO()
        console = Console(file=file, width=width, force_terminal=terminal, _environ={"TERM": "xterm"})
        with showing(console):
            function()
        return file.getvalue()

    return of


@pytest.fixture
def quick(monkeypatch):
    """Lets 0.1 seconds count as 2, and 0.3 seconds as 30."""
    for name, seconds in (("SLOW", 0.1), ("PERIOD", 0.3), ("POLL", 0.01)):
        monkeypatch.setattr(progress, name, seconds)


def steps(number, seconds, note=None):
    def run():
        with ProgressBar("answering") as bar:
            bar.update(0, number)
            for i in range(number):
                time.sleep(seconds)
                bar.update(i + 1, note=note)

    return run


def test_a_log_gets_a_line_for_each_tenth_with_the_remaining_time(quick, shown, monkeypatch):
    monkeypatch.setattr(progress, "PERIOD", 3600)
    lines = shown(steps(40, 0.04, "12 failed")).splitlines()
    assert 5 <= len(lines) <= 11
    assert all(line.startswith("answering ") and " of 40 · 12 failed" in line for line in lines)
    assert all(line.endswith(" s left") for line in lines[:-1])
    assert lines[-1] == "answering 40 of 40 · 12 failed"


def test_a_short_operation_leaves_no_line_in_a_log(shown):
    assert shown(steps(40, 0)) == ""


def test_a_long_step_does_not_silence_a_log(quick, shown):
    assert shown(steps(1, 0.8)).splitlines()[:2] == ["answering 0 of 1"] * 2


def test_an_error_ends_the_lines_of_a_log(quick, shown, monkeypatch):
    def fail():
        with suppress(ValueError), ProgressBar("answering") as bar:
            bar.update(0, 2)
            time.sleep(0.15)
            bar.update(2)
            raise ValueError

    monkeypatch.setattr(progress, "POLL", 60)
    assert shown(fail) == ""


def test_a_terminal_shows_a_bar_with_the_same_facts(shown):
    text = shown(steps(3, 0, "loss 1.5"), terminal=True)
    assert "answering" in text
    assert "3/3" in text
    assert "loss 1.5" in text


def test_a_narrow_terminal_shows_every_fact(shown):
    note = "loss 2.1256 · rate 7.5e-04 · 1,386 tokens/s · 1.4 GB"
    text = shown(steps(150, 0, note), terminal=True, width=80)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).rpartition("answering")[2]
    assert "150/150" in last
    assert set(note.split()) <= set(last.split())


def test_nothing_is_shown_elsewhere(capsys, quick):
    steps(3, 0.1)()
    with stage("loading"):
        say("loaded")
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "")


def test_a_slow_stage_is_named_once_and_then_from_time_to_time(quick, shown):
    def run(seconds):
        with stage("loading"):
            time.sleep(seconds)

    assert shown(lambda: run(0)) == ""
    assert shown(lambda: run(0.2)) == "loading …\n"
    assert shown(lambda: run(0.6)).splitlines() == ["loading …", "loading … (0 s)"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "1 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_rough_durations(seconds, text):
    assert about(seconds) == text
