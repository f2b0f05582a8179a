"""What adapted layers of every kind have in common: parameters, forward, merging, several adapters, dtypes, scale."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import reference
from pera import PeraConfig, UserError
from pera.tuner import PeraConv1DLinear, PeraConvolution, PeraEmbedding, PeraLinear
from pera.tuner.layers import BASE, layer_class
from reference import relative_error
from tiny import KINDS, RMS, adapt, adapted, evaluate, linear, reference_base, reference_output


@pytest.fixture(params=KINDS)
def kind(request):
    """A kind of layer."""
    return KINDS[request.param]


@pytest.fixture(params=sorted(KINDS.keys() - {"embedding"}))
def dense(request):
    """A kind of layer whose input is not indices."""
    return KINDS[request.param]


def add(layer, name, **options):
    """A further adapter on a layer; returns the layer."""
    config = PeraConfig(**{"r": 2, "normalization": "rms", "init_weights": False, **options})
    layer.update_layer(name, config.r, config.pera_alpha, config=config)
    return layer


# Kinds


@pytest.mark.parametrize(
    ("base", "cls"),
    [
        (nn.Linear(2, 3), PeraLinear),
        (Conv1D(3, 2), PeraConv1DLinear),
        (nn.Embedding(2, 3), PeraEmbedding),
        (nn.Conv1d(2, 3, 1), PeraConvolution),
        (nn.Conv2d(2, 3, 1), PeraConvolution),
        (nn.Conv3d(2, 3, 1), PeraConvolution),
    ],
)
def test_each_kind_of_base_layer_has_its_adapted_layer(base, cls):
    assert layer_class(base, "layer", {}) is type(adapted(base, r=2)) is cls


@pytest.mark.parametrize(
    "base", [nn.LayerNorm(4), nn.EmbeddingBag(8, 4), nn.ConvTranspose1d(4, 4, 1), nn.Bilinear(4, 4, 4), nn.GRU(4, 4)]
)
def test_an_unsupported_kind_is_refused_with_the_supported_ones(base):
    supported = r"torch\.nn\.Linear, plain or quantised, Embedding, Conv1d, Conv2d, Conv3d, and transformers' Conv1D\.$"
    refusal = (
        rf"^target_modules: '1' is a {type(base).__name__}, which PERA does not support; supported are {supported}"
    )
    with pytest.raises(UserError, match=refusal):
        adapt(nn.Sequential(nn.Linear(4, 4), base), target_modules=["0", "1"])


@pytest.mark.parametrize("target", ["attention", "attention.out_proj"])
def test_a_projection_that_is_never_called_is_refused_with_what_to_do(target):
    """nn.MultiheadAttention would ignore the adapter without a word."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    refusal = (
        rf"^target_modules: '{target}' belongs to torch\.nn\.MultiheadAttention.* ignored; name its in_proj_weight"
    )
    with pytest.raises(UserError, match=refusal) as refused:
        adapt(model, target_modules=[target])
    assert ". " not in str(refused.value), "one sentence"


