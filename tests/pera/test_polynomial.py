"""The algebra, equation by equation as in the paper (arXiv 2604.11841)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from pera.errors import UserError
from pera.polynomial import (
    coefficient_pairs,
    delta_weight,
    expand,
    expand_A,
    expand_B,
    expand_backward,
    expanded_rank,
    fixed_coefficients,
    lora_factors,
    normalizer,
    num_coefficients,
    rms,
)
from reference import COEFFICIENTS, NORMALIZATIONS, TERMS, by_pair, draw, draw_anchors, pairs, relative_error

RANKS = (1, 4)


# K, the expanded rank


@pytest.mark.parametrize(("r", "K"), [(2, 5), (4, 14), (8, 44), (12, 90), (16, 152), (24, 324), (30, 495), (32, 560)])
def test_expanded_rank_is_the_table_of_the_paper(r, K):
    assert expanded_rank(r) == K


@pytest.mark.parametrize("r", RANKS)
def test_expanded_rank_of_each_variant(r):
    assert expanded_rank(r, "none") == r
    assert expanded_rank(r, "square") == 2 * r
    assert expanded_rank(r, "cross") == r + r * (r - 1) // 2
    assert expanded_rank(r, "all") == r + r * (r + 1) // 2


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", RANKS)
def test_there_is_one_coefficient_for_each_product(r, terms):
    count = num_coefficients(r, terms)
    assert count == len(pairs(r, terms))
    assert len(coefficient_pairs(r, terms)) == count
    assert fixed_coefficients(r, terms).shape == (count,)


# The order of h


def test_h_holds_squares_first_then_crosses_lexicographically():
    squares = [(0, 0), (1, 1), (2, 2), (3, 3)]
    crosses = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert coefficient_pairs(4, "all") == squares + crosses
    assert coefficient_pairs(4, "square") == squares
    assert coefficient_pairs(4, "cross") == crosses
    assert coefficient_pairs(4, "none") == []


@pytest.mark.parametrize("terms", ["all", "square", "cross"])
def test_each_entry_of_h_weighs_the_product_of_its_pair(terms):
    A, B, _ = draw(4, terms)
    for position, (i, j) in enumerate(pairs(4, terms)):
        h = torch.zeros(len(pairs(4, terms)), dtype=torch.float64)
        h[position] = 1.0
        product = torch.outer(B[:, i] * B[:, j], A[i] * A[j])
        torch.testing.assert_close(delta_weight(A, B, h, terms) - B @ A, product, rtol=0, atol=1e-13)


def test_fixed_coefficients_are_one_for_squares_and_two_for_crosses():
    assert fixed_coefficients(3, "all").tolist() == [1, 1, 1, 2, 2, 2]
    assert fixed_coefficients(3, "square").tolist() == [1, 1, 1]
    assert fixed_coefficients(3, "cross").tolist() == [2, 2, 2]
    assert fixed_coefficients(3, "none").tolist() == []
    assert fixed_coefficients(3, "all", dtype=torch.float64).dtype == torch.float64


# Eq. 6 and 7, the expansions


def test_expansion_of_B_appends_products_of_columns():
    b1, b2, b3 = columns = torch.randn(3, 5, dtype=torch.float64)
    expected = torch.stack([b1, b2, b3, b1 * b1, b2 * b2, b3 * b3, b1 * b2, b1 * b3, b2 * b3], dim=1)
    assert torch.equal(expand_B(columns.T), expected)


def test_expansion_of_A_appends_weighted_products_of_rows():
    a1, a2, a3 = A = torch.randn(3, 6, dtype=torch.float64)
    h11, h22, h33, h12, h13, h23 = h = torch.randn(6, dtype=torch.float64)
    products = [h11 * a1 * a1, h22 * a2 * a2, h33 * a3 * a3, h12 * a1 * a2, h13 * a1 * a3, h23 * a2 * a3]
    torch.testing.assert_close(expand_A(A, h), torch.stack([a1, a2, a3, *products]), rtol=1e-14, atol=1e-15)


def test_rms_divides_the_products_and_leaves_the_factor():
    A, B, h = draw(3, "all")
    for plain, normalized, factor in (
        (expand_A(A, h), expand_A(A, h, "all", "rms"), A),
        (expand_B(B).T, expand_B(B, "all", "rms").T, B),
    ):
        assert torch.equal(normalized[:3], plain[:3])
        torch.testing.assert_close(normalized[3:] * reference.rho(factor, "rms"), plain[3:])


def test_columns_of_zeros_do_not_count_in_rho():
    """Such as the columns of tokens that were never seen, in an embedding."""
    A, _, _ = draw(3, "all", n=9)
    wide = torch.cat([A, torch.zeros(3, 1000, dtype=A.dtype)], 1).requires_grad_()
    expanded = expand(wide, None, "all", "rms")
    torch.testing.assert_close(expanded[:, :9], expand(A, None, "all", "rms"), rtol=1e-14, atol=0)
    cotangent = torch.randn_like(expanded)
    (gradient,) = torch.autograd.grad(expanded, wide, cotangent)
    torch.testing.assert_close(expand_backward(cotangent, wide.detach(), "all", "rms"), gradient)
    assert torch.equal(gradient[:, 9:], cotangent[:3, 9:]), "as if there were no products"


def test_rho_is_the_root_mean_square_with_a_guard():
    A, _, _ = draw(3, "all")
    torch.testing.assert_close(rms(A), reference.rho(A, "rms"), rtol=1e-14, atol=0)
    assert rms(torch.zeros(2, 3)).item() == pytest.approx(1e-12)


@pytest.mark.parametrize("terms", TERMS)
def test_expansions_have_K_rows_and_columns(terms):
    A, B, h = draw(4, terms)
    K = expanded_rank(4, terms)
    assert expand_A(A, h, terms).shape == (K, 9)
    assert expand_B(B, terms).shape == (7, K)


# Eq. 9, the update


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", RANKS)
def test_delta_weight_is_the_sum_over_index_pairs(r, terms, coefficients, normalization):
    A, B, h = draw(r, terms, coefficients)
    expected = reference.delta_weight(A, B, by_pair(h, r, terms), normalization, scaling=0.7)
    assert relative_error(delta_weight(A, B, h, terms, normalization, scaling=0.7), expected) <= 1e-12


@pytest.mark.parametrize("r", RANKS)
def test_high_order_part_is_the_squared_update_for_constant_coefficients(r):
    A, B, _ = draw(r, "all")
    c = 0.3
    h = torch.tensor([c if i == j else 2 * c for i, j in pairs(r, "all")], dtype=torch.float64)
    high_order = delta_weight(A, B, h) - B @ A
    assert relative_error(high_order, c * (B @ A) * (B @ A)) <= 1e-12


@pytest.mark.parametrize("r", RANKS)
def test_fixed_coefficients_are_those_of_the_published_code(r):
    A, B, _ = draw(r, "all")
    BA = B @ A
    assert relative_error(delta_weight(A, B, fixed_coefficients(r, "all", dtype=A.dtype)), BA + BA * BA) <= 1e-12


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("terms", TERMS)
def test_lora_factors_of_rank_K_are_the_update_exactly(terms, normalization):
    A, B, h = draw(5, terms)
    lora_A, lora_B = lora_factors(A, B, h, terms, normalization, scaling=2.5)
    K = expanded_rank(5, terms)
    assert lora_A.shape == (K, 9)
    assert lora_B.shape == (7, K)
    assert torch.equal(lora_B @ lora_A, delta_weight(A, B, h, terms, normalization, scaling=2.5))
    expected = reference.delta_weight(A, B, by_pair(h, 5, terms), normalization, scaling=2.5)
    assert relative_error(lora_B @ lora_A, expected) <= 1e-12


# Eq. 8, 10 and 11, the special cases


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_all_coefficients_zero_is_lora(normalization):
    A, B, h = draw(4, "all")
    torch.testing.assert_close(delta_weight(A, B, torch.zeros_like(h), "all", normalization), B @ A)
    assert torch.equal(delta_weight(A, B, None, "none", normalization), B @ A)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_cross_coefficients_zero_is_squares_only(normalization):
    A, B, h = draw(4, "all")
    h[4:] = 0.0
    squares_only = delta_weight(A, B, h[:4], "square", normalization)
    torch.testing.assert_close(delta_weight(A, B, h, "all", normalization), squares_only)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_square_coefficients_zero_is_crosses_only(normalization):
    A, B, h = draw(4, "all")
    h[:4] = 0.0
    crosses_only = delta_weight(A, B, h[4:], "cross", normalization)
    torch.testing.assert_close(delta_weight(A, B, h, "all", normalization), crosses_only)


def test_rank_one_has_no_crosses():
    A, B, h = draw(1, "cross")
    assert torch.equal(delta_weight(A, B, h, "cross"), B @ A)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("terms", TERMS)
def test_update_is_zero_where_B_is_zero(terms, normalization):
    A, B, h = draw(4, terms)
    assert not delta_weight(A, torch.zeros_like(B), h, terms, normalization).any()


# The rank bound


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("terms", TERMS)
def test_rank_of_the_update_is_bounded_by_K_and_reaches_it(terms, normalization):
    A, B, h = draw(4, terms, m=40, n=50)
    update = delta_weight(A, B, h, terms, normalization)
    assert torch.linalg.matrix_rank(update).item() == expanded_rank(4, terms)


# Degree: with rms the update scales with each factor as LoRA's does


@pytest.mark.parametrize("t", [1e-3, 0.5, 7.0])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_rms_preserves_the_degree(factor, t):
    A, B, h = draw(4, "all")
    scaled = delta_weight(t * A, B, h, "all", "rms") if factor == "A" else delta_weight(A, t * B, h, "all", "rms")
    assert relative_error(scaled, t * delta_weight(A, B, h, "all", "rms")) <= 1e-12
    assert relative_error(scaled - t * B @ A, t * (delta_weight(A, B, h, "all", "rms") - B @ A)) <= 1e-12


@pytest.mark.parametrize("factor", ["A", "B"])
def test_high_order_part_is_even_in_each_factor(factor):
    A, B, h = draw(4, "all")
    flipped = delta_weight(-A, B, h, "all", "rms") if factor == "A" else delta_weight(A, -B, h, "all", "rms")
    torch.testing.assert_close(flipped + B @ A, delta_weight(A, B, h, "all", "rms") - B @ A)


def test_without_normalization_the_high_order_part_is_of_degree_two():
    A, B, h = draw(4, "all")
    high_order = delta_weight(A, B, h) - B @ A
    assert relative_error(delta_weight(0.1 * A, B, h) - 0.1 * B @ A, 0.01 * high_order) <= 1e-12


# The gradient


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("r", RANKS)
def test_expand_backward_is_the_gradient_of_expand(r, terms, normalization):
    A, _, _ = draw(r, terms)
    A.requires_grad_()
    expansion = expand(A, None, terms, normalization)
    cotangent = torch.randn_like(expansion)
    (expected,) = torch.autograd.grad(expansion, A, cotangent)
    with torch.no_grad():
        actual = expand_backward(cotangent, A, terms, normalization)
        inner = (cotangent[r:] * expansion[r:]).sum()
        known = expand_backward(cotangent, A, terms, normalization, known=normalizer(A), inner=inner)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if normalization != "none":
        torch.testing.assert_close(known, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("vanishing", ["A", "B"])
def test_gradients_stay_finite_where_a_factor_vanishes(vanishing, normalization, dtype, value):
    A, B, h = draw(4, "all", dtype=dtype)
    (A if vanishing == "A" else B).fill_(value)
    inputs = [A.requires_grad_(), B.requires_grad_(), h.requires_grad_()]
    update = delta_weight(A, B, h, "all", normalization)
    cotangent = torch.randn_like(update)
    for gradient in torch.autograd.grad(update, inputs, cotangent):
        assert torch.isfinite(gradient).all()
    for factor in (A, B.T):
        cotangent = torch.randn_like(expand(factor, None, "all", normalization))
        assert torch.isfinite(expand_backward(cotangent, factor, "all", normalization)).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradient_at_the_start_is_that_of_lora(normalization):
    """At B = 0 every product is zero, so that B receives LoRA's gradient and A and h receive none."""
    A, B, h = draw(4, "all")
    inputs = [A.requires_grad_(), B.zero_().requires_grad_(), h.requires_grad_()]
    cotangent = torch.randn(7, 9, dtype=torch.float64)
    grad_A, grad_B, grad_h = torch.autograd.grad(delta_weight(A, B, h, "all", normalization), inputs, cotangent)
    torch.testing.assert_close(grad_B, cotangent @ A.T)
    assert not grad_A.any()
    assert not grad_h.any()


