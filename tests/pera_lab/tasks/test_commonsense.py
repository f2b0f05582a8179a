"""The eight commonsense tasks: rows, wording, prompts of both protocols, mixes, answers, and what is refused."""

# ruff: noqa: E501 (golden strings are in one piece)

import json

import pytest

from pera.errors import UserError
from pera_lab.recipe import load_recipe
from pera_lab.tasks import Splits, Verdict, commonsense
from pera_lab.tasks.commonsense import MEMBERS, PROTOCOLS, CommonsenseTask, instruction_row
from pera_lab.tasks.encoding import encode_example, encode_question
from pera_lab.tasks.sources import BadRow
from shared import DATA, needs_data

SIZES = {
    "boolq": (9427, 3270),
    "piqa": (16113, 1838),
    "social_i_qa": (20000, 1954),
    "hellaswag": (1980, 2785),
    "ARC-Easy": (2251, 2376),
    "ARC-Challenge": (1119, 1172),
    "openbookqa": (4957, 500),
}
ANSWERS = {
    "boolq": {"true": 2033, "false": 1237},
    "piqa": {"solution1": 910, "solution2": 928},
    "social_i_qa": {"answer1": 643, "answer2": 654, "answer3": 657},
    "hellaswag": {"ending1": 729, "ending2": 642, "ending3": 736, "ending4": 678},
    "ARC-Easy": {"answer1": 596, "answer2": 585, "answer3": 633, "answer4": 561, "answer5": 1},
    "ARC-Challenge": {"answer1": 266, "answer2": 311, "answer3": 310, "answer4": 285},
    "openbookqa": {"answer1": 138, "answer2": 126, "answer3": 132, "answer4": 104},
}
FIRST = {
    "boolq": (
        "Please answer the following question with true or false, question: does ethanol take more energy make that "
        "produces?\n\nAnswer format: true/false"
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: A person wants to start saving money so that they can afford "
        "a nice vacation at the end of the year. After looking over their budget and expenses, they decide the best way "
        "to save money is to\n\nAnswer1: make more phone calls Answer2: quit eating lunch out Answer3: buy less with "
        "monopoly money Answer4: have lunch with friends\n\nAnswer format: answer1/answer2/answer3/answer4"
    ),
}
JEANS = {
    "sentence": "The jeans fit worse than the shirt because I had tried the _ on at the store.",
    "option1": "jeans",
    "option2": "shirt",
    "answer": "2",
}
ROW = {
    "instruction": "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}
WINO = instruction_row("winogrande", JEANS)


def sizes(splits: Splits):
    return len(splits.train), len(splits.validation), len(splits.test)


@needs_data
@pytest.mark.parametrize("name", SIZES)
def test_all_rows_of_the_shared_files_are_read(name):
    """Reading checks that every answer is among the options and agrees with the output."""
    task = CommonsenseTask(name=name, data=str(DATA / "commonsense"), validation_size=0)
    splits = task.build()
    assert (len(splits.train), len(splits.test)) == SIZES[name]
    answers = [row.answer.removeprefix("the correct answer is ") for row in splits.test]
    assert {answer: answers.count(answer) for answer in set(answers)} == ANSWERS[name]
    assert all(task.judge(row, row.answer) == Verdict(a, True) for row, a in zip(splits.test, answers, strict=True))
    if name in FIRST:
        assert splits.test[0].prompt == FIRST[name]


@needs_data
def test_the_mix_of_all_notes_missing_members_and_repeated_rows():
    task = CommonsenseTask(data=str(DATA / "commonsense"), train_size=2000, test_size=10)
    splits = task.build()
    assert sizes(splits) == (1880, 120, 70)
    assert splits.notes[0] == f"winogrande is missing in {str(DATA / 'commonsense')!r} and gets no score."
    assert task.members == tuple(MEMBERS)
    whole = CommonsenseTask(name="ARC-Easy", data=str(DATA / "commonsense")).build()
    assert whole.notes == ["ARC-Easy: 2 of 2376 test rows also occur in the training data."]


# Prompts, character by character


def test_the_prompt_of_hira(tokenizer):
    frame = PROTOCOLS["hira"].frame
    example = commonsense._example(ROW, "boolq")
    encoded = encode_example(tokenizer, example, frame)
    assert tokenizer.decode(encoded["input_ids"]) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n"
        "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false\n\n"
        "### Response:\n"
        "the correct answer is true"
    )
    assert tokenizer.decode([i for i in encoded["labels"] if i >= 0]) == "the correct answer is true"


