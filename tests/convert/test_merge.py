"""A merged model is one plain model that answers as base and adapter do."""

import json

import pytest
import torch
from peft import DeloraConfig, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pera import PeraConfig
from pera.convert.merge import merge
from pera.errors import UserError
from reference import relative_error


def test_a_trained_run_is_merged_and_checked_on_its_own_task(finished_run, tiny_llama, tmp_path, unmerged, logits):
    agreement = merge(str(finished_run.path), tmp_path / "merged")
    assert agreement.agree
    adapted = logits(unmerged(tiny_llama, finished_run.adapter))
    assert (adapted - logits(tiny_llama)).abs().max() > 0.1
    assert (adapted - logits(tmp_path / "merged")).abs().max() < 1e-5
    record = json.loads((tmp_path / "merged" / "verification.json").read_text())
    assert record == {
        "of": "merged model",
        "against": str(finished_run.path),
        "agree": True,
        "prompts": 6,
        "tokens": agreement.tokens,
        "max_difference": agreement.max_difference,
        "tolerance": 1e-3,
        "dtype": "float32",
        "near_ties": agreement.near_ties,
        "same_top1": 1.0,
        "kl_divergence": agreement.kl_divergence,
    }


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
    for config in (LoraConfig(r=2, init_lora_weights=False), DeloraConfig(r=2, init_weights=False)):
        config.target_modules, config.task_type = {"q_proj"}, "CAUSAL_LM"
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
        folder = tmp_path / type(config).__name__
        model.save_pretrained(folder)
        assert merge(str(folder), folder / "merged").agree
        assert (logits(model) - logits(folder / "merged")).abs().max() < 1e-5


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
