"""The best LoRA of a smaller rank, computed from the factors alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pera.lora import factored_svd, truncate_factors
from pera.polynomial import lora_factors, num_coefficients


def random_factors(m, n, r, seed=0):
    """A and B of the LoRA that equals a random PERA adapter, in float64."""
    torch.manual_seed(seed)
    A, B = torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64)
    return lora_factors(A, B, torch.randn(num_coefficients(r, "all"), dtype=torch.float64), "all", "rms")


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    r=st.integers(1, 6),
    rank=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_the_error_is_that_of_the_best_approximation(m, n, r, rank, seed):
    A, B = random_factors(m, n, r, seed)
    delta = B @ A
    values = torch.linalg.svdvals(delta)
    A_cut, B_cut = truncate_factors(A, B, rank)
    error = (delta - B_cut @ A_cut).norm() / delta.norm()
    optimal = values[rank:].norm() / delta.norm()
    assert len(A_cut) == B_cut.shape[1] <= rank
    assert abs(error - optimal) <= 1e-5


@pytest.mark.parametrize("leading", [(), (3,)])
def test_the_decomposition_equals_the_one_of_the_product(leading):
    torch.manual_seed(0)
    A, B = torch.randn(*leading, 14, 9, dtype=torch.float64), torch.randn(*leading, 20, 14, dtype=torch.float64)
    U, S, Vh = factored_svd(A, B)
    assert S.shape == (*leading, 9)
    assert torch.allclose(S, torch.linalg.svdvals(B @ A))
    assert torch.allclose(U * S.unsqueeze(-2) @ Vh, B @ A)


def test_only_a_K_by_K_matrix_is_decomposed(monkeypatch):
    sizes = []
    decompose = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda X, **options: (sizes.append(X.shape), decompose(X, **options))[1])
    A, B = random_factors(300, 200, 4)
    truncate_factors(A, B, 5)
    assert sizes == [(14, 14)]
