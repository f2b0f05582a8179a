"""A model whose weights are read on demand has the outputs of the whole model."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from pera.errors import UserError
from pera_lab.convert.checkpoint import Checkpoint, empty_model, sources, weights_on_demand
from pera_lab.models import fingerprint


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": None}, "model_type=None is not a model"),
        ({"model_type": "new"}, "model_type='new' is not a model"),
        ({"num_attention_heads": 5}, "num_key_value_heads=2 should divide num_attention_heads=5"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_rejected(change, reason, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "copy")
    config = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(UserError, match=f"^model: config.json of {str(folder)!r}: {reason}"):
        empty_model(Checkpoint(folder), torch.float32)


def test_saved_buffers_are_read(tmp_path, logits):
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
