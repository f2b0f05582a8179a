"""Whatever is wrong with its input, a command ends soon, in one sentence, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES, inputs
from malformed import report, table

pytestmark = pytest.mark.slow
PROCESSES = 24
"""Inputs that also run in a process of their own, where messages of imports would show."""


def run(*arguments):
    """The records of malformed inputs. The server needs a process that never runs an operation of torch."""
    command = [sys.executable, str(Path(__file__).parent / "malformed.py"), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_malformed_inputs_are_refused_in_one_line_and_leave_nothing(family):
    found = run(family)
    print(table(found, "command"))
    assert len(found) == len(inputs(family))
    assert report(found) == ""


def test_there_are_enough_malformed_inputs():
    assert sum(len(inputs(family)) for family in FAMILIES) >= 800


def test_a_refusal_is_one_line_also_in_a_process_of_its_own():
    names = [given.name for family in FAMILIES for given in inputs(family)]
    found = run("--fresh", *names[:: len(names) // PROCESSES][:PROCESSES])
    assert len(found) == PROCESSES
    assert report(found) == ""
