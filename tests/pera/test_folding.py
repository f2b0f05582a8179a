"""Adapters of PEFT's methods are folded into LoRA exactly, or refused with the reason."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, LoraConfig
from peft.utils import PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

from other_methods import FOLDABLE, OF_FULL_RANK, TARGETS, adapter
from pera import UserError, combine, to_lora
from pera.folding import FULL, METHODS, NEVER, check_config, folded_layers
from reference import relative_error
from tiny import llama, logits


def merged_updates(model):
    """ΔW ``(out, in)`` of each adapted layer, as PEFT merges it."""
    base, merged = copy.deepcopy(model).unload(), copy.deepcopy(model).merge_and_unload()
    updates = {}
    for name, layer in merged.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, Conv1D)):
            delta = (layer.weight - base.get_submodule(name).weight).detach()
            if delta.abs().max() > 0:
                transposed = isinstance(layer, (nn.Embedding, Conv1D))
                updates[name] = delta.T if transposed else delta.flatten(1)
    return updates


def check_factors(folded, updates, tolerance=1e-10):
    assert folded.keys() == updates.keys() != set()
    for name, (_, _, A, B) in folded.items():
        assert A.dtype == B.dtype == torch.float64
        assert relative_error(B @ A, updates[name]) <= tolerance, name


@pytest.mark.parametrize("name", FOLDABLE)
def test_the_factors_multiply_to_the_update_that_peft_merges(name):
    options, rank = FOLDABLE[name]
    model = adapter(name, **options)
    folded = folded_layers(model, {"default": 1.0})
    check_factors(folded, merged_updates(model), 1e-6 if name.startswith("DEFT") else 1e-10)  # PEFT's is in float32
    assert max(len(found.A) for found in folded.values()) == rank


@pytest.mark.parametrize("name", FOLDABLE)
def test_the_lora_gives_the_outputs_of_the_adapter(name):
    model = adapter(name, **FOLDABLE[name][0]).float()
    before = logits(model)
    with model.disable_adapter():
        assert relative_error(logits(model), before) > 0.01
    lora = to_lora(model)
    assert isinstance(lora.peft_config["default"], LoraConfig)
    assert relative_error(logits(lora), before) <= 1e-4


@pytest.mark.parametrize("name", OF_FULL_RANK)
def test_an_update_of_full_rank_is_refused_unless_it_may_be_cut(name):
    model = adapter(name, **OF_FULL_RANK[name])
    with pytest.raises(UserError, match="no LoRA of low rank equals it; cut it with pera export --max-rank"):
        folded_layers(model, {"default": 1.0})
    updates = merged_updates(model)
    check_factors(folded_layers(model, {"default": 1.0}, full=True), updates)
    ranks = {layer: torch.linalg.matrix_rank(delta) for layer, delta in updates.items()}
    assert ranks == {layer: min(delta.shape) for layer, delta in updates.items()}


SHAPES = {
    "LOHA": {"r": st.integers(1, 5), "alpha": st.integers(1, 8)},
    "LOKR": {
        "r": st.integers(1, 9),
        "alpha": st.integers(1, 8),
        "decompose_factor": st.sampled_from([-1, 2, 3, 4]),
        "decompose_both": st.booleans(),
    },
    "GRALORA": {"r": st.sampled_from([6, 12]), "gralora_k": st.sampled_from([1, 2, 3]), "hybrid_r": st.integers(0, 2)},
    "HRA": {"r": st.integers(1, 6), "apply_GS": st.booleans()},
    "MISS": {"r": st.integers(1, 6)},
    "ADALORA": {"init_r": st.integers(1, 5), "lora_alpha": st.integers(1, 8), "total_step": st.just(9)},
}


@pytest.mark.parametrize("method", SHAPES)
@given(data=st.data(), sides=st.tuples(st.sampled_from([6, 12, 18]), st.sampled_from([6, 12, 24])))
def test_the_factors_are_exact_for_any_shape_and_rank(method, data, sides):
    options = {key: data.draw(values) for key, values in SHAPES[method].items()}
    model = adapter(method, nn.Sequential(nn.Linear(*sides)), target_modules=["0"], **options)
    check_factors(folded_layers(model, {"default": 1.0}), merged_updates(model), 1e-6)  # PEFT's scale is in float32


KERNELS, BLOCKS = {"use_effective_conv2d": True}, {"target_modules_bd_a": ["0"], "nblocks": 2}
LAYERS = {
    "LoHa, convolution": ("LOHA", lambda: nn.Conv2d(4, 6, (2, 3)), {"r": 2}),
    "LoHa, convolution with kernels of its own": (
        "LOHA",
        lambda: nn.Conv2d(4, 6, (2, 3)),
        {"use_effective_conv2d": True},
    ),
    "LoHa, convolution of one dimension": ("LOHA", lambda: nn.Conv1d(4, 6, 3), {"r": 2, "use_effective_conv2d": True}),
    "LoRA, convolution": ("LORA", lambda: nn.Conv2d(4, 6, 3), {"r": 2, "init_lora_weights": False}),
    "LoRA, embedding": ("LORA", lambda: nn.Embedding(9, 7), {"r": 2, "init_lora_weights": False}),
    "LoRA, Conv1D": ("LORA", lambda: Conv1D(7, 9), {"r": 2, "fan_in_fan_out": True}),
    "VeRA, Conv1D": ("VERA", lambda: Conv1D(7, 9), {"r": 2, "fan_in_fan_out": True}),
    "DEFT, Conv1D": ("DEFT", lambda: Conv1D(7, 9), {"r": 2, "fan_in_fan_out": True}),
    "LoRA of blocks": (
        "LORA",
        lambda: nn.Linear(8, 6),
        {"r": 4, "use_bdlora": BLOCKS},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_other_kinds_of_layers_are_folded(name):
    method, base, options = LAYERS[name]
    model = adapter(method, nn.Sequential(base()), target_modules=["0"], **options)
    check_factors(folded_layers(model, {"default": 1.0}), merged_updates(model), 1e-6)


def test_a_weighted_sum_of_adapters_of_two_ranks_is_exact():
    model = adapter("LOHA", r=2, init_weights=False)
    model.add_adapter("other", LoHaConfig(r=3, target_modules=TARGETS, init_weights=False))
    model.double()
    parts = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        parts[name] = merged_updates(model)
    lora = combine(model, {"default": 2.0, "other": -0.5})
    assert lora.peft_config["combined"].r == 13
    for name, delta in merged_updates(lora).items():
        expected = 2.0 * parts["default"][name] - 0.5 * parts["other"][name]
        assert relative_error(delta, expected) <= 1e-6


def test_what_an_adapter_trains_besides_its_factors_is_kept():
    model = adapter("LOHA", r=2, init_weights=False, modules_to_save=["lm_head"]).float()
    before = logits(model)
    lora = to_lora(model)
    assert lora.peft_config["default"].modules_to_save == ["lm_head"]
    assert relative_error(logits(lora), before) <= 1e-4


def test_every_method_of_peft_is_folded_or_refused_with_a_reason():
    decided = [*METHODS, *FULL, *NEVER]
    assert sorted(decided) == sorted(kind.value for kind in PeftType)


@pytest.mark.parametrize("method", NEVER)
def test_a_method_that_is_no_update_of_weights_is_refused(method):
    with pytest.raises(UserError, match=f"this {method} adapter .*, which cannot become a LoRA"):
        check_config(SimpleNamespace(peft_type=method))


MORE = {
    # method: options, what the message says
    "LORA, biases": ({"lora_bias": True}, "this LORA adapter also trains biases"),
    "LORA, invocation": ({"alora_invocation_tokens": [3]}, "this LORA adapter is of the variant ALora"),
    "LORA, initialization": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' also changed the base model"),
    "ADAMSS": ({"r": 4, "num_subspaces": 2}, "this ADAMSS adapter also changes biases"),
    "PVERA": ({"r": 2, "sample_at_inference": True}, "this PVERA adapter draws random numbers at inference"),
}


@pytest.mark.parametrize("name", MORE)
def test_an_adapter_that_is_more_than_its_factors_is_refused(name):
    options, message = MORE[name]
    model = adapter(name, llama(attention_bias=True), **options)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        to_lora(model)
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


def test_an_update_that_also_changes_biases_cannot_be_cut_either():
    model = adapter("IA3", llama(attention_bias=True), feedforward_modules=["down_proj"])
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.normal_(layer.bias)
    with pytest.raises(UserError, match="this IA3 adapter also changes biases"):
        folded_layers(model, {"default": 1.0}, full=True)
