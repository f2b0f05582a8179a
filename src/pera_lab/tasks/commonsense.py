"""The eight commonsense tasks in the wording of LLM-Adapters (Hu et al., arXiv 2304.01933), and a mix of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pera.errors import UserError, nearest
from pera_lab.tasks.base import Example, GenerationTask, Verdict
from pera_lab.tasks.prompts import Frame
from pera_lab.tasks.sources import (
    HUB,
    BadRow,
    Rows,
    field,
    folder_of,
    read_file,
    read_hub,
    split_file,
    take,
    validation_split,
)

TARGET = "the correct answer is "
VALIDATION = 120


class Protocol(NamedTuple):
    """What a line of work does with the same rows."""

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
White space differs."""


def frame_of(protocol: str, loss: Any = None) -> Frame:
    """The frame of a protocol, with the loss on "answer" or "all" if that is given."""
    frame = PROTOCOLS[protocol].frame
    return frame if loss is None else frame._replace(loss=loss)


class _Hub(NamedTuple):
    """A data set on the hub in its original form, and how a row of it is worded."""

    repository: str
    configuration: str | None
    convert: Callable[[dict[str, Any]], tuple[str, str]]
    """Instruction and answer of a row."""
    test: str = "validation"
    """The split whose labels are public."""
    revision: str | None = None


class _Member(NamedTuple):
    pattern: str
    """The task's answers; the first match in an output is the model's."""
    hub: _Hub


def _worded(question: str, names: Sequence[str], options: Sequence[str], between: str, gap: str) -> str:
    listed = between.join(f"{name.capitalize()}: {option}" for name, option in zip(names, options, strict=True))
    return f"{question}\n\n{listed}{gap}Answer format: {'/'.join(names)}"


def _choice(
    start: str, question: str, kind: str, options: Sequence[str], right: int, between: str = " ", gap: str = "\n\n"
) -> tuple[str, str]:
    names = [f"{kind}{i}" for i in range(1, len(options) + 1)]
    if not 0 <= right < len(names):
        raise BadRow(f"the label names option {right + 1} of {len(names)}.")
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
        raise BadRow(f"field {name!r}={value!r} should be a number.")
    return int(value)


_PARQUET = "refs/convert/parquet"  # data sets that are scripts on the hub, as the hub converts them
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
"""Names the mix of all members."""


class CommonsenseTask(GenerationTask):
    """One of the eight tasks, or a mix of several, scored one by one.

    Args:
        name: "commonsense", or the only member.
        names: the members of the mix; all eight by default.
        data: "hub" (the original data sets, worded here), a folder with ``<task>/{train,test}.json``, or one mixed file
            to train on, beside which such folders hold the test rows. Fields: instruction, input, output, answer.
        train_size: rows of the mix, drawn by ``seed``; all by default.
        shares: how ``train_size`` is divided among the members, or "equal"; by default as their rows are.
        caps: the most rows of a member, by name.
        test_size: test rows of each member at most, drawn by ``seed``.
        validation_size: rows that are taken off the mix to choose the checkpoint by.
        validation_seed: draws them; by default that of the protocol.
        protocol: a key of :data:`PROTOCOLS`.
        loss: "answer" or "all", in the place of the protocol's.
        seed: draws rows where sizes are given.

    A member without a folder is missing: it is noted, and no score stands for it.

    Raises:
        UserError: unknown name, missing split, a broken row, an answer that is not among the options, shares or caps
            that do not fit.
    """

    prefix = TARGET

    def __init__(
        self,
        name: str = ALL,
        *,
        names: Sequence[str] | None = None,
        data: str = HUB,
        train_size: int | None = None,
        shares: Mapping[str, float] | Literal["equal"] | None = None,
        caps: Mapping[str, int] | None = None,
        test_size: int | None = None,
        validation_size: int = VALIDATION,
        validation_seed: int | None = None,
        protocol: str = "hira",
        loss: str | None = None,
        seed: int = 42,
    ) -> None:
        if name != ALL and names is not None:
            raise UserError(f"task.names={list(names)!r} are the members of {ALL!r}; task {name!r} has none.")
        wanted = tuple(names if names is not None else MEMBERS) if name == ALL else (name,)
        if shares == "equal":
            shares = dict.fromkeys(wanted, 1.0)
        for member in (*wanted, *(shares or {}), *(caps or {})):
            if member not in MEMBERS:
                raise UserError(f"task: {member!r} is not a commonsense task; {nearest(member, MEMBERS)}")
        for key, given in (("shares", shares or {}), ("caps", caps or {})):
            if unused := [member for member in given if member not in wanted]:
                raise UserError(f"task.{key}.{unused[0]}: {unused[0]!r} is not in the mix of {', '.join(wanted)}.")
        if shares and train_size is None:
            raise UserError("task.shares needs task.train_size, the rows that are divided.")
        if protocol not in PROTOCOLS:
            raise UserError(f"task.protocol={protocol!r} is not known; {nearest(protocol, PROTOCOLS)}")
        self.name, self.members = name, wanted
        self.frame = frame_of(protocol, loss)
        source = _Source(data, wanted)
        test = {member: rows for member in wanted if (rows := source.rows(member, "test"))}
        if not test:
            raise UserError(f"task.data={data!r} holds none of {', '.join(wanted)}; the test split is missing.")
        tests = {m: take(rows.convert(_reader(m)), test_size, seed) for m, rows in test.items()}
        self.test = [example for examples in tests.values() for example in examples]

        if source.mix is not None:
            if shares or caps:
                raise UserError("task.shares and task.caps need a folder for each task; task.data is one mixed file.")
            pools = {"": source.mix}
        else:
            pools = {member: rows for member in wanted if (rows := source.rows(member, "train"))}
        drawn = _mixed(
            {m: rows.convert(_reader(m)) for m, rows in pools.items()},
            train_size, shares, caps or {}, seed,
        )  # fmt: skip
        mix = [example for examples in drawn.values() for example in examples]
        if validation_size >= len(mix):
            raise UserError(f"task.validation_size={validation_size} leaves nothing of the {len(mix)} training rows.")
        chosen = validation_seed if validation_seed is not None else PROTOCOLS[protocol].validation_seed
        self.train, self.validation = validation_split(mix, validation_size, chosen)
        self.missing = [f"{m} is missing in {data!r}: it is not scored." for m in wanted if m not in test]
        self.manifest = {
            "train": {member or "mix": pools[member].record(len(rows)) for member, rows in drawn.items()},
            "validation": {"rows": validation_size, "seed": chosen, "of": "train"},
            "test": {member: test[member].record(len(rows)) for member, rows in tests.items()},
            "seed": seed,
        }

    def judge(self, example: Example, output: str) -> Verdict:
        """The first match of the task's pattern, or of the options of a row from a mixed file; an output without one is
        wrong."""
        options = (re.escape(option.removeprefix(TARGET)) for option in example.options)
        found = re.search(MEMBERS[example.group].pattern if example.group else "|".join(options), output)
        return Verdict(found[0], found[0] == example.answer.removeprefix(TARGET)) if found else Verdict(None, False)


