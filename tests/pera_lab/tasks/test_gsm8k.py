"""GSM8K: exact match on the number after ####."""

import json

import pytest

from pera.errors import UserError
from pera_lab.tasks.gsm8k import Gsm8kTask, final_number
from shared import DATA, needs_data


@needs_data
def test_all_rows_of_the_shared_files_are_read():
    task = Gsm8kTask(data=str(DATA / "gsm8k"), validation_size=100)
    splits = task.build()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (7373, 100, 1319)
    assert splits.notes == []
    first = splits.test[0]
    assert first.prompt.startswith("Janet’s ducks lay 16 eggs per day. She eats three")
    assert first.answer == (
        "Janet sells 16 - 3 - 4 = 9 duck eggs a day.\nShe makes 9 * 2 = $18 every day at the farmer’s market.\n#### 18"
    )
    assert all(task.judge(row, row.answer).correct for row in splits.test)
    kept = Gsm8kTask(data=str(DATA / "gsm8k"), annotations=True).build().test[0]
    assert "<<16-3-4=9>>9 duck" in kept.answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 18.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### $5.50 in all", "5.5"),
        ("#### -3", "-3"),
        ("#### 18.0", "18"),
        ("#### .5", ".5"),
        ("#### 1\n#### 2", "2"),
        ("the answer is 18", None),
        ("####", None),
        ("#### many", None),
    ],
)
def test_the_number_after_the_last_marks_is_the_answer(text, number):
    assert final_number(text) == number


def test_an_output_without_a_number_is_wrong_and_not_parsed(tmp_path):
    for split in ("train", "test"):
        row = {"question": f"{split}?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    task = Gsm8kTask(data=str(tmp_path))
    (example,) = task.build().test
    assert example.answer == "1 + 1 = 2\n#### 2"
    assert task.judge(example, "It is 2.\n#### 2.0") == ("2", True)
    assert task.judge(example, "#### 3") == ("3", False)
    assert task.judge(example, "It is 2.") == (None, False)


def test_an_answer_without_its_number_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "?", "answer": "two"}) + "\n")
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: field 'answer' should end with '#### ' and a number"):
        Gsm8kTask(data=str(tmp_path)).build()
