"""The adapted embedding: any table and any indices, what it computes, padding, scaled tables, training from zero."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from pera import UserError
from pera.tuner.layers import embedding as layers_embedding
from reference import COEFFICIENTS, TERMS, relative_error
from tiny import RMS, adapted, evaluate, reference_output

NORMALIZATIONS = ("none", "rms")
TOKENS = torch.tensor([[2, 5, 2], [0, 2, 7]])
"""Three of one, one of three others, and none of the rest of nine rows."""


def embedding(rows=9, features=7, dtype=torch.float32, padding_idx=None, scale_grad_by_freq=False, **options):
    """One adapted ``nn.Embedding``."""
    table = {"dtype": dtype, "padding_idx": padding_idx, "scale_grad_by_freq": scale_grad_by_freq}
    return adapted(nn.Embedding(rows, features, **table), **options)


def gradients(layer, x):
    """The gradients of A, B and h for a sum of squares."""
    layer.zero_grad()
    layer(x).square().sum().backward()
    return [layer.get_parameter(f"pera_{name}.default").grad for name in "ABh"]


def train(layer, x, steps=3):
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - 1).square().sum().backward()
        optimizer.step()


# Against an explicit update


@pytest.mark.filterwarnings("ignore:r=.* is above a side")
@given(
    rows=st.integers(1, 12),
    features=st.integers(1, 8),
    r=st.integers(1, 5),
    terms=st.sampled_from(TERMS),
    coefficients=st.sampled_from(COEFFICIENTS),
    normalization=st.sampled_from(NORMALIZATIONS),
    shape=st.lists(st.integers(0, 3), max_size=3),
    index=st.sampled_from([torch.int32, torch.int64]),
    padding=st.booleans(),
)
def test_any_indices_into_any_table(rows, features, r, terms, coefficients, normalization, shape, index, padding):
    assume((terms != "cross" or r > 1) and r <= max(rows, features))
    assume(terms != "none" or (coefficients, normalization) == ("learned", "none"))
    expansion = {"terms": terms, "coefficients": coefficients, "normalization": normalization}
    layer = embedding(rows, features, torch.float64, padding_idx=0 if padding else None, r=r, **expansion)
    x = torch.randint(rows, shape, dtype=index)
    expected = reference_output(layer, x)
    for y in (layer(x), evaluate(layer, x)):
        assert y.shape == (*shape, features)
        assert relative_error(y, expected) <= 1e-12
    layer.merge()
    assert relative_error(evaluate(layer, x), expected) <= 1e-12


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("terms", TERMS)
def test_first_and_second_derivatives(terms, normalization):
    normalization = "none" if terms == "none" else normalization
    layer = embedding(dtype=torch.float64, r=2, terms=terms, normalization=normalization)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert len(names) == (2 if terms == "none" else 3)

    def output(*parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), TOKENS)

    parameters = [layer.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(output, parameters)
    assert torch.autograd.gradgradcheck(output, parameters)


# What is computed


VOCABULARY = 50_000


@pytest.fixture
def widths(monkeypatch):
    """How many columns of A have been expanded, one entry for each time."""
    seen = []
    expand = layers_embedding.expand
    monkeypatch.setattr(layers_embedding, "expand", lambda X, *a, **k: seen.append(X.shape[1]) or expand(X, *a, **k))
    return seen


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_products_are_computed_for_the_rows_looked_up_alone(widths, normalization):
    layer = embedding(VOCABULARY, normalization=normalization)
    x = torch.tensor([[7, VOCABULARY - 1, 7]])
    evaluate(layer, x)
    layer.train()(x).sum().backward()
    assert widths == [3, 3]


class LargestTensor(TorchDispatchMode):
    """Remembers how many entries the largest tensor has that an operation returned."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.entries = max(self.entries, result.numel())
        return result


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_nothing_is_larger_than_A_itself(normalization):
    layer = embedding(VOCABULARY, r=3, normalization=normalization)
    with LargestTensor() as largest:
        layer(torch.tensor([7, VOCABULARY - 1, 7])).sum().backward()
    assert largest.entries == 3 * VOCABULARY


def test_rho_is_that_of_the_whole_factor():
    layer = embedding(**RMS)
    with torch.no_grad():
        layer.pera_A["default"][:, 8].mul_(100)
    for row in (torch.tensor([3]), torch.tensor([8, 8])):
        for y in (layer(row), evaluate(layer, row)):
            assert relative_error(y, reference_output(layer, row)) <= 1e-6


# Which rows are trained


def test_without_normalization_only_rows_looked_up_have_gradients():
    A, _, _ = gradients(embedding(), TOKENS)
    assert A.any(0).nonzero().flatten().tolist() == [0, 2, 5, 7]