@pytest.mark.parametrize("target", ["linear1", "linear2"])
def test_a_layer_that_evaluation_does_not_call_is_refused_with_what_to_do(target):
    """nn.TransformerEncoderLayer would train the adapter and ignore it in evaluation."""

    def adapted_encoder():
        encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
        return adapt(encoder, target_modules=[target])

    with pytest.raises(
        UserError, match=rf"^target_modules: .* does not call '{target}'.*fastpath_enabled\(False\) first\.$"
    ):
        adapted_encoder()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        encoder, x = adapted_encoder(), torch.randn(2, 3, 8)
        torch.testing.assert_close(evaluate(encoder, x), evaluate(encoder.train(), x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("compute", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_weight_that_is_computed_is_refused(kind, compute):
    with pytest.raises(
        UserError, match=r"^target_modules: '0' computes its weight in every forward, .*; leave it out\.$"
    ):
        adapted(compute(kind.base()))


def test_a_rank_above_a_side_is_a_warning(kind, recwarn):
    rows, columns = kind.shape
    side = min(kind.shape)
    kind.layer(r=side)
    assert not recwarn
    with pytest.warns(UserWarning, match=rf"r={side + 1} .* is above a side of a \({rows}, {columns}\) weight"):
        kind.layer(r=side + 1)


def test_a_layer_says_what_it_is(kind):
    assert repr(kind.layer()).startswith("pera.Pera")


# Parameters


@pytest.mark.parametrize(("terms", "count"), [("all", 10), ("square", 4), ("cross", 6), ("none", None)])
def test_parameters_have_the_settled_shapes(kind, terms, count):
    layer = kind.layer(r=4, terms=terms)
    rows, columns = kind.shape
    assert layer.pera_A["default"].shape == (4, columns)
    assert layer.pera_B["default"].shape == (rows, 4)
    assert ("default" in layer.pera_h) == (count is not None)
    if count is not None:
        assert layer.pera_h["default"].shape == (count,)


@pytest.mark.parametrize(("terms", "count"), [("all", 10), ("square", 4), ("cross", 6), ("none", 0)])
def test_each_anchor_appends_a_coefficient_that_starts_at_one(kind, terms, count):
    initial = 0.3 if count else 0.0
    layer = kind.layer(r=4, terms=terms, anchors=3, init_weights=True, init_coefficients=initial)
    assert layer.pera_h["default"].tolist() == pytest.approx([initial] * count + [1, 1, 1])
    assert not layer.get_delta_weight("default").any()


@pytest.mark.parametrize(("terms", "products"), [("all", [1, 1, 1, 2, 2, 2]), ("none", [])])
def test_fixed_coefficients_of_anchors_are_no_parameters(kind, terms, products):
    layer = kind.layer(terms=terms, anchors=2, coefficients="fixed")
    assert not layer.pera_h
    assert layer.coefficients("default").tolist() == [*products, 1, 1]


def test_anchors_are_drawn_from_seed_name_and_shape_and_not_saved(kind):
    layer = kind.layer(anchors=3, anchor_seed=5)
    rows, columns = kind.shape
    anchors = layer.expansion["default"].anchors
    assert anchors.V.tolist() == [reference.sign_row(5, "0", "in", columns, c) for c in range(3)]
    assert anchors.U_T.tolist() == [reference.sign_row(5, "0", "out", rows, c) for c in range(3)]
    assert len(layer.state_dict()) == len(kind.layer().state_dict())


def test_more_anchors_than_either_side_are_refused(kind):
    rows, columns = kind.shape
    with pytest.raises(
        UserError,
        match=rf"^anchors=65 is above both sides of a \({rows}, {columns}\) weight; use at most {min(kind.shape)}",
    ):
        kind.layer(anchors=65)
    assert kind.layer(anchors=64).expansion["default"].k == 64


def test_anchors_follow_the_layer_and_keep_their_values(kind):
    """A cast, an emptied module or another device would change parameters and buffers."""
    layer = kind.layer(anchors=3)
    expected = [rows.clone() for rows in layer.expansion["default"].anchors]
    x = kind.input()
    layer(x)
    for change in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to_empty(device="meta"),
        lambda m: m.to_empty(device="cpu"),
    ):
        layer = copy.deepcopy(change(layer))
        A = layer.pera_A["default"]
        placed = layer.expansion_on(A.device, "default").anchors
        assert placed.V.device == A.device
    for rows, same in zip(layer.expansion["default"].anchors, expected, strict=True):
        assert torch.equal(rows, same)


@pytest.mark.parametrize("terms", ["all", "square", "cross"])
def test_fixed_coefficients_are_no_parameters(kind, terms):
    layer = kind.layer(terms=terms, coefficients="fixed")
    assert not layer.pera_h
    assert (
        layer.coefficients("default").tolist()
        == {
            "all": [1, 1, 1, 2, 2, 2],
            "square": [1, 1, 1],
            "cross": [2, 2, 2],
        }[terms]
    )


def test_initialisation_is_that_of_the_paper(dense):
    layer = dense.layer(r=4, init_weights=True, init_coefficients=0.3)
    A = layer.pera_A["default"]
    bound = dense.shape[1] ** -0.5
    assert A.abs().max() <= bound
    assert A.std() > 0.3 * bound
    assert not layer.pera_B["default"].any()
    assert (layer.pera_h["default"] == 0.3).all()


def test_a_gaussian_start_is_that_of_lora(dense):
    """A normal of deviation 1 / r, far beyond the bound of the uniform one; B zero."""
    layer = dense.layer(r=2, init_weights="gaussian")
    assert 0.25 < layer.pera_A["default"].std() < 1
    assert layer.pera_A["default"].abs().max() > dense.shape[1] ** -0.5
    assert not layer.get_delta_weight("default").any()


def test_a_gaussian_start_leaves_an_embedding_as_lora_starts_it():
    layer = KINDS["embedding"].layer(r=2, init_weights="gaussian")
    assert not layer.pera_A["default"].any()
    assert layer.pera_B["default"].all()


def test_the_start_is_a_zero_update(kind):
    layer = kind.layer(r=4, init_weights=True)
    assert not layer.pera_h["default"].any()
    assert not layer.get_delta_weight("default").any()
    x = kind.input()
    assert torch.equal(layer(x), layer.base_layer(x))


def test_init_weights_false_is_not_the_identity(kind):
    layer = kind.layer(init_weights=False)
    assert layer.get_delta_weight("default").abs().max() > 1e-3
    assert layer.pera_h["default"].all()


def test_an_adapter_that_is_not_there_is_named(kind):
    with pytest.raises(UserError, match="adapter 'other' is not on this layer; it has: default"):
        kind.layer().get_delta_weight("other")


# Forward and the update


@pytest.mark.parametrize(
    ("terms", "coefficients", "normalization"),
    [
        ("all", "learned", "none"),
        ("all", "learned", "rms"),
        ("all", "fixed", "rms"),
        ("square", "learned", "centred"),
        ("cross", "learned", "rms"),
        ("cross", "fixed", "none"),
        ("none", "learned", "none"),
    ],
)
@pytest.mark.parametrize("anchors", [0, 3])
def test_forward_adds_the_explicit_update(kind, anchors, terms, coefficients, normalization):
    if kind is KINDS["embedding"] and normalization == "centred":
        normalization = "rms"  # embeddings refuse "centred": see test_embedding.py
    options = {"terms": terms, "coefficients": coefficients, "normalization": normalization, "anchors": anchors}
    layer = kind.layer(**options, pera_alpha=5)
    x = kind.input()
    expected = reference_output(layer, x)
    assert relative_error(expected, layer.base_layer(x)) > 1e-3
    assert relative_error(evaluate(layer, x), expected) <= 1e-6, "without gradients"
    assert relative_error(layer(x), expected) <= 1e-6, "with gradients"


def test_the_update_has_the_layout_of_the_base_weight(kind):
    layer = kind.layer(**RMS)
    update, weight = layer.get_delta_weight("default"), layer.base_layer.weight
    assert update.shape == weight.shape
    assert relative_error(update, reference_base(layer).weight - weight.double()) <= 1e-6


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


@pytest.mark.parametrize("options", [RMS, {"terms": "none", "anchors": 3}])
def test_gradients_reach_the_adapter_alone(kind, options):
    layer = kind.layer(**options)
    layer(kind.input()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in layer.named_parameters() if "pera_" in name)
    assert all(p.grad is None for p in layer.base_layer.parameters())


# Merging


def test_the_update_and_a_merge_are_the_same_under_autocast(kind):
    layer = kind.layer(**RMS)
    update, merged = layer.get_delta_weight("default"), reference_base(layer).weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.get_delta_weight("default"), update)
        layer.merge()
    assert relative_error(layer.base_layer.weight, merged) <= 1e-6


@pytest.mark.parametrize("anchors", [0, 3])
def test_merge_adds_the_update_and_unmerge_removes_it(kind, anchors):
    layer = kind.layer(**RMS, pera_alpha=5, anchors=anchors)
    x = kind.input()
    expected, weight = reference_output(layer, x), layer.base_layer.weight.detach().clone()
    merged = reference_base(layer).weight
    layer.merge()
    assert layer.merged
    assert layer.merged_adapters == ["default"]
    assert relative_error(layer.base_layer.weight, merged) <= 1e-6
    assert relative_error(evaluate(layer, x), expected) <= 1e-6
    assert torch.equal(evaluate(layer, x), evaluate(layer.base_layer, x))
    layer.unmerge()
    assert not layer.merged
    assert relative_error(layer.base_layer.weight, weight) <= 1e-6
    assert relative_error(evaluate(layer, x), expected) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge_write_into_the_base_weight_in_place(kind, dtype, safe_merge):
    layer = kind.layer(dtype)
    weight = layer.base_layer.weight
    before, address = weight.detach().clone(), weight.data_ptr()
    layer.merge(safe_merge)
    assert not torch.equal(weight, before)
    layer.unmerge()
    assert layer.base_layer.weight is weight
    assert weight.data_ptr() == address


def test_merging_twice_and_unmerging_twice_is_a_warning(kind):
    layer = kind.layer()
    layer.merge()
    weight = layer.base_layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, weight)
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_adds_in_float32_and_keeps_the_dtype(kind, dtype):
    layer = add(kind.layer(dtype, **RMS), "second")
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
    layer = kind.layer(**RMS)
    weight = layer.base_layer.weight.detach().clone()
    layer.pera_B["default"].data[0, 0] = value
    with pytest.raises(
        ValueError, match=r"^NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_safe_merge_of_a_second_broken_adapter_merges_neither(kind):
    layer = add(kind.layer(), "second")
    layer.pera_B["second"].data[0, 0] = float("nan")
    weight = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="The adapter second seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["default", "second"])
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_safe_merge_refuses_a_sum_that_overflows_the_dtype_of_the_base(kind):
    layer = kind.layer(torch.float16)
    layer.pera_B["default"].data.fill_(1e4)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.isfinite(layer.base_layer.weight).all()


def test_safe_merge_of_a_sound_adapter_is_merge(kind):
    layer, same = kind.layer(), kind.layer()
    same.load_state_dict(layer.state_dict())
    layer.merge(safe_merge=True)
    same.merge()
    assert torch.equal(layer.base_layer.weight, same.base_layer.weight)


def test_a_disabled_layer_is_the_base_layer(kind):
    layer = kind.layer()
    x = kind.input()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert relative_error(layer(x), reference_output(layer, x)) <= 1e-6


def test_disabling_a_merged_layer_unmerges_it(kind):
    layer = kind.layer()
    x = kind.input()
    expected = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), expected)
    assert not layer.merged


