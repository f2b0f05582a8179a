"""``import pera`` costs little more than PEFT, which it stands on."""

import sys
import time

import pytest


def test_nothing_is_imported_besides_peft_and_what_it_imports(python):
    program = "import sys, peft; before = set(sys.modules); import pera; print(*set(sys.modules) - before)"
    packages = {name.partition(".")[0] for name in python(program).stdout.split()}
    assert packages - sys.stdlib_module_names == {"pera"}


@pytest.mark.slow  # it is timed
def test_importing_takes_less_than_one_and_a_half_times_as_long_as_peft(python):
    times = {"import peft": [], "import pera": []}
    for _ in range(3):
        for program, taken in times.items():
            start = time.perf_counter()
            python(program)
            taken.append(time.perf_counter() - start)
    assert min(times["import pera"]) < 1.5 * min(times["import peft"])