def instruction_row(task: str, row: dict[str, Any]) -> dict[str, str]:
    """A row of a task's original data set in the wording and the fields of LLM-Adapters.

    Raises:
        BadRow: a field is missing or holds what it should not.
    """
    instruction, answer = MEMBERS[task].hub.convert(row)
    return {"instruction": instruction, "input": "", "output": TARGET + answer, "answer": answer}


class _Source:
    """Where the rows of the members lie."""

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
        """The rows of a split; None if the folder holds nothing of the member, and it is one of several."""
        if self.folder is None:
            hub = MEMBERS[member].hub
            found = read_hub(hub.repository, hub.configuration, hub.test if split == "test" else split, hub.revision)
            return found._replace(rows=found.convert(lambda row: instruction_row(member, row)))
        if not (self.folder / member).is_dir() and len(self._wanted) > 1:
            return None
        return read_file(split_file(self.folder / member, [split]))


def _reader(member: str) -> Callable[[dict[str, Any]], Example]:
    return lambda row: _example(row, member)


def _example(row: dict[str, Any], member: str) -> Example:
    """A row in the fields of LLM-Adapters; its options stand at the end of the instruction."""
    instruction, answer = field(row, "instruction"), field(row, "answer")
    if row.get("input"):
        raise BadRow(f"field 'input'={row['input']!r} should be empty.")
    _, mark, listed = instruction.rpartition("Answer format: ")
    options = tuple(listed.strip().split("/"))
    if not mark or len(options) < 2:
        raise BadRow("field 'instruction' should end with its options, as in 'Answer format: answer1/answer2'.")
    if answer not in options:
        raise BadRow(f"field 'answer'={answer!r} should be one of {', '.join(options)}.")
    if "output" in row and row["output"] != TARGET + answer:
        raise BadRow(f"field 'output'={row['output']!r} should be {TARGET + answer!r}, as the answer says.")
    if member and not all(re.fullmatch(MEMBERS[member].pattern, option) for option in options):
        raise BadRow(f"field 'instruction' has the options {', '.join(options)}, which are not those of {member}.")
    return Example(instruction, TARGET + answer, group=member, options=tuple(TARGET + option for option in options))


def _mixed(
    pools: dict[str, list[Example]],
    size: int | None,
    shares: Mapping[str, float] | None,
    caps: Mapping[str, int],
    seed: int,
) -> dict[str, list[Example]]:
    """The rows of each member in a mix."""
    capped = {member: take(rows, caps.get(member), seed) for member, rows in pools.items()}
    if size is None:
        return capped
    if shares is None:
        flat = take([(member, row) for member, rows in capped.items() for row in rows], size, seed)
        return {member: [row for of, row in flat if of == member] for member in capped}
    present = {member: share for member, share in shares.items() if member in capped}
    total = sum(present.values())
    if total <= 0:
        raise UserError(f"task.shares={dict(shares)!r} should hold a number above 0 for a task at hand.")
    exact = {member: size * share / total for member, share in present.items()}
    counts = {member: int(value) for member, value in exact.items()}
    for member in sorted(exact, key=lambda m: counts[m] - exact[m])[: size - sum(counts.values())]:
        counts[member] += 1  # the largest remainders
    for member, count in counts.items():
        if count > len(capped[member]):
            given = f"task.shares.{member}={shares[member]:g} of {size} are {count} rows"
            raise UserError(f"{given}, and {len(capped[member])} are there; lower the share or task.train_size.")
    return {member: take(capped[member], count, seed) if count else [] for member, count in counts.items()}
