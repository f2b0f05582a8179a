"""The examples run as they stand, on tiny models (`make test-examples`)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.slow


@pytest.fixture
def deep_llama(tiny_llama, tmp_path):
    """A tiny model with as many blocks as SmolLM2, which phonebook-smollm2 needs."""
    folder = tmp_path / "deep"
    shutil.copytree(tiny_llama, folder)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, num_hidden_layers=30)).save_pretrained(folder)
    return folder


@pytest.fixture
def call(tmp_path):
    """Runs a command in an empty folder, with the commands of this environment, and returns what it prints."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(*arguments, cwd=tmp_path, **variables):
        done = subprocess.run(
            [*map(str, arguments)], cwd=cwd, env={**os.environ, "PATH": path, **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_101_trains_both_adapters(call, tiny_llama):
    printed = call(sys.executable, EXAMPLES / "101_change_one_line.py", tiny_llama)
    assert "LoRA loss:" in printed
    assert "PERA loss:" in printed


def test_102_and_103_train_answer_merge_and_export(call, tiny_llama, tmp_path):
    call("sh", EXAMPLES / "102_own_data.sh", tiny_llama)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    printed = call("sh", EXAMPLES / "103_merge_export_serve.sh", "own-run")
    assert "LORA of rank 14" in printed
    assert "vllm serve" in printed


def test_201_prints_what_each_adapter_stored(call, deep_llama):
    printed = call(sys.executable, EXAMPLES / "201_teach_facts.py", deep_llama, 5, 3)
    assert "lora, r = 1:" in printed
    assert "pera-anchors-16, r = 1:" in printed


@pytest.fixture
def examples(tmp_path):
    """A copy of the folder, to run in."""
    return shutil.copytree(EXAMPLES, tmp_path / "examples")


def test_202_compares_two_methods(call, examples, tiny_llama):
    few = ["choose.learning_rate=[1e-2]", "report.seeds=[1]", f"model={tiny_llama}", "training.max_steps=2"]
    call("pera", "study", "run", "202_compare_methods.yaml", *few, "--output", "study", cwd=examples)
    outcomes = [json.loads(file.read_text())["status"] for file in (examples / "study").rglob("outcome.json")]
    assert outcomes == ["finished"] * 4


def test_203_adds_a_method_that_is_exported(call, examples, tiny_llama):
    folder = examples / "203_own_method"
    install = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", "installed", "."]
    call(sys.executable, "-m", *install, cwd=folder)
    path = os.pathsep.join(filter(None, [str(folder / "installed"), os.environ.get("PYTHONPATH", "")]))
    few = [f"model={tiny_llama}", "training.max_steps=2"]
    call("pera", "train", "gralora.yaml", *few, "--output", "run", cwd=folder, PYTHONPATH=path)
    call("pera", "export", "run", "--to", "lora", "--output", "lora", cwd=folder, PYTHONPATH=path)
    assert json.loads((folder / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("name", ["quickstart", "is_it_full"])
def test_a_notebook_runs(name, deep_llama, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PERA_EXAMPLE_MODEL", str(deep_llama))
    monkeypatch.setenv("PERA_EXAMPLE_STEPS", "3")
    notebook = nbformat.read(EXAMPLES / "notebooks" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert any(cell.get("outputs") for cell in notebook.cells)
