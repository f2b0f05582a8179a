"""A user's own data, in every form."""

import copy
import json

import pytest

from pera.errors import UserError
from pera_lab.tasks.conversations import example_of
from pera_lab.tasks.encoding import CHAT, as_scored, encode_example, encode_question, encode_texts
from pera_lab.tasks.examples import Example
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


CALLING = (
    "{% if tools %}{{ '<s>tools\n' + tools | tojson + '</s>' }}{% endif %}{% for m in messages %}"
    "{{ '<s>' + m.role + '\n' + m.content }}{% for call in m.tool_calls %}"
    "{{ '<call>' + call.function.name + ' ' }}ARGUMENTS{% endfor %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def called(arguments, **more):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **more}


@pytest.fixture(params=["{{ call.function.arguments | tojson }}", "{{ call.function.arguments }}"])
def calling(request, tokenizer):
    """Tokenizers whose templates write tool calls, from arguments as an object and as JSON text."""
    calling = copy.deepcopy(tokenizer)
    calling.chat_template = CALLING.replace("ARGUMENTS", request.param)
    return calling


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_a_tool_call_is_learned_and_compared_as_the_template_writes_it(arguments, tools, calling):
    example = example_of({"messages": [USER, called(arguments, refusal=None)], "tools": tools})
    encoded = encode_example(calling, example)
    text = '<call>weather {"city": "Rome"}'
    prompt = f"<s>tools\n{json.dumps(TOOLS)}</s><s>user\nWho?</s><s>assistant\n"
    assert calling.decode(encoded["input_ids"]) == f"{prompt}{text}</s>"
    assert calling.decode([i for i in encoded["labels"] if i >= 0]) == f"{text}</s>"
    assert as_scored(calling, example).answer == text


def test_calls_and_results_before_the_answer_are_in_the_prompt(calling):
    result = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}
    turn = [USER, called({"city": "Rome"}), result, ASSISTANT]
    messages = [SYSTEM, *turn, *turn]
    prompt = encode_question(calling, example_of({"messages": messages}), CHAT)
    last = '<s>user\nWho?</s><s>assistant\n<call>weather {"city": "Rome"}</s><s>tool\nrain</s><s>assistant\n'
    assert calling.decode(prompt.ids).endswith(f"</s>{last}")
    cut = encode_question(calling, example_of({"messages": messages}), CHAT, len(prompt.ids) - 1)
    assert calling.decode(cut.ids) == f"<s>system\nBe brief.</s>{last}"  # a call stays with its question
    asked = example_of({"messages": messages[:-1]}, answered=False)
    assert encode_question(calling, asked, CHAT).ids == prompt.ids


def test_text_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "W"}, {"type": "text", "text": "ho?"}]
    assert example_of({"messages": [{**USER, "content": parts}, ASSISTANT]}).prompt == "Who?"


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"messages": [USER, called({"city": "Rome"})]}, "message 2: .* leaves its 'tool_calls' out"),
        ({"messages": [USER, called({}), USER, ASSISTANT]}, "message 2: .* leaves its 'tool_calls' out"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "message 2: .* leaves its 'weight' out"),
        ({"messages": [USER, ASSISTANT | {"reasoning_content": "hm"}]}, "message 2: .* leaves its 'reasoning_content'"),
        (
            {"messages": [USER, ASSISTANT | {"function_call": {"name": "f"}}]},
            "message 2: .* leaves its 'function_call'",
        ),
        ({"messages": [USER | {"name": "Zoe"}, ASSISTANT]}, "message 1: .* leaves its 'name' out"),
        ({"messages": [{"role": "critic", "content": "a"}, USER, ASSISTANT]}, "message 1: .* leaves its 'content' out"),
        ({"messages": [USER, ASSISTANT], "tools": TOOLS}, "field 'tools': the model's chat template leaves the tools"),
        ({"prompt": "Who?", "completion": "Zoe", "tools": TOOLS}, "field 'tools': "),
    ],
)
def test_a_row_that_the_template_leaves_a_part_of_out_is_refused(row, part, tokenizer, tmp_path):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = (
        "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}{{ m.role + m.content + '</s>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    )
    task = OwnTask(data=lines(tmp_path / "a.jsonl", [row, row]), test_size=1)
    splits = task.build()
    for check in (lambda: task.encode(plain, splits.train), lambda: task.check(plain, splits.test)):
        with pytest.raises(UserError, match=rf"a\.jsonl, line [12]: {part}"):
            check()


def test_a_training_is_refused_for_a_call_that_the_template_leaves_out(refused, recipe_file, tmp_path):
    data = lines(tmp_path / "a.jsonl", [{"messages": [USER, called({})]}] * 3)
    task = f"task={{name: own, data: {data}, test_size: 1}}"
    refused("train", recipe_file, task, "--output", tmp_path / "run", words=["a.jsonl, line ", "'tool_calls'"])


def test_columns_that_nothing_uses_are_named(tmp_path):
    data = lines(tmp_path / "a.jsonl", [{**row, "id": 1, "messages": None} for row in rows(3)])
    assert OwnTask(data=data, test_size=1).build().notes == ["columns that are not used: id."]


def test_a_huge_text_is_cut_or_left_out_without_being_tokenized(tokenizer, monkeypatch):
    seen = []
    tokenize = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, text, *a, **k: [seen.append(len(text)), tokenize(self, text, *a, **k)][1],
    )
    huge = Example("x" * 10**7 + "?", "y")
    prompt = encode_question(tokenizer, huge, CHAT, 20)
    assert prompt.shortened
    assert len(prompt.ids) == 20
    assert tokenizer.decode(prompt.ids).endswith("x?</s><s>assistant\n")
    turns = ({"role": "user", "content": huge.prompt}, ASSISTANT, USER)
    assert encode_question(tokenizer, Example("Who?", "Zoe", messages=turns), CHAT, 40).text == "Who?"
    assert OwnTask(data="a.jsonl").encode(tokenizer, [huge, Example("a", "b")], 40).left_out == 1
    encoded, cut = encode_texts(tokenizer, [huge.prompt], 20)
    assert (len(encoded["input_ids"]), cut) == (20, True)
    assert max(seen) < len(huge.prompt) / 100


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a", "completion": " "}, "field 'completion'=' ' should be a text."),
        ({"messages": [USER, {**ASSISTANT, "content": ""}]}, "the last message, from the assistant, is empty"),
        ({"messages": [USER, {**ASSISTANT, "content": None}]}, "field 'messages' should hold messages such as"),
        ({"messages": [USER, called("Rome")]}, "field 'messages', message 2: tool_calls should hold calls such as"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}, ASSISTANT]}, "message 1: content has a part"),
        ({"prompt": "a", "completion": "b", "tools": "x"}, "field 'tools'='x' should be a list of functions"),
        ({"prompt": "a", "completion": "b", "weight": 0.5}, "field 'weight'=0.5 would have no effect here; remove it."),
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
