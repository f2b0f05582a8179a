"""from_lora: a LoRA becomes an equal PERA adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from pera import PeraConfig, UserError, from_lora, to_lora
from pera.polynomial import num_coefficients
from reference import relative_error
from tiny import KINDS, adapt, evaluate, gpt2, layers, llama, logits, tokens

TIED = {"ensure_weight_tying": True}


def lora(base, **options):
    """A base model with a LoRA whose update is not zero, in evaluation mode."""
    chosen = {"r": 3, "lora_alpha": 7, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
    return get_peft_model(base, LoraConfig(**{**chosen, **options})).eval()


EMBEDDINGS = {"target_modules": ["embed_tokens", "q_proj"]}
LORAS = {
    # name: options of the base, options of the LoRA
    "plain": ({}, {}),
    "rslora": ({}, {"use_rslora": True}),
    "patterns": ({}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}}),
    "one layer": ({}, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "embedding": ({"tie_word_embeddings": False}, EMBEDDINGS),
    "tied embedding": ({"tie_word_embeddings": True}, {**EMBEDDINGS, **TIED}),
    "saved head": ({"tie_word_embeddings": False}, {"modules_to_save": ["lm_head"]}),
    "saved tied head": ({"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"], **TIED}),
    "tokens": ({"tie_word_embeddings": True}, {"trainable_token_indices": [8, 13]}),
    "biases": ({"attention_bias": True}, {"bias": "lora_only"}),
}


@pytest.mark.parametrize(("base", "options"), LORAS.values(), ids=LORAS)
def test_from_lora_gives_the_logits_of_the_lora(base, options, tmp_path):
    model = lora(llama(**base), **options)
    expected = logits(model)
    assert relative_error(expected, logits(llama(**base))) > 1e-3
    converted = from_lora(model)
    assert type(converted.peft_config["default"]) is PeraConfig
    assert [name for name in converted.state_dict() if "lora" in name] == []
    assert relative_error(logits(converted), expected) <= 1e-6
    converted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(**base), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(converted))
    assert relative_error(logits(to_lora(converted)), expected) <= 1e-5


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "grouped"])
def test_from_lora_converts_each_kind_of_layer(kind):
    model = lora(nn.Sequential(KINDS[kind].base()), target_modules=["0"], fan_in_fan_out=kind == "conv1d")
    x = KINDS[kind].input()
    expected = evaluate(model, x)
    assert relative_error(evaluate(from_lora(model), x), expected) <= 1e-6


@pytest.mark.parametrize(("terms", "k"), [("all", 0), ("square", 0), ("cross", 0), ("square", 4), ("none", 4)])
def test_from_lora_adds_coefficients_of_zero_that_training_moves(terms, k):
    before = lora(llama())
    expected = logits(before)
    model = from_lora(before, terms=terms, anchors=k, anchor_seed=min(k, 1))
    assert relative_error(logits(model), expected) <= 1e-6
    model.train()
    h = [layer.pera_h["default"] for layer in layers(model).values()]
    assert [len(one) for one in h] == [num_coefficients(3, terms, k)] * 4
    assert model.peft_config["default"].normalization == ("none" if terms == "none" else "rms")
    assert not any(one.any() for one in h)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens(), labels=tokens()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(one.abs().max() > 1e-3 for one in h)


def test_from_lora_drops_adapters_that_are_not_named():
    model = lora(llama())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    model.set_adapter("second")
    expected = logits(model)
    converted = from_lora(model, ["second"], terms="square", normalization="none")
    assert list(converted.peft_config) == converted.active_adapters == ["second"]
    config = converted.peft_config["second"]
    assert (config.terms, config.normalization) == ("square", "none")
    assert relative_error(logits(converted), expected) <= 1e-6


def test_conversions_keep_the_name_of_the_base_model():
    model = lora(llama())
    model.peft_config["default"].base_model_name_or_path = "name/of-base"
    converted = from_lora(model)
    assert converted.peft_config["default"].base_model_name_or_path == "name/of-base"
    assert to_lora(converted).peft_config["default"].base_model_name_or_path == "name/of-base"


def dilated():
    return lora(nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2)), target_modules=["0"])


def parameter():
    return lora(nn.Sequential(nn.Linear(4, 4)), target_modules=[], target_parameters=["0.weight"])


def merged_lora():
    model = lora(llama())
    model.merge_adapter()
    return model


NOT_PERA = {
    "terms": (lambda: lora(llama()), {"terms": "none"}, "terms='none' leaves no products to train"),
    "nothing to normalize": (
        lambda: lora(llama()),
        {"terms": "none", "anchors": 2, "normalization": "rms"},
        "normalization='rms' has no effect with terms='none'",
    ),
    "rank 1": (lambda: lora(llama(), r=1), {"terms": "cross"}, "r=1 with terms='cross' leaves no products"),
    "PERA": (
        lambda: adapt(gpt2(), target_modules=["c_attn"]),
        {},
        "give a PeftModel with LoRA adapters",
    ),
    "merged": (merged_lora, {}, "adapter 'default' is merged; call unmerge_adapter first"),
    "unknown": (lambda: lora(llama()), {"adapter_names": ["b"]}, "adapter 'b' is not in the model"),
    "DoRA": (lambda: lora(llama(), use_dora=True), {}, "use_dora=True has no counterpart"),
    "PiSSA": (
        lambda: lora(llama(), init_lora_weights="pissa"),
        {},
        "init_lora_weights='pissa' .* changed the base",
    ),
    "centred embedding": (
        lambda: lora(llama(), **EMBEDDINGS),
        {"normalization": "centred"},
        "normalization='centred' is not for embeddings",
    ),
    "parameter": (parameter, {}, r"target_parameters=\['0\.weight'\] cannot be converted; merge the adapter"),
    "dilation": (dilated, {}, r"'0' is a convolution with dilation=\(2, 2\)"),
}


@pytest.mark.parametrize("case", NOT_PERA)
def test_from_lora_refuses_and_leaves_the_model_unchanged(case):
    make, options, message = NOT_PERA[case]
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        from_lora(model, **options)
    assert {name: tensor for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == {}
    assert list(model.state_dict()) == list(before)
