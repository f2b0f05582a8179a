"""The effect of the high-order terms: the change of the loss without them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import tiny
from pera import PeraConfig, UserError
from pera_lab.diagnose import Cuts, diagnose_adapter, effects, high_order_ratios, run_effects, zeroed
from pera_lab.diagnose.effect import mean_loss
from pera_lab.recipe import load_recipe
from pera_lab.runs import Run
from pera_lab.tasks.encoding import IGNORED
from pera_lab.training import train


class Regression(nn.Module):
    """A frozen zero matrix that an adapter fits to a target; the loss is the mean squared error."""

    def __init__(self, size):
        super().__init__()
        self.matrix = nn.Linear(size, size, bias=False)
        nn.init.zeros_(self.matrix.weight)

    def forward(self, x, labels):
        return SimpleNamespace(loss=(self.matrix(x) - labels).square().mean())


def fit(steps=1500, size=16, **options):
    """An adapter fitted to S + S ⊙ S with S of rank 2, and the data it was fitted to."""
    torch.manual_seed(0)
    S = torch.randn(size, 2) @ torch.randn(2, size) / 2**0.5
    config = PeraConfig(r=2, target_modules=["matrix"], **options)
    model = get_peft_model(Regression(size), config)
    x = torch.randn(256, size)
    batch = {"x": x, "labels": x @ (S + S * S).T}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, weight_decay=0)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), [batch]


def test_the_effect_is_large_for_an_adapter_that_needs_the_terms_and_a_lora_has_none():
    lora, data = fit(terms="none")
    without = effects(lora, data)
    assert (without.without, without.without_high_order) == ({}, {})
    assert without.at_rank_r == pytest.approx(0, abs=1e-5 * without.loss)

    pera, data = fit(normalization="rms")
    needed = effects(pera, data)
    assert needed.loss < 0.7 * without.loss
    assert needed.without["high_order"] > 5 * needed.loss
    assert needed.without_high_order["matrix"] == needed.without["high_order"]
    assert needed.at_rank_r > 0.5 * needed.loss


BATCH = {"input_ids": tiny.tokens(), "labels": tiny.tokens()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.delete_adapter("default"),
            r"'default' is not a PERA adapter of the model, which has \['second'\]",
        ),
        (lambda model: model.set_adapter("second"), "'default' is not active; call set_adapter first"),
        (lambda model: model.merge_adapter(), "'default' is merged; call unmerge_adapter first"),
        (lambda model: model.base_model.disable_adapter_layers(), "'default' is disabled; enable the adapters first"),
    ],
)
def test_an_adapter_that_is_not_active_is_refused(change, message):
    model = tiny.adapt(tiny.llama(), target_modules=["q_proj"])
    model.add_adapter("second", PeraConfig(target_modules=["q_proj"]))
    change(model)
    with pytest.raises(UserError, match=f"adapter_name={message}"):
        effects(model, [BATCH])


@pytest.mark.parametrize("batches", [[], [{**BATCH, "labels": torch.full_like(BATCH["labels"], IGNORED)}]])
def test_batches_whose_labels_are_all_ignored_are_refused(batches):
    with pytest.raises(UserError, match=f"batches: all labels of the {len(batches)} batches are ignored"):
        effects(tiny.adapt(tiny.llama(), target_modules=["q_proj"]), batches)


def test_a_batch_whose_labels_are_all_ignored_adds_nothing():
    model = tiny.adapt(tiny.llama(), target_modules=["q_proj"])
    unlabelled = {**BATCH, "labels": torch.full_like(BATCH["labels"], IGNORED)}
    assert mean_loss(model, [BATCH, unlabelled]) == mean_loss(model, [BATCH])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"normalization": "rms"}, "high_order"),
        ({"coefficients": "fixed", "terms": "square"}, "high_order"),
        ({"terms": "none", "anchors": 3}, "anchors"),
        ({"terms": "none", "anchors": 3, "coefficients": "fixed"}, "anchors"),
    ],
)
def test_zeroing_equals_an_adapter_without_the_terms_and_is_undone(options, part):
    model = tiny.adapt(tiny.llama(), target_modules=["q_proj", "down_proj"], **options)
    layers = tiny.layers(model).values()
    before = tiny.logits(model)
    with zeroed(layers, part):
        without = tiny.logits(model)
    assert torch.equal(tiny.logits(model), before)
    linear = tiny.adapt(tiny.llama(), target_modules=["q_proj", "down_proj"], terms="none")
    for layer, plain in zip(layers, tiny.layers(linear).values(), strict=True):
        plain.pera_A["default"].data.copy_(layer.pera_A["default"])
        plain.pera_B["default"].data.copy_(layer.pera_B["default"])
    assert torch.allclose(without, tiny.logits(linear), atol=1e-6)
    assert not torch.allclose(without, before, atol=1e-4)


def test_zeroing_is_undone_after_an_error():
    model = tiny.adapt(tiny.llama(), target_modules=["q_proj"])
    before = tiny.logits(model)
    with pytest.raises(RuntimeError, match="inside"), zeroed(tiny.layers(model).values(), "square"):
        raise RuntimeError("inside")
    assert torch.equal(tiny.logits(model), before)


@pytest.mark.parametrize(
    "options",
    [{"normalization": "rms"}, {"coefficients": "fixed", "pera_alpha": 7}, {"terms": "none", "anchors": 3}],
)
def test_a_cut_to_r_keeps_the_leading_directions_of_every_delta_weight_and_is_undone(options):
    """The reference is NumPy's decomposition of ΔW, added to the weights of the base."""
    targets = ["q_proj", "down_proj", "embed_tokens"]
    model = tiny.adapt(tiny.llama(), target_modules=targets, rank_pattern={"down_proj": 3}, **options)
    layers = tiny.layers(model)
    before = tiny.logits(model)
    with Cuts(model).at(None):
        cut = tiny.logits(model)
    assert torch.equal(tiny.logits(model), before)
    expected = tiny.llama()
    for name, layer in layers.items():
        U, S, Vh = np.linalg.svd(layer.get_delta_weight("default").detach().double().numpy(), full_matrices=False)
        r = layer.r["default"]
        assert r == (3 if "down_proj" in name else model.peft_config["default"].r)
        assert S[r] > 1e-4 * S[0]
        weight = expected.get_submodule(name.removeprefix("base_model.model.")).weight
        weight.data += torch.from_numpy((U[:, :r] * S[:r]) @ Vh[:r]).to(weight.dtype)
    assert torch.allclose(cut, tiny.logits(expected), atol=1e-5)
    assert not torch.allclose(cut, before, atol=1e-4)