def test_the_prompt_of_llm_adapters(tokenizer):
    encoded = encode_example(tokenizer, commonsense._example(ROW, "boolq"), PROTOCOLS["llm-adapters"].frame)
    assert tokenizer.decode(encoded["input_ids"]) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
        "                ### Instruction:\n"
        "                Please answer the following question with true or false, question: is it?\n\n"
        "Answer format: true/false\n\n"
        "                ### Response:\n"
        "                the correct answer is true</s>"
    )
    assert encoded["labels"] == encoded["input_ids"]


def test_the_loss_can_differ_from_the_protocol():
    task = CommonsenseTask(name="boolq", protocol="llm-adapters", loss="answer")
    assert task.frame == PROTOCOLS["llm-adapters"].frame._replace(loss="answer")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_prompt_that_is_too_long_keeps_its_options_and_the_response_marker(protocol, tokenizer):
    frame = PROTOCOLS[protocol].frame
    options = commonsense._example({**ROW, "instruction": "Answer format: true/false"}, "boolq")
    max_length = len(encode_question(tokenizer, options, frame).ids) + 8
    long = {**ROW, "instruction": "word " * 400 + ROW["instruction"]}
    prompt = encode_question(tokenizer, commonsense._example(long, "boolq"), frame, max_length=max_length)
    whole = encode_question(tokenizer, commonsense._example(ROW, "boolq"), frame)
    text = tokenizer.decode(prompt.ids)
    assert prompt.shortened
    assert not whole.shortened
    assert len(prompt.ids) <= max_length
    assert text.startswith("Below is an instruction")
    assert text.rstrip().endswith("### Response:")
    assert "Answer format: true/false" in text


# The original data sets, worded


PIQA = {
    "goal": "How do I ready a guinea pig cage for it's new occupants?",
    "sol1": "Provide the guinea pig with a cage full of a few inches of bedding made of ripped paper strips, you will also "
    "need to supply it with a water bottle and a food dish.",
    "sol2": "Provide the guinea pig with a cage full of a few inches of bedding made of ripped jeans material, you will "
    "also need to supply it with a water bottle and a food dish.",
    "label": 0,
}
SIQA = {
    "context": "Tracy didn't go home that evening and resisted Riley's attacks.",
    "question": "What does Tracy need to do before this?",
    "answerA": "make a new plan",
    "answerB": "Go home and see Riley",
    "answerC": "Find somewhere to go",
    "label": "3",
}
HELLASWAG = {
    "activity_label": "Sharpening knives",
    "ctx": "Two hands hold a knife. he",
    "endings": ["cuts.", "sings.", "runs.", "sleeps."],
    "label": "0",
}
OBQA = {
    "question_stem": "The sun is responsible for",
    "choices": {"text": ["puppies", "plants sprouting"], "label": ["A", "B"]},
    "answerKey": "B",
}


@needs_data
@pytest.mark.parametrize(("name", "row"), [("piqa", PIQA), ("social_i_qa", SIQA)])
def test_the_converter_gives_the_row_of_the_published_file(name, row):
    published = json.loads((DATA / "commonsense" / name / "test.json").read_text())
    assert instruction_row(name, row) == published[0]


def test_winogrande_is_worded_as_published():
    assert WINO == {
        "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: The jeans "
        "fit worse than the shirt because I had tried the _ on at the store.\n\nOption1: jeans Option2: shirt "
        "Answer format: option1/option2",
        "input": "",
        "output": "the correct answer is option2",
        "answer": "option2",
    }


@pytest.mark.parametrize(
    ("name", "row", "instruction", "answer"),
    [
        ("boolq", {"question": "is it", "answer": False}, ROW["instruction"], "false"),
        (
            "hellaswag",
            HELLASWAG,
            "Please choose the correct ending to complete the given sentence: Sharpening knives: Two hands hold a knife. "
            "he\n\nEnding1: cuts. Ending2: sings. Ending3: runs. Ending4: sleeps.\n\n"
            "Answer format: ending1/ending2/ending3/ending4",
            "ending1",
        ),
        (
            "openbookqa",
            OBQA,
            "Please choose the correct answer to the question: The sun is responsible for\n\nAnswer1: puppies Answer2: "
            "plants sprouting\n\nAnswer format: answer1/answer2",
            "answer2",
        ),
    ],
)
def test_the_original_rows_are_worded(name, row, instruction, answer):
    found = instruction_row(name, row)
    assert (found["instruction"], found["answer"]) == (instruction, answer)
    assert commonsense._example(found, name).answer == f"the correct answer is {answer}"


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        ("piqa", {**PIQA, "label": 2}, "the label means option 3, and there are 2."),
        ("piqa", {"goal": "x"}, "field 'sol1' is missing; the fields are goal."),
        ("openbookqa", {**OBQA, "answerKey": "C"}, "field 'answerKey'='C' should be one of A, B."),
        ("winogrande", {**JEANS, "answer": ""}, "field 'answer'='' should be a number."),
    ],
)
def test_an_original_row_that_is_wrong_is_named(name, row, sentence):
    with pytest.raises(BadRow) as caught:
        instruction_row(name, row)
    assert str(caught.value) == sentence


