"""The eight commonsense tasks in the wording of LLM-Adapters (Hu et al., arXiv 2304.01933), and a mix of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from pera.errors import UserError, nearest
from pera_lab.sections import one_message
from pera_lab.tasks.base import GenerationTask
from pera_lab.tasks.conversations import example_of
from pera_lab.tasks.encoding import Frame
from pera_lab.tasks.examples import Example, Splits, Verdict
from pera_lab.tasks.sources import (
    HUB,
    BadRow,
    DataPath,
    Rows,
    field,
    folder_of,
    read_file,
    read_hub,
    short,
    split_file,
    take,
    validation_split,
)

TARGET = "the correct answer is "


class Protocol(NamedTuple):
    """How one line of work presents the rows and draws its validation rows."""

    frame: Frame
    validation_seed: int


_WORDS = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_INDENT = " " * 16  # of the source code in which that prompt was published

PROTOCOLS = {
    "llm-adapters": Protocol(
        Frame(
            f"{_WORDS} \n\n{_INDENT}### Instruction:\n{_INDENT}{{prompt}}\n\n{_INDENT}### Response:\n{_INDENT}",
            loss="all",
            end=True,
        ),
        validation_seed=42,
    ),
    "hira": Protocol(
        Frame(f"{_WORDS}\n\n### Instruction:\n{{prompt}}\n\n### Response:\n", loss="answer", end=False),
        validation_seed=58,
    ),
}
"""LLM-Adapters and DoRA: the loss is on the whole text and the end. HiRA and PERA: on the answer alone, without an end.
The white space differs too."""


class _Hub(NamedTuple):
    """A data set on the Hub in its original form, and the function that words its rows."""

    repository: str
    configuration: str | None
    convert: Callable[[dict[str, Any]], tuple[str, str]]
    """Instruction and answer of a row."""
    test: str = "validation"
    """The split whose labels are public."""
    revision: str | None = None


class _Member(NamedTuple):
    pattern: str
    """Regular expression of the answers. The first match in an output is the model's answer."""
    hub: _Hub


def _worded(question: str, names: Sequence[str], options: Sequence[str], between: str, gap: str) -> str:
    listed = between.join(f"{name.capitalize()}: {option}" for name, option in zip(names, options, strict=True))
    return f"{question}\n\n{listed}{gap}Answer format: {'/'.join(names)}"


def _choice(
    start: str, question: str, kind: str, options: Sequence[str], right: int, between: str = " ", gap: str = "\n\n"
) -> tuple[str, str]:
    names = [f"{kind}{i}" for i in range(1, len(options) + 1)]
    if not 0 <= right < len(names):
        raise BadRow(f"the label means option {right + 1}, and there are {len(names)}.")
    return _worded(f"{start}: {question}", names, options, between, gap), names[right]


_TRUE = "Please answer the following question with true or false, question"
_SOLUTION = "Please choose the correct solution to the question"
_ANSWER = "Please choose the correct answer to the question"
_ENDING = "Please choose the correct ending to complete the given sentence"
_BLANK = "Please choose the correct answer to fill in the blank to complete the given sentence"


def _boolq(row: dict[str, Any]) -> tuple[str, str]:
    answer = str(field(row, "answer", bool, "true or false")).lower()
    return f"{_TRUE}: {field(row, 'question')}?\n\nAnswer format: true/false", answer


def _piqa(row: dict[str, Any]) -> tuple[str, str]:
    options = [field(row, "sol1"), field(row, "sol2")]
    return _choice(_SOLUTION, field(row, "goal"), "solution", options, field(row, "label", int, "0 or 1"), "\n\n")


def _siqa(row: dict[str, Any]) -> tuple[str, str]:
    options = [field(row, f"answer{letter}") for letter in "ABC"]
    question = f"{field(row, 'context')} {field(row, 'question')}"
    return _choice(_ANSWER, question, "answer", options, _number(row, "label") - 1)