# Precision


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_factors_are_computed_in_float32(dtype, normalization):
    A, B, h = draw(4, "all", dtype=dtype)
    update = delta_weight(A, B, h, "all", normalization)
    assert update.dtype == torch.float32
    assert torch.equal(update, delta_weight(A.float(), B.float(), h.float(), "all", normalization))
    assert rms(A).dtype == torch.float32
    cotangent = expand(A, None, "all", normalization).to(dtype)
    gradient = expand_backward(cotangent, A, "all", normalization)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, expand_backward(cotangent.float(), A.float(), "all", normalization))


def test_float64_stays_float64():
    A, B, h = draw(4, "all")
    assert delta_weight(A, B, h, "all", "rms").dtype == torch.float64


def test_rms_of_half_precision_does_not_overflow():
    A = torch.full((2, 3), 3e4, dtype=torch.float16)
    assert rms(A).item() == pytest.approx(3e4, rel=1e-3)


# Mistakes


@pytest.mark.parametrize(
    "call",
    [
        lambda terms: coefficient_pairs(4, terms),
        lambda terms: num_coefficients(4, terms),
        lambda terms: expanded_rank(4, terms),
        lambda terms: fixed_coefficients(4, terms),
        lambda terms: expand(torch.ones(4, 3), None, terms, "none"),
        lambda terms: delta_weight(torch.ones(4, 3), torch.ones(2, 4), None, terms),
    ],
)
def test_unknown_terms_are_refused_with_the_nearest(call):
    with pytest.raises(UserError, match=r"terms='squares' is not known; did you mean 'square'\?"):
        call("squares")


