"""Adapters on single parameters: fused experts, and the projection in nn.MultiheadAttention."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import reference
from pera import PeraConfig, UserError, combine, to_lora
from pera.polynomial import delta_weight
from pera.tuner.layers import ParamWrapper
from pera.tuner.saved import saved_factors
from reference import relative_error
from tiny import VOCABULARY, layers, logits, needs_transformers, tokens

CONVERTS = needs_transformers("5.4", "PEFT 0.21 cannot rename the parameters of a LoRA")

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def qwen():
    """Experts as (experts, out, in)."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, **HEADS, moe_intermediate_size=24, num_experts=4)
    return Qwen3MoeForCausalLM(config).eval()


def gpt_oss():
    """Experts as (experts, in, out)."""
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**SIZES, **HEADS, num_local_experts=4)).eval()


class Attention(nn.Module):
    """nn.MultiheadAttention, called by a module of one's own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


@pytest.fixture(params=[qwen, gpt_oss], ids=["out-in", "in-out"])
def make(request):
    """A function that makes a model with fused experts."""
    return request.param


def adapt(model, **options):
    options = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, **options}
    return get_peft_model(model, PeraConfig(r=2, init_weights=False, **options)).eval()


def explicit_delta(layer, name="default"):
    """ΔW of every expert from the reference, in the layout of the parameter."""
    terms, normalization, anchors = layer.expansion[name]
    deltas = []
    for A, B, h in zip(layer.pera_A[name], layer.pera_B[name], layer.pera_h[name], strict=True):
        h_by_pair = reference.by_pair(h, A.shape[0], terms, anchors)
        delta = reference.delta_weight(A, B, h_by_pair, normalization, layer.scaling[name], anchors).detach()
        deltas.append(delta.T if getattr(layer.get_base_layer(), "is_transposed", False) else delta)
    return torch.stack(deltas)


@pytest.mark.parametrize(
    "options", [{}, {"normalization": "rms", "pera_alpha": 3}, {"terms": "square"}, {"terms": "none", "anchors": 3}]
)
def test_forward_is_the_model_with_the_explicit_update(make, options):
    model = make()
    base = logits(model)
    adapted = adapt(model, **options)
    explicit = make()
    for name, layer in layers(adapted).items():
        module = explicit.get_submodule(name.replace(".base_layer", ""))
        with torch.no_grad():
            if isinstance(layer, ParamWrapper):
                getattr(module, layer.parameter_name).add_(explicit_delta(layer))
            else:
                module.weight.add_(layer.get_delta_weight("default"))
    assert relative_error(logits(adapted), base) > 0.1, "the adapter is visible"
    assert relative_error(logits(adapted), logits(explicit)) <= 1e-5
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)


def test_the_start_is_the_base_model_exactly(make):
    model = make()
    base = logits(model)
    config = PeraConfig(r=2, target_modules=[], target_parameters=EXPERTS)
    assert torch.equal(logits(get_peft_model(model, config)), base)


def test_every_expert_has_factors_of_its_own(make):
    adapted = adapt(make())
    found = {
        name: tuple(p.shape) for name, p in adapted.named_parameters() if "layers.0.mlp" in name and "pera_" in name
    }
    down = "base_model.model.model.layers.0.mlp.experts.pera_{}.default"
    up = "base_model.model.model.layers.0.mlp.experts.base_layer.pera_{}.default"
    wide = 48 if make is qwen else 96
    assert found == {
        up.format("A"): (4, 2, 32),
        up.format("B"): (4, wide, 2),
        up.format("h"): (4, 3),
        down.format("A"): (4, 2, wide // 2),
        down.format("B"): (4, 32, 2),
        down.format("h"): (4, 3),
    }


def test_training_moves_every_factor_and_lowers_the_loss(make):
    adapted = adapt(make(), normalization="rms").train()
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) != ("pera_" in name), name


@pytest.mark.parametrize("anchors", [0, 3])
def test_saved_and_loaded_it_gives_equal_logits(make, anchors, tmp_path):
    adapted = adapt(make(), anchors=anchors)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(adapted))
    factors = saved_factors(load_file(tmp_path / "adapter_model.safetensors"), adapted.peft_config["default"])
    assert len(factors) == 2 + 2 * 2 * 4, "an attention layer, and two parameters of four experts, in two layers"
    for name, layer in layers(adapted).items():
        if isinstance(layer, ParamWrapper):
            transposed = getattr(layer.get_base_layer(), "is_transposed", False)
            for i, explicit in enumerate(explicit_delta(layer)):
                update = delta_weight(*factors[f"base_model.model.{name}.{i}"])
                assert relative_error(update, explicit.T if transposed else explicit) <= 1e-12


def test_merge_unmerge_and_unload(make):
    adapted = adapt(make())
    expected = logits(adapted)
    adapted.merge_adapter()
    assert relative_error(logits(adapted), expected) <= 1e-5
    adapted.unmerge_adapter()
    assert relative_error(logits(adapted), expected) <= 1e-5
    merged = adapted.merge_and_unload()
    assert type(merged.model.layers[0].mlp.experts) is type(make().model.layers[0].mlp.experts)
    assert relative_error(logits(merged), expected) <= 1e-5


def test_two_adapters_add_up_and_can_be_deleted(make):
    adapted = adapt(make())
    first = logits(adapted)
    adapted.add_adapter("second", PeraConfig(r=3, init_weights=False, target_modules=[], target_parameters=EXPERTS))
    assert torch.equal(logits(adapted), first)
    adapted.base_model.set_adapter(["default", "second"])
    both = copy.deepcopy(adapted)
    assert relative_error(logits(both.merge_and_unload()), logits(adapted)) <= 1e-5
    adapted.delete_adapter("second")
    assert torch.equal(logits(adapted), first)


@CONVERTS
@pytest.mark.parametrize("anchors", [0, 3])
def test_it_equals_a_lora(make, anchors):
    adapted = adapt(make(), normalization="rms", anchors=anchors)
    expected = logits(adapted)
    assert relative_error(logits(to_lora(adapted)), expected) <= 1e-5


@CONVERTS
def test_two_combined_are_their_weighted_sum(make):
    adapted = adapt(make())
    adapted.add_adapter("second", PeraConfig(r=3, init_weights=False, target_modules=[], target_parameters=EXPERTS))
    adapted.base_model.set_adapter(["default", "second"])
    weights = {"default": 0.5, "second": -2.0}
    for layer in layers(adapted).values():
        for name, weight in weights.items():
            layer.set_scale(name, weight)
    expected = logits(adapted)
    for layer in layers(adapted).values():
        for name in weights:
            layer.set_scale(name, 1.0)
    assert relative_error(logits(adapted), expected) > 1e-3
    assert relative_error(logits(combine(adapted, weights)), expected) <= 1e-5


@needs_transformers("5.4", "torch cannot trace its fused experts")
def test_compiled_it_gives_the_same(make):
    adapted = adapt(make())
    compiled = torch.compile(adapted, backend="aot_eager")
    assert relative_error(logits(compiled), logits(adapted)) <= 1e-5


def test_the_projection_of_multihead_attention():
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        base = model(x)
        adapted = adapt(model, target_modules=["head"], target_parameters=["attention.in_proj_weight"])
        expected = adapted(x)
        assert relative_error(expected, base) > 0.1
        assert relative_error(adapted.merge_and_unload()(x), expected) <= 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.gate_up_prj"]}, "target_parameters: 'experts.gate_up_prj' not found"),
        ({"target_parameters": ["norm.weight"]}, r"'weight' of shape \(32,\) .* cannot be adapted"),
        ({"pera_dropout": 0.1}, "pera_dropout=0.1 cannot apply to 'model.layers.0.mlp.experts.gate_up_proj'"),
        (
            {"rank_pattern": {"gate_up_proj": 4}},
            "rank_pattern: 'gate_up_proj' matches .*, which takes r and pera_alpha",
        ),
        (
            {"layers_to_transform": 0},
            r"layers_to_transform=0 would exclude 'model\.layers\.1\.mlp.* full names",
        ),
        (
            {"exclude_modules": ["0.mlp.experts"]},
            r"exclude_modules=.* would exclude 'model\.layers\.0\.mlp\.experts\.",
        ),
        (
            {"exclude_modules": r".*\.1\..*(down|k)_proj"},
            r"exclude_modules=.* would exclude 'model\.layers\.1\..*down_proj'",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        adapt(qwen(), **options)


def test_modules_may_be_left_out_beside_parameters_named_in_full():
    options = {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"], "layers_to_transform": [1]}
    adapted = adapt(qwen(), target_parameters=["1.mlp.experts.down_proj"], **options)
    assert set(layers(adapted)) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts"}


def test_a_parameter_that_would_be_read_past_the_adapter_is_refused():
    encoder = nn.Sequential(nn.TransformerEncoderLayer(16, 2, batch_first=True))
    with pytest.raises(UserError, match="reads it without calling its module"):
        adapt(encoder, target_modules=[], target_parameters=["self_attn.in_proj_weight"])
    with pytest.raises(UserError, match="reads it without calling its module"):
        adapt(Attention(), target_modules=["head"], target_parameters=["attention.out_proj.weight"])


def test_other_parameters_for_a_second_adapter_are_refused():
    adapted = adapt(qwen())
    with pytest.raises(UserError, match=r"differs from .* of adapter 'default'"):
        adapted.add_adapter("second", PeraConfig(target_modules=[], target_parameters=["experts.down_proj"]))


def test_one_batch_cannot_mix_adapters():
    adapted = adapt(qwen())
    with pytest.raises(UserError, match="with adapters on target_parameters"):
        adapted(input_ids=tokens(), adapter_names=["default", "__base__"])
