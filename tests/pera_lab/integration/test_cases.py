"""The cases of issue 21, each a program that exits with 0 if the command line does what is right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CASES = ROOT.parent / "shared" / "cases"
if not CASES.is_dir():
    CASES = ROOT / "shared" / "cases"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not on this machine"),
]


@pytest.mark.parametrize("case", sorted(path.parent.name for path in CASES.glob("*/run.sh")))
def test_case(case):
    path = f"{ROOT / 'src'}:{Path(__file__).parent / 'old_names'}"
    environment = {**os.environ, "PY": sys.executable, "PYTHONPATH": path}
    command = [str(CASES / case / "run.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
