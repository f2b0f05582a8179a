"""saved_factors: the layers of a saved adapter, from its files alone."""

import pytest
import torch
from peft.utils import get_peft_model_state_dict

from pera import PeraConfig, UserError
from pera.polynomial import delta_weight
from pera.tuner.saved import saved_factors
from reference import relative_error
from tiny import adapt, gpt2, layers, llama, reference_delta

PREFIX = "base_model.model."


def save(model):
    """The weights as in the adapter's file, and its configuration."""
    return get_peft_model_state_dict(model), model.peft_config["default"]


def check(model):
    """The saved factors are those of the model's layers."""
    factors = saved_factors(*save(model))
    assert set(factors) == {PREFIX + name for name in layers(model)}
    for name, layer in layers(model).items():
        saved = factors[PREFIX + name]
        assert saved.A.dtype == saved.B.dtype == saved.h.dtype == torch.float64
        assert relative_error(delta_weight(*saved), reference_delta(layer)) <= 1e-12


@pytest.mark.parametrize(
    ("terms", "coefficients", "normalization"),
    [
        ("all", "learned", "centred"),
        ("square", "fixed", "rms"),
        ("cross", "fixed", "none"),
        ("none", "learned", "none"),
    ],
)
@pytest.mark.parametrize("anchors", [0, 3])
def test_saved_factors_give_the_update(anchors, terms, coefficients, normalization):
    options = {"terms": terms, "coefficients": coefficients, "normalization": normalization, "anchors": anchors}
    check(adapt(llama(), target_modules=["q_proj", "down_proj"], pera_alpha=5, use_rslora=True, **options))


def test_ranks_and_alphas_follow_the_patterns():
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 7}}
    check(adapt(llama(), target_modules=["q_proj", "v_proj"], **patterns))


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_patterns_may_be_anchored_at_the_start_of_a_name(pattern):
    check(adapt(llama(), target_modules=["q_proj"], **{pattern: {r"^model\.layers\.0\.self_attn\.q_proj": 7}}))


def test_anchors_of_tied_layers_are_those_of_the_embedding():
    options = {"target_modules": ["lm_head"], "ensure_weight_tying": True, "anchors": 3}
    model = adapt(llama(tie_word_embeddings=True), **options)
    saved = saved_factors(*save(model))[f"{PREFIX}model.embed_tokens"]
    assert relative_error(delta_weight(*saved), reference_delta(layers(model)["model.embed_tokens"])) <= 1e-12


def test_layers_that_were_renamed_are_refused_if_they_have_anchors():
    weights, config = save(adapt(llama(), target_modules=["q_proj"], anchors=3))
    renamed = {key.replace("self_attn", "attention"): weight for key, weight in weights.items()}
    refusal = r"^anchors=3: frozen rows .* such as 'model\.layers\.0\.attention\.q_proj', but .* under other names"
    with pytest.raises(UserError, match=refusal):
        saved_factors(renamed, config)


def test_a_number_of_anchors_that_no_layer_has_is_refused_before_they_are_drawn():
    weights, config = save(adapt(llama(), target_modules=["q_proj"], terms="none", anchors=3, coefficients="fixed"))
    config.anchors = 10**6
    with pytest.raises(UserError, match=r"^anchors=1000000 is above both sides of a \(32, 32\) weight"):
        saved_factors(weights, config)


def test_other_tensors_are_ignored():
    check(adapt(gpt2(), target_modules=["c_attn"], bias="all", modules_to_save=["ln_f"]))


LAYER = f"{PREFIX}model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.clear(), "has no PERA layer"),
        (lambda weights: weights.pop(f"{LAYER}.pera_B"), f"lacks {LAYER}.pera_B"),
        (lambda weights: weights.pop(f"{LAYER}.pera_h"), f"lacks {LAYER}.pera_h"),
        (lambda weights: weights.update({f"{LAYER}.pera_A": torch.ones(4, 32)}), f"{LAYER} do not have the rank"),
        (lambda weights: weights.update({f"{LAYER}.pera_B": torch.ones(32, 4)}), f"{LAYER} do not have the rank"),
        (lambda weights: weights.update({f"{LAYER}.pera_h": torch.ones(5)}), f"{LAYER} do not have the rank"),
        (lambda weights: weights.update({f"{LAYER}.pera_A": torch.ones(96)}), f"{LAYER} do not have the rank"),
        (lambda weights: weights.update({f"{LAYER}.pera_B": torch.ones(3)}), f"{LAYER} do not have the rank"),
        (lambda weights: weights.update({f"{LAYER}.pera_B": torch.ones(2, 32, 3)}), f"{LAYER} do not have the rank"),
        (lambda weights: weights.update({f"{LAYER}.pera_h": torch.tensor(1.0)}), f"{LAYER} do not have the rank"),
    ],
)
def test_a_broken_file_is_refused(change, message):
    weights, config = save(adapt(llama(), target_modules=["q_proj"]))
    weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
    change(weights)
    with pytest.raises(UserError, match=message):
        saved_factors(weights, config)


def test_another_rank_in_the_configuration_is_refused():
    weights, _ = save(adapt(llama(), target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"do not have the rank in adapter_config\.json, 4"):
        saved_factors(weights, PeraConfig(r=4))
