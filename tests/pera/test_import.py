"""``import pera`` imports pera, torch and PEFT only, and takes little longer than PEFT."""

import sys
import time

import pytest


def test_import_adds_only_pera_to_torch_and_peft(python):
    program = "import sys, torch, peft; before = set(sys.modules); import pera; print(*set(sys.modules) - before)"
    packages = {name.partition(".")[0] for name in python(program).stdout.split()}
    assert packages - sys.stdlib_module_names == {"pera"}


@pytest.mark.slow  # it measures time
def test_import_takes_less_than_one_and_a_half_times_as_long_as_peft(python):
    times = {"import peft": [], "import pera": []}
    for _ in range(3):
        for program, taken in times.items():
            start = time.perf_counter()
            python(program)
            taken.append(time.perf_counter() - start)
    assert min(times["import pera"]) < 1.5 * min(times["import peft"])
