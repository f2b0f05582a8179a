"""A user's own data, in every form."""

import json

import pytest

from pera.errors import UserError
from pera_lab.tasks.conversations import example_of
from pera_lab.tasks.encoding import encode_example
from pera_lab.tasks.own import OwnTask
from pera_lab.tasks.sources import BadRow

USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Zoe"}
SYSTEM = {"role": "system", "content": "Be brief."}


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows(n, start=0):
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(start, start + n)]


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "messages"),
    [
        ({"prompt": "Who?", "completion": "Zoe"}, "Who?", "Zoe", ()),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, "Who?", "Zoe", (SYSTEM, USER)),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "Who?", "Zoe", (USER,)),
    ],
)
def test_prompts_and_conversations_are_examples(row, prompt, answer, messages):
    example = example_of(row)
    assert (example.prompt, example.answer, example.messages) == (prompt, answer, messages)


def test_a_conversation_is_put_into_the_chat_template(tokenizer):
    encoded = encode_example(tokenizer, example_of({"messages": [SYSTEM, USER, ASSISTANT]}))
    expected = "<s>system\nBe brief.</s><s>user\nWho?</s><s>assistant\nZoe</s>"
    assert tokenizer.decode(encoded["input_ids"]) == expected
    assert tokenizer.decode([i for i in encoded["labels"] if i >= 0]) == "Zoe</s>"


def test_a_plain_completion_follows_its_prompt(tokenizer, tmp_path):
    task = OwnTask(data=lines(tmp_path / "a.jsonl", rows(9)), template="plain")
    encoded = encode_example(tokenizer, example_of({"prompt": "Who? ", "completion": "Zoe"}), task.frame)
    assert tokenizer.decode(encoded["input_ids"]) == "Who? Zoe</s>"


@pytest.mark.parametrize("row", [{"messages": [USER, ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}])
def test_messages_are_not_put_plainly(row, tmp_path):
    data, field = lines(tmp_path / "a.jsonl", [row] * 9), next(iter(row))
    with pytest.raises(UserError, match=rf"line 1: field '{field}' holds messages, and template 'plain' has no roles"):
        OwnTask(data=data, template="plain", test_size=1).build()
    with pytest.raises(BadRow, match=rf"^field '{field}' holds messages"):
        OwnTask(data=data, template="plain").question(row)


def test_without_a_test_file_rows_are_taken_off(tmp_path):
    task = OwnTask(data=lines(tmp_path / "a.jsonl", rows(50)), test_size=10, validation_size=5)
    splits = task.build()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (35, 5, 10)
    assert len({row.prompt for row in [*splits.train, *splits.validation, *splits.test]}) == 50
    assert task.judge(splits.test[0], f" {splits.test[0].answer}\n").correct
    assert not task.judge(splits.test[0], "other").correct


def test_a_folder_has_its_splits_and_repeated_rows_are_counted(tmp_path):
    lines(tmp_path / "train.jsonl", rows(9))
    lines(tmp_path / "test.jsonl", rows(4, start=7))
    (tmp_path / "validation.csv").write_text("prompt,completion\na,b\n")
    splits = OwnTask(data=str(tmp_path)).build()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9, 1, 4)
    assert splits.notes == ["2 of 4 test rows also occur in the training data."]


def test_columns_can_have_other_names(tmp_path):
    (tmp_path / "a.csv").write_text("q,a\n1+1,2\n2+2,4\n")
    task = OwnTask(data=str(tmp_path / "a.csv"), columns={"prompt": "q", "completion": "a"}, test_size=1)
    splits = task.build()
    assert {(e.prompt, e.answer) for e in [*splits.train, *splits.test]} == {("1+1", "2"), ("2+2", "4")}


def test_a_hub_set_is_read_by_its_id(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    from pera_lab.tasks import own

    lines(tmp_path / "train.jsonl", rows(9))
    read = own.read_hub_splits
    monkeypatch.setattr(own, "read_hub_splits", lambda name: read(str(tmp_path)))
    splits = OwnTask(data="somebody/something", test_size=2).build()
    assert (len(splits.train), len(splits.test)) == (7, 2)
    lines(tmp_path / "test.jsonl", rows(4))
    assert len(OwnTask(data="somebody/something").build().test) == 4
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match="'somebody/something' has no split 'train'; it has test"):
        OwnTask(data="somebody/something").build()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a"}, "field 'completion' is missing; the fields are prompt."),
        ({"text": "a"}, "field 'prompt' is missing; the fields are text."),
        ({"messages": []}, "field 'messages' has no messages."),
        ({"messages": [USER]}, "field 'messages' should end with an assistant's message after a user's."),
        ({"messages": ["hello"]}, "field 'messages' should hold messages such as"),
        ({"messages": "hello"}, "field 'messages'='hello' should be a list of messages."),
        ({"prompt": [USER], "completion": [ASSISTANT, USER, ASSISTANT]}, "field 'completion' should hold one message"),
        ({"prompt": [USER], "completion": [USER]}, "field 'completion' should hold one message, from the assistant."),
    ],
)
def test_a_bad_row_is_named(row, sentence):
    with pytest.raises(BadRow) as caught:
        example_of(row)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"test_size": 5}, r"^task\.test_size=5 leaves none of the 5 training rows"),
        ({"test_size": 1, "validation_size": 4}, r"^task\.validation_size=4 leaves none of the 4 training rows"),
        ({"data": "missing.jsonl"}, r"^task\.data='missing\.jsonl' does not exist"),
        ({"data": "./a/b"}, r"^task\.data='\./a/b' does not exist"),
    ],
)
def test_data_that_cannot_be_had(options, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        OwnTask(**{"data": lines(tmp_path / "a.jsonl", rows(5)), **options}).build()
