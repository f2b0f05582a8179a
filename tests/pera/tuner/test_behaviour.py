"""Layers that compute something else than their kind are refused, or left out of "all-linear"."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from torch import nn
from torch.nn.functional import dropout, pad
from transformers import FalconConfig, FalconForCausalLM, Llama4ForCausalLM, Llama4TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from pera import PeraConfig, UserError
from reference import relative_error
from tiny import adapt, adapted, evaluate, layers


def subclass(kind, forward):
    """A subclass of ``kind`` with another forward."""
    return type("Other", (kind,), {"forward": forward})


def scaled(kind):
    return subclass(kind, lambda self, x: 2 * kind.forward(self, x))


class Inherits(nn.Linear):
    """A subclass without a forward of its own."""


LINEAR, CONVOLUTION = nn.Linear.forward, nn.Conv1d.forward
OTHERS = {
    "a scaled Linear": lambda: scaled(nn.Linear)(9, 7),
    "a scaled Conv1D": lambda: scaled(Conv1D)(7, 9),
    "a scaled Embedding": lambda: scaled(nn.Embedding)(9, 7),
    "a scaled convolution": lambda: scaled(nn.Conv2d)(2, 7, 3),
    "a clamp": lambda: subclass(nn.Linear, lambda self, x: LINEAR(self, x).clamp(-5, 5))(9, 7),
    "dropout": lambda: subclass(nn.Linear, lambda self, x: dropout(LINEAR(self, x), 0.5, self.training))(9, 7),
    "two outputs": lambda: subclass(nn.Linear, lambda self, x: (LINEAR(self, x), x))(9, 7),
    "indices": lambda: subclass(nn.Linear, lambda self, x: LINEAR(self, x).argmax(-1))(9, 7),
    "a second input": lambda: subclass(nn.Linear, lambda self, x, y: LINEAR(self, x) * y)(9, 7),
    "a causal convolution": lambda: subclass(nn.Conv1d, lambda self, x: CONVOLUTION(self, pad(x, (2, 0))))(2, 7, 3),
    "positions": lambda: OPTLearnedPositionalEmbedding(9, 7),
}
SAME = {
    "an inherited forward": lambda: Inherits(9, 7),
    "the same forward": lambda: subclass(nn.Linear, lambda self, x: x @ self.weight.T + self.bias)(9, 7),
    "a scaled word embedding": lambda: Gemma3TextScaledWordEmbedding(9, 7, 0, 4.0),
    "plain": lambda: nn.Linear(9, 7),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_forward_that_computes_something_else_is_refused(other, device):
    with torch.device(device):
        layer = OTHERS[other]()
    nn.init.zeros_(layer.weight)  # the weight hides the difference
    refusal = r"^target_modules: '0' is a \w+, whose forward is different from .*; leave it out\.$"
    with pytest.raises(UserError, match=refusal):
        adapted(layer)


@pytest.mark.parametrize("same", SAME)
def test_a_forward_that_computes_the_same_is_adapted_and_merges(same):
    layer = adapted(SAME[same]())
    x = torch.arange(9)[None] if isinstance(layer.base_layer, nn.Embedding) else torch.randn(4, 9)
    expected = evaluate(layer, x)
    layer.merge()
    assert relative_error(evaluate(layer, x), expected) <= 1e-6


def test_a_probe_changes_nothing():
    layer = SAME["the same forward"]()
    before, state, attributes = layer.weight.clone(), torch.get_rng_state(), vars(layer).copy()
    adapted(layer, init_weights=True, r=1)
    assert torch.equal(layer.weight, before)
    assert vars(layer).keys() == attributes.keys()
    torch.set_rng_state(state)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    with pytest.raises(UserError):
        adapted(OTHERS["dropout"]())
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_forward_hook(lambda module, args, y: 2 * y),
        lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    ],
)
def test_a_hook_that_changes_the_output_is_refused(register):
    layer = nn.Linear(9, 7)
    register(layer)
    with pytest.raises(UserError, match=r"^target_modules: '0' has a forward hook that changes what it computes"):
        adapted(layer)


def test_a_hook_that_only_looks_is_accepted():
    layer, seen = nn.Embedding(9, 7), []
    layer.register_forward_hook(lambda module, args, y: seen.append(y.requires_grad_(True)))
    adapted(layer)
    assert seen


def replace_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def test_a_replaced_forward_is_refused():
    with pytest.raises(UserError, match=r"^target_modules: '0' has a forward that was replaced, .*; leave it out\.$"):
        adapted(replace_forward(nn.Linear(9, 7)))


def test_the_forward_that_accelerate_replaces_is_the_one_that_counts():
    hook = AlignDevicesHook("cpu", io_same_device=True)
    adapted(add_hook_to_module(nn.Linear(9, 7), hook))
    for layer in (scaled(nn.Linear)(9, 7), replace_forward(nn.Linear(9, 7))):
        with pytest.raises(UserError, match="forward"):
            adapted(add_hook_to_module(layer, hook))


def test_all_linear_leaves_out_what_it_cannot_adapt():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.scaled = nn.Linear(8, 8), scaled(nn.Linear)(8, 8)
            self.attention = nn.MultiheadAttention(8, 2)

    model = Net()
    assert set(layers(adapt(model, target_modules="all-linear"))) == {"plain"}
    with pytest.raises(UserError, match="target_modules='all-linear' finds no linear layer that an adapter fits"):
        adapt(nn.Sequential(scaled(nn.Linear)(8, 8)), target_modules="all-linear")


def test_all_linear_leaves_out_the_router_of_llama_4():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "head_dim": 4, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "num_local_experts": 2}
    model = adapt(Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, pad_token_id=0)), target_modules="all-linear")
    assert {name.rpartition(".")[2] for name in layers(model)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert torch.isfinite(evaluate(model, torch.arange(6)[None]).logits).all()


def test_the_linear_layers_of_falcon_are_adapted():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = get_peft_model(FalconForCausalLM(FalconConfig(**sizes)), PeraConfig(r=2))
    assert list(layers(model)) == ["transformer.h.0.self_attention.query_key_value"]


def test_a_module_that_holds_layers_is_refused_with_their_names():
    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

    model = nn.ModuleDict({"q_proj": Clipped()})
    with pytest.raises(UserError, match=r"'q_proj' is a Clipped, .*; name 'q_proj\.linear' instead\.$"):
        adapt(model, target_modules=["q_proj"])
