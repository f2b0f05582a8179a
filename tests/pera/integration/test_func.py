"""``torch.func`` on an adapted model: the gradients of plain autograd, for the whole batch and for each sample."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from tiny import adapt, llama, tokens


def network():
    """Two adapted layers and a loss of one sample."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 7))
    model = adapt(base, target_modules=["0", "2"], normalization="rms")
    return model, torch.randn(4, 9), lambda output: output.square().sum()


def language_model():
    model = adapt(llama(attn_implementation="eager"), target_modules=["q_proj", "down_proj"])
    return model, tokens(), lambda output: output.logits.square().mean()


@pytest.mark.parametrize("make", [network, language_model])
def test_gradients_are_those_of_autograd(make):
    model, x, loss = make()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss(model(x)).backward()
    found = grad(lambda values: loss(functional_call(model, values, (x,))))(
        {name: p.detach() for name, p in parameters.items()}
    )
    for name, p in parameters.items():
        torch.testing.assert_close(found[name], p.grad, msg=name)


def test_vmap_gives_the_gradient_of_each_sample():
    model, x, loss = network()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradient(values, sample):
        return grad(lambda values: loss(functional_call(model, values, (sample,))))(values)

    found = vmap(gradient, in_dims=(None, 0))({name: p.detach() for name, p in parameters.items()}, x)
    for position, sample in enumerate(x):
        expected = torch.autograd.grad(loss(model(sample)), list(parameters.values()))
        for name, right in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][position], right, msg=name)