def test_with_rms_the_other_rows_have_the_gradient_of_rho():
    """Which is a multiple of A itself."""
    layer = embedding(**RMS)
    others = [1, 3, 4, 6, 8]
    ratio = (gradients(layer, TOKENS)[0] / layer.pera_A["default"])[:, others]
    assert ratio.abs().max() > 0
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_padding_has_no_gradient_of_its_own(normalization):
    padded, plain = (embedding(padding_idx=index, normalization=normalization) for index in (2, None))
    padded.load_state_dict(plain.state_dict())
    assert relative_error(evaluate(padded, TOKENS), reference_output(padded, TOKENS)) <= 1e-6
    A = padded.pera_A["default"].detach()
    gradient = gradients(padded, TOKENS)[0]
    ratio = gradient / A  # through ρ alone: a multiple of A, the same for the padding as for rows never looked up
    torch.testing.assert_close(ratio[:, 2], ratio[:, 8])
    assert ratio[:, 2].any() == (normalization == "rms")
    others = [0, 5, 7]
    torch.testing.assert_close(gradient[:, others], gradients(plain, TOKENS)[0][:, others])


def test_gradients_are_scaled_by_frequency_where_the_table_says_so():
    scaled, plain = (embedding(scale_grad_by_freq=scale) for scale in (True, False))
    scaled.load_state_dict(plain.state_dict())
    counts = torch.bincount(TOKENS.flatten(), minlength=9).clamp(min=1)
    for gradient, expected, divisor in zip(
        gradients(scaled, TOKENS), gradients(plain, TOKENS), (counts, 1, 1), strict=True
    ):
        torch.testing.assert_close(gradient, expected / divisor)


# The start, and training from there


def test_initialisation_is_zero_for_A_and_normal_for_B():
    layer = embedding(64, 64, r=8, init_weights=True, init_coefficients=0.3)
    assert not layer.pera_A["default"].any()
    B = layer.pera_B["default"]
    assert B.std().item() == pytest.approx(1, abs=0.1)
    assert B.abs().max() > 2.5
    assert (layer.pera_h["default"] == 0.3).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_rows_never_looked_up_and_the_padding_keep_their_values(normalization):
    start = {"init_weights": True, "init_coefficients": 0.3, "normalization": normalization}
    layer = embedding(padding_idx=2, **start)
    train(layer, TOKENS)
    update = layer.get_delta_weight("default")
    assert torch.isfinite(update).all()
    assert update.any(1).nonzero().flatten().tolist() == [0, 5, 7]
    assert (layer.pera_h["default"] != 0.3).all()


def test_squares_are_not_centred_over_a_vocabulary():
    with pytest.raises(UserError, match="normalization='centred' is not for embeddings"):
        embedding(normalization="centred")


# Tables that scale what they look up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding])
def test_a_scaled_table_scales_the_update(scaled, dtype):
    layer = adapted(scaled(9, 7, padding_idx=0, embed_scale=7**0.5).to(dtype), **RMS)
    tolerance = 4 * torch.finfo(dtype).eps
    expected = reference_output(layer, TOKENS)
    for y in (layer(TOKENS), evaluate(layer, TOKENS)):
        assert y.dtype == dtype
        assert relative_error(y, expected) <= tolerance
    layer.merge()
    assert relative_error(evaluate(layer, TOKENS), expected) <= tolerance


def test_a_table_that_changes_in_every_forward_is_refused():
    refusal = r"^target_modules: '0' has max_norm=2\.0, which changes its weight in every forward, .*; leave it out\.$"
    with pytest.raises(UserError, match=refusal):
        adapted(nn.Embedding(9, 7, max_norm=2.0))


def test_a_table_with_rules_of_its_own_is_refused():
    """Positions, here: the base counts them and adds an offset, whatever the tokens are."""
    refusal = (
        r"^target_modules: '0' is a BartLearnedPositionalEmbedding, .* from torch\.nn\.Embedding, .*; leave it out\.$"
    )
    with pytest.raises(UserError, match=refusal):
        adapted(BartLearnedPositionalEmbedding(9, 7))


# Dropout


def test_dropout_drops_the_whole_update_of_a_position():
    layer = embedding(dtype=torch.float64, pera_dropout=0.75).train()
    x = torch.randint(9, (20, 30))
    base, update = layer.base_layer(x), reference_output(layer, x) - layer.base_layer(x)
    kept = (layer(x) - base) / update
    dropped = kept[..., 0] == 0
    torch.testing.assert_close(kept, torch.where(dropped, 0.0, 4.0).double().unsqueeze(2).expand_as(kept))
    assert dropped.double().mean().item() == pytest.approx(0.75, abs=0.06)
    assert len({tuple(row.tolist()) for row in dropped}) == len(x), "each position for itself"
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x)), "drawn anew"