def test_the_hub_gives_the_rows_of_the_folder(folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    hub = tmp_path / "hub"
    hub.mkdir()
    for split in ("train", "validation"):
        (hub / f"{split}.jsonl").write_text("".join(json.dumps({**JEANS, "option1": str(i)}) + "\n" for i in range(5)))
    member = MEMBERS["winogrande"]
    moved = member._replace(hub=member.hub._replace(repository=str(hub), configuration=None))
    monkeypatch.setitem(MEMBERS, "winogrande", moved)
    splits = CommonsenseTask(name="winogrande", validation_size=1).build()
    assert sizes(splits) == (4, 1, 5)
    assert splits.test[0].prompt.endswith("Option1: 0 Option2: shirt Answer format: option1/option2")
    assert splits.test[0].group == "winogrande"


# Mixes


@pytest.fixture
def folder(tmp_path):
    """A folder with so many rows of each task, for training and test."""

    def make(**rows):
        for name, n in rows.items():
            name = name.replace("ARC_", "ARC-")
            (tmp_path / name).mkdir()
            row = WINO if name == "winogrande" else ROW
            if name not in ("winogrande", "boolq"):
                kind = MEMBERS[name].pattern.split("|")
                listed = "/".join(kind)
                answer = f"the correct answer is {kind[0]}"
                row = {"instruction": f"Which?\n\nAnswer format: {listed}", "output": answer, "answer": kind[0]}
            for split in ("train", "test"):
                made = [{**row, "instruction": f"{split} {i}: {row['instruction']}"} for i in range(n)]
                (tmp_path / name / f"{split}.json").write_text(json.dumps(made))
        return str(tmp_path)

    return make


def counts(splits):
    rows = [*splits.train, *splits.validation]
    return {group: sum(row.group == group for row in rows) for group in {row.group for row in rows}}


def test_caps_and_shares_decide_how_many_rows_of_each_are_mixed(folder):
    data = folder(boolq=100, piqa=50, winogrande=20)
    few = {"names": ["boolq", "piqa", "winogrande"], "data": data, "validation_size": 5}
    assert counts(CommonsenseTask(**few).build()) == {"boolq": 100, "piqa": 50, "winogrande": 20}
    assert counts(CommonsenseTask(**few, caps={"boolq": 7}).build()) == {"boolq": 7, "piqa": 50, "winogrande": 20}
    shares = {"boolq": 1, "piqa": 2, "winogrande": 0}
    assert counts(CommonsenseTask(**few, train_size=30, shares=shares).build()) == {"boolq": 10, "piqa": 20}
    equal = CommonsenseTask(**few, train_size=31, shares={"boolq": 1, "piqa": 1, "winogrande": 1}).build()
    assert sorted(counts(equal).values()) == [10, 10, 11]
    assert equal.manifest["train"]["boolq"]["rows"] == 100
    assert sum(part["used"] for part in equal.manifest["train"].values()) == 31
    assert CommonsenseTask(**few, train_size=31, shares="equal").build().train == equal.train
    assert sum(counts(CommonsenseTask(**few, train_size=40).build()).values()) == 40


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [(["task.names=[boolq, piqa]"], {"boolq": 10, "piqa": 10}), (["task=boolq"], {"boolq": 20})],
)
def test_the_shipped_mix_can_have_other_members(overrides, expected, folder):
    data = folder(boolq=30, piqa=20)
    few = [f"data={data}", "task.train_size=20", "task.validation_size=4"]
    assert counts(load_recipe("commonsense-smollm2", [*few, *overrides]).build_splits()) == expected


def test_a_mix_is_drawn_by_seed(folder):
    data = folder(boolq=100, piqa=50)
    one, again, other = (
        CommonsenseTask(
            names=["boolq", "piqa"], data=data, train_size=30, validation_size=5, test_size=3, seed=seed
        ).build()
        for seed in (1, 1, 2)
    )
    assert one == again
    assert one.train != other.train


def test_the_validation_rows_follow_the_protocol(folder):
    data = folder(boolq=50)
    hira, adapters, given = (
        CommonsenseTask(name="boolq", data=data, validation_size=5, **options).build()
        for options in ({}, {"protocol": "llm-adapters"}, {"validation_seed": 58})
    )
    assert hira.validation == given.validation != adapters.validation


