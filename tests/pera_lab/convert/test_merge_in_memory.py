"""Adapters that cannot be merged file by file are merged in memory."""

import json
import shutil

import pytest
import torch
from peft import AdaLoraConfig, DeloraConfig, KasaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TorchAoConfig

from pera import PeraConfig
from pera.errors import UserError
from pera_lab.convert.merge import merge
from pera_lab.convert.verify import verify
from pera_lab.opening import locate_adapter
from reference import relative_error


def test_adapters_of_other_methods_are_merged_too(tiny_llama, tmp_path, logits):
    adalora = AdaLoraConfig(init_r=2, total_step=10, init_lora_weights=False)
    for config in (LoraConfig(r=2, init_lora_weights=False), adalora, DeloraConfig(r=2, init_weights=False)):
        config.target_modules, config.task_type = {"q_proj"}, "CAUSAL_LM"
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
        folder = tmp_path / type(config).__name__
        model.save_pretrained(folder)
        assert merge(locate_adapter(str(folder)), folder / "merged").agree
        assert relative_error(logits(folder / "merged"), logits(model)) <= 1e-5


def test_an_initialization_that_changes_the_base_is_merged(tiny_llama, merge_adapter, tmp_path, logits):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    assert merge_adapter().agree
    assert relative_error(logits(tmp_path / "merged"), logits(model)) <= 1e-4
    assert relative_error(logits(tiny_llama), logits(model)) > 1e-2


VARIANTS = {"bias": {"lora_bias": True}, "DoRA": {"use_dora": True}, "KaSA": {"kasa_config": KasaConfig()}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_are_merged(variant, biased_llama, merge_adapter, tmp_path, logits):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **VARIANTS[variant])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(biased_llama), config)
    model.save_pretrained(tmp_path / "adapter")
    assert merge_adapter().agree
    assert relative_error(logits(tmp_path / "merged"), logits(model)) <= 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_bias": True}, r"the base layer has no bias\.$"),
        ({"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, r"aLoRA does not support safe merging\.$"),
    ],
    ids=["bias", "aLoRA"],
)
def test_a_variant_of_lora_that_cannot_be_merged_is_rejected(options, words, tiny_llama, merge_adapter, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"cannot be merged: .*{words}") as error:
        merge_adapter()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "config",
    [
        PeraConfig(r=2, target_modules=["q_proj", "lm_head"], init_weights=False),
        PeraConfig(r=2, target_modules=["embed_tokens"], init_weights=False),
        PeraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_weights=False),
        LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False),
    ],
    ids=lambda config: f"{config.peft_type.value} {sorted(config.target_modules)}",
)
def test_a_shared_weight_is_separated_if_its_layers_have_different_adapters(
    config, tied_llama, merge_adapter, tmp_path, logits
):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tied_llama), config)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="the weight was shared with another layer"):
        assert merge_adapter().agree
    assert relative_error(logits(tmp_path / "merged"), logits(adapted)) <= 1e-5
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


def test_a_shared_weight_stays_shared_if_its_layers_share_the_adapter(tied_llama, merge_adapter, tmp_path, logits):
    targets = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    config = PeraConfig(r=2, init_weights=False, **targets)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tied_llama), config)
    adapted.save_pretrained(tmp_path / "adapter")
    assert merge_adapter().agree
    assert relative_error(logits(tmp_path / "merged"), logits(adapted)) <= 1e-5
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


