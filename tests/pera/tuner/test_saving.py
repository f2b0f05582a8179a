"""Saving and loading whole models with PERA adapters."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tiny import adapt, gpt2, llama, logits, tokens


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a base model and of an adapter trained on it, and the adapted model's logits."""
    base_folder, adapter_folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    llama().save_pretrained(base_folder)
    model = adapt(
        AutoModelForCausalLM.from_pretrained(base_folder),
        target_modules="all-linear",
        normalization="rms",
        rank_pattern={"q_proj": 5},
        task_type="CAUSAL_LM",
    )
    model.save_pretrained(adapter_folder)
    return base_folder, adapter_folder, logits(model)


def test_only_safetensors_is_written(folders):
    _, folder, _ = folders
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_gives_equal_logits(folders, low_cpu_mem_usage):
    _, folder, expected = folders
    model = PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), expected)
    assert not any(p.is_meta for p in model.parameters())
    assert not trainable(model)


def test_a_loaded_adapter_can_be_trained_further(folders):
    _, folder, _ = folders
    model = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".pera_" in name}


def test_an_adapter_can_be_loaded_next_to_another(folders):
    _, folder, expected = folders
    model = adapt(llama(), target_modules=["q_proj"])
    model.load_adapter(folder, adapter_name="loaded")
    model.set_adapter("loaded")
    assert torch.equal(logits(model), expected)


def test_the_auto_class_loads_base_and_adapter(folders):
    _, folder, expected = folders
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)


def test_a_fresh_process_gives_equal_logits(folders, python, tmp_path):
    _, folder, expected = folders
    program = """
import sys, torch, pera
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
_, adapter, tokens, logits = sys.argv
model = AutoPeftModelForCausalLM.from_pretrained(adapter)
with torch.no_grad():
    save_file({"logits": model(**load_file(tokens)).logits}, logits)
"""
    save_file({"input_ids": tokens()}, tmp_path / "tokens")
    python(program, folder, tmp_path / "tokens", tmp_path / "logits")
    assert torch.equal(load_file(tmp_path / "logits")["logits"], expected)


@pytest.mark.parametrize(
    ("terms", "coefficients"),
    [("all", "learned"), ("square", "learned"), ("cross", "learned"), ("none", "learned"), ("all", "fixed")],
)
def test_saved_names_and_shapes(terms, coefficients, tmp_path):
    model = adapt(gpt2(), r=4, target_modules=["h.1.mlp.c_fc"], terms=terms, coefficients=coefficients)
    model.save_pretrained(tmp_path)
    prefix = "base_model.model.transformer.h.1.mlp.c_fc"
    expected = {f"{prefix}.pera_A": (4, 32), f"{prefix}.pera_B": (128, 4)}
    if coefficients == "learned" and terms != "none":
        expected[f"{prefix}.pera_h"] = ({"all": 10, "square": 4, "cross": 6}[terms],)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), logits(model))


def test_the_configuration_saved_with_the_adapter(folders):
    base_folder, folder, _ = folders
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base_folder)
    assert saved["inference_mode"] is True
    assert saved["target_modules"] == sorted(saved["target_modules"])
    assert (saved["peft_type"], saved["pera_version"], saved["normalization"]) == ("PERA", 1, "rms")
