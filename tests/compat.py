"""Run tests/pera with versions other than the pinned ones of constraints.txt: ``python tests/compat.py [ROW …]``.

Each row of ``ROWS`` gets an environment under build/compat, with the torch of constraints.txt unless it names another.
Without arguments, the rows of ``DEFAULT`` run. Of other versions of torch PyPI has only CUDA builds, which take
gigabytes. The variable PYTEST_ADDOPTS gives options to pytest, such as ``-n auto``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "compat"
TORCH = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
FLOOR = re.findall(r'"((?:torch|peft|transformers)>=.+)"', (ROOT / "pyproject.toml").read_text())
LOWEST = {requirement.partition(">=")[0]: requirement.replace(">=", "==") for requirement in FLOOR}
TOOLS = ("datasets", "hypothesis", "pytest", "pytest-xdist", "scikit-learn")

ROWS = {
    "lowest": (TORCH, LOWEST["peft"], LOWEST["transformers"]),
    "lowest-torch": (LOWEST["torch"], LOWEST["peft"], LOWEST["transformers"]),
    "newest": (TORCH, "peft", "transformers", "trl"),
    "newest-torch": ("torch", "peft", "transformers", "trl"),
    "development": (TORCH, "peft @ git+https://github.com/huggingface/peft", "transformers", "trl"),
}
DEFAULT = ("lowest", "newest")
SHOWN = ("torch", "peft", "transformers", "huggingface_hub")
VERSIONS = f"import importlib.metadata as m, platform as p; print(p.python_version(), *map(m.version, {SHOWN}))"


def run(row):
    """The cells of the table for one row: versions of Python and of ``SHOWN``; tests that passed, failed, skipped."""
    folder, report = FOLDER / row, FOLDER / f"{row}.xml"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade")
    subprocess.run([*pip, ROWS[row][0]], check=True)  # first, so that no other package chooses its build
    eager = ("--upgrade-strategy", "eager")
    subprocess.run([*pip, *eager, *ROWS[row], *TOOLS, "--editable", ROOT], check=True)
    versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.split()
    report.unlink(missing_ok=True)
    tests = [python, "-m", "pytest", "-q", f"--junit-xml={report}", "tests/pera"]
    subprocess.run(tests, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    counts = ElementTree.parse(report).getroot().find("testsuite").attrib
    total, skipped = int(counts["tests"]), int(counts["skipped"])
    failed = int(counts["failures"]) + int(counts["errors"])
    return (*versions, total - failed - skipped, failed, skipped)


def main():
    rows = sys.argv[1:] or DEFAULT
    if unknown := [row for row in rows if row not in ROWS]:
        sys.exit(f"unknown row {unknown[0]!r}; rows: {', '.join(ROWS)}")
    table = {row: run(row) for row in rows}
    titles = ("row", "Python", *SHOWN, "passed", "failed", "skipped")
    for cells in (titles, ["---"] * len(titles), *((row, *cells) for row, cells in table.items())):
        print("|", " | ".join(map(str, cells)), "|")
    sys.exit(any(failed or not passed for *_, passed, failed, _ in table.values()))


if __name__ == "__main__":
    main()
