"""The fast expansions against the algebra, with torch and with the Triton kernels (in Triton's interpreter)."""

import importlib.util

import pytest
import torch

import pera
import reference
from pera.errors import UserError
from pera.expansion import expansion, fold_back, pairs, use_kernels
from pera.linear import pera_linear
from pera.polynomial import expand, expand_vjp, num_coefficients
from reference import NORMALIZATIONS, TERMS, draw

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton"))


@pytest.fixture(params=["torch", TRITON], autouse=True)
def path(request, monkeypatch):
    """Each test runs on both."""
    monkeypatch.setattr(pera.expansion, "_use_kernels", request.param == "triton")
    return request.param


def in_this_order(rows, r, terms):
    """Rows of an expansion in the order of h, in the order of ``pairs``."""
    positions = [reference.pairs(r, terms).index(pair) for pair in pairs(r, terms)]
    return torch.cat([rows[:r], rows[r:][positions]])


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", range(1, 18))
def test_every_product_stands_there_once(r, terms):
    assert sorted(pairs(r, terms)) == sorted(reference.pairs(r, terms))


@pytest.mark.parametrize("with_h", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("r", "d"), [(1, 5), (2, 1), (4, 130), (9, 40)])
def test_it_is_the_expansion_and_its_gradient(r, d, terms, normalization, with_h):
    X, h = torch.randn(d, r, dtype=torch.float64).T, torch.randn(num_coefficients(r, terms), dtype=torch.float64)
    h = h if with_h else None
    actual = expansion(X, h, terms, normalization, 0.7, torch.float64)
    expected = 0.7 * expand(X, h, terms, normalization)
    torch.testing.assert_close(actual, in_this_order(expected, r, terms), rtol=1e-13, atol=1e-13)

    cotangent = torch.randn_like(expected)
    right_X, right_h = expand_vjp(0.7 * cotangent, X, h, terms, normalization)
    grad_X, grad_h, _ = fold_back(in_this_order(cotangent, r, terms), X, h, terms, normalization, 0.7, need_h=with_h)
    torch.testing.assert_close(grad_X, right_X, rtol=1e-11, atol=1e-11)
    if with_h:
        torch.testing.assert_close(grad_h, right_h, rtol=1e-11, atol=1e-11)
    else:
        assert grad_h is None


@pytest.mark.parametrize("normalization", [name for name in NORMALIZATIONS if name != "none"])
@pytest.mark.parametrize("r", [1, 3, 4])
def test_what_goes_through_rho_is_the_same_for_both_factors(r, normalization):
    A, B, h = draw(r, "all", m=20, n=30)
    G = torch.randn(20, 30, dtype=torch.float64)  # the gradient of ΔW
    A_hat = expansion(A, h, "all", normalization, 0.7, torch.float64)
    B_hat_T = expansion(B.T, None, "all", normalization, 1.0, torch.float64)
    grad_A_hat, grad_B_hat_T = B_hat_T @ G, A_hat @ G.T
    shares = fold_back(grad_A_hat, A, h, "all", normalization, 0.7).shares
    alone = fold_back(grad_B_hat_T, B.T, None, "all", normalization, 1.0)
    torch.testing.assert_close(shares, alone.shares)
    given = fold_back(grad_B_hat_T, B.T, None, "all", normalization, 1.0, shares=shares)
    torch.testing.assert_close(given.X, alone.X)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_low_precision_is_computed_in_float32_and_rounded_once(normalization, factor_dtype, path):
    A, _, h = draw(5, "all", n=200, dtype=factor_dtype)
    rounded = expansion(A, h, "all", normalization, 0.7, torch.bfloat16)
    unrounded = expansion(A.float(), h.float(), "all", normalization, 0.7, torch.float32)
    ulps = 1 if path == "triton" else 0.5  # Triton's interpreter cuts off where a GPU rounds
    assert (rounded.float() - unrounded).abs().le(ulps * torch.finfo(torch.bfloat16).eps * unrounded.abs()).all()
    grad = torch.randn_like(unrounded).bfloat16()
    low = fold_back(grad, A, h, "all", normalization, 0.7, need_h=True)
    high = fold_back(grad.float(), A.float(), h.float(), "all", normalization, 0.7, need_h=True)
    assert low.X.dtype == low.h.dtype == torch.float32
    assert torch.equal(low.X, high.X)
    assert torch.equal(low.h, high.h)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("recompute", [True, False])
def test_gradcheck_of_the_operator(recompute, terms, normalization, path):
    if path == "triton" and (recompute, terms, normalization) != (False, "all", "rms"):
        pytest.skip("Triton's interpreter takes 20 s for each")
    inputs = [torch.randn(2, 4, dtype=torch.float64), *draw(2, terms, m=3, n=4), torch.randn(2, 3, dtype=torch.float64)]

    def operator(x, A, B, h, base):
        options = {"terms": terms, "normalization": normalization, "scaling": 0.7}
        return pera_linear(x, A, B, h, base=base, recompute=recompute, **options)

    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(operator, inputs)
    assert torch.autograd.gradgradcheck(operator, inputs)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_paths_agree_to_rounding(dtype, monkeypatch):
    """Both compute in float32 and round Â and B̂ once: what may differ is the order of the sums, r terms for a row
    of the gradient and the columns for an inner product."""
    A, B, h = (t.requires_grad_() for t in draw(8, "all", m=150, n=200, dtype=torch.float32))
    x, cotangent = torch.randn(6, 200, dtype=dtype), torch.randn(6, 150, dtype=dtype)
    results = []
    for kernels in (False, True):
        monkeypatch.setattr(pera.expansion, "_use_kernels", kernels)
        y = pera_linear(x, A, B, h, normalization="rms")
        results.append([y, *torch.autograd.grad(y, (A, B, h), cotangent)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 200 * torch.finfo(dtype).eps * ours.norm()


def test_triton_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pera\[triton\]'"):
        use_kernels()


def test_kernels_are_switched_on_and_off():
    use_kernels(False)
    assert not pera.expansion._use_kernels
    if importlib.util.find_spec("triton"):
        use_kernels()
        assert pera.expansion._use_kernels


def test_without_a_gpu_the_switch_changes_nothing(monkeypatch, path):
    if path == "torch":
        pytest.skip("with the switch on")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(pera.expansion, "_require_triton", lambda: pytest.fail("kernels were asked for"))
    A, _, h = draw(3, "all")
    assert expansion(A, h, "all", "none", 1.0, torch.float64).shape == (9, 9)
