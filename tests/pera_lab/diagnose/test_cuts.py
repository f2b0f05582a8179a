"""Cuts of every ΔW of an adapter to a rank."""

import numpy as np
import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model

import tiny
from pera import to_lora
from pera.errors import UserError
from pera_lab.diagnose import Cuts
from pera_lab.diagnose.cuts import ranks_below
from pera_lab.methods import peft_config, resolve_targets

TARGETS = ["q_proj", "down_proj", "embed_tokens"]


def random_lora(base, **options):
    """The base with a LoRA whose ΔW is not zero, in evaluation mode."""
    return get_peft_model(base, LoraConfig(**{"r": 4, "init_lora_weights": False, **options})).eval()


def lora():
    options = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 7}, "use_rslora": True}
    return random_lora(tiny.llama(), target_modules=TARGETS, **options)


def pera():
    return tiny.adapt(tiny.llama(), target_modules=TARGETS, rank_pattern={"down_proj": 2}, **tiny.RMS)


@pytest.mark.parametrize("adapted", [lora, pera])
@pytest.mark.parametrize("rank", [0, 1, 2, 5])
def test_a_cut_keeps_the_leading_directions_of_every_delta_weight_and_is_undone(adapted, rank):
    """The reference is NumPy's decomposition of ΔW, added to the weights of the base."""
    model = adapted()
    before, spectra = tiny.logits(model), {}
    expected = tiny.llama()
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        update = layer.get_delta_weight("default").detach().double().numpy()
        U, spectra[name], Vh = np.linalg.svd(update, full_matrices=False)
        near = torch.from_numpy((U[:, :rank] * spectra[name][:rank]) @ Vh[:rank])
        weight = expected.get_submodule(name).weight
        weight.data += near.to(weight.dtype)
    cuts = Cuts(model)
    with cuts.at(rank):
        cut = tiny.logits(model)
    assert torch.equal(tiny.logits(model), before)
    assert torch.allclose(cut, tiny.logits(expected), atol=1e-5)
    assert torch.allclose(cut, before, atol=1e-5) == (rank >= cuts.rank)

    energy = {name: S**2 / (S**2).sum() for name, S in spectra.items()}
    effective = [np.exp(-sum(p * np.log(p) for p in shares if p > 0)) for shares in energy.values()]
    weights = [(S**2).sum() for S in spectra.values()]
    assert cuts.effective_rank == pytest.approx(np.average(effective, weights=weights), rel=1e-4)


def test_a_pera_and_the_equivalent_lora_are_cut_alike():
    with Cuts(model := pera()).at(2):
        cut = tiny.logits(model)
    with Cuts(converted := to_lora(pera())).at(2):
        assert torch.allclose(tiny.logits(converted), cut, atol=1e-5)


def test_kernels_of_a_convolution_are_cut_as_one_matrix():
    base = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    model = random_lora(base, target_modules=["0"], r=4)
    x, layer = torch.randn(2, 3, 6, 6), model.base_model.model[0]
    U, S, Vh = np.linalg.svd(layer.get_delta_weight("default").detach().numpy().reshape(8, 27), full_matrices=False)
    near = torch.from_numpy((U[:, :2] * S[:2]) @ Vh[:2]).reshape(8, 3, 3, 3)
    with torch.no_grad(), Cuts(model).at(2):
        expected = layer.base_layer(x) + torch.conv2d(x, near)
        assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HiraConfig(target_modules=["q_proj"]), "'default' is neither a PERA nor a LoRA adapter"),
        (resolve_targets(tiny.llama(), peft_config("full")), "'default' is neither a PERA nor a LoRA adapter"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora=True makes ΔW something else"),
    ],
)
def test_an_adapter_whose_update_is_no_product_of_factors_is_rejected(config, message):
    with pytest.raises(UserError, match=message):
        Cuts(get_peft_model(tiny.llama(), config))


def test_layers_keep_their_update_if_a_block_fails():
    model = lora()
    before = tiny.logits(model)
    with pytest.raises(RuntimeError, match="inside"), Cuts(model).at(1):
        raise RuntimeError("inside")
    assert torch.equal(tiny.logits(model), before)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, [0]), (2, [0, 1]), (5, [0, 1, 2, 3, 4]), (8, [0, 1, 2, 3, 4, 6]), (14, [0, 1, 2, 3, 4, 6, 8, 12])],
)
def test_ranks_become_sparser_as_they_grow(rank, expected):
    assert list(ranks_below(rank)) == expected
