"""Facts that are trained and tested: generated, published, and a user's own."""

import json
import math

import pytest

from pera.errors import UserError
from pera_lab.recipe import load_recipe
from pera_lab.tasks import parse_task, subsample
from pera_lab.tasks.encoding import IGNORED
from shared import DATA, needs_data


def task(name="phonebook", **options):
    return parse_task({"name": name, **options})


@pytest.fixture
def rows(tmp_path):
    """Write rows to a file, and return its path."""

    def write(*rows, name="facts.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def test_a_generated_phone_book_has_distinct_names_and_ten_digits():
    splits = task(size=400, seed=7).build()
    assert len({fact.prompt for fact in splits.train}) == 400
    assert all(fact.prompt.endswith(":") and fact.prompt.count(" ") == 1 for fact in splits.train)
    assert {len(fact.answer) for fact in splits.train} == {10}
    digits = "".join(fact.answer for fact in splits.train)
    assert all(350 < digits.count(digit) < 450 for digit in "0123456789")
    assert task().information(splits.train[0]) == pytest.approx(10 * math.log2(10))


@pytest.mark.parametrize("name", ["phonebook", "codewords"])
def test_a_seed_draws_the_same_facts_and_another_seed_draws_others(name):
    first, again, other = (task(name, size=50, seed=seed).build().train for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)


def test_code_words_come_from_a_vocabulary_of_the_given_size():
    codes = task("codewords", size=600, vocabulary=8, length=3)
    facts = codes.build().train
    words = [word for fact in facts for word in fact.answer.split()]
    assert len(words) == 3 * 600
    assert len(set(words)) == 8
    assert codes.information(facts[0]) == 9
    assert codes.judge(facts[0], facts[0].answer.strip()).correct


def test_the_trained_facts_are_tested_without_a_warning():
    splits = task(size=5).build()
    assert splits.test == splits.train
    assert splits.notes == []
    half = subsample(splits, share=0.4)
    assert len(half.train) == 2
    assert half.test == half.train
    assert half.notes == []


def test_facts_cannot_be_held_out():
    with pytest.raises(UserError, match=r"^training\.held_out=1: the facts that are trained are tested, so none"):
        subsample(task(size=5).build(), held_out=1)


@needs_data
def test_the_published_phone_books_are_read():
    files = sorted((DATA / "phonebook").glob("PB*.jsonl"))
    assert len(files) == 6
    for file in files:
        facts = task(data=str(file)).build().train
        assert 10 * len(facts) == int(file.stem.removeprefix("PB"))
    book = task(data=str(DATA / "phonebook" / "PB1000.jsonl"), size=30).build()
    assert len(book.train) == 30
    assert book.manifest["train"]["used"] == 30
    assert (facts[0].prompt[-1], len(facts[0].answer)) == (":", 10)


def test_own_facts_name_their_columns_and_list_those_that_are_not_used(rows):
    data = rows({"q": "Where is Ann?", "a": "in Rome", "note": 1}, {"q": "Where is Bob?", "a": "at sea"})
    facts = task("facts", data=data, columns={"question": "q", "answer": "a"})
    splits = facts.build()
    assert [(fact.prompt, fact.answer) for fact in splits.test] == [
        ("Where is Ann?", "in Rome"),
        ("Where is Bob?", "at sea"),
    ]
    assert splits.notes == ["columns that are not used: note."]
    assert facts.question({"q": "Who?"}).prompt == "Who?"
    assert facts.information(splits.test[0]) is None
    known = facts.model_copy(update={"answers": 8.0})
    assert known.information(splits.test[0]) == 3


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        ("phonebook", {"query": "Al Bo:", "target": "123"}, r"line 2: field 'target'='123' should be ten digits\.$"),
        (
            "phonebook",
            {"query": "Al Bo:", "target": "１２３４５６７８９０"},
            r"line 2: field .* ten digits\.$",
        ),
        ("phonebook", {"name": "Al Bo:"}, r"line 2: field 'query' is missing; the fields are name\.$"),
        (
            "facts",
            {"question": "Who?", "answer": "I"},
            r"line 2: the question 'Who\?' occurs before, .*line 1; keep",
        ),
        ("facts", {"question": "What?"}, r"line 2: field 'answer' is missing"),
    ],
)
def test_broken_facts_are_refused_with_their_line(name, row, sentence, rows):
    first = {"query": "Cy Do:", "target": "0123456789", "question": "Who?", "answer": "you"}
    with pytest.raises(UserError, match=sentence):
        task(name, data=rows(first, row)).build()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["task.size=40000"], r"^task\.size=40000 is too large; there are 28,275 different questions\.$"),
        (["task.data=gone.jsonl"], r"^task\.data='gone\.jsonl' does not exist"),
        (["evaluation.num_beams=2"], r"evaluation\.num_beams=2: recall is measured by greedy decoding; give 1"),
        (
            ["evaluation.scorer=exact_match"],
            r"evaluation\.scorer='exact_match' does not fit task 'phonebook'",
        ),
        (["task={name: codewords, vocabulary: 5000}"], r"vocabulary=5000: input should be less than or equal to 277"),
        (["task={name: codewords, data: x}"], r"data is not a key of"),
    ],
)
def test_options_that_do_not_fit_are_refused(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        load_recipe("phonebook-smollm2", overrides).build_splits()


def test_only_own_facts_teach_the_end_of_an_answer(tokenizer, rows):
    (row,) = task(size=1).encode(tokenizer, task(size=1).build().train).rows
    learned = [token for token in row["labels"] if token != IGNORED]
    assert tokenizer.decode(learned) == task(size=1).build().train[0].answer
    own = task("facts", data=rows({"question": "Who?", "answer": "you"}))
    (row,) = own.encode(tokenizer, own.build().train).rows
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_a_tokenizer_that_joins_digits_is_noted(tokenizer, tiny_llama):
    from transformers import AutoTokenizer

    splits = task(size=1).build()
    assert task().tokenizer_notes(tokenizer, splits) == []
    joined = AutoTokenizer.from_pretrained(tiny_llama)
    joined.add_tokens([splits.train[0].answer[:3]])
    (note,) = task().tokenizer_notes(joined, splits)
    assert note.startswith(f"the tokenizer writes the ten digits {splits.train[0].answer} as ")
