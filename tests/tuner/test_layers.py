"""The adapted layers: forward, merge, scale, dropout, and the kept expansion."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from pera import PeraConfig, UserError, pera_linear
from pera.tuner import PeraConv1DLinear, PeraLinear
from pera.tuner.layers import base as layers_base
from pera.tuner.layers import layer_class
from reference import COEFFICIENTS, NORMALIZATIONS, TERMS, relative_error
from tiny import adapt, linear, reference_delta, reference_output

RMS = {"normalization": "rms"}


def conv1d(**options):
    """One adapted ``Conv1D`` of 9 inputs and 7 outputs."""
    base = Conv1D(7, 9)
    nn.init.normal_(base.bias)
    return adapt(nn.Sequential(base), target_modules=["0"], **options).base_model.model[0]


KINDS = {"linear": linear, "conv1d": conv1d}


@pytest.fixture(params=KINDS)
def kind(request):
    """A function that makes one adapted layer of a kind."""
    return KINDS[request.param]


def evaluate(layer, x):
    with torch.no_grad():
        return layer(x)


# Kinds


def test_each_kind_of_base_layer_has_its_adapted_layer():
    assert type(linear()) is layer_class(nn.Linear(2, 3)) is PeraLinear
    assert type(conv1d()) is layer_class(Conv1D(3, 2)) is PeraConv1DLinear
    assert layer_class(nn.Embedding(2, 3)) is None
    assert layer_class(nn.Conv2d(2, 3, 1)) is None


def test_a_projection_that_is_never_called_is_refused():
    """nn.MultiheadAttention would ignore the adapter without a word."""
    attention = nn.MultiheadAttention(8, 2)
    assert layer_class(attention.out_proj) is None


def test_a_rank_above_a_side_is_a_warning():
    with pytest.warns(UserWarning, match=r"r=8 is above a side of a \(7, 9\) weight"):
        linear(r=8)


def test_a_layer_says_what_it_is(kind):
    assert repr(kind()).startswith("pera.Pera")


# Parameters


@pytest.mark.parametrize(("terms", "count"), [("all", 10), ("square", 4), ("cross", 6), ("none", None)])
def test_parameters_have_the_settled_shapes(kind, terms, count):
    layer = kind(r=4, terms=terms)
    assert layer.pera_A["default"].shape == (4, 9)
    assert layer.pera_B["default"].shape == (7, 4)
    assert ("default" in layer.pera_h) == (count is not None)
    if count is not None:
        assert layer.pera_h["default"].shape == (count,)


@pytest.mark.parametrize("terms", TERMS)
def test_fixed_coefficients_are_no_parameters(kind, terms):
    layer = kind(terms=terms, coefficients="fixed")
    assert not layer.pera_h
    assert (
        layer.coefficients("default").tolist()
        == {
            "all": [1, 1, 1, 2, 2, 2],
            "square": [1, 1, 1],
            "cross": [2, 2, 2],
            "none": [],
        }[terms]
    )


def test_initialisation_is_that_of_the_paper(kind):
    layer = kind(r=4, init_weights=True, init_coefficients=0.3)
    A = layer.pera_A["default"]
    assert A.abs().max() <= 9**-0.5
    assert A.std() > 0.1
    assert not layer.pera_B["default"].any()
    assert (layer.pera_h["default"] == 0.3).all()
    assert not kind(r=4, init_weights=True).pera_h["default"].any()
    assert not layer.get_delta_weight("default").any()


def test_init_weights_false_is_not_the_identity(kind):
    layer = kind(init_weights=False)
    assert layer.get_delta_weight("default").abs().max() > 1e-3
    assert layer.pera_h["default"].all()


def test_an_adapter_that_is_not_there_is_named():
    with pytest.raises(UserError, match="adapter 'other' is not on this layer; it has: default"):
        linear().get_delta_weight("other")


# Forward and the update


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("terms", TERMS)
def test_forward_adds_the_explicit_update(kind, terms, coefficients, normalization):
    layer = kind(terms=terms, coefficients=coefficients, normalization=normalization, pera_alpha=5)
    x = torch.randn(2, 4, 9)
    expected = reference_output(layer, x)
    assert relative_error(expected, layer.base_layer(x)) > 1e-3
    assert relative_error(evaluate(layer, x), expected) <= 1e-6, "kept expansion"
    assert relative_error(layer(x), expected) <= 1e-6, "operator"


def test_the_update_has_the_layout_of_the_base_weight(kind):
    layer = kind(**RMS)
    expected = reference_delta(layer)
    update = layer.get_delta_weight("default")
    assert update.shape == layer.base_layer.weight.shape
    assert relative_error(update, expected.T if isinstance(layer, PeraConv1DLinear) else expected) <= 1e-6


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 1.0),
        ({"pera_alpha": 8}, 2.0),
        ({"use_rslora": True}, 2.0),
        ({"pera_alpha": 8, "use_rslora": True}, 4.0),
    ],
)
def test_scale_is_alpha_over_r(options, scaling):
    assert linear(r=4, **options).scaling["default"] == scaling


def test_gradients_reach_the_adapter_alone(kind):
    layer = kind(**RMS)
    layer(torch.randn(4, 9)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in layer.named_parameters() if "pera_" in name)
    assert all(p.grad is None for p in layer.base_layer.parameters())


# Merging


def test_merge_adds_the_update_and_unmerge_removes_it(kind):
    layer = kind(**RMS, pera_alpha=5)
    x = torch.randn(4, 9)
    expected, weight = reference_output(layer, x), layer.base_layer.weight.detach().clone()
    layer.merge()
    assert layer.merged
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(layer.base_layer.weight, weight + layer.get_delta_weight("default"))
    assert relative_error(evaluate(layer, x), expected) <= 1e-6
    assert torch.equal(evaluate(layer, x), evaluate(layer.base_layer, x))
    layer.unmerge()
    assert not layer.merged
    assert relative_error(layer.base_layer.weight, weight) <= 1e-6
    assert relative_error(evaluate(layer, x), expected) <= 1e-6


def test_merging_twice_and_unmerging_twice_is_a_warning():
    layer = linear()
    layer.merge()
    weight = layer.base_layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, weight)
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_adds_in_float32_and_keeps_the_dtype(dtype):
    layer = linear(64, 64, dtype=dtype, **RMS)
    add(layer, "second")
    layer.set_adapter(["default", "second"])
    weight = layer.base_layer.weight.detach().clone()
    updates = [layer.get_delta_weight(name) for name in ("default", "second")]
    assert updates[0].dtype == torch.float32
    layer.merge()
    merged = layer.base_layer.weight
    assert merged.dtype == dtype
    assert torch.equal(merged, (weight.float() + updates[0] + updates[1]).to(dtype))
    assert not torch.equal(merged, weight + updates[0].to(dtype) + updates[1].to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_weight(kind, value):
    layer = kind(**RMS)
    weight = layer.base_layer.weight.detach().clone()
    layer.pera_B["default"].data[0, 0] = value
    with pytest.raises(
        ValueError, match=r"^NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_safe_merge_of_a_second_broken_adapter_merges_neither():
    layer = linear()
    add(layer, "second").pera_B["second"].data[0, 0] = float("nan")
    weight = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="The adapter second seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["default", "second"])
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_safe_merge_refuses_a_sum_that_overflows_the_dtype_of_the_base():
    layer = linear(dtype=torch.float16)
    layer.pera_B["default"].data.fill_(1e4)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.isfinite(layer.base_layer.weight).all()


def test_safe_merge_of_a_sound_adapter_is_merge(kind):
    layer, same = kind(), kind()
    same.load_state_dict(layer.state_dict())
    layer.merge(safe_merge=True)
    same.merge()
    assert torch.equal(layer.base_layer.weight, same.base_layer.weight)


def test_a_disabled_layer_is_the_base_layer(kind):
    layer = kind()
    x = torch.randn(4, 9)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert relative_error(layer(x), reference_output(layer, x)) <= 1e-6


def test_disabling_a_merged_layer_unmerges_it():
    layer = linear()
    x = torch.randn(4, 9)
    expected = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), expected)
    assert not layer.merged


# Several adapters


def add(layer, name, **options):
    """A further adapter on a layer; returns the layer."""
    config = PeraConfig(**{"r": 2, "normalization": "rms", "init_weights": False, **options})
    layer.update_layer(name, config.r, config.pera_alpha, config=config)
    return layer


def test_active_adapters_add_up(kind):
    layer = add(kind(), "second", terms="square", pera_alpha=3)
    x = torch.randn(4, 9)
    for names in (["default"], ["second"], ["default", "second"], ["second", "default"]):
        layer.set_adapter(names)
        assert relative_error(evaluate(layer, x), reference_output(layer, x, names)) <= 1e-6
        layer.merge()
        assert relative_error(evaluate(layer, x), reference_output(layer, x, names)) > 1e-3, "the base has changed"
        layer.unmerge()
        assert relative_error(evaluate(layer, x), reference_output(layer, x, names)) <= 1e-5


def test_only_active_adapters_are_trained():
    layer = add(linear(), "second")
    layer.set_adapter("second")
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"pera_A.second", "pera_B.second", "pera_h.second"}


def test_a_deleted_adapter_leaves_nothing_behind():
    layer = add(linear(), "second")
    x = torch.randn(4, 9)
    layer.set_adapter(["default", "second"])
    evaluate(layer, x)
    layer.delete_adapter("second")
    assert not [name for name in layer.state_dict() if "second" in name]
    for attribute in (layer.r, layer.pera_alpha, layer.scaling, layer.expansion, layer.pera_dropout):
        assert set(attribute) == {"default"}
    assert relative_error(evaluate(layer, x), reference_output(layer, x)) <= 1e-6


@pytest.mark.parametrize("options", [{"coefficients": "fixed"}, {"terms": "none"}])
def test_replacing_an_adapter_by_one_without_coefficients(options):
    layer = linear(r=2)
    add(layer, "default", r=2, **options)
    assert not layer.pera_h


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_keeps_the_dtype_of_the_base(dtype):
    layer = linear(64, 64, dtype=dtype, **RMS)
    assert layer.pera_A["default"].dtype == torch.float32
    x = torch.randn(5, 64, dtype=dtype)
    for y in (layer(x), evaluate(layer, x)):
        assert y.dtype == dtype
        assert relative_error(y, reference_output(layer, x)) <= 4 * torch.finfo(dtype).eps


def test_output_has_the_dtype_of_the_output_of_the_base():
    class Rounding(nn.Linear):
        def forward(self, x):
            return super().forward(x).bfloat16()

    layer = adapt(nn.Sequential(Rounding(9, 7)), target_modules=["0"]).base_model.model[0]
    x = torch.randn(4, 9)
    assert layer(x).dtype == evaluate(layer, x).dtype == torch.bfloat16


def test_autocast_uses_its_dtype_with_and_without_the_kept_expansion():
    layer = linear(64, 64, **RMS)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained, evaluated = layer(x), evaluate(layer, x)
    assert trained.dtype == evaluated.dtype == torch.bfloat16
    torch.testing.assert_close(evaluated, trained)
    assert relative_error(evaluated, reference_output(layer, x)) <= 4 * torch.finfo(torch.bfloat16).eps
    assert relative_error(evaluate(layer, x), reference_output(layer, x)) <= 1e-6, "float32 again outside"


# Dropout


def test_dropout_acts_on_the_input_while_training():
    layer = linear(pera_dropout=0.5)
    x = torch.randn(4, 9)
    A, B, h = layer.factors("default")
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(y, layer.base_layer(x) + pera_linear(dropped, A, B, h))
    assert not torch.equal(y, layer(x)), "drawn anew"
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x)), "training mode without gradients"


def test_dropout_does_nothing_in_evaluation():
    layer = linear(pera_dropout=0.5)
    x = torch.randn(4, 9)
    for y in (layer(x), evaluate(layer, x)):
        assert relative_error(y, reference_output(layer, x)) <= 1e-6


# Scale


def test_scale_of_one_adapter_and_of_the_active_ones():
    layer = add(linear(pera_alpha=6), "second")
    layer.set_scale("default", 0.5)
    assert layer.scaling == {"default": 1.0, "second": 1.0}
    layer.scale_layer(3.0)
    assert layer.scaling == {"default": 3.0, "second": 1.0}
    layer.unscale_layer(2.0)
    assert layer.scaling == {"default": 1.5, "second": 1.0}
    layer.unscale_layer()
    assert layer.scaling == {"default": 2.0, "second": 1.0}
    layer.set_scale("absent", 2.0)
    assert "absent" not in layer.scaling


# The kept expansion


@pytest.fixture
def computed(monkeypatch):
    """The list of expansions that are computed to be kept, one entry for each."""
    calls = []
    compute = layers_base.expansions
    monkeypatch.setattr(layers_base, "expansions", lambda *a, **k: calls.append(1) or compute(*a, **k))
    return calls


def test_an_expansion_is_computed_once_and_kept(kind, computed):
    layer = kind(**RMS)
    x = torch.randn(4, 9)
    first, second = evaluate(layer, x), evaluate(layer, x)
    assert len(computed) == 1
    assert torch.equal(first, second)
    assert relative_error(evaluate(layer, 2 * x), reference_output(layer, 2 * x)) <= 1e-6, "another input"
    assert len(computed) == 1
    layer.drop_expansions()
    evaluate(layer, x)
    assert len(computed) == 2


def test_with_gradients_or_in_training_nothing_is_kept(computed):
    layer = linear(**RMS)
    x = torch.randn(4, 9)
    layer(x)
    layer.train()
    evaluate(layer, x)
    assert not computed


def test_a_kept_expansion_takes_no_part_in_gradients(computed):
    layer = linear(**RMS)
    x = torch.randn(4, 9)
    evaluate(layer, x)
    layer(x).sum().backward()
    assert all(layer.get_parameter(f"pera_{name}.default").grad.any() for name in "ABh")
    assert len(computed) == 1


def new_values(layer):
    """Random values for the three parameters of the adapter."""
    return {name: torch.randn_like(p) for name, p in layer.state_dict().items() if "pera_" in name}


def optimizer_step(layer):
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(torch.randn(4, 9)).square().sum().backward()
    optimizer.step()


def load_state_dict(layer):
    layer.load_state_dict(new_values(layer), strict=False)


def load_state_dict_assigned(layer):
    layer.load_state_dict(new_values(layer), strict=False, assign=True)


def write_in_place(layer):
    with torch.no_grad():
        layer.pera_h["default"].mul_(-2)
        layer.pera_A["default"].add_(1)


def replace_parameter_twice(layer):
    for _ in range(2):
        layer.pera_B["default"] = nn.Parameter(torch.randn(7, 3))
        evaluate(layer, torch.randn(4, 9))
    layer.pera_B["default"] = nn.Parameter(torch.randn(7, 3))


def set_scale(layer):
    layer.set_scale("default", 3.0)


def scale_layer(layer):
    layer.scale_layer(3.0)


def scale_and_unscale_layer(layer):
    layer.scale_layer(3.0)
    layer(torch.randn(4, 9))
    layer.unscale_layer(2.0)


def delete_and_add_again(layer):
    layer.delete_adapter("default")
    add(layer, "default", r=3)
    layer.set_adapter("default")


def add_over(layer):
    add(layer, "default", r=2, terms="square")


CHANGES = [
    optimizer_step,
    load_state_dict,
    load_state_dict_assigned,
    write_in_place,
    replace_parameter_twice,
    set_scale,
    scale_layer,
    scale_and_unscale_layer,
    delete_and_add_again,
    add_over,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_output_follows_the_adapter_after(change):
    layer = linear(**RMS)
    x = torch.randn(4, 9)
    before = evaluate(layer, x)
    change(layer)
    expected = reference_output(layer, x)
    assert relative_error(before, expected) > 1e-3, "the change is visible"
    assert relative_error(evaluate(layer, x), expected) <= 1e-5


# What drops a kept expansion even where a write left no trace.
EVENTS = {
    "train": lambda layer: layer.train().eval(),
    "eval": lambda layer: layer.eval(),
    "load_state_dict": lambda layer: layer.load_state_dict({}, strict=False),
    "cast": lambda layer: layer.to(torch.float32),
    "merge": lambda layer: (layer.merge(), layer.unmerge()),
    "set_adapter": lambda layer: layer.set_adapter("default"),
    "add_adapter": lambda layer: add(layer, "third"),
    "delete_adapter": lambda layer: layer.delete_adapter("second"),
    "set_scale": lambda layer: layer.set_scale("default", 1.0),
    "scale_layer": lambda layer: layer.scale_layer(1.0),
    "unscale_layer": lambda layer: layer.unscale_layer(),
    "drop_expansions": lambda layer: layer.drop_expansions(),
}


@pytest.mark.parametrize("event", EVENTS)
def test_output_follows_a_write_through_data_after(event):
    layer = add(linear(**RMS), "second")
    x = torch.randn(4, 9)
    before = evaluate(layer, x)
    layer.pera_A["default"].data.copy_(torch.randn(3, 9))
    assert torch.equal(evaluate(layer, x), before), "nothing tells of the write"
    EVENTS[event](layer)
    assert relative_error(evaluate(layer, x), reference_output(layer, x)) <= 1e-5


def test_output_follows_a_scale_written_directly():
    """As users of PEFT do: ``layer.scaling[name] = …``."""
    layer = linear(**RMS)
    x = torch.randn(4, 9)
    evaluate(layer, x)
    layer.scaling["default"] = 5.0
    assert relative_error(evaluate(layer, x), reference_output(layer, x)) <= 1e-5


def test_output_follows_another_tensor_at_the_same_address():
    """As with ``functional_call`` in a loop: the memory of the last parameters is given to the next."""
    layer = linear(**RMS)
    x = torch.randn(4, 9)
    memory = np.ones((7, 3), dtype=np.float32)
    with torch.no_grad():
        ones = functional_call(layer, {"pera_B.default": torch.from_numpy(memory)}, x)
        memory[:] = 0.0
        zeros = functional_call(layer, {"pera_B.default": torch.from_numpy(memory)}, x)
    assert not torch.equal(ones, layer.base_layer(x))
    assert torch.equal(zeros, layer.base_layer(x))


def test_output_follows_set_adapter():
    layer = add(linear(**RMS), "second")
    x = torch.randn(4, 9)
    for names in (["default"], ["second"], ["default", "second"], ["default"]):
        layer.set_adapter(names)
        assert relative_error(evaluate(layer, x), reference_output(layer, x, names)) <= 1e-6


def test_output_follows_the_dtype():
    layer = linear(**RMS)
    x = torch.randn(4, 9)
    evaluate(layer, x)
    layer.to(torch.float64)
    y = evaluate(layer, x.double())
    assert y.dtype == torch.float64
    assert relative_error(y, reference_output(layer, x)) <= 1e-12
    layer.to(torch.bfloat16)
    y = evaluate(layer, x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, reference_output(layer, x.bfloat16())) <= 4 * torch.finfo(torch.bfloat16).eps


def test_inference_mode_agrees_and_does_not_spoil_training():
    layer = linear(**RMS)
    x = torch.randn(4, 9)
    with torch.inference_mode():
        assert relative_error(layer(x).clone(), reference_output(layer, x)) <= 1e-6
    assert relative_error(evaluate(layer, x), reference_output(layer, x)) <= 1e-6
    layer(x).sum().backward()
    optimizer_step(layer)
    with torch.inference_mode():
        y = layer(x)
    assert relative_error(y.clone(), reference_output(layer, x)) <= 1e-6


def test_an_adapter_made_in_inference_mode_is_followed():
    """Inference tensors do not count their writes, so that nothing kept may be trusted."""
    with torch.inference_mode():
        layer = linear(**RMS)
        x = torch.randn(4, 9)
        layer(x)
        layer.pera_A["default"].mul_(2)
        assert relative_error(layer(x), reference_output(layer, x)) <= 1e-6


def test_a_deep_copy_goes_its_own_way():
    layer = linear(**RMS)
    x = torch.randn(4, 9)
    before = evaluate(layer, x)
    twin = copy.deepcopy(layer)
    assert torch.equal(evaluate(twin, x), before)
    load_state_dict(twin)
    assert relative_error(evaluate(twin, x), reference_output(twin, x)) <= 1e-6
    assert torch.equal(evaluate(layer, x), before)
    write_in_place(layer)
    assert relative_error(evaluate(layer, x), reference_output(layer, x)) <= 1e-6


def test_the_kept_expansion_is_not_saved(kind):
    layer = kind()
    names = set(layer.state_dict())
    evaluate(layer, torch.randn(4, 9))
    assert set(layer.state_dict()) == names