def _hellaswag(row: dict[str, Any]) -> tuple[str, str]:
    question = f"{field(row, 'activity_label')}: {field(row, 'ctx')}"
    return _choice(_ENDING, question, "ending", field(row, "endings", list, "a list"), _number(row, "label"))


def _winogrande(row: dict[str, Any]) -> tuple[str, str]:
    options = [field(row, "option1"), field(row, "option2")]
    return _choice(_BLANK, field(row, "sentence"), "option", options, _number(row, "answer") - 1, gap=" ")


def _arc(row: dict[str, Any]) -> tuple[str, str]:
    choices = field(row, "choices", dict, "an object with text and label")
    question = field(row, "question" if "question" in row else "question_stem")
    key, labels = field(row, "answerKey"), list(choices["label"])
    if key not in labels:
        raise BadRow(f"field 'answerKey'={key!r} should be one of {', '.join(labels)}.")
    return _choice(_ANSWER, question, "answer", choices["text"], labels.index(key))


def _number(row: dict[str, Any], name: str) -> int:
    value = field(row, name, (str, int), "a number")
    if not str(value).isdecimal():
        raise BadRow(f"field {name!r}={short(value)} should be a number.")
    return int(value)


_PARQUET = "refs/convert/parquet"  # the Hub's conversion of data sets that are scripts
_FIVE = "answer1|answer2|answer3|answer4|answer5"
MEMBERS = {
    "boolq": _Member("true|false", _Hub("google/boolq", None, _boolq)),
    "piqa": _Member("solution1|solution2", _Hub("ybisk/piqa", None, _piqa, revision=_PARQUET)),
    "social_i_qa": _Member(_FIVE, _Hub("allenai/social_i_qa", None, _siqa, revision=_PARQUET)),
    "hellaswag": _Member("ending1|ending2|ending3|ending4", _Hub("Rowan/hellaswag", None, _hellaswag)),
    "winogrande": _Member("option1|option2", _Hub("allenai/winogrande", "winogrande_xl", _winogrande)),
    "ARC-Easy": _Member(_FIVE, _Hub("allenai/ai2_arc", "ARC-Easy", _arc, "test")),
    "ARC-Challenge": _Member(_FIVE, _Hub("allenai/ai2_arc", "ARC-Challenge", _arc, "test")),
    "openbookqa": _Member(_FIVE, _Hub("allenai/openbookqa", "main", _arc, "test")),
}
"""In the order of the published tables."""

ALL = "commonsense"
"""Name of the mix."""


