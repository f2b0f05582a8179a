"""The benchmark of ranks: what it cuts, and what it refuses, lest it measure nothing."""

import runpy
from pathlib import Path

import pytest
import torch
from peft import DeloraConfig, HiraConfig, LoraConfig, get_peft_model

import tiny
from pera import to_lora
from pera_lab.methods import peft_config, resolve_targets


@pytest.fixture(scope="module")
def ranks():
    return runpy.run_path(str(Path(__file__).resolve().parents[1] / "benchmarks" / "ranks.py"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (HiraConfig(target_modules=["q_proj"]), "this adapter has none"),
        (DeloraConfig(target_modules=["q_proj"]), "this adapter has none"),
        (resolve_targets(tiny.llama(), peft_config("full")), "this adapter has none"),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"]), "embed_tokens is none"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "q_proj is none"),
    ],
)
def test_only_what_is_cut_to_a_rank_is_said_to_lose_by_it(ranks, config, said):
    with pytest.raises(SystemExit, match=f"^run: only .*{said}"):
        ranks["factors_of"](get_peft_model(tiny.llama(), config), "run")


def test_a_pera_is_cut_to_a_rank(ranks):
    lora = to_lora(tiny.adapt(tiny.llama(), target_modules=["q_proj", "v_proj"]))
    before = tiny.logits(lora)
    with torch.no_grad(), ranks["cut"](ranks["factors_of"](lora, "run"), 1):
        assert not torch.allclose(tiny.logits(lora), before, atol=1e-4)
    assert torch.equal(tiny.logits(lora), before)