def test_a_single_mixed_file_is_trained_on_and_the_folders_beside_it_are_scored(folder, tmp_path):
    data = folder(boolq=4, winogrande=3)
    rows = [{**ROW, "instruction": f"{i} {ROW['instruction']}"} for i in range(9)] + [WINO]
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(rows))
    task = CommonsenseTask(data=f"{data}/commonsense_170k.json", validation_size=2)
    splits = task.build()
    assert sizes(splits) == (8, 2, 7)
    assert [row.group for row in splits.test] == ["boolq"] * 4 + ["winogrande"] * 3
    assert task.majority(splits) is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"names": ["boolq", "piqqa"]}, r"^task: 'piqqa' is not a commonsense task; did you mean 'piqa'\?"),
        ({"name": "boolq", "names": ["piqa"]}, r"^task\.names=\['piqa'\] are members of 'commonsense'"),
        ({"caps": {"bolq": 3}}, r"^task: 'bolq' is not a commonsense task; did you mean 'boolq'\?"),
        ({"names": ["boolq"], "caps": {"piqa": 3}}, r"^task\.caps\.piqa: 'piqa' is not in the mix of boolq"),
        ({"shares": {"boolq": 1}}, r"^task\.shares needs task\.train_size"),
        (
            {"shares": {"boolq": 0}, "train_size": 3},
            r"^task\.shares=\{'boolq': 0\.0\} should be above 0 for at least one task",
        ),
        (
            {"shares": {"boolq": 1, "piqa": 19}, "train_size": 100},
            r"^task\.shares\.piqa=19 of 100 are 95 rows, and there are 5",
        ),
        ({"validation_size": 12}, r"^task\.validation_size=12 leaves none of the 12 training rows"),
        ({"name": "winogrande"}, r"^task\.data: the split '.*winogrande/test' is missing"),
    ],
)
def test_a_mix_that_cannot_be_made(options, sentence, folder):
    with pytest.raises(UserError, match=sentence):
        CommonsenseTask(**{"data": folder(boolq=7, piqa=5), "validation_size": 2, **options}).build()


# Answers


@pytest.mark.parametrize(
    ("name", "output", "answer"),
    [
        ("boolq", "the correct answer is false", "false"),
        ("boolq", "true, not false", "true"),
        ("boolq", "yes", None),
        ("piqa", "the correct answer is solution2.", "solution2"),
        ("piqa", "Solution 2", None),
        ("ARC-Easy", "answer5answer1", "answer5"),
        ("hellaswag", "ending9 ending3", "ending3"),
        ("winogrande", "option1", "option1"),
        ("social_i_qa", "", None),
    ],
)
def test_the_first_match_of_the_pattern_is_the_answer(name, output, answer, folder):
    data = folder(**{name.replace("-", "_"): 3}) if name != "ARC-Easy" else folder(ARC_Easy=3)
    task = CommonsenseTask(name=name, data=data, validation_size=1)
    example = task.build().test[0]
    right = example.answer.removeprefix("the correct answer is ")
    assert task.judge(example, output) == (answer, answer == right)


# Bad rows


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": "maybe"}, "field 'answer'='maybe' should be one of true, false."),
        ({"output": "the correct answer is false"}, "field 'output'='the correct answer is false' should be 'the correct"),
        ({"answer": None}, "field 'answer' is missing"),
        ({"instruction": "Is it?"}, "field 'instruction' should end with its options, as in 'Answer format: "),
        ({"input": "a passage"}, "field 'input'='a passage' should be empty."),
        ({"instruction": "Is it?\n\nAnswer format: yes/no", "answer": "no", "output": "the correct answer is no"},
         "field 'instruction' has the options yes, no, which do not fit boolq."),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_file(change, sentence, folder, tmp_path):
    data = folder(boolq=3)
    (tmp_path / "boolq" / "train.json").write_text(json.dumps([ROW, {**ROW, **change}]))
    with pytest.raises(UserError) as caught:
        CommonsenseTask(name="boolq", data=data).build()
    assert f"boolq/train.json, row 2: {sentence}" in str(caught.value)


def test_a_missing_split_of_a_task_that_is_there_is_an_error(folder, tmp_path):
    data = folder(boolq=3, piqa=3)
    (tmp_path / "piqa" / "test.json").unlink()
    with pytest.raises(UserError, match=r"^task\.data: the split '.*piqa/test' is missing"):
        CommonsenseTask(data=data).build()


def test_a_folder_without_any_task_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^task\.data='.*' has no test rows of boolq, piqa, "):
        CommonsenseTask(data=str(tmp_path)).build()