# Several adapters


def test_active_adapters_add_up(kind):
    layer = add(kind.layer(), "second", terms="square", anchors=3, pera_alpha=3)
    x = kind.input()
    for names in (["default"], ["second"], ["default", "second"], ["second", "default"]):
        layer.set_adapter(names)
        expected = reference_output(layer, x, names)
        assert relative_error(evaluate(layer, x), expected) <= 1e-6
        layer.merge()
        assert relative_error(evaluate(layer, x), expected) <= 1e-5
        layer.unmerge()
        assert relative_error(evaluate(layer, x), expected) <= 1e-5


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_a_merged_adapter_is_not_added_again(kind):
    layer = add(kind.layer(), "second")
    layer.set_adapter(["default", "second"])
    x = kind.input()
    expected = reference_output(layer, x, ["default", "second"])
    layer.merge(adapter_names=["second"])
    assert relative_error(evaluate(layer, x), expected) <= 1e-5
    layer.merge(adapter_names=["default"])
    assert relative_error(evaluate(layer, x), expected) <= 1e-5


def test_each_sample_has_its_adapter(kind):
    layer = add(kind.layer(), "second", terms="square", anchors=3)
    x = kind.input(5)
    names = ["second", BASE, "default", "second", "default"]
    y = layer(x, adapter_names=names)
    for sample, output, name in zip(x.split(1), y.split(1), names, strict=True):
        expected = reference_output(layer, sample, [name] if name != BASE else [])
        assert relative_error(output, expected) <= 1e-6
    y.square().sum().backward()
    assert all(p.grad.any() for name, p in layer.named_parameters() if p.requires_grad)


