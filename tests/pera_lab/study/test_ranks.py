"""The loss at a lower rank: what is truncated, and which adapters are rejected."""

import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model

import tiny
from pera import to_lora
from pera.errors import UserError
from pera_lab.methods import peft_config, resolve_targets
from pera_lab.runs import Run
from pera_lab.study.ranks import linear_factors, truncated, truncated_loss


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (HiraConfig(target_modules=["q_proj"]), "and its adapter has none"),
        (resolve_targets(tiny.llama(), peft_config("full")), "and its adapter has none"),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"]), r"embed_tokens' is something else"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), r"q_proj' is something else"),
    ],
)
def test_only_linear_layers_of_a_lora_or_pera_are_truncated(config, found):
    with pytest.raises(UserError, match=f"^'run': only linear layers .*{found}"):
        linear_factors(get_peft_model(tiny.llama(), config), "run")


def test_a_pera_is_truncated_within_the_block_only():
    lora = to_lora(tiny.adapt(tiny.llama(), target_modules=["q_proj", "v_proj"]))
    before = tiny.logits(lora)
    with torch.no_grad(), truncated(linear_factors(lora, "run"), 1):
        assert not torch.allclose(tiny.logits(lora), before, atol=1e-4)
    assert torch.equal(tiny.logits(lora), before)


def test_the_loss_of_a_run_changes_unless_the_rank_suffices(finished):
    (path,) = finished.runs.glob("*-pera-rms-0.3-*-report-*-seed42")
    labels, loss, change = truncated_loss(Run(path), [1, 5], examples=8)
    assert labels > 0
    assert loss > 0
    assert abs(change[1]) > 1e-6
    assert abs(change[5]) < 1e-6
