"""The kinds of layers that an adapter is looked at by."""

import pytest
from peft import get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import tiny
from pera import PeraConfig
from pera_lab.diagnose import effects, high_order_ratios
from pera_lab.diagnose.kinds import kind

KINDS = {"q_proj", "gate_up_proj", "down_proj"}


@pytest.fixture
def experts():
    """A model with an adapter on fused experts and on a layer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "moe_intermediate_size": 8, "num_experts": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=tiny.VOCABULARY, **sizes, **heads))
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    return get_peft_model(base, PeraConfig(r=2, init_weights=False, **targets)).eval()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj", "q_proj"),
        ("model.layers.0.mlp.experts.1.w1", "w1"),
        ("model.layers.0.mlp.experts.1", "experts"),
        ("model.layers.0.mlp.experts.base_layer.12", "experts"),
        ("matrix", "matrix"),
        ("0", "0"),
    ],
)
def test_the_kind_is_the_last_part_of_the_name_that_says_something(name, expected):
    assert kind(name) == expected


def test_fused_experts_are_of_the_kind_of_their_parameter(experts):
    assert set(high_order_ratios(experts)) == KINDS
    found = effects(experts, [{"input_ids": tiny.tokens(), "labels": tiny.tokens()}])
    assert set(found.without_high_order) == KINDS
