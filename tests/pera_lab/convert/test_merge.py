"""A merged model is one plain model that answers as base and adapter do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, DeloraConfig, KasaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Lfm2Config,
    MambaConfig,
    TorchAoConfig,
)

from pera import PeraConfig
from pera.errors import UserError
from pera_lab.convert.export import export
from pera_lab.convert.merge import merge
from pera_lab.convert.verify import verify
from reference import relative_error


def test_a_trained_run_is_merged_and_checked_on_its_own_task(
    finished_run, tiny_llama, tmp_path, unmerged, logits, stored
):
    agreement = merge(str(finished_run.path), tmp_path / "merged")
    assert agreement.agree
    adapted = logits(unmerged(tiny_llama, finished_run.adapter.path))
    assert (adapted - logits(tiny_llama)).abs().max() > 0.1
    assert (adapted - logits(tmp_path / "merged")).abs().max() < 1e-5
    record = json.loads((tmp_path / "merged" / "verification.json").read_text())
    assert record == stored(agreement, "merged model", finished_run.path)


def test_the_merged_model_is_built_as_the_base_is(finished_run, tiny_llama, tmp_path):
    merge(str(finished_run.path), tmp_path / "merged")
    merged, base = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", tiny_llama))
    assert {key: (w.shape, w.dtype) for key, w in merged.items()} == {
        key: (w.shape, w.dtype) for key, w in base.items()
    }
    changed = {key.split(".")[-2] for key, w in merged.items() if not torch.equal(w, base[key])}
    assert changed == {"q_proj", "v_proj", "up_proj", "down_proj"}
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "merged", tiny_llama)]
    assert configs[0] == configs[1]
    text = "How is Liam related to Zoe?"
    tokens = [AutoTokenizer.from_pretrained(path)(text).input_ids for path in (tmp_path / "merged", tiny_llama)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("tiny_llama", {"normalization": "rms", "rank_pattern": {"v_proj": 2}, "pera_alpha": 5, "use_rslora": True}),
        ("tiny_llama", {"target_modules": ["lm_head"], "terms": "square"}),
        ("tiny_llama", {"modules_to_save": ["lm_head"], "coefficients": "fixed"}),
        ("biased_llama", {"bias": "all"}),
        ("tiny_gpt2", {"target_modules": ["c_attn", "c_fc"], "normalization": "rms"}),
        ("tied_llama", {"normalization": "rms"}),
    ],
)
def test_the_merged_model_gives_the_logits_of_the_adapter(base, options, request, save_adapter, tmp_path, logits):
    base = request.getfixturevalue(base)
    adapted = logits(save_adapter(tmp_path / "adapter", base, **options))
    agreement = merge(str(tmp_path / "adapter"), tmp_path / "merged")
    effect = (adapted - logits(base)).abs().max()
    assert agreement.agree
    assert effect > 0.1
    assert (adapted - logits(tmp_path / "merged")).abs().max() < 1e-5 * max(1, effect)


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [("bfloat16", "stored", "bfloat16"), ("bfloat16", "float32", "float32"), ("float32", "bfloat16", "bfloat16")],
)
def test_the_base_decides_the_dtype_unless_told_otherwise(stored, dtype, expected, save_llama, save_adapter, tmp_path):
    base = save_llama(tmp_path / "base", dtype=getattr(torch, stored), tie_word_embeddings=False)
    save_adapter(tmp_path / "adapter", base)
    agreement = merge(str(tmp_path / "adapter"), tmp_path / "merged", dtype=dtype)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {getattr(torch, expected)}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == expected
    assert agreement.dtype == expected


def test_an_addition_to_bfloat16_weights_is_rounded_once(save_llama, save_adapter, tmp_path):
    base = save_llama(tmp_path / "base", dtype=torch.bfloat16, tie_word_embeddings=False)
    adapted = save_adapter(tmp_path / "adapter", base)
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    key = "model.layers.0.self_attn.q_proj"
    delta = adapted.get_submodule(f"base_model.model.{key}").get_delta_weight("default").detach().float()
    assert torch.equal(after[f"{key}.weight"], (before[f"{key}.weight"].float() + delta).bfloat16())


def test_a_base_in_float64_is_merged_too(save_llama, save_adapter, tmp_path):
    base = save_llama(tmp_path / "base", dtype=torch.float64, tie_word_embeddings=False)
    save_adapter(tmp_path / "adapter", base)
    assert merge(str(tmp_path / "adapter"), tmp_path / "merged").agree


def test_adapters_of_other_methods_are_merged_too(tiny_llama, tmp_path, logits):
    adalora = AdaLoraConfig(init_r=2, total_step=10, init_lora_weights=False)
    for config in (LoraConfig(r=2, init_lora_weights=False), adalora, DeloraConfig(r=2, init_weights=False)):
        config.target_modules, config.task_type = {"q_proj"}, "CAUSAL_LM"
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
        folder = tmp_path / type(config).__name__
        model.save_pretrained(folder)
        assert merge(str(folder), folder / "merged").agree
        assert relative_error(logits(folder / "merged"), logits(model)) <= 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_an_initialisation_took_from_the_base_is_not_added_again(init, tiny_llama, tmp_path, logits):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(str(tmp_path / "adapter"), tmp_path / "merged").agree
    assert relative_error(logits(tmp_path / "merged"), logits(model)) <= 1e-4
    assert relative_error(logits(tiny_llama), logits(model)) > 1e-2


VARIANTS = {"bias": {"lora_bias": True}, "DoRA": {"use_dora": True}, "KaSA": {"kasa_config": KasaConfig()}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_are_merged(variant, biased_llama, tmp_path, logits):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **VARIANTS[variant])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(biased_llama), config)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(str(tmp_path / "adapter"), tmp_path / "merged").agree
    assert relative_error(logits(tmp_path / "merged"), logits(model)) <= 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_bias": True}, r"the base layer has no bias\.$"),
        ({"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, r"aLoRA does not support safe merging\.$"),
    ],
    ids=["bias", "aLoRA"],
)
def test_a_variant_of_lora_that_weights_cannot_take_is_refused(options, words, tiny_llama, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"cannot be merged: .*{words}") as error:
        merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_is_no_change_of_weights_is_refused(tiny_llama, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match="prompt"):
        merge(str(tmp_path / "prompt"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "config",
    [
        PeraConfig(r=2, target_modules=["q_proj", "lm_head"], init_weights=False),
        PeraConfig(r=2, target_modules=["embed_tokens"], init_weights=False),
        PeraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_weights=False),
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
        LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False),
    ],
    ids=lambda config: f"{config.peft_type.value} {sorted(config.target_modules)}",
)
def test_a_shared_weight_is_separated_where_the_adapter_is_on_one_side(config, tied_llama, tmp_path, logits):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tied_llama), config)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="the base weight was shared with another layer"):
        assert merge(str(tmp_path / "adapter"), tmp_path / "merged").agree
    assert relative_error(logits(tmp_path / "merged"), logits(adapted)) <= 1e-5
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


def test_a_shared_weight_stays_one_where_the_adapter_is_one(tied_llama, tmp_path, logits):
    targets = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    config = PeraConfig(r=2, init_weights=False, **targets)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tied_llama), config)
    adapted.save_pretrained(tmp_path / "adapter")
    assert merge(str(tmp_path / "adapter"), tmp_path / "merged").agree
    assert relative_error(logits(tmp_path / "merged"), logits(adapted)) <= 1e-5
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("key", ["pera_A", "pera_B", "pera_h", "lm_head"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(key, value, save_adapter, tiny_llama, tmp_path, change_weights):
    save_adapter(tmp_path / "adapter", tiny_llama, modules_to_save=["lm_head"])

    def spoil(weights):
        next(w for name, w in weights.items() if key in name).view(-1)[0] = value
        return weights

    change_weights(tmp_path / "adapter" / "adapter_model.safetensors", spoil)
    with pytest.raises(UserError, match=r"adapter.*NaNs detected"):
        merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_that_differs_is_kept_and_says_so(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("pera.tuner.PeraLayer.merge", lambda layer, safe_merge: None)
    agreement = merge(str(adapter), tmp_path / "merged")
    assert not agreement.agree
    record = json.loads((tmp_path / "merged" / "verification.json").read_text())
    assert record["agree"] is False
    assert record["max_difference"] == agreement.max_difference > 0.1


@pytest.fixture
def sharded(tiny_llama, tmp_path):
    """Folder of the tiny LLaMA in several files."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


