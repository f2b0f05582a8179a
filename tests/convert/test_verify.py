"""Two models agree if their logits do."""

import json
import shutil

import pytest
import torch

from pera.convert.verify import PROMPTS, TOLERANCE, compare, logits, prompts_of, verify
from pera.errors import UserError
from pera.models import load_model, load_tokenizer
from pera.recipe import load_recipe
from pera.runs import locate
from pera.tasks.prompts import encode_prompt

CLEAR = torch.tensor([[0.0, 1.0, 3.0], [5.0, 1.0, 0.0]])
"""Logits of two tokens whose best lie far ahead."""


def test_the_same_logits_agree():
    agreement = compare([CLEAR, CLEAR], [CLEAR, CLEAR], torch.float32)
    assert agreement.agree
    assert (agreement.prompts, agreement.tokens, agreement.near_ties) == (2, 4, 0)
    assert (agreement.max_difference, agreement.same_top1) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tolerance_of_the_dtype_is_the_limit(dtype):
    for factor, agree in [(0.9, True), (1.1, False)]:
        other = CLEAR.clone()
        other[1, 2] -= factor * TOLERANCE[dtype]
        agreement = compare([CLEAR], [other], dtype)
        assert agreement.agree is agree
        assert agreement.max_difference == pytest.approx(factor * TOLERANCE[dtype], rel=1e-4)
        assert (agreement.tolerance, f"torch.{agreement.dtype}") == (TOLERANCE[dtype], str(dtype))


def test_the_largest_difference_is_found_in_either_direction_and_in_any_prompt():
    for change in (0.5, -0.5):
        assert compare([CLEAR, CLEAR], [CLEAR, CLEAR + change], torch.float32).max_difference == 0.5


def test_another_token_is_a_disagreement_unless_it_was_a_near_tie():
    tie = torch.tensor([[1.0, 1.0005, 0.0]])
    swapped = torch.tensor([[1.0005, 1.0, 0.0]])
    agreement = compare([CLEAR, tie], [CLEAR, swapped], torch.float32)
    assert agreement.agree
    assert (agreement.near_ties, agreement.same_top1) == (1, 1.0)
    agreement = compare([CLEAR, tie], [CLEAR.flip(1), tie], torch.float32)
    assert not agreement.agree
    assert agreement.same_top1 == 0.0
    agreement = compare([CLEAR], [torch.stack([CLEAR[0], CLEAR[1].flip(0)])], torch.float32)
    assert agreement.same_top1 == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_agrees(value):
    broken = torch.full_like(CLEAR, value)
    for pair in ([CLEAR, broken], [broken, CLEAR], [broken, broken]):
        agreement = compare(pair[:1], pair[1:], torch.float32)
        assert not agreement.agree
        assert agreement.max_difference == float("inf")


def test_models_of_different_vocabularies_cannot_be_compared():
    with pytest.raises(UserError, match=r"cannot be compared: logits of shapes \(2, 3\) and \(2, 2\)"):
        compare([CLEAR, CLEAR], [CLEAR, CLEAR[:, :2]], torch.float32)


def test_the_sentence_says_what_was_found():
    agreement = compare([CLEAR], [CLEAR + 0.25], torch.float32)
    assert agreement.sentence() == (
        "largest logit difference 2.5e-01 (tolerance 0.001, float32), 100.0 % of top-1 tokens equal over 2 tokens, "
        "KL divergence 0.0e+00"
    )
    ties = compare([torch.zeros(1, 3)], [torch.zeros(1, 3)], torch.float32)
    assert ties.sentence().endswith("equal over 1 tokens, near-ties (1) apart, KL divergence 0.0e+00")


def test_the_record_has_everything(tmp_path):
    agreement = compare([CLEAR], [CLEAR + 0.25], torch.bfloat16)
    agreement.save(tmp_path, of="this", against="that")
    assert json.loads((tmp_path / "verification.json").read_text()) == {
        "of": "this",
        "against": "that",
        "agree": True,
        "prompts": 1,
        "tokens": 2,
        "max_difference": 0.25,
        "tolerance": 1.0,
        "dtype": "bfloat16",
        "near_ties": 0,
        "same_top1": 1.0,
        "kl_divergence": agreement.kl_divergence,
    }


def test_logits_are_those_of_every_token_of_the_encoded_prompts(tiny_llama):
    model, tokenizer = load_model(str(tiny_llama), dtype="bfloat16"), load_tokenizer(str(tiny_llama))
    found = logits(model, tokenizer, ["Who?", "What is Zoe?"])
    for prompt, values in zip(["Who?", "What is Zoe?"], found, strict=True):
        assert values.shape == (len(encode_prompt(tokenizer, prompt)), 400)
        assert values.dtype == torch.float32


def test_a_run_brings_the_prompts_of_its_task(finished_run, recipe_file):
    held_out = [example.prompt for example in load_recipe(str(recipe_file)).build_task().test[:6]]
    run, model = locate(str(finished_run.path)), locate("smollm2-135m")
    assert prompts_of(model, run) == prompts_of(run) == held_out
    assert prompts_of(model) == prompts_of(locate(str(finished_run.adapter))) == list(PROMPTS)


def test_a_run_its_adapter_and_a_copy_agree(finished_run, tmp_path):
    copy = shutil.copytree(finished_run.adapter, tmp_path / "copy")
    for a, b in [(finished_run.path, finished_run.adapter), (finished_run.adapter, copy)]:
        agreement = verify(str(a), str(b))
        assert agreement.agree
        assert agreement.max_difference == 0.0


def test_an_adapter_and_its_base_do_not_agree(finished_run, tiny_llama):
    for pair in [(finished_run.path, tiny_llama), (tiny_llama, finished_run.adapter)]:
        agreement = verify(*map(str, pair))
        assert not agreement.agree
        assert agreement.max_difference > 0.1
        assert agreement.same_top1 < 0.9


def test_both_are_computed_in_the_dtype_asked_for(tiny_llama, save_llama, tmp_path):
    rounded = save_llama(tmp_path / "rounded", dtype=torch.bfloat16, tie_word_embeddings=False)
    assert verify(str(tiny_llama), str(rounded), dtype="bfloat16").max_difference == 0.0
    agreement = verify(str(tiny_llama), str(rounded), dtype="float32")
    assert agreement.dtype == "float32"
    assert agreement.max_difference > 1e-3


def test_logits_that_are_no_numbers_never_agree():
    nothing = [torch.full((3, 4), float("nan"))]
    found = compare(nothing, nothing, torch.float32)
    assert not found.agree
    assert found.same_top1 == 0
