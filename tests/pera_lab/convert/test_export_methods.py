"""Adapters of PEFT's methods are exported to a LoRA with the same outputs, or cut, or refused with the reason."""

import json

import pytest
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from other_methods import FOLDABLE, OF_FULL_RANK, adapter
from pera_lab.convert.export import export
from pera_lab.opening import locate_adapter


@pytest.fixture(scope="module")
def save(tiny_llama):
    """Saves a random adapter of a method on the tiny LLaMA, and returns the adapted model."""

    def call(name, folder, **options):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model = adapter(name, base, task_type="CAUSAL_LM", **options).float()
        model.save_pretrained(folder)
        return model

    return call


FAST = ("LOHA", "GRALORA", "VERA")
METHODS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FOLDABLE]


@pytest.mark.parametrize("name", METHODS)
def test_peft_gives_the_logits_of_the_adapter(name, save, logits, tiny_llama, tmp_path):
    options, rank = FOLDABLE[name]
    before = logits(save(name, tmp_path / "own", **options))
    made = export(locate_adapter(str(tmp_path / "own")), tmp_path / "lora")
    assert made.agreement.agree
    after = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "lora"))
    effect = (before - logits(tiny_llama)).abs().max()
    assert effect > 0.01
    assert (after - before).abs().max() < 1e-5 * max(1, effect)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", rank)


@pytest.mark.parametrize("name", ["HIRA", "LORA, DoRA"])
def test_an_update_of_full_rank_is_cut_and_its_loss_reported(name, save, tmp_path):
    save(name, tmp_path / "own", **OF_FULL_RANK[name])
    cut = export(locate_adapter(str(tmp_path / "own")), tmp_path / "cut", max_rank=4)
    assert cut.good
    assert (cut.truncation.rank, cut.truncation.lossless) == (4, False)
    whole = export(locate_adapter(str(tmp_path / "own")), tmp_path / "whole", max_rank=32)
    assert whole.truncation is None
    assert whole.agreement.agree


def test_an_adapter_that_no_lora_equals_is_refused_in_one_sentence(save, tiny_llama, tmp_path, refused, capsys):
    save("IA3", tmp_path / "ia3", **OF_FULL_RANK["IA3"])
    prompts = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), prompts).save_pretrained(tmp_path / "prompts")
    capsys.readouterr()
    for folder, words in (
        ("ia3", ["this IA3 adapter rescales rows or columns of the weights", "--max-rank", "pera merge"]),
        ("prompts", ["this PROMPT_TUNING adapter adds inputs instead of changing weights", "cannot become a LoRA"]),
    ):
        refused("export", tmp_path / folder, "--to", "lora", "--output", tmp_path / "out", words=words)
