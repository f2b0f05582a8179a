"""Scorers: answers in batches, judged, and counted exactly."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pera.errors import UserError
from pera_lab.evaluation import evaluate
from pera_lab.files import Journal
from pera_lab.inference import Branches, log_likelihoods, takes_padding
from pera_lab.intervals import wilson_interval
from pera_lab.scorers import answer_batches, make_scorer
from pera_lab.tasks import EvaluationSection, Example, parse_task, subsample
from pera_lab.tasks.commonsense import CommonsenseTask
from pera_lab.tasks.encoding import encode_chat, encode_prompt, encode_question
from pera_lab.tasks.reasoning import ReasoningTask
from shared import DATA, needs_data

PROMPTS = ["Who is Zoe?", "How is Liam related to Zoe, who is married to Ethan?", "Ethan?", "What is Kai to Aria?"]


class Oracle(torch.nn.Linear):
    """A model that knows the answers by their prompts, and remembers how it was asked."""

    def __init__(self, tokenizer, answers):
        super().__init__(1, 1)
        self.tokenizer = tokenizer
        self.answers = {tuple(encode_prompt(tokenizer, prompt)): answer for prompt, answer in answers.items()}
        self.calls = []

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2))

    def generate(self, input_ids, attention_mask, generation_config, streamer=None):
        self.calls.append(SimpleNamespace(rows=len(input_ids), mask=attention_mask, config=generation_config))
        max_new_tokens = generation_config.max_new_tokens
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
    batches = answer_batches(make_scorer(model, tokenizer, TASK, examples, spec, None), "")
    answers = {i: output.answer for batch in batches for i, output in batch.items()}
    return [answers[i] for i in range(len(prompts))]


TASK = ReasoningTask(name="family_relationships", train_size=1, test_size=10)


@pytest.fixture(scope="module")
def splits():
    return TASK.build()


@pytest.mark.parametrize("batch_size", [3, 64])
def test_right_answers_are_counted_exactly(splits, tokenizer, batch_size):
    answers = {example.prompt: f" {example.answer}\n" for example in splits.test}
    wrong = [example.prompt for example in splits.test[2:5]]
    answers.update(dict.fromkeys(wrong, "neighbour"))
    spec = EvaluationSection(batch_size=batch_size, max_new_tokens=16)
    score, predictions = evaluate(Oracle(tokenizer, answers), tokenizer, TASK, splits, spec)
    assert (score.n, score.correct, score.value) == (10, 7, 0.7)
    assert (score.low, score.high) == wilson_interval(7, 10)
    assert [p.prompt for p in predictions] == [example.prompt for example in splits.test]
    assert [p.expected for p in predictions] == [example.answer for example in splits.test]
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
    assert all(call.config.do_sample is False for call in model.calls)


def test_an_answer_ends_after_the_number_of_tokens_asked_for(tokenizer):
    model = Oracle(tokenizer, {"Who?": "grandmother and grandfather"})
    (answer,) = generate(model, tokenizer, ["Who?"], batch_size=1, max_new_tokens=2)
    expected = tokenizer.decode(tokenizer("grandmother and grandfather", add_special_tokens=False).input_ids[:2])
    assert answer == expected.strip() != ""


def test_an_answer_that_leaves_no_room_for_the_question_is_an_error(splits, tiny_llama, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokens = len(encode_prompt(tokenizer, ""))
    make_scorer(model, tokenizer, TASK, splits.test, EvaluationSection(max_new_tokens=511 - tokens), None)
    for length in (512 - tokens, 600):
        sentence = rf"^evaluation\.max_new_tokens={length} leaves no room for the question in the 512 tokens"
        with pytest.raises(UserError, match=sentence):
            make_scorer(model, tokenizer, TASK, splits.test, EvaluationSection(max_new_tokens=length), None)


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
    scorer = make_scorer(model, tokenizer, TASK, [long, short], EvaluationSection(max_new_tokens=4), None)
    assert [prompt.shortened for prompt in scorer.prompts] == [True, False]
    kept = [turns[i:] for i in (2, 4, 6) if len(encode_chat(tokenizer, [start, *turns[i:], question])) <= 508]
    assert scorer.prompts[0].ids == encode_chat(tokenizer, [start, *kept[0], question])


# Answers among options


@pytest.fixture
def options(tmp_path):
    """A mix of yes-or-no questions and choices, and its splits. The third member has no data."""
    kinds = {"boolq": ["true", "false"], "winogrande": ["option1", "option2"], "piqa": []}
    for name, answers in kinds.items():
        if answers:
            (tmp_path / name).mkdir()
        for split in ("train", "test") if answers else ():
            rows = [
                {
                    "instruction": f"{split} {name} {i}, which?\n\nAnswer format: {'/'.join(answers)}",
                    "output": f"the correct answer is {answers[i % 2]}",
                    "answer": answers[i % 2],
                }
                for i in range(6 if name == "boolq" else 4)
            ]
            (tmp_path / name / f"{split}.json").write_text(json.dumps(rows))
    task = CommonsenseTask(names=list(kinds), data=str(tmp_path), validation_size=1)
    return task, task.build()


class Frames(Oracle):
    """An oracle for prompts in the frame of a task."""

    def __init__(self, tokenizer, task, splits, answers):
        super().__init__(tokenizer, {})
        asked = [tuple(encode_question(tokenizer, example, task.frame).ids) for example in splits.test]
        self.answers = dict(zip(asked, answers, strict=True))


def test_right_wrong_and_unparsed_outputs_are_counted_exactly(options, tokenizer):
    boolq = ["the correct answer is true", "false", "no idea", "false", "true or false", "true"]
    winogrande = ["option1", "option2", "option2", "Option"]
    model = Frames(tokenizer, *options, boolq + winogrande)
    spec = EvaluationSection(scorer="generation", batch_size=3, max_new_tokens=32)
    score, predictions = evaluate(model, tokenizer, *options, spec)
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


def test_held_out_rows_of_a_mixed_file_are_judged_by_their_own_options(tokenizer, options, tmp_path):
    rows = [row for file in sorted(tmp_path.glob("*/train.json")) for row in json.loads(file.read_text())]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    task = CommonsenseTask(names=["boolq", "winogrande"], data=str(tmp_path / "mix.json"), validation_size=1)
    splits = subsample(task.build(), held_out=4)
    model = Frames(tokenizer, task, splits, [*(example.answer for example in splits.test[:2]), "option3", "no idea"])
    spec = EvaluationSection(scorer="generation", batch_size=3, max_new_tokens=32)
    score, _ = evaluate(model, tokenizer, task, splits, spec)
    assert (score.n, score.correct, score.unparsed, score.metric) == (4, 2, 2, "accuracy")
    assert (score.parts, score.missing) == ({}, ())


def test_beams_are_asked_for(options, tokenizer):
    model = Frames(tokenizer, *options, ["true"] * 6 + ["option1"] * 4)
    evaluate(model, tokenizer, *options, EvaluationSection(scorer="generation", num_beams=4))
    assert {call.config.num_beams for call in model.calls} == {4}


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
def test_likelihoods_are_those_of_one_option_at_a_time(name, batch_size, request, options, tokenizer):
    """The byte-level tokenizer gives options of several tokens each, so that cached keys and values are used."""
    task, splits = options
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name), dtype=torch.float32).eval()
    spec = EvaluationSection(scorer="likelihood", batch_size=batch_size)
    scorer = make_scorer(model, tokenizer, task, splits.test, spec, None)
    assert max(len(suffix) for b in scorer.branches for suffix in b.suffixes) > 1
    found = {}
    for outputs in answer_batches(scorer, ""):
        found |= {i: scorer.judge(i, output) for i, output in outputs.items()}
    for i, example in enumerate(splits.test):
        expected = one_at_a_time(model, tokenizer, task, example)
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
    task = CommonsenseTask(name="ARC-Easy", data=str(DATA / "commonsense"), test_size=8)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    assert takes_padding(model)  # which runs the model twice, once for all
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    spec = EvaluationSection(scorer="likelihood", batch_size=8)
    score, _ = evaluate(model, tokenizer, task, task.build(), spec)
    assert len(calls) == 1
    assert score.n == 8


def test_free_answers_cannot_be_ranked(splits, tokenizer):
    with pytest.raises(UserError, match=r"^evaluation\.scorer='likelihood' needs options to rank"):
        evaluate(Oracle(tokenizer, {}), tokenizer, TASK, splits, EvaluationSection(scorer="likelihood"))


# Interruptions


class Killed(Exception):
    pass


def test_a_restart_makes_only_the_missing_answers(options, tokenizer, tmp_path):
    answers = ["true"] * 6 + ["option1"] * 4
    spec = EvaluationSection(scorer="generation", batch_size=3, max_new_tokens=32)
    whole = evaluate(Frames(tokenizer, *options, answers), tokenizer, *options, spec)[1]

    killed = Frames(tokenizer, *options, answers)
    generate_batch = killed.generate

    def generate_twice(*arguments, **kwargs):
        if len(killed.calls) == 2:
            raise Killed
        return generate_batch(*arguments, **kwargs)

    killed.generate = generate_twice
    with pytest.raises(Killed):
        evaluate(killed, tokenizer, *options, spec, journal=Journal(tmp_path / "kept.jsonl", {"a": 1}))
    with (tmp_path / "kept.jsonl").open("a") as f:
        f.write('{"index": 9, "ro')  # killed while a line was being written
    journal = Journal(tmp_path / "kept.jsonl", {"a": 1})
    assert len(journal.found) == 6
    model = Frames(tokenizer, *options, answers)
    _, predictions = evaluate(model, tokenizer, *options, spec, journal=journal)
    assert sum(call.rows for call in model.calls) == 4
    assert predictions == whole
    assert Journal(tmp_path / "kept.jsonl", {"a": 2}).found == {}


def test_a_long_option_fits_behind_a_long_question(tiny_gpt2, tokenizer, options):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32).eval()
    example = Example("why? " * 400, "yes", options=("yes", "because it is so, as everybody knows. " * 4))
    spec = EvaluationSection(scorer="likelihood")
    scorer = make_scorer(model, tokenizer, options[0], [example], spec, None)
    (branches,) = scorer.branches
    assert max(len(branches.shared) + len(suffix) for suffix in branches.suffixes) <= 512
    assert scorer.answer([0])[0].shortened
    with pytest.raises(UserError, match=r"an option has \d+ tokens, but the model reads at most 512; shorten it"):
        make_scorer(model, tokenizer, options[0], [Example("a", "b", options=("b", "long " * 600))], spec, None)


# What is remembered


@pytest.fixture
def facts(tiny_llama):
    """A model, codes of five passphrases, and their splits."""
    codes = parse_task({"name": "codewords", "size": 5, "vocabulary": 4, "length": 2})
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval(), codes, codes.build()


@torch.no_grad()
def by_hand(model, tokenizer, book, fact):
    """Log-probabilities of the tokens of an answer, from one forward pass of the whole text."""
    prompt = encode_question(tokenizer, fact, book.frame).ids
    answer = tokenizer(fact.answer, add_special_tokens=False).input_ids
    logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return [float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]


@pytest.mark.parametrize(("name", "batch_size"), [("tiny_llama", 1), ("tiny_llama", 5), ("tiny_gpt2", 5)])
def test_bits_count_every_token_of_an_answer_over_the_whole_vocabulary(facts, tokenizer, name, batch_size, request):
    _, book, splits = facts
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name), dtype=torch.float64).eval()
    score, predictions = evaluate(
        model, tokenizer, book, splits, EvaluationSection(scorer="recall", batch_size=batch_size, max_new_tokens=64)
    )
    expected = [by_hand(model, tokenizer, book, fact) for fact in splits.test]
    for prediction, values in zip(predictions, expected, strict=True):
        assert prediction.log_likelihoods == pytest.approx(values, abs=1e-4)
    tokens = [x for values in expected for x in values]
    memory = score.memory
    assert memory.tokens == len(tokens)
    assert memory.loss == pytest.approx(-sum(tokens) / len(tokens))
    assert memory.confident == sum(x > math.log(0.5) for x in tokens) / len(tokens)
    assert memory.information == 5 * 2 * 2
    assert memory.bits == pytest.approx(20 + sum(tokens) / math.log(2), rel=1e-4)
    assert memory.low < memory.bits < memory.high


class Recalling(Frames):
    """An oracle with equal probabilities for 400 tokens."""

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 400))


def test_recall_needs_every_token_of_the_answer_and_ignores_what_follows(facts, tokenizer):
    _, codes, splits = facts
    first, second, third, fourth, _ = (fact.answer for fact in splits.test)
    model = Recalling(tokenizer, codes, splits, [first, second + " and more", third[:-1], "no" + fourth, ""])
    spec = EvaluationSection(scorer="recall", max_new_tokens=64, batch_size=2)
    score, predictions = evaluate(model, tokenizer, codes, splits, spec)
    assert [p.correct for p in predictions] == [True, True, False, False, False]
    assert (score.metric, score.correct, score.value) == ("recall", 2, 0.4)
    assert (score.low, score.high) == wilson_interval(2, 5)
    assert score.memory.bits == pytest.approx(20 - score.memory.tokens * math.log2(400))
    assert score.memory.confident == 0


def test_bits_of_answers_whose_number_is_unknown_are_not_counted(facts, tokenizer, tmp_path):
    model, _, splits = facts
    (tmp_path / "own.jsonl").write_text("{}")
    own = parse_task({"name": "facts", "data": str(tmp_path / "own.jsonl"), "template": "plain"})
    memory = evaluate(model, tokenizer, own, splits, EvaluationSection(scorer="recall", max_new_tokens=64))[0].memory
    assert (memory.information, memory.bits, memory.low) == (None, None, None)
    assert memory.loss > 0


def test_an_answer_that_is_cut_cannot_be_recalled(facts, tokenizer):
    model, book, splits = facts
    longest = max(len(tokenizer(e.answer, add_special_tokens=False).input_ids) for e in splits.test)
    make_scorer(model, tokenizer, book, splits.test, EvaluationSection(scorer="recall", max_new_tokens=longest), None)
    short = EvaluationSection(scorer="recall", max_new_tokens=longest - 1)
    sentence = rf"^evaluation\.max_new_tokens={longest - 1} is less than the {longest} tokens of the longest answer"
    with pytest.raises(UserError, match=sentence):
        make_scorer(model, tokenizer, book, splits.test, short, None)


def test_a_question_without_an_answer_gets_as_many_tokens_as_asked_for(facts, tokenizer):
    model, book, _ = facts
    spec = EvaluationSection(scorer="recall", max_new_tokens=3)
    scorer = make_scorer(model, tokenizer, book, [book.question({"question": "Who?"})], spec, None)
    (output,) = scorer.answer([0])
    ids = model.generate(torch.tensor([scorer.prompts[0].ids]), max_new_tokens=3, do_sample=False, pad_token_id=2)
    assert output.answer == tokenizer.decode(ids[0, -3:], skip_special_tokens=True).strip()
    assert output.log_likelihoods is None