@pytest.mark.parametrize("dtype", ["stored", "bfloat16", "float16"])
def test_a_sharded_base_is_merged_file_by_file(dtype, sharded, save_adapter, tmp_path, logits, monkeypatch):
    monkeypatch.setattr("pera_lab.convert.merge.open_model", None)  # never loaded as a whole
    expected = logits(save_adapter(tmp_path / "adapter", sharded, target_modules=["q_proj", "down_proj", "lm_head"]))
    assert merge(str(tmp_path / "adapter"), tmp_path / "merged", dtype=dtype).agree
    files = [{file.name for file in folder.glob("*.safetensors*")} for folder in (sharded, tmp_path / "merged")]
    assert files[0] == files[1]
    assert len(files[0]) > 3
    index = [
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (sharded, tmp_path / "merged")
    ]
    assert index[0]["weight_map"] == index[1]["weight_map"]
    found = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        found |= load_file(file)
    assert index[1]["metadata"]["total_size"] == sum(weight.nbytes for weight in found.values())
    stored = "float32" if dtype == "stored" else dtype
    assert {weight.dtype for weight in found.values()} == {getattr(torch, stored)}
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["max_new_tokens"] == 7
    if dtype == "stored":
        assert (logits(tmp_path / "merged") - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2, "pad_token_id": 2, "eos_token_id": 1}
