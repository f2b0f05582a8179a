"""The Python blocks of README.md and docs/ run as they stand."""

import ast
import functools
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pera import PeraConfig

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    """Yield each Python block; its id is the page and line."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{line}")


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


@pytest.mark.parametrize("source", blocks())
def test_python_block_runs(source, names):
    for node in ast.walk(ast.parse(source)):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            if importlib.util.find_spec(module.partition(".")[0]) is None:
                pytest.skip(f"{module} is not installed")
    exec(compile(source, "block", "exec"), names)
