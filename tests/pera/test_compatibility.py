"""Adapters saved by pera 0.1.0 load and give the outputs that they gave then."""

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ADAPTERS = ("published", "fixed", "squares", "crosses", "rms", "centred", "lora", "embedding", "parameter")


def load(folder):
    config = PeftConfig.from_pretrained(folder)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path), folder)


def test_every_saved_adapter_is_tested(saved):
    assert {folder.name for folder in (saved / "adapters").iterdir()} == set(ADAPTERS)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_saved_adapter_gives_the_same_logits(saved, adapter):
    then = load_file(saved / "logits.safetensors")
    model = load(saved / "adapters" / adapter).eval()
    with torch.no_grad():
        now = model(then["ids"]).logits
        with model.disable_adapter():
            base = model(then["ids"]).logits
    assert (now - then[adapter]).abs().max() <= 1e-6 * then[adapter].abs().max()
    assert (base - then[adapter]).abs().max() > 1e-3 * then[adapter].abs().max()