READERS = {
    "Mamba": (MambaConfig(state_size=4, **SMALL), ["in_proj"]),
    "LFM2": (
        Lfm2Config(
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
            **SMALL,
        ),
        ["in_proj", "q_proj"],
    ),
}
"""Models of which a module reads the weight of one within it."""


@pytest.mark.parametrize("name", READERS)
def test_a_module_may_read_the_weights_within_it(name, tokenizer, save_adapter, tmp_path, logits, monkeypatch):
    monkeypatch.setattr("pera_lab.convert.merge.open_model", None)  # never loaded as a whole
    config, targets = READERS[name]
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    expected = logits(save_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=targets))
    assert merge(str(tmp_path / "adapter"), tmp_path / "merged").agree
    assert relative_error(logits(tmp_path / "merged"), expected) <= 1e-5
    assert relative_error(logits(tmp_path / "base"), expected) > 1e-2


def test_a_sum_beyond_the_range_of_float16_is_refused(tiny_llama, save_adapter, change_weights, tmp_path):
    save_adapter(tmp_path / "adapter", tiny_llama)

    def enlarge(weights):
        return {key: weight * 1e4 if "pera_B" in key else weight for key, weight in weights.items()}

    change_weights(tmp_path / "adapter" / "adapter_model.safetensors", enlarge)
    with pytest.raises(UserError, match=r"q_proj.weight is beyond the range of float16; try bfloat16"):
        merge(str(tmp_path / "adapter"), tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()


KILLED = """
import os, signal, sys
import pera_lab.convert.merge as merging
save, saved = merging.save_file, []
def save_or_die(*arguments, **options):
    if len(saved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    saved.append(save(*arguments, **options))
merging.save_file = save_or_die
merging.merge(*sys.argv[1:2], merging.Path(sys.argv[2]))
"""


def test_a_merge_that_is_killed_leaves_no_folder_that_looks_complete(sharded, save_adapter, python, tmp_path):
    save_adapter(tmp_path / "adapter", sharded)
    killed = python(KILLED, tmp_path / "adapter", tmp_path / "merged", check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "merged").exists()
    (left,) = tmp_path.glob("merged.partial-*")
    assert len(list(left.glob("*.safetensors"))) == 2
    assert not (left / "config.json").exists()
    assert not (left / "model.safetensors.index.json").exists()
    assert merge(str(tmp_path / "adapter"), tmp_path / "merged").agree


def test_a_base_that_is_not_the_one_of_the_run_is_refused_with_both_names(run, tmp_path, change_weights, tiny_llama):
    """The folder that the run names has another model in it by now."""
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    change_weights(other / "model.safetensors", lambda w: {key: weight + 0.5 for key, weight in w.items()})
    run.recipe_file.write_text(run.recipe_file.read_text().replace(str(tiny_llama), str(other)))
    words = rf"was trained on '{tiny_llama}' with fingerprint \w+, but the base model '{other}' has fingerprint \w+"
    for attempt in (merge, export):
        with pytest.raises(UserError, match=words):
            attempt(str(run.path), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_dequantised_on_request_alone(tiny_llama, save_adapter, tmp_path, logits):
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, device_map="cpu")
    base.save_pretrained(tmp_path / "quantised")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "quantised")
    del base
    expected = logits(save_adapter(tmp_path / "adapter", tmp_path / "quantised"))
    with pytest.raises(UserError, match=r"sits on a quantised base, .* dequantise it first with --dequantise"):
        merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert merge(str(tmp_path / "adapter"), tmp_path / "merged", dequantised=True).agree
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (logits(tmp_path / "merged") - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


def test_a_classifier_on_a_quantised_base_is_dequantised_with_its_head(tiny_llama, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, device_map="cpu")
    base.save_pretrained(tmp_path / "quantised")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "quantised")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "quantised", num_labels=3)
    config = PeraConfig(r=2, target_modules=["q_proj"], init_weights=False, task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert merge(str(tmp_path / "adapter"), tmp_path / "merged", dequantised=True).agree
    assert load_file(tmp_path / "merged" / "model.safetensors")["score.weight"].shape == (3, 32)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def own_code(model, folder, monkeypatch):
    """A copy of a LLaMA that comes with code of its own."""
    base = shutil.copytree(model, folder)
    config = json.loads((base / "config.json").read_text())
    code = {"AutoConfig": "code_of_its_own.OwnConfig", "AutoModelForCausalLM": "code_of_its_own.Own"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": code}))
    (base / "code_of_its_own.py").write_text(CODE)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
    return base


def test_a_model_with_code_of_its_own_is_merged_in_memory_if_it_is_trusted(run, tiny_llama, tmp_path, monkeypatch):
    base = own_code(tiny_llama, tmp_path / "base", monkeypatch)
    recipe = run.recipe_file.read_text().replace(str(tiny_llama), str(base))
    run.recipe_file.write_text(recipe.replace("trust_remote_code: false", "trust_remote_code: true"))
    monkeypatch.setattr("pera_lab.convert.merge._streamed", lambda *_: None)
    assert merge(str(run.path), tmp_path / "merged").agree


def test_code_is_trusted_at_a_word_where_there_is_no_recipe(tiny_llama, adapter, tmp_path, monkeypatch):
    base = own_code(tiny_llama, tmp_path / "base", monkeypatch)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    with pytest.raises(UserError, match=r"needs its own code to load; .*--trust-remote-code"):
        merge(str(adapter), tmp_path / "merged")
    assert merge(str(adapter), tmp_path / "merged", trust_remote_code=True).agree
    assert verify(str(adapter), str(tmp_path / "merged"), trust_remote_code=True).agree


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", None])
def test_the_tokenizer_of_the_adapter_goes_with_it(template, streamed, adapter, tiny_llama, tmp_path, monkeypatch):
    own = AutoTokenizer.from_pretrained(tiny_llama)
    own.chat_template, own.model_max_length = template, 77
    own.save_pretrained(adapter)
    if not streamed:
        monkeypatch.setattr("pera_lab.convert.merge._streamed", lambda *_: None)
    assert merge(str(adapter), tmp_path / "merged").agree
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (merged.chat_template, merged.model_max_length) == (template, 77)
    assert (tmp_path / "merged" / "generation_config.json").is_file()


@pytest.mark.parametrize("base", ["tiny_llama", "tied_llama", "tiny_gpt2"])
@pytest.mark.parametrize("further", [{}, {"trainable_token_indices": [5]}, {"modules_to_save": ["HEAD"]}])
def test_an_adapter_with_more_tokens_than_its_base_is_merged(
    further, base, request, save_adapter, own_tokenizer, tmp_path, logits
):
    targets = ["c_attn"] if base == "tiny_gpt2" else ["q_proj", "v_proj"]
    if further == {"modules_to_save": ["HEAD"]}:
        further = {"modules_to_save": ["wte" if base == "tiny_gpt2" else "embed_tokens", "lm_head"]}
    folder = request.getfixturevalue(base)
    adapted = save_adapter(tmp_path / "adapter", folder, own_tokenizer, target_modules=targets, **further)
    assert merge(str(tmp_path / "adapter"), tmp_path / "merged").agree
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == len(own_tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path / "merged"))
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-4
    assert verify(str(tmp_path / "adapter"), str(tmp_path / "merged")).agree


def test_more_tokens_of_which_the_rows_were_not_saved_are_refused(save_adapter, own_tokenizer, tiny_llama, tmp_path):
    save_adapter(tmp_path / "adapter", tiny_llama, own_tokenizer, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(
        UserError, match=r"trained with 402 tokens, but its base model has 400 .* lack 'lm_head.weight'"
    ):
        merge(str(tmp_path / "adapter"), tmp_path / "merged")
    save_adapter(tmp_path / "other", tiny_llama)
    own_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"has a tokenizer of 402 tokens, but the model embeds 400; save"):
        verify(str(tmp_path / "other"), str(tmp_path / "other"))


def test_a_plain_base_is_not_dequantised(adapter, tmp_path):
    with pytest.raises(UserError, match=r"--dequantise: the base of .* is not quantised"):
        merge(str(adapter), tmp_path / "merged", dequantised=True)


LARGE = """
import re, sys, json
from pathlib import Path
from pera_lab.convert.merge import merge
agreement = merge(sys.argv[1], Path(sys.argv[2]))
status = Path("/proc/self/status").read_text()  # ru_maxrss would be that of the process that started this one
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
print(json.dumps({"agree": agreement.agree, "difference": agreement.max_difference, "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="measures memory as Linux tells it")
def test_several_gigabytes_are_merged_in_less_than_three_shards_of_memory(save_llama, python, tmp_path):
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 4}
    shape = {**sizes, "num_hidden_layers": 16, "tie_word_embeddings": False, "initializer_range": 0.02}
    config = PeraConfig(r=8, target_modules="all-linear", normalization="rms", init_weights=False)
    base = save_llama(tmp_path / "base", **shape)  # in files of transformers' choice
    model = AutoModelForCausalLM.from_pretrained(base)
    shutil.rmtree(base)
    model.save_pretrained(base, max_shard_size="1GB")
    save_llama(tmp_path / "tokenizer")
    AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(base)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "pera_B" in name:
                parameter.mul_(0.01)
    adapted.save_pretrained(tmp_path / "adapter")
    del model, adapted
    shards = [file.stat().st_size for file in base.glob("*.safetensors")]
    done = json.loads(python(LARGE, tmp_path / "adapter", tmp_path / "merged").stdout.splitlines()[-1])
    print(f"\n{sum(shards) / 1e9:.1f} GB in {len(shards)} shards of at most {max(shards) / 1e9:.2f} GB: {done}")
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "merged")
    assert done["agree"]
    assert sum(shards) > 3e9
    assert done["peak"] < 3 * max(shards)
