"""A cut to a smaller rank is the best there is, and says what it loses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from pera.errors import UserError
from pera.lora import Folded
from pera.polynomial import lora_factors, num_coefficients
from pera_lab.adapters import Adapter
from pera_lab.convert.export import export
from pera_lab.convert.truncate import factored_svd, measured, truncate, truncate_factors
from reference import NORMALIZATIONS
from tiny import adapt


def random_factors(m, n, r, normalization="rms", seed=0):
    """A and B of the LoRA that a random PERA adapter is, in float64."""
    torch.manual_seed(seed)
    A, B = torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64)
    return lora_factors(A, B, torch.randn(num_coefficients(r, "all"), dtype=torch.float64), "all", normalization)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    r=st.integers(1, 6),
    rank=st.integers(1, 30),
    normalization=st.sampled_from(NORMALIZATIONS),
    seed=st.integers(0, 99),
)
def test_the_error_is_that_of_the_best_approximation(m, n, r, rank, normalization, seed):
    A, B = random_factors(m, n, r, normalization, seed)
    delta = B @ A
    values = torch.linalg.svdvals(delta)
    A_cut, B_cut = truncate_factors(A, B, rank)
    error = (delta - B_cut @ A_cut).norm() / delta.norm()
    optimal = values[rank:].norm() / delta.norm()
    assert len(A_cut) == B_cut.shape[1] <= rank
    assert abs(error - optimal) <= 1e-5


@pytest.mark.parametrize("leading", [(), (3,)])
def test_the_decomposition_is_that_of_the_product(leading):
    torch.manual_seed(0)
    A, B = torch.randn(*leading, 14, 9, dtype=torch.float64), torch.randn(*leading, 20, 14, dtype=torch.float64)
    U, S, Vh = factored_svd(A, B)
    assert S.shape == (*leading, 9)
    assert torch.allclose(S, torch.linalg.svdvals(B @ A))
    assert torch.allclose(U * S.unsqueeze(-2) @ Vh, B @ A)


def test_it_never_builds_a_matrix_of_the_size_of_the_weight(monkeypatch):
    sizes = []
    decompose = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda X, **options: (sizes.append(X.shape), decompose(X, **options))[1])
    A, B = random_factors(300, 200, 4)
    truncate_factors(A, B, 5)
    assert sizes == [(14, 14)]


def test_a_rank_of_the_smaller_side_loses_nothing():
    layers = {"layer": Folded(None, *random_factors(12, 10, 4))}
    cut, truncation = truncate(layers, max_rank=10)
    assert truncation.lossless
    assert (truncation.expanded_rank, truncation.rank) == (14, 10)
    assert torch.allclose(cut["layer"].B @ cut["layer"].A, layers["layer"].B @ layers["layer"].A)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_the_rank_that_keeps_an_energy_is_the_least_for_every_layer(energy):
    layers = {name: Folded(None, *random_factors(30, 20, 4, seed=seed)) for seed, name in enumerate("abc")}
    _, truncation = truncate(layers, energy=energy)
    assert max(truncation.discarded.values()) <= 1 - energy
    _, less = truncate(layers, max_rank=truncation.rank - 1)
    assert max(less.discarded.values()) > 1 - energy
    spectra = {name: torch.linalg.svdvals(layer.B @ layer.A).square() for name, layer in layers.items()}
    for name, spectrum in spectra.items():
        assert truncation.discarded[name] == pytest.approx(float(spectrum[truncation.rank :].sum() / spectrum.sum()))
    lost = sum(float(s[truncation.rank :].sum()) for s in spectra.values())
    assert truncation.total_discarded == pytest.approx(lost / sum(float(s.sum()) for s in spectra.values()))


def test_an_adapter_that_is_zero_is_cut_to_rank_one():
    zero = Folded(None, torch.randn(5, 9).double(), torch.zeros(7, 5).double())
    _, truncation = truncate({"layer": zero}, energy=0.9)
    assert truncation.rank == 1
    assert truncation.total_discarded == 0


def test_the_change_of_a_layers_output_is_measured_on_its_own_inputs():
    model = adapt(nn.Sequential(nn.Linear(9, 7)), target_modules=["0"])
    layer = model.base_model.model[0]
    A, B = random_factors(7, 9, 3)
    layers = {"0": Folded(layer, A, B)}
    cut, _ = truncate(layers, max_rank=2)
    x = torch.randn(11, 9)
    with measured(layers, cut) as changes:
        model(x[:4])
        model(x[4:])
    exact = x.double() @ (B @ A).T
    expected = (exact - x.double() @ (cut["0"].B @ cut["0"].A).T).norm() / exact.norm()
    assert changes == {"0": pytest.approx(float(expected))}


def test_an_export_is_cut_and_says_what_it_loses(save_adapter, tiny_llama, tmp_path, logits):
    expected = logits(save_adapter(tmp_path / "adapter", tiny_llama, normalization="rms"))
    done = export(str(tmp_path / "adapter"), tmp_path / "lora", max_rank=4)
    weights = Adapter(tmp_path / "lora").weights
    assert {len(w) for key, w in weights.items() if "lora_A" in key} == {4}
    assert done.good
    assert done.truncation.rank == 4
    assert not done.agreement.agree
    assert len(done.truncation.output_change) == 4
    assert all(0.01 < change < 1 for change in done.truncation.output_change.values())
    found = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "lora"))
    assert 0.01 < (found - expected).abs().max() < (logits(tiny_llama) - expected).abs().max()


def test_a_cut_that_loses_nothing_has_to_agree(save_adapter, tiny_llama, tmp_path):
    save_adapter(tmp_path / "adapter", tiny_llama, r=8)  # K = 44, and q_proj is (32, 32)
    done = export(str(tmp_path / "adapter"), tmp_path / "lora", max_rank=32)
    assert done.truncation.lossless
    assert done.agreement.agree


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_rank": 3, "energy": 0.9}, "--max-rank=3 and --energy=0.9 both set the rank"),
        ({"max_rank": 0}, "--max-rank=0 should be at least 1"),
        ({"energy": 0.0}, "--energy=0.0 should be a share above 0"),
        ({"energy": 99.9}, "--energy=99.9 should be a share above 0"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(options, words, adapter, tmp_path):
    with pytest.raises(UserError, match=words):
        export(str(adapter), tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()
