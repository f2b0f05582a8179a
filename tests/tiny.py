"""Tiny random models and adapters on them, the same on every call."""

import torch
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import reference
from pera import PeraConfig
from pera.tuner import PeraLayer

VOCABULARY = 64


def llama(**options):
    """A LLaMA of two layers: ``nn.Linear`` without biases."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads, **options)).eval()


def gpt2():
    """A GPT-2 of two layers: ``Conv1D`` with biases."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)).eval()


def tokens():
    return torch.arange(12).reshape(2, 6) * 5 % VOCABULARY


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def adapt(model, **options):
    """The model with an adapter whose update is not zero, in evaluation mode."""
    return get_peft_model(model, PeraConfig(**{"r": 3, "init_weights": False, **options})).eval()


def linear(in_features=9, out_features=7, dtype=torch.float32, **options):
    """One adapted ``nn.Linear`` with a bias."""
    model = nn.Sequential(nn.Linear(in_features, out_features, dtype=dtype))
    return adapt(model, target_modules=["0"], **options).base_model.model[0]


def layers(model):
    """The adapted layers by their name in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, PeraLayer)
    }


def reference_delta(layer, adapter_name="default"):
    """ΔW of one adapter of a layer, ``(out_features, in_features)`` in float64, from the reference."""
    A, B = layer.pera_A[adapter_name], layer.pera_B[adapter_name]
    terms, normalization = layer.expansion[adapter_name]
    if adapter_name in layer.pera_h:
        h = reference.by_pair(layer.pera_h[adapter_name], A.shape[0], terms)
    else:
        h = reference.fixed_by_pair(A.shape[0], terms)
    return reference.delta_weight(A, B, h, normalization, layer.scaling[adapter_name]).detach()


def reference_output(layer, x, adapter_names=("default",)):
    """Output of the adapted layer with explicit updates, in float64."""
    base = layer.base_layer(x.to(layer.base_layer.weight.dtype)).double()
    return (base + sum(x.double() @ reference_delta(layer, name).T for name in adapter_names)).detach()
