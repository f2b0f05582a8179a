"""A run becomes scores, exactly counted."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pera.errors import UserError
from pera_lab.evaluation import (
    Branches,
    Part,
    _mean_interval,
    answer_batches,
    bootstrap_interval,
    evaluate,
    evaluate_run,
    log_likelihoods,
    make_scorer,
    wilson_interval,
)
from pera_lab.files import Journal
from pera_lab.recipe import EvaluationSection
from pera_lab.runs import Run
from pera_lab.tasks import CommonsenseTask, Example, ReasoningTask, divided
from pera_lab.tasks.base import Asked
from pera_lab.tasks.prompts import CHAT, encode_chat, encode_prompt, encode_question
from shared import DATA, needs_data

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


def generate(model, tokenizer, prompts, *, batch_size, max_new_tokens):
    """What a model writes to each prompt."""
    examples = [Example(prompt, "") for prompt in prompts]
    spec = EvaluationSection(batch_size=batch_size, max_new_tokens=max_new_tokens)
    batches = answer_batches(make_scorer(model, tokenizer, Asked(examples, CHAT), examples, spec, None), "", None)
    answers = {i: answer.output for batch in batches for i, answer in batch.items()}
    return [answers[i] for i in range(len(prompts))]


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


def test_an_answer_that_leaves_no_room_for_the_question_is_refused(task, tiny_llama, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokens = len(encode_prompt(tokenizer, ""))
    make_scorer(model, tokenizer, task, task.test, EvaluationSection(max_new_tokens=511 - tokens), None)
    for length in (512 - tokens, 600):
        sentence = rf"^evaluation\.max_new_tokens={length} leaves no room for the question in the 512 tokens"
        with pytest.raises(UserError, match=sentence):
            make_scorer(model, tokenizer, task, task.test, EvaluationSection(max_new_tokens=length), None)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_batch_gives_the_answers_of_single_prompts(name, request, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name), dtype=torch.float64).eval()
    single, batch = (generate(model, tokenizer, PROMPTS, batch_size=n, max_new_tokens=8) for n in (1, 4))
    assert single == batch
    assert len(set(single)) > 1


def test_a_conversation_that_is_too_long_loses_its_oldest_turns_first(tiny_llama, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    turns = [{"role": role, "content": f"{i} " + "word " * 100} for i, role in enumerate(["user", "assistant"] * 3)]
    start, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Zoe?"}
    long = Example(question["content"], "", messages=(start, *turns, question))
    short = Example("Who is Al?", "")
    scorer = make_scorer(
        model, tokenizer, Asked([long, short], CHAT), [long, short], EvaluationSection(max_new_tokens=4), None
    )
    assert [prompt.shortened for prompt in scorer.prompts] == [True, False]
    kept = [turns[i:] for i in (2, 4, 6) if len(encode_chat(tokenizer, [start, *turns[i:], question])) <= 508]
    assert scorer.prompts[0].ids == encode_chat(tokenizer, [start, *kept[0], question])


def test_the_interval_of_a_mean_of_accuracies():
    """Of one it is Wilson's; of two alike it is narrower by the root of two; and nothing right is no certainty."""
    part = Part(20, 5, 0, 0.25, *wilson_interval(5, 20))
    assert _mean_interval([part]) == pytest.approx(wilson_interval(5, 20))
    low, high = _mean_interval([part, part])
    assert (0.25 - low, high - 0.25) == pytest.approx(((0.25 - part.low) / 2**0.5, (part.high - 0.25) / 2**0.5))
    none = Part(4, 0, 0, 0.0, *wilson_interval(0, 4))
    assert _mean_interval([none, none]) == pytest.approx((0, none.high / 2**0.5))


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
    assert not untrained.adapter.path.exists()


# Answers among options


@pytest.fixture
def options_task(tmp_path):
    """Yes-or-no questions and choices, two tasks of a mix; the third has no data."""
    kinds = {"boolq": ["true", "false"], "winogrande": ["option1", "option2"], "piqa": []}
    for name, options in kinds.items():
        if options:
            (tmp_path / name).mkdir()
        for split in ("train", "test") if options else ():
            rows = [
                {
                    "instruction": f"{split} {name} {i}, which?\n\nAnswer format: {'/'.join(options)}",
                    "output": f"the correct answer is {options[i % 2]}",
                    "answer": options[i % 2],
                }
                for i in range(6 if name == "boolq" else 4)
            ]
            (tmp_path / name / f"{split}.json").write_text(json.dumps(rows))
    return CommonsenseTask(names=list(kinds), data=str(tmp_path), validation_size=1)