@pytest.mark.parametrize(
    "terms",
    ["all", "none"],
)
def test_unknown_normalization_is_refused_with_the_nearest(terms):
    with pytest.raises(UserError, match=r"normalization='rsm' is not known; did you mean 'rms'\?"):
        expand(torch.ones(4, 3), None, terms, "rsm")


def test_a_far_off_name_is_refused_with_all_known():
    with pytest.raises(UserError, match=r"terms='xyz' is not known; known: all, cross, none, square"):
        num_coefficients(4, "xyz")


# Properties over shapes, ranks, dtypes, terms and anchors

any_case = {
    "r": st.integers(1, 9),
    "m": st.integers(1, 12),
    "n": st.integers(1, 12),
    "terms": st.sampled_from(TERMS),
    "coefficients": st.sampled_from(COEFFICIENTS),
    "normalization": st.sampled_from(NORMALIZATIONS),
    "k": st.integers(0, 3),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
}


@given(**any_case, scaling=st.floats(0.1, 4))
def test_update_is_within_rounding_of_the_reference(r, m, n, terms, coefficients, normalization, k, dtype, scaling):
    A, B, h = draw(r, terms, coefficients, m, n, dtype)
    anchors, h = draw_anchors(k, h, m, n)
    before = [t.clone() for t in (A, B, h)]
    update = delta_weight(A, B, h, terms, normalization, anchors, scaling)
    assert update.shape == (m, n)
    assert update.dtype == torch.promote_types(dtype, torch.float32)
    assert all(torch.equal(now, then) for now, then in zip((A, B, h), before, strict=True))
    # One rounding for each summand of the K products and of the two means, and a dozen for a single product.
    roundings = expanded_rank(r, terms, k) + A.numel() + B.numel() + 12
    weights = by_pair(h, r, terms, anchors)
    expected = reference.delta_weight(A, B, weights, normalization, scaling, anchors)
    bound = reference.magnitude(A, B, weights, normalization, scaling, anchors)
    assert ((update.double() - expected).abs() <= roundings * torch.finfo(update.dtype).eps * bound).all()


