"""Rows from files and from the hub; every mistake with its file, its line and its field."""

import json

import pytest

from pera.errors import UserError
from pera_lab.tasks.sources import BadRow, field, read_file, read_hub, take, validation_split

BREAKS = "these end no line: \u2028 \x85 \x1c \x0b \x0c"
ROWS = [
    {"prompt": "a, b", "completion": "c\nd"},
    {"prompt": "é", "completion": "1"},
    {"prompt": BREAKS, "completion": "e\r\nf"},
]


def write(folder, suffix):
    file = folder / f"rows.{suffix}"
    if suffix == "parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(ROWS), file)
    else:
        file.write_text(
            {
                "json": json.dumps(ROWS),
                "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
                "csv": f'prompt,completion\n"a, b","c\nd"\né,1\n{BREAKS},"e\r\nf"\n',
            }[suffix],
            encoding="utf-8",
            newline="",
        )
    return file


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix, tmp_path):
    assert read_file(write(tmp_path, suffix)).rows == ROWS


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n', r"a\.jsonl, line 2: is not valid JSON"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', r"a\.jsonl, line 2: is not valid JSON"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', r"a\.json, line 2: is not valid JSON"),
        ("a.json", '{"a": 1}', r"a\.json, line 1: should be an array of objects"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, row 2: has another number of fields than the header"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv, row 1: has another number of fields than the header"),
        ("a.jsonl", b'{"a": 1}\n\xff\n', r"a\.jsonl, line 2: is not UTF-8 text"),
        ("a.parquet", b"nothing", r"a\.parquet' is not a Parquet file"),
        ("a.txt", "a", r"should end in one of \.json, \.jsonl, \.csv, \.parquet"),
    ],
)
def test_a_broken_file_is_named_with_the_line(name, content, sentence, tmp_path):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=sentence) as caught:
        read_file(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json' cannot be read: No such file"):
        read_file(tmp_path / "nothing.json")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_an_empty_file_is_refused(suffix, tmp_path):
    file = tmp_path / f"empty.{suffix}"
    file.write_text("")
    with pytest.raises(UserError, match=rf"empty\.{suffix} has no rows\.$"):
        read_file(file).convert(lambda row: row)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({}, "field 'label' is missing; the fields are none."),
        ({"lable": 1}, "field 'label' is missing; the fields are lable."),
        ({"label": "1"}, "field 'label'='1' should be 0 or 1."),
        ({"label": True}, "field 'label'=True should be 0 or 1."),
        ([1], "should be an object with fields, not [1]."),
    ],
)
def test_a_field_that_is_wrong_is_named(row, sentence):
    with pytest.raises(BadRow) as caught:
        field(row, "label", int, "0 or 1")
    assert str(caught.value) == sentence


def test_the_line_of_a_bad_row_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n{"text": ""}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: field 'text'='' should be a text\.$"):
        read_file(file).convert(lambda row: field(row, "text"))


def test_rows_are_drawn_by_seed_in_their_order():
    rows = list(range(100))
    assert take(rows, 10, 1) == sorted(take(rows, 10, 1)) != take(rows, 10, 2)
    assert take(rows, 200, 1) == take(rows, None, 1) == rows


def test_the_validation_rows_are_those_that_the_library_datasets_draws():
    datasets = pytest.importorskip("datasets")
    expected = datasets.Dataset.from_dict({"x": range(500)}).train_test_split(test_size=120, shuffle=True, seed=42)
    rest, held = validation_split(list(range(500)), 120, 42)
    assert held == expected["test"]["x"]
    assert rest == sorted(expected["train"]["x"])


def test_the_hub_is_read_by_the_library(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path, "jsonl").rename(tmp_path / "train.jsonl")
    found = read_hub(str(tmp_path), None, "train")
    assert found.rows == ROWS
    with pytest.raises(UserError, match=r"^task\.data: split 'test' of .* cannot be loaded: .*data=FOLDER\.$"):
        read_hub(str(tmp_path), None, "test")


def test_what_the_hub_lacks_is_one_sentence():
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"^task\.data: split 'train' of nobody/nothing \(x\) cannot be") as caught:
        read_hub("nobody/nothing", "x", "train")
    assert "\n" not in str(caught.value)
