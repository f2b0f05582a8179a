"""Tiny random models and adapters, the same in every call, and their expected outputs."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.pytorch_utils import Conv1D

import reference
from pera import PeraConfig
from pera.tuner import PeraLayer

needs_whole_graphs = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="torch 2.7 breaks the graph, and the versions between were not tried",
)
"""Skip a test that compiles adapted layers without a graph break."""


needs_peft_of_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"the adapter methods of transformers {transformers.__version__} need peft {MIN_PEFT_VERSION}",
)
"""Skip a test of ``add_adapter`` and its relatives. transformers 5.24 asks for a PEFT that is not released."""


def needs_transformers(version, reason):
    """Skip a test of something that older versions of transformers lack."""
    return pytest.mark.skipif(Version(transformers.__version__) < Version(version), reason=reason)


VOCABULARY = 64
RMS = {"normalization": "rms"}


def llama(**options):
    """A LLaMA with two layers: ``nn.Linear`` without biases."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": VOCABULARY, **sizes, **heads, **options})).eval()


def gpt2():
    """A GPT-2 with two layers: ``Conv1D`` with biases."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)).eval()


def tokens():
    return torch.arange(12).reshape(2, 6) * 5 % VOCABULARY


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def adapt(model, **options):
    """The model with a random adapter, in evaluation mode. Its update is not zero."""
    return get_peft_model(model, PeraConfig(**{"r": 3, "init_weights": False, **options})).eval()


def adapted(base, **options):
    """The layer ``base``, adapted."""
    return adapt(nn.Sequential(base), target_modules=["0"], **options).base_model.model[0]


def linear(in_features=9, out_features=7, dtype=torch.float32, **options):
    """An adapted ``nn.Linear`` with a bias."""
    return adapted(nn.Linear(in_features, out_features, dtype=dtype), **options)


class Kind(NamedTuple):
    """A kind of layer: functions that make a base layer and an input, and the shape of ΔW."""

    base: Callable[[], nn.Module]
    draw: Callable[[int], torch.Tensor]
    shape: tuple[int, int] = (7, 9)

    def layer(self, dtype=torch.float32, **options):
        """An adapted layer of this kind."""
        return adapted(self.base().to(dtype), **options)

    def input(self, samples=4, dtype=torch.float32):
        """An input. ``dtype`` does not apply to indices."""
        x = self.draw(samples)
        return x.to(dtype) if x.is_floating_point() else x


def conv1d():
    """A ``Conv1D`` of 9 inputs and 7 outputs, with a bias that is not zero."""
    base = Conv1D(7, 9)
    nn.init.normal_(base.bias)
    return base


GEOMETRY = {"groups": 2, "stride": 2, "dilation": 2, "padding": 3, "padding_mode": "circular"}
KINDS = {
    "linear": Kind(lambda: nn.Linear(9, 7), lambda n: torch.randn(n, 3, 9)),
    "conv1d": Kind(conv1d, lambda n: torch.randn(n, 3, 9)),
    "embedding": Kind(lambda: nn.Embedding(9, 7), lambda n: torch.randint(9, (n, 3))),
    "convolution": Kind(lambda: nn.Conv1d(3, 7, 3), lambda n: torch.randn(n, 3, 5)),
    "grouped": Kind(lambda: nn.Conv1d(6, 8, 3, **GEOMETRY), lambda n: torch.randn(n, 6, 9), (8, 9)),
    "convolution2d": Kind(lambda: nn.Conv2d(2, 7, (2, 3)), lambda n: torch.randn(n, 2, 4, 5), (7, 12)),
    "convolution3d": Kind(lambda: nn.Conv3d(2, 7, (1, 3, 2)), lambda n: torch.randn(n, 2, 2, 4, 3), (7, 12)),
}


def layers(model):
    """The adapted layers by their name in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, PeraLayer)
    }


def evaluate(module, x):
    with torch.no_grad():
        return module(x)


def reference_delta(layer, adapter_name="default"):
    """ΔW of one adapter of a layer, ``(rows, columns)`` in float64, from the reference."""
    A, B = layer.pera_A[adapter_name], layer.pera_B[adapter_name]
    terms, normalization, anchors = layer.expansion[adapter_name]
    if adapter_name in layer.pera_h:
        h = reference.by_pair(layer.pera_h[adapter_name], A.shape[0], terms, anchors)
    else:
        h = {**reference.fixed_by_pair(A.shape[0], terms), "anchors": torch.ones(layer.expansion[adapter_name].k)}
    return reference.delta_weight(A, B, h, normalization, layer.scaling[adapter_name], anchors).detach()


def reference_base(layer, adapter_names=("default",)):
    """The base layer of an adapted layer in float64, with explicit updates added to its weight."""
    base = copy.deepcopy(layer.base_layer).double()
    for name in adapter_names:
        delta = reference_delta(layer, name)
        delta = delta.T if isinstance(base, (nn.Embedding, Conv1D)) else delta
        base.weight.data += delta.reshape(base.weight.shape)
    return base


def reference_output(layer, x, adapter_names=("default",)):
    """Output of the adapted layer with explicit updates, in float64."""
    return evaluate(reference_base(layer, adapter_names), x.double() if x.is_floating_point() else x)


def reference_model(model):
    """The base model in float64, with explicit updates of the active adapters, unless they are merged."""
    base = copy.deepcopy(model.get_base_model()).double()
    for name, layer in layers(model).items():
        names = [adapter for adapter in layer.active_adapters if layer.has(adapter) and not layer.merged]
        base.set_submodule(name, reference_base(layer, names))
    return base
