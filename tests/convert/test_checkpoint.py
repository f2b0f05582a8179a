"""A model folder whose weights are read when they are wanted is the model that it holds."""

import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from pera.convert.checkpoint import Checkpoint, empty_model, sources, weights_on_demand
from pera.models import fingerprint


def test_saved_buffers_are_read_with_the_model(tmp_path, logits):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 400, "pad_token_id": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}
    base = AutoModelForCausalLM.from_config(Gemma4TextConfig(**shape, **heads, hidden_size_per_layer_input=0))
    for layer in base.model.layers:
        layer.layer_scalar.fill_(0.25)
    base.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    model = empty_model(checkpoint, torch.float32)
    found = sources(model, checkpoint)
    assert fingerprint(model, read=lambda name: checkpoint.read(found[name])) == fingerprint(base)
    with weights_on_demand(model, checkpoint, torch.float32):
        assert torch.equal(logits(model), logits(base))