def test_a_quantised_base_is_dequantised_only_on_request(tiny_llama, save_adapter, merge_adapter, tmp_path, logits):
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, device_map="cpu")
    base.save_pretrained(tmp_path / "quantised")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "quantised")
    del base
    expected = logits(save_adapter(tmp_path / "adapter", tmp_path / "quantised"))
    with pytest.raises(UserError, match=r"the base of .*, is quantised, .*; add --dequantise"):
        merge_adapter()
    assert not (tmp_path / "merged").exists()
    assert merge_adapter(dequantised=True).agree
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (logits(tmp_path / "merged") - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


def test_a_classifier_on_a_quantised_base_is_merged_with_its_head(tiny_llama, merge_adapter, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, device_map="cpu")
    base.save_pretrained(tmp_path / "quantised")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "quantised")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "quantised", num_labels=3)
    config = PeraConfig(r=2, target_modules=["q_proj"], init_weights=False, task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert merge_adapter(dequantised=True).agree
    assert load_file(tmp_path / "merged" / "model.safetensors")["score.weight"].shape == (3, 32)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def own_code(model, folder, monkeypatch):
    """A copy of a LLaMA that comes with its own code."""
    base = shutil.copytree(model, folder)
    config = json.loads((base / "config.json").read_text())
    code = {"AutoConfig": "code_of_its_own.OwnConfig", "AutoModelForCausalLM": "code_of_its_own.Own"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": code}))
    (base / "code_of_its_own.py").write_text(CODE)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
    return base


def test_a_model_with_its_own_code_is_merged_in_memory_only_if_the_user_trusts_it(
    run, tiny_llama, tmp_path, monkeypatch
):
    base = own_code(tiny_llama, tmp_path / "base", monkeypatch)
    recipe = run.recipe_file.read_text().replace(str(tiny_llama), str(base))
    run.recipe_file.write_text(recipe.replace("trust_remote_code: false", "trust_remote_code: true"))
    monkeypatch.setattr("pera_lab.convert.merge._stream", lambda *_: None)
    with pytest.raises(UserError, match="needs its own code to load"):
        merge(locate_adapter(str(run.path)), tmp_path / "merged")
    assert merge(locate_adapter(str(run.path), trust_remote_code=True), tmp_path / "merged").agree


def test_code_is_trusted_on_request_without_a_recipe(tiny_llama, adapter, tmp_path, monkeypatch):
    base = own_code(tiny_llama, tmp_path / "base", monkeypatch)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    with pytest.raises(UserError, match=r"needs its own code to load; .*--trust-remote-code"):
        merge(locate_adapter(str(adapter)), tmp_path / "merged")
    assert merge(locate_adapter(str(adapter), trust_remote_code=True), tmp_path / "merged").agree
    assert verify(str(adapter), str(tmp_path / "merged"), trust_remote_code=True).agree


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("tiny_llama", {}),
        ("tied_llama", {"trainable_token_indices": [5]}),
        ("tiny_gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]}),
    ],
)
def test_an_adapter_with_more_tokens_than_its_base_is_merged(
    base, options, request, save_adapter, own_tokenizer, merge_adapter, tmp_path, logits
):
    folder = request.getfixturevalue(base)
    adapted = save_adapter(tmp_path / "adapter", folder, own_tokenizer, **options)
    assert merge_adapter().agree
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == len(own_tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path / "merged"))
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-4
    assert verify(str(tmp_path / "adapter"), str(tmp_path / "merged")).agree


def test_more_tokens_whose_rows_were_not_saved_are_rejected(
    save_adapter, own_tokenizer, tiny_llama, merge_adapter, tmp_path
):
    save_adapter(tmp_path / "adapter", tiny_llama, own_tokenizer, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(
        UserError, match=r"trained with 402 tokens, but its base model has 400 .* lack 'lm_head.weight'"
    ):
        merge_adapter()
    save_adapter(tmp_path / "other", tiny_llama)
    own_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"has a tokenizer of 402 tokens, but the model embeds 400; save"):
        verify(str(tmp_path / "other"), str(tmp_path / "other"))


def test_dequantise_is_rejected_for_a_plain_base(adapter, tmp_path):
    with pytest.raises(UserError, match=r"--dequantise: the base of .* is not quantised"):
        merge(locate_adapter(str(adapter)), tmp_path / "merged", dequantised=True)
