"""The diagnosis from the factors against an explicit ΔW in float64."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import HiraConfig, LoraConfig, get_peft_model

import reference
import tiny
from pera.errors import UserError
from pera.polynomial import num_coefficients
from pera_lab.adapters import Adapter
from pera_lab.diagnose import by_kind, diagnose_adapter, diagnose_layer, place_layers
from pera_lab.diagnose.factors import kind
from reference import NORMALIZATIONS


def parts(A, B, h, terms, normalization, anchors, scaling):
    """Explicit linear, square and cross parts of ΔW, and the part of the anchors."""
    by_pair = reference.by_pair(h, A.shape[0], terms, anchors)
    of_anchors = by_pair.pop("anchors", None)
    squares = {(i, j): c for (i, j), c in by_pair.items() if i == j}
    crosses = {(i, j): c for (i, j), c in by_pair.items() if i != j}
    high_order = [reference.high_order_part(A, B, chosen, normalization) for chosen in (squares, crosses)]
    linear = reference.linear_part(A, B)
    frozen = linear * 0 if anchors is None else reference.anchor_part(A, B, of_anchors, anchors)
    return [scaling * part for part in (linear, *high_order, frozen)]


@given(
    r=st.integers(1, 9),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    terms=st.sampled_from(["all", "square", "cross", "none"]),
    normalization=st.sampled_from(NORMALIZATIONS),
    k=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_norms_ratios_and_spectrum_equal_those_of_the_explicit_update(r, shape, terms, normalization, k, seed):
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    A, B, h = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((r, n), (m, r), (num_coefficients(r, terms),))
    )
    torch.manual_seed(seed)
    anchors, h = reference.draw_anchors(k, h, m, n)
    found = diagnose_layer(A, B, h, terms, normalization, anchors, 0.7)
    linear, square, cross, frozen = parts(A, B, h, terms, normalization, anchors, 0.7)
    update = linear + square + cross + frozen
    close = lambda value: pytest.approx(float(value), rel=1e-8, abs=1e-10)  # noqa: E731
    assert found.norm == close(update.norm())
    assert (found.linear, found.square, found.cross) == (
        close(linear.norm()),
        close(square.norm()),
        close(cross.norm()),
    )
    assert found.anchors == close(frozen.norm())
    assert found.anchor_ratio == close(frozen.norm() / linear.norm())
    assert found.high_order == close((square + cross).norm())
    assert found.high_order_ratio == close((square + cross).norm() / linear.norm())
    explicit = torch.linalg.svdvals(update)
    assert found.singular_values == pytest.approx(explicit[: len(found.singular_values)].tolist(), rel=1e-8, abs=1e-8)
    assert explicit[len(found.singular_values) :].sum() == pytest.approx(0, abs=1e-8)
    assert found.stable_rank == close(update.square().sum() / explicit[0] ** 2)
    high = square + cross
    if high.norm() > 0:
        assert found.ones_weight == pytest.approx(float(high.sum() ** 2 / (m * n) / high.square().sum()), abs=1e-8)


@pytest.mark.parametrize("k", [1, 8])
def test_the_effective_rank_of_k_equal_singular_values_is_k(k):
    A = torch.linalg.qr(torch.randn(30, 8, dtype=torch.float64)).Q.T
    B = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64)).Q
    B[:, k:] = 0
    found = diagnose_layer(A, B, None, "none")
    assert found.stable_rank == pytest.approx(k)
    assert found.effective_rank == pytest.approx(k)


def test_a_zero_update_has_rank_zero_and_ratio_zero():
    found = diagnose_layer(torch.randn(3, 5), torch.zeros(4, 3), torch.ones(6), "all", "rms")
    assert (found.norm, found.stable_rank, found.effective_rank, found.high_order_ratio) == (0, 0, 0, 0)


def test_random_squares_lie_along_the_ones_and_crosses_do_not():
    squares = diagnose_layer(torch.randn(4, 900), torch.randn(800, 4), torch.ones(4), "square", "rms")
    crosses = diagnose_layer(torch.randn(4, 900), torch.randn(800, 4), torch.ones(6), "cross", "rms")
    assert squares.ones_weight > 0.2
    assert crosses.ones_weight < 0.02


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj", "q_proj"),
        ("model.layers.0.mlp.experts.1.w1", "w1"),
        ("model.layers.0.mlp.experts.base_layer.12", "experts"),
        ("matrix", "matrix"),
        ("0", "0"),
    ],
)
def test_the_kind_is_the_last_part_of_the_name_that_is_not_a_number(name, expected):
    assert kind(name) == expected


def test_a_saved_adapter_is_diagnosed_without_its_base(finished_run, monkeypatch):
    monkeypatch.setattr("pera_lab.models.load_model", lambda *a, **k: pytest.fail("the base model was loaded"))
    found = diagnose_adapter(finished_run.adapter)
    assert set(by_kind(place_layers(found))) == {"q_proj", "v_proj", "up_proj", "down_proj"}
    assert all(layer.high_order_ratio > 0.01 for layer in found.values())
    assert "model.layers.1.mlp.up_proj" in found


LORA = {"r": 2, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HiraConfig(**LORA), "is a HIRA adapter; only PERA and LoRA adapters"),
        (LoraConfig(**LORA, use_dora=True), "use_dora=True makes ΔW something else than the product B A"),
        (LoraConfig(**LORA, init_lora_weights="pissa"), "init_lora_weights='pissa' also changed the base model"),
    ],
)
def test_an_adapter_of_another_method_is_rejected(config, message, tmp_path):
    get_peft_model(tiny.llama(), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        diagnose_adapter(Adapter(tmp_path))


def test_inspect_shows_kinds_and_layers_and_json(pera, finished_run):
    shown = pera("inspect", finished_run.path).out
    assert "q_proj (2)" in shown
    assert "model.layers" not in shown
    assert "1.mlp.down_proj" in pera("inspect", finished_run.path, "--layers").out
    content = json.loads(pera("inspect", finished_run.adapter.path, "--json").out)
    explicit = diagnose_adapter(finished_run.adapter)["model.layers.0.self_attn.q_proj"]
    assert content["layers"]["model.layers.0.self_attn.q_proj"]["high_order_ratio"] == explicit.high_order_ratio


def test_inspect_shows_anchors_where_there_are_some(pera, save_adapter, tiny_llama, adapter, tmp_path):
    save_adapter(tmp_path / "anchored", tiny_llama, terms="none", anchors=2)
    shown = pera("inspect", tmp_path / "anchored", "--json").out
    layer = json.loads(shown)["layers"]["model.layers.0.self_attn.q_proj"]
    assert layer["high_order"] == 0
    assert layer["anchors"] > 0
    assert layer["anchor_ratio"] == pytest.approx(layer["anchors"] / layer["linear"])
    assert "anchors" in pera("inspect", tmp_path / "anchored").out
    assert "anchors" not in pera("inspect", adapter).out
    assert pera("inspect", tmp_path / "anchored", "--plot", tmp_path / "ratio.svg").code == 0
    assert "anchor ratio" in (tmp_path / "ratio.svg").read_text()


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["model.layers.10.mlp.up_proj", "model.layers.2.mlp.up_proj"], [(2, "up_proj"), (10, "up_proj")]),
        (["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.q"], [(0, "attn.c_proj"), (0, "mlp.c_proj"), (0, "q")]),
        (["l.0.experts.0.w1", "l.0.experts.1.w1"], [(0, "experts.*.w1"), (0, "experts.*.w1")]),
        (["l.0.experts.base_layer.0", "l.0.experts.base_layer.1"], [(0, "experts.*")] * 2),
        (["score", "l.0.q"], [(0, "q"), (None, "score")]),
        (["0"], [(0, "0")]),
    ],
)  # fmt: skip
def test_block_and_kind_are_read_from_the_names(names, places):
    assert [(layer.block, layer.kind) for layer in place_layers(dict.fromkeys(names))] == sorted(
        places, key=lambda place: (place[0] is None, place[0] or 0, place[1])
    )


def test_weights_beyond_float64_are_reported(adapter, change_weights):
    change_weights(adapter / "adapter_model.safetensors", lambda w: {k: 1e300 * x.double() for k, x in w.items()})
    with pytest.raises(UserError, match="too large for float64"):
        diagnose_adapter(Adapter(adapter))