def test_square_and_cross_are_zeroed_separately():
    model = tiny.adapt(tiny.llama(), target_modules=["q_proj"], r=3)
    (layer, *_) = tiny.layers(model).values()
    h = coefficients(layer)
    with zeroed([layer], "square"):
        assert torch.equal(coefficients(layer), torch.cat([torch.zeros(3), h[3:]]))
    with zeroed([layer], "cross"):
        assert torch.equal(coefficients(layer), torch.cat([h[:3], torch.zeros(3)]))


def test_products_and_anchors_are_zeroed_separately():
    (layer, *_) = tiny.layers(tiny.adapt(tiny.llama(), target_modules=["q_proj"], r=3, anchors=2)).values()
    h = coefficients(layer)
    for part, first, last in (("square", 0, 3), ("cross", 3, 6), ("high_order", 0, 6), ("anchors", 6, 8)):
        with zeroed([layer], part):
            assert torch.equal(coefficients(layer), torch.cat([h[:first], torch.zeros(last - first), h[last:]]))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"terms": "none", "anchors": 3}, {"anchors"}),
        ({"terms": "all"}, {"square", "cross", "high_order"}),
        ({"terms": "all", "r": 1}, {"square", "high_order"}),
        ({"terms": "cross", "anchors": 3}, {"cross", "high_order", "anchors"}),
        ({"terms": "none"}, set()),
    ],
)
def test_only_the_kinds_of_terms_that_the_adapter_has_are_measured(options, parts):
    found = effects(tiny.adapt(tiny.llama(), target_modules=["q_proj", "down_proj"], **options), [BATCH])
    assert set(found.without) == parts
    assert set(found.without_high_order) == ({"q_proj", "down_proj"} if "high_order" in parts else set())
    if "anchors" in parts:
        assert abs(found.without["anchors"]) > 1e-3


