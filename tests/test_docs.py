"""The Python blocks of README.md and docs/ run as they stand; commands and recipes there are valid."""

import ast
import functools
import importlib.util
import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer
import yaml
from transformers import AutoModelForCausalLM

from pera import PeraConfig
from pera_lab.cli.app import app
from pera_lab.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language):
    """Yield each block of a language; its id is the page and line."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            yield pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{line}")


def commands():
    """Yield each call of pera in a shell block that can be run as it stands."""
    for block in blocks("sh"):
        for line in re.findall(r"^pera (?:'[^']*'|\\\n|[^'\n#])*", block.values[0], re.MULTILINE):
            if not re.search(r"…|\[-|\[model|<", line):
                yield pytest.param(shlex.split(line)[1:], id=f"{block.id} {' '.join(line.split())[:40]}")


@pytest.mark.parametrize("arguments", commands())
def test_command_line_has_known_commands_and_options(arguments):
    arguments = list(itertools.takewhile(lambda word: word not in ("|", ">", "&&"), arguments))
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context("pera", arguments)  # refuses unknown options


@pytest.mark.parametrize("source", [b for b in blocks("yaml") if "extending.md" not in b.id])  # it adds the method
def test_recipe_is_valid(source, tmp_path, monkeypatch):
    content = yaml.safe_load(source)
    if not {"model", "method", "task", "training"} <= content.keys():
        pytest.skip("not a whole recipe")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "own.yaml").write_text(source)
    load_recipe("own.yaml")


@pytest.fixture
def names(tiny_llama, save_adapter, tmp_path, monkeypatch):
    """Names a block may use undefined. The folders it names are in the working directory."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    for folder in ("path/or/hub-id", "BASE", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        shutil.copytree(tiny_llama, tmp_path / folder)
    save_adapter(tmp_path / "other/adapter", tiny_llama, normalization="rms")
    monkeypatch.chdir(tmp_path)
    for config in ("SFTConfig", "DPOConfig"):  # TRL computes in bfloat16 unless told otherwise, which needs a GPU
        monkeypatch.setattr(trl, config, functools.partial(getattr(trl, config), use_cpu=True, bf16=False))
    base = AutoModelForCausalLM.from_pretrained("BASE")
    model = save_adapter(tmp_path / "adapter", tiny_llama, normalization="rms")
    for name in ("a", "b"):
        model.add_adapter(name, PeraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    tokens = torch.arange(3, 19).reshape(2, 8).tolist()
    return {
        "__name__": "block",
        "base": base,
        "model": model,
        "dataset": datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        "preferences": datasets.Dataset.from_dict({"prompt": ["Ada"], "chosen": [" Byron"], "rejected": [" King"]}),
    }


@pytest.mark.parametrize("source", blocks("python"))
def test_python_block_runs(source, names):
    for node in ast.walk(ast.parse(source)):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            if importlib.util.find_spec(module.partition(".")[0]) is None:
                pytest.skip(f"{module} is not installed")
    exec(compile(source, "block", "exec"), names)
