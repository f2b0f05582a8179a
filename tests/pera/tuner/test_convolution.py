"""The adapted convolution: any geometry, and its derivatives."""

from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d

from pera import UserError
from pera.tuner import PeraConvolution
from reference import COEFFICIENTS, NORMALIZATIONS, TERMS, relative_error
from tiny import adapted, evaluate, reference_output


class ChannelsLast(nn.Conv1d):
    """As the heads of Parakeet and Lasr, which older versions of transformers lack."""

    def forward(self, x):
        return super().forward(x.mT).mT


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def geometries(draw):
    """A convolution of one to three dimensions, in float64, with an input."""
    dimensions = draw(st.integers(1, 3))

    def per_axis(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * dimensions))

    groups = draw(st.integers(1, 3))
    channels = [groups * draw(st.integers(1, 3)) for _ in "io"]
    padding = draw(st.sampled_from([per_axis(0, 2), "valid", "same"]))
    convolution = CONVOLUTIONS[dimensions](
        *channels,
        per_axis(1, 3),
        stride=1 if padding == "same" else per_axis(1, 3),
        dilation=per_axis(1, 2),
        padding=padding,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    samples = draw(st.sampled_from([(), (1,), (3,)]))
    return convolution.double(), torch.randn(*samples, channels[0], *per_axis(5, 7), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:r=.* is above a side", "ignore:.*padding='same' with even kernel")
@given(
    geometry=geometries(),
    r=st.integers(1, 4),
    terms=st.sampled_from(TERMS),
    coefficients=st.sampled_from(COEFFICIENTS),
    normalization=st.sampled_from(NORMALIZATIONS),
)
def test_any_geometry(geometry, r, terms, coefficients, normalization):
    assume(terms != "cross" or r > 1)
    assume(terms != "none" or (coefficients, normalization) == ("learned", "none"))
    convolution, x = geometry
    layer = adapted(convolution, r=r, terms=terms, coefficients=coefficients, normalization=normalization)
    expected = reference_output(layer, x)
    for y in (layer(x), evaluate(layer, x)):
        assert y.shape == expected.shape
        assert relative_error(y, expected) <= 1e-12
    layer.merge()
    assert relative_error(evaluate(layer, x), expected) <= 1e-12


@pytest.mark.parametrize(
    ("base", "plain"), [(ChannelsLast(3, 7, 1), "Conv1d"), (WeightStandardizedConv2d(3, 7, 3), "Conv2d")]
)
def test_a_convolution_with_rules_of_its_own_is_refused(base, plain):
    refusal = rf"^target_modules: '0' is a {type(base).__name__}, .* from torch\.nn\.{plain}, .*; leave it out\.$"
    with pytest.raises(UserError, match=refusal):
        adapted(base)


def test_a_subclass_that_only_chooses_a_geometry_is_a_convolution():
    assert type(adapted(EfficientNetDepthwiseConv2d(4))) is PeraConvolution


@pytest.mark.parametrize(
    ("terms", "normalization"), [("none", "none"), *product(("all", "square", "cross"), NORMALIZATIONS)]
)
def test_first_and_second_derivatives(terms, normalization):
    base = nn.Conv1d(2, 4, 2, groups=2, stride=2, padding=1, padding_mode="circular", dtype=torch.float64)
    layer = adapted(base, r=2, terms=terms, normalization=normalization)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert len(names) == (2 if terms == "none" else 3)

    def output(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    inputs = [torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True), *map(layer.get_parameter, names)]
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


def test_channels_last_memory_gives_the_same():
    layer = adapted(nn.Conv2d(3, 7, 3))
    x = torch.randn(2, 3, 5, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    for y in (layer(last), evaluate(layer, last)):
        assert relative_error(y, reference_output(layer, x)) <= 1e-6