class Frames(Oracle):
    """An oracle that is asked in the frame of a task."""

    def __init__(self, tokenizer, task, answers):
        super().__init__(tokenizer, {})
        asked = [tuple(encode_question(tokenizer, example, task.frame).ids) for example in task.test]
        self.answers = dict(zip(asked, answers, strict=True))


def test_right_wrong_and_unparsed_outputs_are_counted_exactly(options_task, tokenizer):
    boolq = ["the correct answer is true", "false", "no idea", "false", "true or false", "true"]
    winogrande = ["option1", "option2", "option2", "Option"]
    model = Frames(tokenizer, options_task, boolq + winogrande)
    spec = EvaluationSection(scorer="generation", batch_size=3, max_new_tokens=32)
    score, predictions = evaluate(model, tokenizer, options_task, spec)
    assert [p.answer for p in predictions] == [
        *("true", "false", None, "false", "true", "true"),
        *("option1", "option2", "option2", None),
    ]
    assert [p.correct for p in predictions] == [True, True, False, True, True, False, True, True, False, False]
    assert {name: (p.n, p.correct, p.unparsed, p.accuracy) for name, p in score.parts.items()} == {
        "boolq": (6, 4, 1, 4 / 6),
        "winogrande": (4, 2, 1, 0.5),
    }
    assert (score.n, score.correct, score.unparsed) == (10, 6, 2)
    assert (score.metric, score.value) == ("mean accuracy", pytest.approx((4 / 6 + 0.5) / 2))
    assert score.missing == ("piqa",)
    assert score.majority is not None
    assert score.low < score.value < score.high
    assert (score.parts["boolq"].low, score.parts["boolq"].high) == wilson_interval(4, 6)


def test_held_out_rows_of_a_mixed_file_are_judged_by_their_own_options(tokenizer, options_task, tmp_path):
    rows = [row for file in sorted(tmp_path.glob("*/train.json")) for row in json.loads(file.read_text())]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    mixed = CommonsenseTask(names=["boolq", "winogrande"], data=str(tmp_path / "mix.json"), validation_size=1)
    task = divided(mixed, held_out=4)
    model = Frames(tokenizer, task, [*(example.answer for example in task.test[:2]), "option3", "no idea"])
    spec = EvaluationSection(scorer="generation", batch_size=3, max_new_tokens=32)
    score, _ = evaluate(model, tokenizer, task, spec)
    assert (score.n, score.correct, score.unparsed, score.metric) == (4, 2, 2, "accuracy")
    assert (score.parts, score.missing) == ({}, ())


def test_beams_are_asked_for(options_task, tokenizer):
    model = Frames(tokenizer, options_task, ["true"] * 6 + ["option1"] * 4)
    evaluate(model, tokenizer, options_task, EvaluationSection(scorer="generation", num_beams=4))
    assert {call.options["num_beams"] for call in model.calls} == {4}


@torch.no_grad()
def one_at_a_time(model, tokenizer, task, example):
    """Log-probability of each option of a question behind "the correct answer is", from unpadded whole sequences."""
    prompt = encode_question(tokenizer, example, task.frame).ids
    start = len(tokenizer("the correct answer is", add_special_tokens=False).input_ids)
    found = {}
    for option in example.options:
        answer = tokenizer(option, add_special_tokens=False).input_ids
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = range(len(prompt) + start, len(prompt) + len(answer))
        found[option] = sum(logits[place - 1, (prompt + answer)[place]].item() for place in places)
    return found


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_are_those_of_one_option_at_a_time(name, batch_size, request, options_task, tokenizer):
    """The byte-level tokenizer gives options of several tokens each, so that the kept keys and values are used."""
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name), dtype=torch.float32).eval()
    spec = EvaluationSection(scorer="likelihood", batch_size=batch_size)
    scorer = make_scorer(model, tokenizer, options_task, options_task.test, spec, None)
    assert max(len(suffix) for b in scorer.branches for suffix in b.suffixes) > 1
    found = {}
    for answered in answer_batches(scorer, "", None):
        found |= answered
    for i, example in enumerate(options_task.test):
        expected = one_at_a_time(model, tokenizer, options_task, example)
        assert found[i].scores == pytest.approx(expected, abs=1e-4)
        assert found[i].answer == max(expected, key=expected.get)
        assert found[i].correct == (found[i].answer == example.answer)


