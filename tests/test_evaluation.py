"""A run becomes scores, exactly counted."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pera.evaluation import evaluate, evaluate_run, generate, wilson_interval
from pera.recipe import EvaluationSection
from pera.runs import Run
from pera.tasks import ReasoningTask
from pera.tasks.prompts import encode_prompt

PROMPTS = ["Who is Zoe?", "How is Liam related to Zoe, who is married to Ethan?", "Ethan?", "What is Kai to Aria?"]


class Oracle(torch.nn.Linear):
    """A model that knows the answers by their prompts, and remembers how it was asked."""

    def __init__(self, tokenizer, answers):
        super().__init__(1, 1)
        self.tokenizer = tokenizer
        self.answers = {tuple(encode_prompt(tokenizer, prompt)): answer for prompt, answer in answers.items()}
        self.calls = []

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        self.calls.append(SimpleNamespace(rows=len(input_ids), mask=attention_mask, options=options))
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            answer = self.answers[tuple(ids[mask.bool()].tolist())]
            new = self.tokenizer(answer, add_special_tokens=False).input_ids[:max_new_tokens]
            end = [self.tokenizer.eos_token_id] + [self.tokenizer.pad_token_id] * max_new_tokens
            rows.append(torch.cat([ids, torch.tensor((new + end)[:max_new_tokens])]))
        return torch.stack(rows)


@pytest.fixture(scope="module")
def task():
    return ReasoningTask("family_relationships", train_size=1, test_size=10)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_right_answers_are_counted_exactly(task, tokenizer, batch_size):
    answers = {example.prompt: f" {example.answer}\n" for example in task.test}
    wrong = [example.prompt for example in task.test[2:5]]
    answers.update(dict.fromkeys(wrong, "neighbour"))
    spec = EvaluationSection(batch_size=batch_size, max_new_tokens=16)
    score, predictions = evaluate(Oracle(tokenizer, answers), tokenizer, task, spec)
    assert (score.n, score.correct, score.value) == (10, 7, 0.7)
    assert (score.low, score.high) == wilson_interval(7, 10)
    assert [p.prompt for p in predictions] == [example.prompt for example in task.test]
    assert [p.expected for p in predictions] == [example.answer for example in task.test]
    assert [p.output for p in predictions] == [answers[p.prompt].strip() for p in predictions]
    assert [p.prompt for p in predictions if not p.correct] == wrong


def test_prompts_are_batched_by_length_padded_on_the_left_and_answered_in_order(tokenizer):
    model = Oracle(tokenizer, {prompt: prompt[:5] for prompt in PROMPTS})
    answers = generate(model, tokenizer, PROMPTS, batch_size=3, max_new_tokens=16)
    assert answers == [prompt[:5].strip() for prompt in PROMPTS]
    assert [call.rows for call in model.calls] == [3, 1]
    lengths = torch.cat([call.mask.sum(1) for call in model.calls]).tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert all(call.mask[:, -1].all() for call in model.calls)
    assert all(call.options["do_sample"] is False for call in model.calls)


def test_an_answer_ends_after_the_number_of_tokens_asked_for(tokenizer):
    model = Oracle(tokenizer, {"Who?": "grandmother and grandfather"})
    (answer,) = generate(model, tokenizer, ["Who?"], batch_size=1, max_new_tokens=2)
    expected = tokenizer.decode(tokenizer("grandmother and grandfather", add_special_tokens=False).input_ids[:2])
    assert answer == expected.strip() != ""


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_batch_gives_the_answers_of_single_prompts(name, request, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name), dtype=torch.float64).eval()
    single, batch = (generate(model, tokenizer, PROMPTS, batch_size=n, max_new_tokens=8) for n in (1, 4))
    assert single == batch
    assert len(set(single)) > 1


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_scores_and_predictions_of_base_and_adapter_are_kept_side_by_side(run):
    scores = {which: evaluate_run(run, base=which == "base") for which in ("base", "adapter")}
    content = json.loads(run.scores_file.read_text())
    assert set(content) == {"base", "adapter"}
    for which, score in scores.items():
        lines = [json.loads(line) for line in (run.predictions / f"{which}.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == [example.prompt for example in run.recipe.build_task().test]
        assert sum(line["correct"] for line in lines) == score.correct == content[which]["correct"]
        assert content[which]["scorer"] == "exact_match"
        assert (content[which]["n"], content[which]["value"]) == (8, score.value)
        assert (content[which]["low"], content[which]["high"]) == (score.low, score.high)
    answers = [(run.predictions / f"{which}.jsonl").read_text() for which in scores]
    assert answers[0] != answers[1]


def test_scoring_again_replaces_a_score_and_keeps_the_other(run):
    old = {
        "scorer": "exact_match",
        "n": 1,
        "correct": 1,
        "metric": "accuracy",
        "value": 1.0,
        "low": 0.2,
        "high": 1.0,
        "seconds": 0.1,
    }
    run.scores_file.write_text(json.dumps({"base": old, "adapter": old}))
    evaluate_run(run)
    content = json.loads(run.scores_file.read_text())
    assert content["base"] == old
    assert content["adapter"]["n"] == 8


def test_the_base_can_be_scored_before_training(finished_run, tmp_path):
    untrained = Run.create(finished_run.recipe, tmp_path / "untrained")
    assert evaluate_run(untrained, base=True).n == 8
    assert set(untrained.scores()) == {"base"}
    assert not untrained.adapter.exists()
