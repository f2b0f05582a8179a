"""The operator x ↦ s x ΔWᵀ: values, derivatives, precision, and what it keeps for backward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import reference
from pera import pera_linear
from pera.linear import expanded_linear, expansions
from pera.polynomial import expanded_rank
from reference import COEFFICIENTS, NORMALIZATIONS, TERMS, by_pair, draw, draw_anchors, relative_error
from tiny import needs_whole_graphs

M, N = 7, 9


def leaves(*tensors):
    """Copies that are differentiated with respect to."""
    return [t.detach().clone().requires_grad_() for t in tensors]


def reference_output(x, A, B, h, terms, normalization, scaling=1.0, anchors=None):
    """x ΔWᵀ in float64 with an explicit ΔW."""
    weights = by_pair(h, A.shape[0], terms, anchors)
    return x.double() @ reference.delta_weight(A, B, weights, normalization, scaling, anchors).T


def gradients(y, inputs, cotangent):
    return torch.autograd.grad(y, inputs, cotangent, allow_unused=True, materialize_grads=True)


# Against an explicit update


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("r", "k"), [(1, 0), (1, 16), (4, 0), (4, 2)])
def test_output_and_gradients_are_those_of_the_explicit_update(r, k, terms, coefficients, normalization):
    A, B, h = draw(r, terms, coefficients)
    anchors, h = draw_anchors(k, h)
    inputs = leaves(torch.randn(5, N, dtype=torch.float64), A, B, h)
    expected = reference_output(*inputs, terms, normalization, 0.7, anchors)
    actual = pera_linear(*inputs, terms=terms, normalization=normalization, anchors=anchors, scaling=0.7)
    assert relative_error(actual, expected) <= 1e-10
    cotangent = torch.randn_like(expected)
    for gradient, right in zip(
        gradients(actual, inputs, cotangent), gradients(expected, inputs, cotangent), strict=True
    ):
        assert gradient.shape == right.shape
        torch.testing.assert_close(
            gradient, right, rtol=1e-10, atol=1e-10 * (right.abs().max().item() if right.numel() else 0)
        )


@pytest.mark.parametrize("k", [0, 4])
def test_without_h_every_term_has_weight_one(k):
    x, A, B, h = torch.randn(5, N, dtype=torch.float64), *draw(3, "all")
    anchors, h = draw_anchors(k, h)
    expected = reference_output(x, A, B, torch.ones_like(h), "all", "none", anchors=anchors)
    assert relative_error(pera_linear(x, A, B, None, anchors=anchors), expected) <= 1e-12


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("k", [0, 2])
def test_first_and_second_derivatives(k, terms, normalization):
    base = torch.randn(3, 3, dtype=torch.float64)
    A, B, h = draw(2, terms, m=3, n=4)
    anchors, h = draw_anchors(k, h, 3, 4)
    inputs = leaves(torch.randn(3, 4, dtype=torch.float64), A, B, h, base)
    options = {"terms": terms, "normalization": normalization, "anchors": anchors, "scaling": 0.7}

    def operator(x, A, B, h, base):
        return pera_linear(x, A, B, h, base=base, **options)

    assert torch.autograd.gradcheck(operator, inputs)
    assert torch.autograd.gradgradcheck(operator, inputs)


def test_rank_one_crosses_are_the_linear_part():
    inputs = leaves(torch.randn(5, N, dtype=torch.float64), *draw(1, "cross"))
    x, A, B, _ = inputs
    torch.testing.assert_close(pera_linear(*inputs, terms="cross", normalization="rms"), x @ A.T @ B.T)


def test_kept_expansions_give_the_same_product():
    x, A, B, h = torch.randn(2, 3, N, dtype=torch.float64), *draw(4, "all")
    options = {"terms": "all", "normalization": "rms", "scaling": 0.7}
    kept = expansions(A, B, h, dtype=x.dtype, **options)
    assert kept.A_hat.shape == (expanded_rank(4), N)
    assert kept.B_hat_T.shape == (expanded_rank(4), M)
    assert torch.equal(expanded_linear(x, kept), pera_linear(x, A, B, h, **options))


def test_expansions_are_rounded_once():
    A, B, h = draw(4, "all")
    options = {"terms": "all", "normalization": "rms", "scaling": 0.7}
    exact = expansions(A, B, h, dtype=torch.float64, **options)
    for rounded, unrounded in zip(expansions(A, B, h, dtype=torch.bfloat16, **options), exact, strict=True):
        assert torch.equal(rounded, unrounded.to(torch.bfloat16))


@pytest.mark.parametrize("terms", TERMS)
def test_without_products_it_is_the_lora_layer_of_peft(terms):
    model = get_peft_model(nn.Sequential(nn.Linear(N, M)), LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(B)
    x = torch.randn(5, N, requires_grad=True)
    cotangent = torch.randn(5, M)
    lora = layer(x) - layer.base_layer(x)
    h = torch.zeros(len(reference.pairs(4, terms)))
    pera = pera_linear(x, A, B, h, terms=terms, scaling=6 / 4)
    assert relative_error(pera, lora) <= 1e-6
    for actual, expected in zip(
        gradients(pera, (x, A, B), cotangent), gradients(lora, (x, A, B), cotangent), strict=True
    ):
        assert relative_error(actual, expected) <= 1e-6


# Shapes


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 3)])
def test_any_leading_shape(shape):
    inputs = leaves(torch.randn(*shape, N, dtype=torch.float64), *draw(3, "all"))
    x, A, B, h = inputs
    y = pera_linear(x, A, B, h, normalization="rms")
    assert y.shape == (*shape, M)
    expected = reference_output(x, A, B, h, "all", "rms")
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    for actual, right in zip(gradients(y, inputs, cotangent), gradients(expected, inputs, cotangent), strict=True):
        torch.testing.assert_close(actual, right)


def test_strides_do_not_matter():
    A, B, h = draw(3, "all")
    permuted = torch.randn(N, 4, 2, dtype=torch.float64).permute(2, 1, 0)
    repeated = torch.randn(1, N, dtype=torch.float64).expand(5, N)
    for x in (permuted, repeated):
        inputs = leaves(A.T.contiguous().T, B.T.contiguous().T, h)
        y = pera_linear(x, *inputs)
        torch.testing.assert_close(y, reference_output(x, *inputs, "all", "none"))
        cotangent = torch.randn(*y.shape[::-1], dtype=torch.float64).permute(*reversed(range(y.ndim)))
        expected = gradients(reference_output(x, *inputs, "all", "none"), inputs, cotangent)
        torch.testing.assert_close(gradients(y, inputs, cotangent), expected)


# Which inputs receive a gradient


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_only_inputs_that_require_a_gradient_receive_one(wanted):
    inputs = [torch.randn(5, N, dtype=torch.float64), *draw(3, "all")]
    inputs[wanted].requires_grad_()
    cotangent = torch.randn(5, M, dtype=torch.float64)
    (expected,) = torch.autograd.grad(reference_output(*inputs, "all", "rms"), inputs[wanted], cotangent)
    pera_linear(*inputs, normalization="rms").backward(cotangent)
    assert [t.grad is not None for t in inputs] == [position == wanted for position in range(4)]
    torch.testing.assert_close(inputs[wanted].grad, expected)


def test_no_grad_computes_the_same_and_records_nothing():
    inputs = leaves(torch.randn(5, N), *draw(3, "all", dtype=torch.float32))
    with torch.no_grad():
        y = pera_linear(*inputs)
    assert not y.requires_grad
    assert torch.equal(y, pera_linear(*inputs))


# Precision


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("factor_dtype", ["same", torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [0, 4])
def test_output_is_within_rounding_of_float64(k, dtype, factor_dtype, normalization):
    A, B, h = draw(8, "all", dtype=dtype if factor_dtype == "same" else factor_dtype)
    anchors, h = draw_anchors(k, h)
    x = torch.randn(5, N, dtype=dtype)
    y = pera_linear(x, A, B, h, normalization=normalization, anchors=anchors)
    assert y.dtype == dtype
    weights = by_pair(h, 8, "all", anchors)
    # Â, B̂, x Âᵀ, h, their product and the result are rounded to the dtype; sums and means are in float32.
    sums = N + expanded_rank(8, "all", k) + A.numel() + B.numel() + 12
    rounding = (6 * torch.finfo(dtype).eps + sums * torch.finfo(torch.float32).eps) / 2
    bound = rounding * (x.double().abs() @ reference.magnitude(A, B, weights, normalization, 1.0, anchors).T)
    assert ((y.double() - reference_output(x, A, B, h, "all", normalization, 1.0, anchors)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_the_dtype_of_their_input(dtype):
    x, A, B, h = inputs = leaves(torch.randn(5, N, dtype=dtype), *draw(3, "all", dtype=torch.float32))
    y = pera_linear(*inputs, normalization="rms")
    cotangent = torch.randn_like(y)
    expected = gradients(reference_output(*inputs, "all", "rms"), inputs, cotangent.double())
    # Each gradient is a chain of at most six roundings to the dtype; 4 allows for their growth in the norm.
    for actual, right in zip(gradients(y, inputs, cotangent), expected, strict=True):
        assert (actual.double() - right).norm() <= 4 * 6 * torch.finfo(dtype).eps * right.norm()
    assert [g.dtype for g in gradients(pera_linear(*inputs), inputs, cotangent)] == [t.dtype for t in (x, A, B, h)]


@pytest.mark.parametrize("k", [0, 4])
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(k):
    A, B, h = draw(3, "all", dtype=torch.float32)
    anchors, h = draw_anchors(k, h)
    x, A, B, h = inputs = leaves(torch.randn(5, N), A, B, h)
    cotangent = torch.randn(5, M, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pera_linear(*inputs, anchors=anchors)
        inside = gradients(y, inputs, cotangent)
    assert y.dtype == torch.bfloat16
    cast = pera_linear(x.bfloat16(), A, B, h, anchors=anchors)
    assert torch.equal(y, cast)
    for gradient, same in zip(inside, gradients(cast, inputs, cotangent), strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, same)


def test_meta_tensors_have_shapes():
    A, B, h = (t.to("meta") for t in draw(3, "all"))
    assert pera_linear(torch.empty(5, N, device="meta"), A, B, h).shape == (5, M)


def test_autocast_leaves_float64_alone():
    x, A, B, h = torch.randn(5, N, dtype=torch.float64), *draw(3, "all")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.functional.linear(x, B @ A).dtype == torch.float64
        assert pera_linear(x, A, B, h).dtype == torch.float64


# Beside the rest of PyTorch


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    inputs = leaves(torch.randn(5, N), *draw(3, "all", dtype=torch.float32))

    def block(*inputs):
        return torch.tanh(pera_linear(*inputs, normalization="rms"))

    block(*inputs).sum().backward()
    expected = [t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad = None
    checkpoint(block, *inputs, use_reentrant=use_reentrant).sum().backward()
    for t, gradient in zip(inputs, expected, strict=True):
        assert torch.equal(t.grad, gradient)


@needs_whole_graphs
@pytest.mark.parametrize(
    ("normalization", "k", "backend"), [("none", 0, "aot_eager"), ("rms", 4, "aot_eager"), ("rms", 0, "inductor")]
)
def test_compiled_without_a_graph_break_gives_the_same(normalization, k, backend):
    A, B, h = draw(3, "all", dtype=torch.float32)
    anchors, h = draw_anchors(k, h)
    inputs = leaves(torch.randn(5, N), A, B, h)

    def operator(*inputs):
        return pera_linear(*inputs, normalization=normalization, anchors=anchors, scaling=0.7)

    cotangent = torch.randn(5, M)
    expected = operator(*inputs)
    actual = torch.compile(operator, fullgraph=True, backend=backend)(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, inputs, cotangent), gradients(expected, inputs, cotangent))


@pytest.mark.parametrize("k", [0, 4])
def test_func_transforms_give_the_gradients_of_autograd(k):
    x, A, B, h = torch.randn(5, N, dtype=torch.float64), *draw(3, "all")
    anchors, h = draw_anchors(k, h)
    factors, options = (A, B, h), {"normalization": "rms", "anchors": anchors, "scaling": 0.7}

    def loss(factors, x):
        return torch.tanh(pera_linear(x, *factors, **options)).square().sum()

    inputs = leaves(*factors)
    each = [torch.autograd.grad(loss(inputs, row), inputs) for row in x]
    expected = [torch.stack(gradients) for gradients in zip(*each, strict=True)]
    whole = torch.func.grad(loss)(tuple(factors), x)
    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(tuple(factors), x)
    by_adapter = torch.func.vmap(torch.func.grad(loss))(tuple(t.expand(5, *t.shape) for t in factors), x)
    for ours, ours_too, total, right in zip(by_sample, by_adapter, whole, expected, strict=True):
        torch.testing.assert_close(ours, right)
        torch.testing.assert_close(ours_too, right)
        torch.testing.assert_close(total, right.sum(0))


def test_func_transforms_leave_nothing_behind():
    """Index tensors made within a transform are not used after it."""
    x, *factors = torch.randn(5, N, dtype=torch.float64), *draw(7, "cross")  # a rank that no other test uses

    def loss(x):
        return pera_linear(x, *factors, terms="cross").sum()

    with torch.inference_mode():
        pera_linear(x, *factors, terms="cross")
    (x,) = leaves(x)
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(x), x)[0])


# What is kept for backward


def saved_by(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call()
    return saved


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("r", "kept"), [(3, True), (5, False)])  # of "all", K = 9 and 20 for inputs of 9
def test_backward_keeps_x_the_factors_and_a_thin_product_that_is_no_larger_than_x(terms, r, kept):
    x, A, B, h = inputs = leaves(torch.randn(2, 5, N), *draw(r, terms, dtype=torch.float32))
    base = torch.randn(2, 5, M, requires_grad=True)
    saved = saved_by(lambda: pera_linear(*inputs, base=base, normalization="rms", terms=terms))
    K = expanded_rank(r, terms)
    assert terms != "all" or (K <= N) == kept
    own = {t.data_ptr() for t in inputs}
    further = [t.numel() for t in saved if t.data_ptr() not in own and t.numel()]
    assert further == ([2 * 5 * K] if K <= N else []), "x and the factors are not copied"
    assert sum(t.numel() for t in saved) == x.numel() + A.numel() + B.numel() + h.numel() + sum(further)


class Shapes(TorchDispatchMode):
    """Shapes and dtypes of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen += [(tuple(t.shape), t.dtype) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_bfloat16_activations_are_never_copied_to_float32(normalization):
    tokens = 101  # a length that nothing else has
    A, B, h = leaves(*draw(3, "all", dtype=torch.float32))
    x, base = leaves(torch.randn(tokens, N).bfloat16(), torch.randn(tokens, M).bfloat16())
    with Shapes() as shapes:
        y = pera_linear(x, A, B, h, normalization=normalization, base=base)
        y.backward(torch.ones_like(y))
    dtypes = {dtype for shape, dtype in shapes.seen if tokens in shape}
    assert dtypes == {torch.bfloat16}


# What it is added to


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("base_dtype", [torch.float64, torch.float32])
def test_base_is_added_in_its_dtype(base_dtype, shape):
    x, A, B, h = leaves(torch.randn(*shape, N, dtype=torch.float64), *draw(3, "all"))
    (base,) = leaves(torch.randn(*shape, M, dtype=base_dtype))
    y = pera_linear(x, A, B, h, base=base)
    expected = base + pera_linear(x, A, B, h).to(base_dtype)
    assert y.dtype == base_dtype
    tolerance = 1e-14 if base_dtype == torch.float64 else 1e-6
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(y)
    for ours, theirs in zip(
        gradients(y, (base, x, A, B, h), cotangent), gradients(expected, (base, x, A, B, h), cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_output_and_gradient_of_x_are_no_views(shape):
    """Else autograd cannot sum the gradients of x in place, and users cannot write into an output."""
    inputs = leaves(torch.randn(*shape, N), *draw(3, "all", dtype=torch.float32))
    y = pera_linear(*inputs)
    y += 1
    assert not y._is_view()
    assert not gradients(y, inputs, torch.ones_like(y))[0]._is_view()
