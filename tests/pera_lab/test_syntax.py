"""Recipes are written and read by one set of YAML rules."""

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pera_lab.recipe.syntax import DEEPEST, LONGEST, read, read_value, write, write_value

TRICKY = (
    *("", "1e-4", "1e400", "E5", "0o17", "017", "0x1F", "0b1", "1_000", "1_", "1.", ".5", "5.e1", "+1", "-", "1\n"),
    *("yes", "no", "On", "off", "y", "true", "null", "Null", "~", ".inf", "-.INF", ".nan", "Infinity", "12:30:45"),
    *("2024-01-01", "2024-99-99", "=", "<<", "---", "- a", "? a", "a: b", "a:", "a #b", "#a", "@a", "`a", "%a", "&a"),
    *("*a", "!a", "!!int a", "|", ">", "[a", "{a", "'a", '"a', "\\", " a", "a ", "a  b " * 40, "x" * 3000),
    *("\t", "\n", "\r\n", " \n a", "a\n\n", "\x85", "\u2028", "\u2029", "\ufeff", "\0", "\x1b[31m", "\x7f", "\ud800"),
    *("\N{GRINNING FACE}", "\u0663", "e\u0301"),
)
TEXTS = st.text(st.characters()) | st.sampled_from(TRICKY) | st.tuples(*[st.sampled_from(TRICKY)] * 2).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(TEXTS, below, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(VALUES)
@example(list(TRICKY))
@example(dict.fromkeys(TRICKY, 1e-5))
def test_what_is_written_is_read_back_the_same(value):
    for found in (read(write({"key": value}))["key"], read_value(write_value(value))):
        assert repr(found) == repr(value)  # tells 1 from True and from 1.0


@pytest.mark.parametrize("text", [text for text in TRICKY if text[:1] not in "[{\"'"])
def test_text_without_quotes_is_taken_as_it_is_in_an_override(text):
    value = read_value(text)
    assert value == text or (not isinstance(value, str) and repr(value) == repr(read(text.strip())))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-1.5E+3", -1500.0),
        ("1_000", 1000),
        ("0x1F", 31),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("017", "017"),
        ("2024-01-01", "2024-01-01"),
        ("12:30:45", "12:30:45"),
        ("=", "="),
        ("\ufeffa", "a"),
        ("{no: 1, 1e-4: 2, 3: 4}", {"no": 1, "1e-4": 2, "3": 4}),
    ],
)
def test_plain_values_and_keys(text, value):
    assert repr(read(text)) == repr(value)


def test_merge_keys_add_what_a_section_lacks():
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], x: 3}\nd: {x: 4, <<: *b}\ne: {'<<': *a}"
    found = read(text)
    assert found["c"] == {"x": 3, "y": 1, "z": 2}
    assert found["d"] == {"x": 4, "y": 2, "z": 2}
    assert found["e"] == {"<<": found["a"]}


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(20))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(20))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("r: !!int a", "'a' is not a whole number"),
        ("r: !!bool a", "'a' is not true or false"),
        ("r: " + "1" * 5000, "is not a whole number that can be read"),
        ("r: 0x" + "f" * 5000, "is not a whole number that can be read"),
        ("r: !!binary aGk=", "'!!binary' is not a type of a recipe's values"),
        ("r: !!set {a}", "'!!set'"),
        ("r: !!timestamp 2024-01-01", "'!!timestamp'"),
        ("r: !!python/object/apply:os.getcwd []", "'!!python/object/apply:os.getcwd'"),
        ("r: !!map a", "'a' is not a section"),
        ("a: 1\na: 2", "the key 'a' is given twice"),
        ("<<: {a: 1}\n<<: {b: 1}", "the key '<<' is given twice"),
        ("<<: 5", "'<<' should name a section"),
        ("{a:1}", "'a:1' has no value; put a space after its colon"),
        ("[a]: 1", "a key should be text"),
        ("r: &r [*r]", "recursive"),
        ("&r {r: *r}", "recursive"),
        ("a: 1\n---\nb: 1", "expected a single document in the stream, but found another document, line 2"),
        ("\ta: 1", "cannot start any token"),
        ("a: \0", "special characters are not allowed"),
        ("[" * 5000, f"more than {DEEPEST} levels deep"),
        ("{a: " * 5000, f"more than {DEEPEST} levels deep"),
        ("[" * (DEEPEST + 1) + "1" + "]" * (DEEPEST + 1), f"more than {DEEPEST} levels deep"),
        (LAUGHS, "its aliases expand to more than"),
        ("a: &a " + "x" * 9000 + "\nb: [" + "*a, " * 500 + "]", "its aliases expand to more than"),
        ("x" * (LONGEST + 1), f"at most {LONGEST:,} are read"),
    ],
)
def test_what_cannot_be_read_ends_in_one_sentence_quickly(text, sentence):
    start = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        read(text)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


def test_merge_keys_do_not_multiply():
    assert read(MERGED)["a20"] == {"x": 1}
