"""A run answers the rows of a file, each once."""

import json
from datetime import datetime
from decimal import Decimal

import pytest
import torch

from pera_lab.files import reserved
from pera_lab.opening import locate_run, open_model
from pera_lab.prediction import predict
from pera_lab.tasks.encoding import encode_prompt


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


PROMPTS = [{"prompt": f"Who is {name}?", "id": name} for name in ("Zoe", "Liam, the son of Kai", "Al", "Ida", "Bo")]


def test_the_answers_are_those_of_the_model(run, tmp_path):
    assert predict(run, write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl") == 5
    model, tokenizer = open_model(locate_run(run), "float32")
    expected = []
    for row in PROMPTS:
        ids = torch.tensor([encode_prompt(tokenizer, row["prompt"])])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        expected.append({**row, "prediction": text.strip()})
    assert read(tmp_path / "out.jsonl") == expected
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_conversations_are_answered_and_csv_is_read(run, tmp_path):
    conversation = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
    predict(run, write(tmp_path / "a.jsonl", conversation), tmp_path / "a.out")
    (tmp_path / "b.csv").write_text("prompt\n" + "".join(f'"{row["prompt"]}"\n' for row in PROMPTS))
    predict(run, tmp_path / "b.csv", tmp_path / "b.out")
    answers = [[row["prediction"] for row in read(tmp_path / name)] for name in ("a.out", "b.out")]
    assert answers[0] == answers[1]


def test_columns_of_parquet_that_json_has_no_form_for_are_written_as_text(run, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {"prompt": "Who is Zoe?", "at": datetime(2026, 11, 27, 1, 2), "price": Decimal("1.50"), "raw": b"\x00a"}
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "in.parquet")
    predict(run, tmp_path / "in.parquet", tmp_path / "out.jsonl")
    (found,) = read(tmp_path / "out.jsonl")
    assert (found["at"], found["price"], found["raw"]) == ("2026-11-27 01:02:00", "1.50", r"b'\x00a'")


def test_a_restart_answers_only_what_is_missing(run, tmp_path, interrupt):
    source = write(tmp_path / "in.jsonl", PROMPTS)
    predict(run, source, tmp_path / "whole.jsonl", batch_size=2)
    asked = interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        predict(run, source, tmp_path / "out.jsonl", batch_size=2)
    assert not (tmp_path / "out.jsonl").exists()
    predict(run, source, tmp_path / "out.jsonl", batch_size=2)
    assert asked == [2, 2, 1, 1]
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_classifier_gives_names_and_logits(glue_run, tmp_path):
    rows = [{"sentence": "fine film 3"}, {"sentence": "dull film 5"}]
    predict(glue_run, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    found = read(tmp_path / "out.jsonl")
    assert [row["prediction"] for row in found] == ["positive", "negative"]
    assert all(max(row["logits"], key=row["logits"].get) == row["prediction"] for row in found)


def test_the_command(pera, run, tmp_path):
    write(tmp_path / "in.jsonl", PROMPTS)
    done = pera("predict", run.path, "--input", "in.jsonl", "--output", "out.jsonl", "--base")
    assert (done.code, done.out) == (0, "5 rows answered, written to out.jsonl\n")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (
            '{"prompt": "a"}\n{"prmpt": "b"}\n',
            [],
            ["in.jsonl, line 2: field 'prompt' is missing"],
        ),
        ("", [], ["in.jsonl has no rows."]),
        ('{"prompt": "a"\n', [], ["in.jsonl, line 1: is not valid JSON"]),
        ('{"prompt": "a", "logits": 1}\n', [], ["'in.jsonl' has a column 'logits', which is an output column"]),
        ('{"prompt": "a"}\n', ["--output", "in.jsonl"], ["--output: 'in.jsonl' exists"]),
        ('{"prompt": "a"}\n', ["--input", "none.jsonl"], ["'none.jsonl' cannot be read"]),
    ],
)
def test_a_file_that_cannot_be_answered(content, options, words, refused, run, tmp_path):
    (tmp_path / "in.jsonl").write_text(content)
    refused("predict", run.path, "--input", "in.jsonl", "--output", "out.jsonl", *options, words=words)


def test_what_a_classifier_cannot_do(refused, glue_run, tmp_path):
    write(tmp_path / "in.jsonl", [{"sentence": "a"}])
    files = ["--input", "in.jsonl", "--output", "out.jsonl"]
    refused("predict", glue_run.path, *files, "--base", words=["--base", "has no trained head"])
    refused("predict", glue_run.path, *files, "--max-new-tokens", "3", words=["--max-new-tokens=3", "writes no text"])
    write(tmp_path / "in.jsonl", [{"text": "a"}])
    refused("predict", glue_run.path, *files, words=["in.jsonl, line 1: field 'sentence' is missing"])


def test_two_predictions_into_one_file_are_refused(refused, run, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hello"}\n')
    with reserved(tmp_path / "out.jsonl"):
        refused(
            *("predict", "run", "--input", "rows.jsonl", "--output", "out.jsonl"),
            words=["'out.jsonl'", "in use by another process"],
        )


def test_a_file_that_looks_like_unfinished_answers_is_kept(refused, run, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "out.jsonl.partial").write_text('{"mine": 1}\n')
    refused(
        *("predict", "run", "--input", "rows.jsonl", "--output", "out.jsonl"),
        words=["out.jsonl.partial'", "was not written by pera"],
    )


def test_a_refused_prediction_leaves_no_file(refused, run, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    options = ["--input", "rows.jsonl", "--output", "new/answers.jsonl", "--max-new-tokens", 600]
    refused("predict", "run", *options, words=["max_new_tokens=600", "leaves no room"])