class CommonsenseTask(GenerationTask):
    """One of the eight tasks, or a mix of several, each scored on its own.

    A member without a folder is reported as missing and gets no score.
    """

    task_names = (ALL, *MEMBERS)
    scorers: ClassVar[tuple[str, ...]] = ("generation", "likelihood")
    prefix: ClassVar[str] = TARGET

    name: str = ALL
    """"commonsense", or the name of one member."""
    names: list[str] | None = Field(None, min_length=1)
    """Members of the mix; all eight by default."""
    data: DataPath = HUB
    """"hub" (the original data sets, worded here), a folder with ``<task>/{train,test}.json``, or one mixed training
    file next to folders with the test rows. Fields: instruction, input, output, answer."""
    train_size: int | None = Field(None, ge=1)
    """Training rows of the mix; all by default."""
    shares: Annotated[
        dict[str, Annotated[float, Field(ge=0, strict=True)]] | Literal["equal"] | None,
        one_message("Input should be a number of at least 0 for each task, such as {boolq: 1, piqa: 3}, or 'equal'"),
    ] = None
    """Shares of the members in ``train_size``, or "equal"; by default in proportion to their rows."""
    caps: dict[str, Annotated[int, Field(ge=1, strict=True)]] | None = None
    """Largest number of training rows of a member, by name."""
    test_size: int | None = Field(None, ge=1)
    """Test rows of each member; all by default."""
    validation_size: int = Field(120, ge=0)
    """Training rows that choose the checkpoint instead."""
    validation_seed: int | None = Field(None, ge=0)
    """Seed of the draw of the validation rows; the protocol's by default."""
    protocol: Literal["llm-adapters", "hira"] = "hira"
    """How the rows are presented; a key of :data:`PROTOCOLS`."""
    loss: Literal["answer", "all"] | None = None
    """Which tokens the loss is on; the protocol's choice by default."""
    seed: int = Field(42, ge=0)
    """Seed of the draws of training and test rows."""

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.names or MEMBERS) if self.name == ALL else (self.name,)

    @property
    def frame(self) -> Frame:
        frame = PROTOCOLS[self.protocol].frame
        return frame if self.loss is None else frame._replace(loss=self.loss)

    def build(self) -> Splits:
        """Read the members and draw the mix.

        Raises:
            UserError: a split is missing, a row is broken, or names, shares or caps do not fit.
        """
        self._check_mix()
        source = _Source(self.data, self.members)
        test = {member: rows for member in self.members if (rows := source.rows(member, "test"))}
        if not test:
            raise UserError(f"task.data={self.data!r} has no test rows of {', '.join(self.members)}.")
        tests = {m: take(rows.convert(_reader(m)), self.test_size, self.seed) for m, rows in test.items()}
        if source.mix is not None:
            if self.shares or self.caps:
                raise UserError("task.shares and task.caps need a folder for each task; task.data is one mixed file.")
            pools = {"": source.mix}
        else:
            pools = {member: rows for member in self.members if (rows := source.rows(member, "train"))}
        drawn = self._draw({member: rows.convert(_reader(member)) for member, rows in pools.items()})
        mix = [example for examples in drawn.values() for example in examples]
        given, default = self.validation_seed, PROTOCOLS[self.protocol].validation_seed
        seed = default if given is None else given
        train, validation = validation_split(mix, self.validation_size, seed)
        manifest = {
            "train": {member or "mix": pools[member].record(len(rows)) for member, rows in drawn.items()},
            "validation": {"rows": self.validation_size, "seed": seed, "of": "train"},
            "test": {member: test[member].record(len(rows)) for member, rows in tests.items()},
            "seed": self.seed,
        }
        missing = [f"{m} is missing in {self.data!r} and gets no score." for m in self.members if m not in test]
        return Splits(train, [row for rows in tests.values() for row in rows], validation, missing, manifest)

    def judge(self, example: Example, output: str) -> Verdict:
        """Compare the first match of the member's pattern with the answer; an output without a match is wrong.

        A row from a mixed file has no member, so its options are the pattern.
        """
        options = (re.escape(option.removeprefix(TARGET)) for option in example.options)
        found = re.search(MEMBERS[example.group].pattern if example.group else "|".join(options), output)
        return Verdict(found[0], found[0] == example.answer.removeprefix(TARGET)) if found else Verdict(None, False)

    def question(self, row: dict[str, Any]) -> Example:
        columns = {"prompt": "instruction"} if "instruction" in row else None
        return example_of(row, columns, template="plain", answered=False)

    def _check_mix(self) -> None:
        if self.name != ALL and self.names is not None:
            raise UserError(f"task.names={self.names!r} are members of {ALL!r}; task {self.name!r} has none.")
        by_member: dict[str, Mapping[str, float]] = {
            "shares": {} if self.shares == "equal" else self.shares or {},
            "caps": self.caps or {},
        }
        for member in (*self.members, *by_member["shares"], *by_member["caps"]):
            if member not in MEMBERS:
                raise UserError(f"task: {member!r} is not a commonsense task; {nearest(member, MEMBERS)}")
        for key, given in by_member.items():
            if unused := [member for member in given if member not in self.members]:
                raise UserError(
                    f"task.{key}.{unused[0]}: {unused[0]!r} is not in the mix of {', '.join(self.members)}."
                )
        if self.shares and self.train_size is None:
            raise UserError("task.shares needs task.train_size, the number of rows to divide.")

    def _draw(self, pools: dict[str, Sequence[Example]]) -> dict[str, Sequence[Example]]:
        """The training rows of each member of the mix."""
        capped = {member: take(rows, (self.caps or {}).get(member), self.seed) for member, rows in pools.items()}
        size = self.train_size
        if size is None:
            return capped
        if not self.shares:
            flat = take([(member, row) for member, rows in capped.items() for row in rows], size, self.seed)
            return {member: [row for of, row in flat if of == member] for member in capped}
        shares = dict.fromkeys(self.members, 1.0) if self.shares == "equal" else self.shares
        counts = _apportion(size, {member: share for member, share in shares.items() if member in capped})
        for member, count in counts.items():
            if count > len(capped[member]):
                raise UserError(
                    f"task.shares.{member}={shares[member]:g} of {size} are {count} rows, and there are "
                    f"{len(capped[member])}; lower the share or task.train_size."
                )
        return {member: take(capped[member], count, self.seed) if count else [] for member, count in counts.items()}