def test_a_nested_context_is_undone_without_the_outer_one():
    (layer, *_) = tiny.layers(tiny.adapt(tiny.llama(), target_modules=["q_proj"], r=3)).values()
    h = coefficients(layer)
    with zeroed([layer], "square"):
        with zeroed([layer], "cross"):
            assert not coefficients(layer).any()
        assert torch.equal(coefficients(layer), torch.cat([torch.zeros(3), h[3:]]))
    assert torch.equal(coefficients(layer), h)


def coefficients(layer):
    return layer.factors("default")[2].detach().clone()


def test_tied_layers_are_zeroed_one_by_one_and_together():
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "normalization": "rms"}
    model = tiny.adapt(tiny.llama(tie_word_embeddings=True), **options)
    embedding, head = (tiny.layers(model)[name] for name in ("model.embed_tokens", "lm_head"))
    h = coefficients(embedding)
    with zeroed([head], "high_order", others=[embedding]):
        assert torch.equal(coefficients(embedding), h)
        assert not coefficients(head).any()
    with zeroed([embedding], "high_order", others=[head]):
        assert not coefficients(embedding).any()
        assert torch.equal(coefficients(head), h)
    with zeroed([embedding, head], "square"):
        assert torch.equal(coefficients(embedding), coefficients(head))
        assert torch.equal(coefficients(head), torch.cat([torch.zeros(3), h[3:]]))
    assert torch.equal(coefficients(embedding), coefficients(head))

    found = effects(model, [BATCH])
    assert set(found.without_high_order) == {"embed_tokens", "lm_head"}
    assert all(found.without_high_order.values())
    assert found.without["high_order"] not in found.without_high_order.values()


def test_fused_experts_are_grouped_by_their_parameter():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "moe_intermediate_size": 8, "num_experts": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=tiny.VOCABULARY, **sizes, **heads))
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = get_peft_model(base, PeraConfig(r=2, init_weights=False, **targets)).eval()
    kinds = {"q_proj", "gate_up_proj", "down_proj"}
    assert set(high_order_ratios(model)) == set(effects(model, [BATCH]).without_high_order) == kinds


def test_the_effect_of_a_run_is_measured_on_held_out_examples_and_written(run, pera):
    outcome = pera("inspect", run.path, "--effect", "--json")
    assert outcome.code == 0
    kept = json.loads(run.effect_file.read_text())
    assert json.loads(outcome.out)["effect"] == kept
    assert kept["tokens"] > 8
    assert set(kept["without_high_order"]) == {"q_proj", "v_proj", "up_proj", "down_proj"}
    assert kept["without"]["high_order"] != 0
    assert kept["at_rank_r"] != 0
    assert "truncated to rank r" in pera("inspect", run.path, "--effect").out
    assert "give --recipe with the task" in pera("inspect", run.adapter.path, "--effect").err


@pytest.mark.slow
def test_the_effect_of_the_published_method_on_the_demo_is_next_to_nothing(tmp_path):
    torch.set_num_threads(2)
    short = ["training.max_steps=30", "training.warmup_steps=3", "method.normalization=none"]
    run = Run.create(load_recipe("quickstart", short), tmp_path / "published")
    train(run.recipe, run)
    assert run.metrics()[-1]["loss"] < 0.5 * run.metrics()[0]["loss"]
    assert max(layer.high_order_ratio for layer in diagnose_adapter(run.adapter).values()) < 0.01
    asleep = run_effects(run, examples=16)
    assert abs(asleep.without["high_order"]) < 0.001 * asleep.loss
