"""The package in docs/extending.md is installed and used by the commands on that page."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "extending.md"
FILE = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def run(tmp_path):
    """Runs a command in a folder with the files of the page, and with its package installed."""
    for name, content in FILE.findall(PAGE.read_text(encoding="utf-8")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    paths = [str(tmp_path / "installed"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def call(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    call("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", "installed", ".")
    (tmp_path / "pera_words.py").unlink()  # only the installed copy is left
    return call


def test_a_package_adds_a_task_and_a_method(run, tiny_llama, tmp_path):
    run("pera_lab", "train", "backwards.yaml", f"model={tiny_llama}", "training.max_steps=2", "--output", "run")
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["peft_type"] == "VERA"
    few = ["choose.learning_rate=[1e-2]", "report.seeds=[1]", f"model={tiny_llama}", "training.max_steps=2"]
    run("pera_lab", "study", "run", "methods.yaml", *few, "--output", "study")
    outcomes = {file.parent: json.loads(file.read_text()) for file in (tmp_path / "study").rglob("outcome.json")}
    assert [outcome["status"] for outcome in outcomes.values()] == ["finished"] * 4
    assert len([run for run in outcomes if (run / "scores.json").is_file()]) == 2