def _apportion(size: int, shares: Mapping[str, float]) -> dict[str, int]:
    """``size`` divided in proportion to the shares, by largest remainder."""
    total = sum(shares.values())
    if total <= 0:
        raise UserError(f"task.shares={dict(shares)!r} should be above 0 for at least one task with data.")
    exact = {member: size * share / total for member, share in shares.items()}
    counts = {member: int(value) for member, value in exact.items()}
    for member in sorted(exact, key=lambda m: counts[m] - exact[m])[: size - sum(counts.values())]:
        counts[member] += 1
    return counts


def instruction_row(task: str, row: dict[str, Any]) -> dict[str, str]:
    """A row of a task's original data set in the wording and the fields of LLM-Adapters.

    Raises:
        BadRow: a field is missing or has a wrong value.
    """
    instruction, answer = MEMBERS[task].hub.convert(row)
    return {"instruction": instruction, "input": "", "output": TARGET + answer, "answer": answer}


class _Source:
    """Reads the rows of the members, from the Hub, from folders, or from one mixed file with folders."""

    def __init__(self, data: str, wanted: Sequence[str]) -> None:
        self.mix: Rows | None = None
        self.folder: Path | None = None
        self._wanted = wanted
        if data == HUB:
            return
        path = folder_of(data)
        if path.is_file():
            self.mix, path = read_file(path), path.parent
        self.folder = path

    def rows(self, member: str, split: str) -> Rows | None:
        """The rows of a split; None if the member is one of several and has no folder."""
        if self.folder is None:
            hub = MEMBERS[member].hub
            found = read_hub(hub.repository, hub.configuration, hub.test if split == "test" else split, hub.revision)
            return replace(found, rows=list(found.convert(lambda row: instruction_row(member, row))))
        if not (self.folder / member).is_dir() and len(self._wanted) > 1:
            return None
        return read_file(split_file(self.folder / member, [split]))


def _reader(member: str) -> Callable[[dict[str, Any]], Example]:
    return lambda row: _example(row, member)


def _example(row: dict[str, Any], member: str) -> Example:
    """A row in the fields of LLM-Adapters. Its options are at the end of the instruction."""
    instruction, answer = field(row, "instruction"), field(row, "answer")
    if row.get("input"):
        raise BadRow(f"field 'input'={short(row['input'])} should be empty.")
    _, mark, listed = instruction.rpartition("Answer format: ")
    options = tuple(listed.strip().split("/"))
    if not mark or len(options) < 2:
        raise BadRow("field 'instruction' should end with its options, as in 'Answer format: answer1/answer2'.")
    if answer not in options:
        raise BadRow(f"field 'answer'={short(answer)} should be one of {', '.join(options)}.")
    if "output" in row and row["output"] != TARGET + answer:
        raise BadRow(f"field 'output'={short(row['output'])} should be {TARGET + answer!r}, as the answer says.")
    if member and not all(re.fullmatch(MEMBERS[member].pattern, option) for option in options):
        raise BadRow(f"field 'instruction' has the options {', '.join(options)}, which do not fit {member}.")
    return Example(instruction, TARGET + answer, group=member, options=tuple(TARGET + option for option in options))
