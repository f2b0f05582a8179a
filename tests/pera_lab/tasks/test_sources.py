"""Rows from files and from the hub; every mistake with its file, its line and its field."""

import csv
import hashlib
import json
import os

import pytest

from pera.errors import UserError
from pera_lab.tasks import sources
from pera_lab.tasks.sources import BadRow, field, read_file, read_hub, read_long_file, take, validation_split


@pytest.fixture(params=["memory", "disk"])
def read(request, monkeypatch, tmp_path):
    """Read and convert a file as one that fits in memory, and as one that does not."""
    if request.param == "disk":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(sources, "LONG", -1)

    def read_rows(file, function=lambda row: row):
        found = (read_file if request.param == "memory" else read_long_file)(file)
        return list(found.convert(function)), found

    return read_rows


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
def test_every_kind_of_file_gives_the_same_rows(suffix, tmp_path, read):
    file = write(tmp_path, suffix)
    rows, found = read(file)
    assert rows == ROWS
    assert found.record(3)["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n', r"a\.jsonl, line 2: is not valid JSON"),
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3: is not valid JSON \(Expecting value, column 7\)"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}', r"a\.jsonl, line 2: .*the key 'c' is given twice"),
        ("a.jsonl", "[" * 10**5, r"a\.jsonl, line 1: .*nested too deeply"),
        ("a.jsonl", '{"a": NaN}', r"a\.jsonl, line 1: .*NaN is not a JSON number; use null"),
        ("a.jsonl", '{"a": 1e400}', r"a\.jsonl, line 1: .*the number 1e400 is too large"),
        ("a.jsonl", f'{{"a": {"9" * 5000}}}', r"a\.jsonl, line 1: .*a number has 5000 digits, which are too many"),
        ("a.json", '[{"a": 1},\n{"a": 1, "a": 2}]', r"a\.json, row 2: .*the key 'a' is given twice"),
        ("a.json", '[{"a": 1}, {"a": 1e400}]', r"a\.json, row 2: .*the number 1e400 is too large"),
        ("a.json", "[" * 10**5, r"a\.json, row 1: .*nested too deeply"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', r"a\.json, line 2: is not valid JSON"),
        ("a.json", '{"a": 1}', r"a\.json, line 1: should be an array of objects"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, line 3: has another number of fields \(1\) than the header \(2\)"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv, line 2: has another number of fields \(3\) than the header \(2\)"),
        ("a.csv", 'a,b\n"1\n2",3\n4\n', r"a\.csv, line 4: has another number of fields"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv, line 1: has two columns named 'a'; rename or remove one"),
        ("a.csv", "a, a\n1,2\n", r"a\.csv, line 1: has two columns named 'a'"),
        ("a.csv", "a,,\n1,2,3\n", r"a\.csv, line 1: has two columns named ''"),
        ("a.csv", 'a\n"1', r"a\.csv, line 2: is not valid CSV"),
        ("a.csv", "a\n1\0\n", r"a\.csv, line 2: holds a NUL character"),
        ("a.csv", "a\n1\n".encode("utf-16"), r"a\.csv, line 1: is UTF-16 text; save the file as UTF-8"),
        ("a.jsonl", b'{"a": 1}\n\xff\n', r"a\.jsonl, line 2: is not UTF-8 text"),
        ("a.parquet", b"nothing", r"a\.parquet' is not a Parquet file"),
        ("a.txt", "a", r"should end in one of \.json, \.jsonl, \.csv, \.parquet"),
    ],
)
def test_a_broken_file_is_named_with_the_line(name, content, sentence, tmp_path, read):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=sentence) as caught:
        read(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json' cannot be read: No such file"):
        read_file(tmp_path / "nothing.json")


def test_blank_lines_and_windows_line_ends_are_skipped(tmp_path, read):
    objects, table = '\ufeff{"a": "1"}\r\n\r\n \t\r\n{"a": "2"}\r\n\r\n', "\ufeff\r\na\r\n1\r\n\r\n2\r\n\r\n"
    old = table.replace("\r\n", "\r")
    for name, content, lines in (("a.jsonl", objects, [1, 4]), ("a.csv", table, [3, 5]), ("b.csv", old, [3, 5])):
        (tmp_path / name).write_bytes(content.encode())
        rows, found = read(tmp_path / name)
        assert rows == [{"a": "1"}, {"a": "2"}]
        assert list(found.numbers) == lines
        with pytest.raises(UserError, match=rf"{name}, line {lines[0]}: field 'b' is missing; the fields are a\."):
            read(tmp_path / name, lambda row: field(row, "b"))


def test_fields_of_csv_keep_their_line_ends_and_marks(tmp_path, read):
    (tmp_path / "a.csv").write_bytes('a,b\n"1\n\n2\r3\r\n4",\ufeff5\n\ufeff6,7\n'.encode())
    assert read(tmp_path / "a.csv")[0] == [{"a": "1\n\n2\r3\r\n4", "b": "\ufeff5"}, {"a": "\ufeff6", "b": "7"}]


def test_a_long_field_of_csv_is_read_and_the_limit_of_the_module_is_kept(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"a\n{'x' * (limit + 1)}\n")
    assert read_file(tmp_path / "a.csv").rows == [{"a": "x" * (limit + 1)}]
    (tmp_path / "a.csv").write_text('a\n"x')
    with pytest.raises(UserError):
        read_file(tmp_path / "a.csv")
    assert csv.field_size_limit() == limit


def test_what_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.csv").mkdir()
    for name in ("pipe.jsonl", "folder.csv"):
        with pytest.raises(UserError, match=rf"{name}' is not a file"):
            read_file(tmp_path / name)


def test_parquet_with_a_repeated_column_or_broken_text_is_refused(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    broken = arrow.Array.from_buffers(
        arrow.string(), 1, [None, arrow.py_buffer(bytes([0] * 4 + [1, 0, 0, 0])), arrow.py_buffer(b"\xff")]
    )
    inner = arrow.StructArray.from_arrays([arrow.array([1]), arrow.array([2])], names=["k", "k"])
    tables = {
        "has two columns named 'a'": arrow.table([arrow.array(["1"]), arrow.array(["2"])], names=["a", "a"]),
        "duplicate field names": arrow.table({"a": inner}),
        "can't decode": arrow.table({"a": broken}),
    }
    for sentence, table in tables.items():
        parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UserError, match=sentence):
            read_file(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (r'{"a": "x", "b": ["\ud83d"]}', r"field 'b' holds '\ud83d', half of a surrogate pair"),
        (r'{"a": "x", "b": {"\udc00": 1}}', r"field 'b' holds '\udc00', half"),
        (r'{"a\ud83d": "x"}', r"field 'a\ud83d' holds '\ud83d', half"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "field 'a' is nested more than 100 levels deep."),
        ("[1, 2]", "[1, 2] should be an object with named fields."),
        ("1" * 4000, "11... should be an object with named fields."),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_field(row, sentence, tmp_path, read):
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n' + row)
    with pytest.raises(UserError, match="line 2: ") as caught:
        read(tmp_path / "a.jsonl", dict)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_an_empty_file_is_refused(suffix, tmp_path, read):
    file = tmp_path / f"empty.{suffix}"
    file.write_text("")
    with pytest.raises(UserError, match=rf"empty\.{suffix} has no rows\.$"):
        read(file)


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


def test_the_hub_is_read_by_the_library(tmp_path, capfd):
    pytest.importorskip("datasets")
    write(tmp_path, "jsonl").rename(tmp_path / "train.jsonl")
    found = read_hub(str(tmp_path), None, "train")
    assert found.rows == ROWS
    assert "Generating" not in capfd.readouterr().err  # a progress bar of the library
    with pytest.raises(UserError, match=r"^task\.data: split 'test' of .* cannot be loaded: .*data=FOLDER\.$"):
        read_hub(str(tmp_path), None, "test")


def test_what_the_hub_lacks_is_one_sentence():
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"^task\.data: split 'train' of nobody/nothing \(x\) cannot be") as caught:
        read_hub("nobody/nothing", "x", "train")
    assert "\n" not in str(caught.value)
