"""Saving and loading whole models with PERA adapters."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from pera import UserError
from tiny import adapt, evaluate, gpt2, llama, logits, tokens


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
        anchors=2,
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
@pytest.mark.parametrize("k", [0, 3])
def test_saved_names_and_shapes(k, terms, coefficients, tmp_path):
    model = adapt(gpt2(), r=4, target_modules=["h.1.mlp.c_fc"], terms=terms, coefficients=coefficients, anchors=k)
    model.save_pretrained(tmp_path)
    prefix = "base_model.model.transformer.h.1.mlp.c_fc"
    expected = {f"{prefix}.pera_A": (4, 32), f"{prefix}.pera_B": (128, 4)}
    if coefficients == "learned" and (terms != "none" or k):
        expected[f"{prefix}.pera_h"] = ({"all": 10, "square": 4, "cross": 6, "none": 0}[terms] + k,)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), logits(model))


def test_the_configuration_saved_with_the_adapter(folders):
    base_folder, folder, _ = folders
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base_folder)
    assert saved["inference_mode"] is True
    assert saved["target_modules"] == sorted(saved["target_modules"])
    assert (saved["peft_type"], saved["pera_version"], saved["normalization"]) == ("PERA", 2, "rms")


# Files that do not fit


@pytest.fixture
def saved(tmp_path):
    """A function that saves an adapter whose weights file has been changed, and returns its folder."""

    def saved(change, **options):
        adapt(llama(), **{"target_modules": ["q_proj"], **options}).save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file)
        return tmp_path

    return saved


def load_alone(folder):
    return PeftModel.from_pretrained(llama(), folder)


def load_on_the_meta_device_first(folder):
    return PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=True)


def load_next_to_another(folder):
    model = adapt(llama(), target_modules=["q_proj"])
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    return model


LOADERS = [load_alone, load_on_the_meta_device_first, load_next_to_another]
KEY = "base_model.model.model.layers.1.self_attn.q_proj.pera_A"


def rename(weights):
    for key in list(weights):
        weights[key.replace("self_attn", "attention")] = weights.pop(key)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.clear(), r"the weights file lacks 'base_model\..*' and 5 more weights; load the"),
        (lambda weights: weights.pop(KEY), rf"the weights file lacks '{KEY}'; load the adapter on the base model"),
        (
            lambda weights: weights.update({f"{KEY}x": torch.ones(1)}),
            rf"the base model has no place for '{KEY}x'",
        ),
        (rename, r"the base model has no place for '.*attention.*' and 5 more weights; load the adapter on the"),
    ],
)
def test_a_weight_without_a_place_is_refused(load, change, message, saved):
    with pytest.raises(UserError, match=message) as refused:
        load(saved(change))
    assert ". " not in str(refused.value), "one sentence"


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(load, dtype, saved):
    with pytest.raises(UserError, match=rf"q_proj\.pera_A\.\w+ has dtype {str(dtype)[6:]}; the weights of an adapter"):
        load(saved(lambda weights: weights.update({KEY: weights[KEY].to(dtype)})))


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_not_finite_are_refused(load, value, dtype, saved):
    def spoil(weights):
        weights[KEY][0, 0] = value
        weights[KEY] = weights[KEY].to(dtype)

    with pytest.raises(UserError, match=r"NaNs detected in the weights of .*q_proj\.pera_A"):
        load(saved(spoil))


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_another_floating_dtype_are_loaded(load, dtype, saved):
    kept = {}

    def cast(weights):
        weights[KEY] = weights[KEY].to(dtype)
        kept[KEY] = weights[KEY].float()

    found = load(saved(cast))
    layer = found.get_submodule(KEY.removesuffix(".pera_A"))
    assert torch.equal(layer.factors(found.active_adapter)[0].float(), kept[KEY])
    assert torch.isfinite(logits(found)).all()


def test_a_buffer_of_whole_numbers_in_a_saved_module_is_loaded(tmp_path):
    model = adapt(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), target_modules=["0"], modules_to_save=["1"])
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), tmp_path)


def test_biases_of_a_saved_module_are_loaded(tmp_path):
    """PEFT saves them twice, under two names."""
    options = {"target_modules": ["0"], "modules_to_save": ["1"], "bias": "all"}
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model, x = adapt(copy.deepcopy(base), **options), torch.randn(2, 4)
    with torch.no_grad():
        model.base_model.model[1].modules_to_save.default.bias.fill_(1.23)
        expected = model(x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(evaluate(PeftModel.from_pretrained(base, tmp_path), x), expected)