def test_names_for_another_number_of_samples_are_refused(kind):
    with pytest.raises(UserError, match=r"same as the number of inputs, but got 3 and 4 respectively"):
        kind.layer()(kind.input(4), adapter_names=["default"] * 3)


def test_only_active_adapters_are_trained(kind):
    layer = add(kind.layer(), "second")
    layer.set_adapter("second")
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"pera_A.second", "pera_B.second", "pera_h.second"}


def test_a_deleted_adapter_leaves_nothing_behind(kind):
    layer = add(kind.layer(), "second")
    x = kind.input()
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
    add(layer, "default", r=2, normalization="none", **options)
    assert not layer.pera_h


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_keeps_the_dtype_of_the_base(kind, dtype):
    layer = kind.layer(dtype, **RMS)
    assert layer.pera_A["default"].dtype == torch.promote_types(dtype, torch.float32)
    x = kind.input(dtype=dtype)
    for y in (layer(x), evaluate(layer, x)):
        assert y.dtype == dtype
        assert relative_error(y, reference_output(layer, x)) <= 4 * torch.finfo(dtype).eps


def test_output_has_the_dtype_of_the_output_of_the_base():
    class Rounding(nn.Linear):
        def forward(self, x):
            return super().forward(x).bfloat16()

    layer = adapted(Rounding(9, 7))
    x = torch.randn(4, 9)
    assert layer(x).dtype == evaluate(layer, x).dtype == torch.bfloat16


