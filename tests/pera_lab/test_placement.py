"""How the base model of a recipe computes attention, and where its layers are."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from pera.errors import UserError
from pera_lab import models, placement
from pera_lab.opening import locate, open_model
from pera_lab.recipe import load_recipe

KEYS = ("model.attn_implementation=eager", "model.device_map=auto")


def weights(run):
    return load_file(run.adapter.path / "adapter_model.safetensors")


def test_every_command_uses_the_attention_and_the_device_map_of_the_run(train_run, tmp_path, pera, monkeypatch):
    run, plain = train_run(tmp_path / "run", *KEYS), train_run(tmp_path / "plain", KEYS[0])
    assert (run.recipe.model.attn_implementation, run.recipe.model.device_map) == ("eager", "auto")
    assert all(torch.equal(weight, weights(plain)[key]) for key, weight in weights(run).items())
    assert open_model(locate(str(run.path)))[0].config._attn_implementation == "eager"

    monkeypatch.setattr("sys.stdin", io.StringIO())
    loaded, load_model = [], models.load_model

    def record(*arguments, **options):
        loaded.append((options["attn_implementation"], options["device_map"]))
        return load_model(*arguments, **options)

    monkeypatch.setattr(models, "load_model", record)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Who is Zoe?", "answer": "Luna"}) + "\n")
    for command in (
        ("evaluate", run.path),
        ("evaluate", run.path, "--base"),
        ("predict", run.path, "--input", "rows.jsonl", "--output", "answers.jsonl"),
        ("inspect", run.path, "--effect"),
        ("chat", run.path),
    ):
        outcome = pera(*command)
        assert outcome.code == 0, outcome.err
    assert loaded == [("eager", "auto")] * 5
    assert pera("merge", run.path, "--output", "merged").code == 0
    assert not [key for key in json.loads((tmp_path / "merged" / "config.json").read_text()) if "attn" in key]


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_a_model_computes_the_attention_that_is_asked_for(kind, tiny_llama):
    model = models.load_model(str(tiny_llama), attn_implementation=kind)
    assert model.config._attn_implementation == kind


def test_keys_that_are_not_set_are_not_written(recipe_file):
    assert load_recipe(str(recipe_file)).model_dump()["model"].keys().isdisjoint({"attn_implementation", "device_map"})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.attn_implementation=flash", ["model.attn_implementation='flash'", "flash_attention_2"]),
        ("model.device_map=cpu", ["model.device_map='cpu'", "auto"]),
        ("model.attn_implementation=flash_attention_2", ["'flash_attention_2'", "not installed", "eager or sdpa"]),
    ],
)
def test_what_this_machine_cannot_do_is_refused(override, words, refused, recipe_file):
    refused("train", recipe_file, override, "--output", "new", words=words)


def test_attention_that_a_model_does_not_support_is_refused(tiny_llama, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    with pytest.raises(UserError, match=r"attn_implementation='sdpa' is not available for .*llama.*: .*; give another"):
        models.load_model(str(tiny_llama), attn_implementation="sdpa")


def test_attention_that_transformers_replaces_is_refused(tiny_llama, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_check_and_adjust_attn_implementation", lambda *_, **__: "eager")
    with pytest.raises(UserError, match=r"'sdpa' is not available .*: transformers uses eager instead"):
        models.load_model(str(tiny_llama), attn_implementation="sdpa")


def test_flex_attention_is_not_trained_on_a_cpu(refused, recipe_file):
    words = ["model.attn_implementation='flex_attention'", "on a CPU", "eager or sdpa"]
    refused("train", recipe_file, "model.attn_implementation=flex_attention", "--output", "new", words=words)


def test_flash_attention_needs_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        placement.check_computed("flash_attention_2", "llama", SimpleNamespace(dtype=dtype))
    with pytest.raises(UserError, match=r"'flash_attention_2' .* is in float32; set model.dtype=bfloat16"):
        placement.check_computed("flash_attention_2", "llama", SimpleNamespace(dtype=torch.float32))
    placement.check_computed("sdpa", "llama", SimpleNamespace(dtype=torch.float32))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_layers_that_do_not_fit_the_accelerators_are_refused(place):
    model = SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": place})
    with pytest.raises(UserError, match=f"device_map='auto' leaves model.layers.1 of 'llama' on the {place}"):
        placement.check_placed("auto", "llama", model)
    placement.check_placed("auto", "llama", SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": 1}))
    placement.check_placed("auto", "llama", SimpleNamespace(hf_device_map={"": "cpu"}))


def test_a_device_map_needs_one_process(tiny_llama, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"model.device_map='auto' .* there are 2 processes; start one"):
        models.load_model(str(tiny_llama), device_map="auto")