@given(**any_case)
def test_expand_backward_is_adjoint_to_the_derivative(r, m, n, terms, coefficients, normalization, k, dtype):
    """⟨G, J v⟩ = ⟨Jᵀ G, v⟩, with J v from forward-mode differentiation."""
    A, _, h = draw(r, terms, coefficients, m, n, dtype)
    V, A = (draw_anchors(k, h, m, n)[0] or (None,))[0], A.double()
    v = torch.randn_like(A)
    _, Jv = torch.func.jvp(lambda A: expand(A, None, terms, normalization, V), (A,), (v,))
    G = torch.randn_like(Jv)
    grad_A = expand_backward(G, A, terms, normalization, V)
    torch.testing.assert_close((G * Jv).sum(), (grad_A * v).sum(), rtol=1e-9, atol=1e-9)


@given(**any_case, with_h=st.booleans(), data=st.data())
def test_some_columns_expand_as_in_the_whole(r, m, n, terms, coefficients, normalization, k, dtype, with_h, data):
    """With ρ and means of the whole: the same values, and the same gradients, through them as well."""
    columns = data.draw(st.lists(st.integers(0, n - 1), max_size=n + 2))
    A, _, h = draw(r, terms, coefficients, m, n, dtype)
    anchors, h = draw_anchors(k, h, m, n)
    V, V_part = (None, None) if anchors is None else (anchors.V, anchors.V[:, columns])
    h = h if with_h else None
    part = expand(A[:, columns], h, terms, normalization, V_part, whole=A)
    assert torch.equal(part, expand(A, h, terms, normalization, V)[:, columns])
    A, h = A.double().requires_grad_(), h if h is None else h.double().requires_grad_()
    part = expand(A[:, columns], h, terms, normalization, V_part, whole=A)
    whole = expand(A, h, terms, normalization, V)[:, columns]
    inputs, cotangent = [A] if h is None else [A, h], torch.randn_like(part)
    for gradient, expected in zip(
        torch.autograd.grad(part, inputs, cotangent, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(whole, inputs, cotangent, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@given(r=st.integers(1, 12), terms=st.sampled_from(TERMS), k=st.integers(0, 5))
def test_order_of_h_agrees_with_the_reference(r, terms, k):
    assert coefficient_pairs(r, terms) == pairs(r, terms)
    assert num_coefficients(r, terms, k) == len(pairs(r, terms)) + k
    assert expanded_rank(r, terms, k) == r + len(pairs(r, terms)) + r * k


# Anchors


def test_anchors_alone_are_a_mask_of_the_linear_update():
    """ΔW = s (BA) ⊙ (1 1ᵀ + U diag(h) V / √k)."""
    A, B, h = draw(3, "none")
    anchors, h = draw_anchors(4, h)
    V, U = anchors.V.double(), anchors.U_T.double().T
    update = delta_weight(A, B, h, "none", "none", anchors, scaling=0.7)
    torch.testing.assert_close(update, 0.7 * (B @ A) * (1 + U @ torch.diag(h) @ V / 2))


def test_rows_of_an_anchor_follow_one_another():
    A, B, h = draw(2, "none")
    anchors, h = draw_anchors(3, h)
    a1, a2 = A
    v1, v2, v3 = anchors.V
    rows = [a1, a2, a1 * v1, a2 * v1, a1 * v2, a2 * v2, a1 * v3, a2 * v3]
    assert torch.equal(expand(A, None, "none", "none", anchors.V), torch.stack(rows))
    weights = torch.tensor([1, 1, *h.repeat_interleave(2) / 3**0.5], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(expand_A(A, h, "none", "none", anchors), torch.stack(rows) * weights)
    b1, u3 = B[:, 0], anchors.U_T[2]
    assert torch.equal(expand_B(B, "none", "none", anchors)[:, 6], b1 * u3)


@pytest.mark.parametrize("terms", TERMS)
def test_anchors_without_coefficients_weigh_one(terms):
    A, B, h = draw(3, terms, "fixed")
    anchors, _ = draw_anchors(4, h)
    ones = torch.ones(num_coefficients(3, terms, 4), dtype=torch.float64)
    update = delta_weight(A, B, ones, terms, "rms", anchors)
    torch.testing.assert_close(delta_weight(A, B, None, terms, "rms", anchors), update)
    published = fixed_coefficients(3, terms, 4)
    assert published.tolist() == [*fixed_coefficients(3, terms).tolist(), 1, 1, 1, 1]


@pytest.mark.parametrize("terms", TERMS)
def test_anchors_raise_the_rank_of_the_update_to_K(terms):
    A, B, h = draw(3, terms, m=40, n=50)
    anchors, h = draw_anchors(4, h, 40, 50)
    update = delta_weight(A, B, h, terms, "none", anchors)
    assert torch.linalg.matrix_rank(update).item() == expanded_rank(3, terms, 4) == expanded_rank(3, terms) + 12


@pytest.mark.parametrize("width", [1, 8])
def test_frozen_rows_of_another_width_are_refused(width):
    """A width of 1 would be broadcast."""
    with pytest.raises(
        UserError, match=rf"anchors: the frozen rows have {width} entries, and the rows of the factor 9"
    ):
        expand(torch.ones(3, 9), None, "none", "none", torch.ones(2, width, dtype=torch.int8))


def test_h_that_lacks_the_anchors_is_refused():
    A, B, h = draw(3, "square")
    anchors, _ = draw_anchors(4, h)
    with pytest.raises(UserError, match=r"h has shape \(3,\); r=3 and terms='square' with 4 anchors need \(7,\)"):
        delta_weight(A, B, h, "square", "none", anchors)