def test_autocast_gives_the_dtype_of_the_base_with_and_without_gradients(kind):
    layer = kind.layer(**RMS)
    x = kind.input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained, evaluated, base = layer(x), evaluate(layer, x), layer.base_layer(x)
    assert trained.dtype == evaluated.dtype == base.dtype
    torch.testing.assert_close(evaluated, trained)
    assert relative_error(evaluated, reference_output(layer, x)) <= 4 * torch.finfo(torch.bfloat16).eps
    assert relative_error(evaluate(layer, x), reference_output(layer, x)) <= 1e-6, "float32 again outside"


def test_autocast_spares_float64(kind):
    layer = kind.layer(torch.float64, **RMS)
    x = kind.input(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for y in (layer(x), evaluate(layer, x)):
            assert y.dtype == torch.float64
            assert relative_error(y, reference_output(layer, x)) <= 1e-14


# Dropout


def test_dropout_acts_on_the_input_while_training(dense):
    layer = dense.layer(pera_dropout=0.5)
    x = dense.input()
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    update = reference_output(layer, dropped) - reference_output(layer, dropped, [])
    assert relative_error(y, reference_output(layer, x, []) + update) <= 1e-6
    assert not torch.equal(y, layer(x)), "drawn anew"
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x)), "training mode without gradients"


def test_dropout_does_nothing_in_evaluation(kind):
    layer = kind.layer(pera_dropout=0.5)
    x = kind.input()
    for y in (layer(x), evaluate(layer, x)):
        assert relative_error(y, reference_output(layer, x)) <= 1e-6


# Scale


def test_scale_of_one_adapter_and_of_the_active_ones(kind):
    layer = add(kind.layer(pera_alpha=6), "second")
    x = kind.input()

    def check(default):
        assert layer.scaling == {"default": default, "second": 1.0}
        assert relative_error(evaluate(layer, x), reference_output(layer, x)) <= 1e-6

    check(2.0)
    layer.set_scale("default", 0.5)
    check(1.0)
    layer.scale_layer(3.0)
    check(3.0)
    layer.unscale_layer(2.0)
    check(1.5)
    layer.set_scale("default", 2.0)
    check(4.0)
    layer.unscale_layer()
    check(2.0)
    layer.set_scale("absent", 2.0)
    check(2.0)


def test_the_scale_of_a_layer_is_its_alpha_over_r_after_rescaling(kind):
    layer = kind.layer(pera_alpha=6)
    layer.rescale("default", alpha=3, scaling=1.0)
    assert layer.pera_alpha["default"] == 3
    layer.scale_layer(5.0)
    layer.unscale_layer()
    assert layer.scaling["default"] == 1.0
    layer.set_scale("default", 4.0)
    assert layer.scaling["default"] == 4.0


RESCALINGS = {
    "set_scale": lambda layer: layer.set_scale("default", 3.0),
    "scale_layer": lambda layer: layer.scale_layer(3.0),
    "unscale_layer": lambda layer: layer.unscale_layer(),
    "unscale_layer_by": lambda layer: layer.unscale_layer(3.0),
    "rescale": lambda layer: layer.rescale("default", alpha=9, scaling=3.0),
}


@pytest.mark.parametrize("change", RESCALINGS)
def test_the_scale_of_a_merged_adapter_stays(change):
    layer = add(linear(pera_alpha=6), "second")
    layer.set_adapter(["second", "default"])
    layer.scale_layer(2.0)
    before = {**layer.scaling}, {**layer.pera_alpha}
    weight = layer.base_layer.weight.detach().clone()
    layer.merge(adapter_names=["default"])
    refusal = r"^adapter 'default' is merged; call unmerge_adapter before you change its scale\.$"
    with pytest.raises(UserError, match=refusal):
        RESCALINGS[change](layer)
    assert (layer.scaling, layer.pera_alpha) == before
    layer.unmerge()
    assert relative_error(layer.base_layer.weight, weight) <= 1e-6
    layer.unscale_layer()
    assert layer.scaling == {"default": 2.0, "second": 1.0}
