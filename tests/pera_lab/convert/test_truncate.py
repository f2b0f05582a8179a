"""A truncated adapter has one rank, and its loss is reported."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from pera.errors import UserError
from pera.folding import Folded
from pera.polynomial import lora_factors, num_coefficients
from pera.tuner.layers import PeraLinear
from pera_lab.adapters import Adapter
from pera_lab.convert.export import export
from pera_lab.convert.truncate import FLOAT32_ROUNDING, measured, truncate
from pera_lab.opening import locate_adapter
from tiny import adapt


def random_factors(m, n, r, seed=0):
    """A and B of the LoRA that equals a random PERA adapter, in float64."""
    torch.manual_seed(seed)
    A, B = torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64)
    return lora_factors(A, B, torch.randn(num_coefficients(r, "all"), dtype=torch.float64), "all", "rms")


def test_the_rank_of_the_smaller_side_keeps_the_product():
    layers = {"layer": Folded(None, PeraLinear, *random_factors(12, 10, 4))}
    cut, truncation = truncate(layers, max_rank=10)
    assert (truncation.expanded_rank, truncation.rank) == (14, 10)
    assert torch.allclose(cut["layer"].B @ cut["layer"].A, layers["layer"].B @ layers["layer"].A)


@pytest.mark.parametrize(("share", "lossless"), [(0.5, True), (2, False)])
def test_a_cut_is_lossless_if_no_layer_loses_more_than_float32_rounds(share, lossless):
    A = torch.eye(2, 3, dtype=torch.float64)
    planted = torch.diag(torch.tensor([1, (share * FLOAT32_ROUNDING) ** 0.5], dtype=torch.float64))
    layers = {
        "planted": Folded(None, PeraLinear, A, planted),
        "rank one": Folded(None, PeraLinear, A[:1], 1e9 * A.T[:, :1]),
    }
    _, truncation = truncate(layers, max_rank=1)
    assert truncation.discarded == {"planted": pytest.approx(share * FLOAT32_ROUNDING), "rank one": 0}
    assert truncation.lossless is lossless


@pytest.mark.parametrize("energy", [0.5, 0.999])
def test_the_rank_for_an_energy_is_the_smallest_that_every_layer_allows(energy):
    layers = {name: Folded(None, PeraLinear, *random_factors(30, 20, 4, seed=seed)) for seed, name in enumerate("abc")}
    _, truncation = truncate(layers, energy=energy)
    assert max(truncation.discarded.values()) <= 1 - energy
    _, less = truncate(layers, max_rank=truncation.rank - 1)
    assert max(less.discarded.values()) > 1 - energy
    spectra = {name: torch.linalg.svdvals(layer.B @ layer.A).square() for name, layer in layers.items()}
    for name, spectrum in spectra.items():
        assert truncation.discarded[name] == pytest.approx(float(spectrum[truncation.rank :].sum() / spectrum.sum()))
    lost = sum(float(s[truncation.rank :].sum()) for s in spectra.values())
    assert truncation.total_discarded == pytest.approx(lost / sum(float(s.sum()) for s in spectra.values()))


def test_a_zero_adapter_is_cut_to_rank_one_and_loses_nothing():
    zero = Folded(None, PeraLinear, torch.randn(5, 9).double(), torch.zeros(7, 5).double())
    _, truncation = truncate({"layer": zero}, energy=0.9)
    assert truncation.rank == 1
    assert truncation.total_discarded == 0


def test_the_output_change_is_measured_on_the_inputs_of_the_layer():
    model = adapt(nn.Sequential(nn.Linear(9, 7)), target_modules=["0"])
    layer = model.base_model.model[0]
    A, B = random_factors(7, 9, 3)
    layers = {"0": Folded(layer, PeraLinear, A, B)}
    cut, _ = truncate(layers, max_rank=2)
    x = torch.randn(11, 9)
    with measured(layers, cut) as changes:
        model(x[:4])
        model(x[4:])
    exact = x.double() @ (B @ A).T
    expected = (exact - x.double() @ (cut["0"].B @ cut["0"].A).T).norm() / exact.norm()
    assert changes == {"0": pytest.approx(float(expected))}


def test_an_export_with_max_rank_is_truncated_and_reports_the_loss(save_adapter, tiny_llama, tmp_path, logits):
    expected = logits(save_adapter(tmp_path / "adapter", tiny_llama, normalization="rms"))
    done = export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "lora", max_rank=4)
    weights = Adapter(tmp_path / "lora").weights
    assert {len(w) for key, w in weights.items() if "lora_A" in key} == {4}
    assert done.good
    assert done.truncation.rank == 4
    assert not done.agreement.agree
    assert len(done.truncation.output_change) == 4
    assert all(0.01 < change < 1 for change in done.truncation.output_change.values())
    found = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "lora"))
    assert 0.01 < (found - expected).abs().max() < (logits(tiny_llama) - expected).abs().max()


def test_a_lossless_truncation_must_agree(save_adapter, tiny_llama, tmp_path):
    save_adapter(tmp_path / "adapter", tiny_llama, r=8)  # K = 44, and q_proj is (32, 32)
    done = export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "lora", max_rank=32)
    assert done.truncation.lossless
    assert done.agreement.agree


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_rank": 3, "energy": 0.9}, "--max-rank=3 and --energy=0.9 both set the rank"),
        ({"max_rank": 0}, "--max-rank=0 should be at least 1"),
        ({"energy": 0.0}, "--energy=0.0 should be above 0"),
        ({"energy": 99.9}, "--energy=99.9 should be above 0 and at most 1"),
    ],
)
def test_an_impossible_rank_is_rejected(options, words, adapter, tmp_path):
    with pytest.raises(UserError, match=words):
        export(locate_adapter(str(adapter)), tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()