@torch.no_grad()
def test_likelihoods_of_branches_of_several_lengths(tiny_llama, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    batch = [Branches([5, 6, 7], 2, [[8], [9, 10, 11]]), Branches([5, 6, 7, 8, 9], 5, [[3, 4], [4, 5, 6, 7], [5]])]
    found = log_likelihoods(model, tokenizer, batch)
    for b, values in zip(batch, found, strict=True):
        for suffix, value in zip(b.suffixes, values, strict=True):
            ids = b.shared + suffix
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(logits[i - 1, ids[i]].item() for i in range(b.start, len(ids)))
            assert value == pytest.approx(expected, abs=1e-4)


@needs_data
def test_a_question_of_the_shared_data_is_ranked_in_one_forward(tiny_llama, tokenizer):
    """Options that differ in their last token alone need no second forward."""
    task = CommonsenseTask("ARC-Easy", data=str(DATA / "commonsense"), test_size=8)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    spec = EvaluationSection(scorer="likelihood", batch_size=8)
    score, _ = evaluate(model, tokenizer, task, spec)
    assert len(calls) == 1
    assert score.n == 8


def test_free_answers_cannot_be_ranked(task, tokenizer):
    with pytest.raises(UserError, match=r"^evaluation\.scorer='likelihood' needs options to rank"):
        evaluate(Oracle(tokenizer, {}), tokenizer, task, EvaluationSection(scorer="likelihood"))


# Interruptions


class Killed(Exception):
    pass


def test_a_restart_answers_only_what_is_missing(options_task, tokenizer, tmp_path):
    answers = ["true"] * 6 + ["option1"] * 4
    spec = EvaluationSection(scorer="generation", batch_size=3, max_new_tokens=32)
    whole = evaluate(Frames(tokenizer, options_task, answers), tokenizer, options_task, spec)[1]

    killed = Frames(tokenizer, options_task, answers)
    generate_batch = killed.generate

    def generate_twice(*arguments, **options):
        if len(killed.calls) == 2:
            raise Killed
        return generate_batch(*arguments, **options)

    killed.generate = generate_twice
    with pytest.raises(Killed):
        evaluate(killed, tokenizer, options_task, spec, journal=Journal(tmp_path / "kept.jsonl", {"a": 1}))
    with (tmp_path / "kept.jsonl").open("a") as f:
        f.write('{"index": 9, "ro')  # killed while a line was being written
    journal = Journal(tmp_path / "kept.jsonl", {"a": 1})
    assert len(journal.found) == 6
    model = Frames(tokenizer, options_task, answers)
    _, predictions = evaluate(model, tokenizer, options_task, spec, journal=journal)
    assert sum(call.rows for call in model.calls) == 4
    assert predictions == whole
    assert Journal(tmp_path / "kept.jsonl", {"a": 2}).found == {}


def test_an_interrupted_evaluation_of_a_run_goes_on(run, interrupt):
    whole = evaluate_run(run)
    answers = (run.predictions / "adapter.jsonl").read_text()
    asked = interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run)
    assert (run.predictions / "adapter.partial.jsonl").is_file()
    assert evaluate_run(run).correct == whole.correct
    assert asked == [4, 4, 4]
    assert (run.predictions / "adapter.jsonl").read_text() == answers
    assert not (run.predictions / "adapter.partial.jsonl").exists()


def test_the_bootstrap_interval_holds_the_value_and_narrows_with_n():
    gold = [i % 2 for i in range(400)]
    predicted = [g if i % 5 else 1 - g for i, g in enumerate(gold)]

    def accuracy(a, b):
        return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)

    low, high = bootstrap_interval(accuracy, gold, predicted)
    assert (low, high) == bootstrap_interval(accuracy, gold, predicted)
    assert (low, high) == pytest.approx(wilson_interval(320, 400), abs=0.01)
    few = bootstrap_interval(accuracy, gold[:40], predicted[:40])
    assert few[1] - few[0] > 2 * (high - low)
