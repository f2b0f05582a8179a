"""``import pera`` imports pera, torch and PEFT only, and takes little longer than PEFT."""

import re
import sys
import time
from importlib.metadata import requires

import pytest

from pera import startup


def test_import_adds_only_pera_to_torch_and_peft(python):
    program = "import sys, torch, peft; before = set(sys.modules); import pera; print(*set(sys.modules) - before)"
    packages = {name.partition(".")[0] for name in python(program).stdout.split()}
    assert packages - sys.stdlib_module_names == {"pera"}


def test_a_peft_older_than_pera_asks_for_is_named(monkeypatch, recwarn):
    assert f"peft>={startup.OLDEST_PEFT}" in requires("pera")
    for version in (startup.OLDEST_PEFT, f"{startup.OLDEST_PEFT}.1.dev0", "1.0"):
        monkeypatch.setattr(startup, "version", lambda package, version=version: version)
        startup.check_peft()
    assert not recwarn
    monkeypatch.setattr(startup, "version", lambda package: "0.20.0")
    with pytest.warns(match=re.escape(f"pera needs peft>={startup.OLDEST_PEFT}; peft 0.20.0 does not save")):
        startup.check_peft()


def test_a_peft_that_pera_cannot_import_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(startup, "version", lambda package: "0.19.1")
    with pytest.raises(ImportError, match=r"^pera does not work with peft 0\.19\.1; install peft>=0\.21"):
        startup.check_peft()


@pytest.mark.slow  # it measures time
def test_import_takes_less_than_one_and_a_half_times_as_long_as_peft(python):
    times = {"import peft": [], "import pera": []}
    for _ in range(3):
        for program, taken in times.items():
            start = time.perf_counter()
            python(program)
            taken.append(time.perf_counter() - start)
    assert min(times["import pera"]) < 1.5 * min(times["import peft"])
