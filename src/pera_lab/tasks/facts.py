"""Facts to store in an adapter: a phone book, code words, or a user's own questions and answers.

The facts that are trained are the facts that are tested, because these tasks measure what an adapter remembers.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from itertools import product
from typing import Any, ClassVar, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from pera.errors import UserError
from pera_lab.files import json_line
from pera_lab.tasks.base import EvaluationSection, GenerationTask
from pera_lab.tasks.encoding import Frame
from pera_lab.tasks.examples import Example, Splits
from pera_lab.tasks.sources import BadRow, DataPath, Rows, field, folder_of, read_file, short, take


def _words(text: str) -> list[str]:
    return text.split()


GENERATED = 100
"""Default number of generated facts."""

FIRST = _words("""
Aaron Adam Alan Alice Amanda Amy Andrea Andrew Angela Anna Anthony Barbara Benjamin Betty Brian Carl Carol Catherine
Charles Christian Christine Daniel David Deborah Dennis Diana Donald Donna Dorothy Douglas Edward Elizabeth Emily Eric
Ethan Eugene Frances Francisco Frank Gary George Gloria Grace Gregory Hannah Harold Heather Helen Henry Howard Jack
Jacob James Janet Jason Jean Jeffrey Jennifer Jerry Jessica Joan John Jonathan Joseph Joshua Joyce Juan Judith Julia
Justin Karen Katherine Keith Kelly Kenneth Kevin Kyle Larry Laura Lauren Lawrence Linda Lisa Louis Margaret Maria
Marie Mark Martha Martin Mary Matthew Megan Melissa Michael Michelle Nancy Nathan Nicholas Nicole Olivia Pamela
Patricia Patrick Paul Peter Philip Rachel Ralph Randy Raymond Rebecca Richard Robert Roger Ronald Rose Roy Russell
Ruth Ryan Samantha Samuel Sandra Sara Scott Sean Sharon Sophia Stephen Steven Susan Teresa Terry Theresa Thomas
Timothy Tyler Victoria Vincent Virginia Walter Wayne William Zachary
""")

LAST = _words("""
Abbott Adkins Aguilar Alvarez Andrade Archer Armstrong Atkins Avery Ballard Barber Barnett Barrett Becker Becerra
Benson Berger Bishop Blackwell Booth Bowman Bradley Brennan Briggs Burgess Burton Byrd Callahan Camacho Cantrell
Cardenas Carlson Carver Castillo Chandler Chapman Clayton Cochran Coleman Conrad Cortez Crawford Crosby Curtis Dalton
Daugherty Delgado Dickson Dominguez Donovan Dudley Duncan Durham Eaton Ellison Emerson Espinoza Farley Ferguson
Figueroa Finley Fitzgerald Fleming Forbes Franklin Frazier Fuentes Gallagher Garrison Gentry Gilmore Glover Goodwin
Grantham Greene Griffith Guerrero Hansen Harding Harper Hartman Hatfield Hawkins Hendricks Herrera Hickman Hodges
Holloway Hopkins Horton Hubbard Huffman Ingram Jacobs Jarvis Jefferson Jimenez Keller Kendrick Kirkland Knapp Kramer
Lambert Laramee Larson Leblanc Levine Lindsey Livingston Lowery Lucero Lynch Maddox Malone Marquez Mathis Maxwell
Mccormick Mcdowell Mckinney Meadows Mendoza Merritt Middleton Molina Montgomery Moreno Mullins Navarro Nielsen Norton
Ochoa Oneal Orozco Osborne Pacheco Padilla Parrish Patton Pennington Pierce Pittman Ponce Preston Quintero Ramsey
Randall Reeves Reynolds Richmond Riggs Robbins Rocha Rosales Rowland Salazar Sanford Savage Schaefer Sexton Shepherd
Simmons Sloan Solis Stafford Stanton Stokes Sutton Tanner Thornton Townsend Trevino Trujillo Tucker Underwood Valencia
Vargas Vasquez Velasquez Vickers Villarreal Wagner Wallace Walters Waters Weaver Webster Whitaker Wilkins Winters
Woodard Wyatt Yates Zamora Zimmerman
""")

WORDS = _words("""
acid actor apple arch arm army art aunt baby bag ball bank barn base bath bear bed bell belt bird boat body bone book
boot bowl box boy brain branch brass bread brick bridge brother brush bulb cake camera camp card cart cat chain chair
chest child church circle city clay clock cloth cloud coal coast coat coffee comb copper cord corn cotton cow crown cup
curtain desk dog door dream dress drum dust eagle ear earth edge egg engine eye face farm feather field finger fire
fish flag floor flower fly fog food foot forest fork fox frame fruit garden gate girl glass glove goat gold grain grass
guitar hair hall hammer hand harbor hat heart hill hole hook horn horse hotel house ice iron island jar jewel key king
kitchen knee knife lake lamp leaf leather leg letter lion lock map market mask meal metal milk mirror moon mountain
mouse mouth nail neck needle nest net night nose nut ocean office oil orange oven paint palace paper park pearl pen
pencil piano pig pin pipe plane plant plate pocket point pool poster pot powder prison queen rail rain ring river road
rock roof room root rope rose sail salt sand school screw sea seat seed shadow sheep shelf ship shirt shoe silk silver
sister skin sky smoke snake snow soap sock song soup spider spoon spring square stamp star station steam steel stick
stone storm street sugar sun table tail tent thread throat ticket tiger tin toe tongue tooth tower town toy train tree
truck tube valley violin wall watch water wave wheel whip wind window wine wing winter wire wolf wood wool worm yard
""")
"""Common words, which most tokenizers write as one token after a space."""


class MemoryTask(GenerationTask):
    """Base class of the tasks in this file. The test rows are the training rows."""

    scorers: ClassVar[tuple[str, ...]] = ("recall",)
    recalls: ClassVar[bool] = True
    teaches_end: ClassVar[bool] = False
    """Whether the end-of-sequence token is learned after an answer. It is never part of what is measured. Without it,
    greedy decoding writes as many tokens as the answer has."""

    size: int | None = Field(None, ge=1, le=10**6)
    """Facts to draw. By default all rows of a file, or 100 generated facts."""
    seed: int = Field(0, ge=0)
    """Seed of the facts. A study replaces it by the seed of each run."""

    @property
    def frame(self) -> Frame:
        return Frame("{prompt}", end=self.teaches_end)

    @property
    def metric(self) -> str:
        return "recall"

    def build(self) -> Splits:
        """Read or generate the facts.

        Raises:
            UserError: a row is broken, or two facts have one question.
        """
        rows = self._rows()
        facts = take(rows.convert(self._fact), self.size, self.seed)
        first: dict[str, Example] = {}
        for fact in facts:
            if (other := first.setdefault(fact.prompt, fact)) is not fact:
                raise UserError(
                    f"{fact.place}: the question {short(fact.prompt)} occurs before, in {other.place}; keep one answer."
                )
        return Splits(
            facts, facts, recalled=True, manifest={"train": rows.record(len(facts))}, unused=self._unused(rows)
        )

    def question(self, row: dict[str, Any]) -> Example:
        return Example(field(row, self._names[0]), "")

    def check_evaluation(self, spec: EvaluationSection) -> None:
        super().check_evaluation(spec)
        if spec.num_beams != 1:
            raise ValueError(f"evaluation.num_beams={spec.num_beams}: recall is measured by greedy decoding; give 1")

    @property
    def _names(self) -> tuple[str, str]:
        """Names of the fields of a question and its answer."""
        raise NotImplementedError

    def _rows(self) -> Rows:
        """The rows of a file, or generated rows."""
        raise NotImplementedError

    def _fact(self, row: dict[str, Any]) -> Example:
        question, answer = self._names
        return Example(field(row, question), field(row, answer))

    def _unused(self, rows: Rows) -> tuple[str, ...]:
        """Columns of a file that nothing uses."""
        return ()


class FactsTask(MemoryTask):
    """A user's own facts, from a file with a question and an answer in each row."""

    task_names = ("facts",)
    max_new_tokens: ClassVar[int] = 64
    teaches_end: ClassVar[bool] = True

    name: str = "facts"
    data: DataPath
    """A ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file."""
    columns: dict[Literal["question", "answer"], str] = Field(default_factory=dict)
    """Names of the columns in the data, by the names used here."""
    template: Literal["chat", "plain"] = "chat"
    """"chat": the question is a user's message in the model's chat template. "plain": the answer follows the question
    directly."""
    answers: float | None = Field(None, ge=2)
    """Number of equally likely answers to a question, if you know it. Stored bits are counted from it. Without it, the
    bits are counted against the base model."""

    @property
    def frame(self) -> Frame:
        return Frame(None if self.template == "chat" else "{prompt}", end=self.teaches_end)

    def information(self, example: Example) -> float | None:
        return None if self.answers is None else math.log2(self.answers)

    @property
    def _names(self) -> tuple[str, str]:
        return self.columns.get("question", "question"), self.columns.get("answer", "answer")

    def _rows(self) -> Rows:
        return read_file(folder_of(self.data))

    def _unused(self, rows: Rows) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for row in rows.rows for key in row if key not in self._names))


class PhoneBookTask(MemoryTask):
    """Names and ten-digit numbers: PhoneBook (arXiv 2605.30260) from a file, or generated rows of the same form.

    The prompt is "First Last:", and the number follows directly.
    """

    task_names = ("phonebook",)
    max_new_tokens: ClassVar[int] = 10

    name: str = "phonebook"
    data: DataPath | None = None
    """A file with the fields "query" and "target". By default the facts are generated from ``seed``."""

    def information(self, example: Example) -> float:
        return len(example.answer) * math.log2(10)

    @property
    def drawn_by_seed(self) -> bool:
        return self.data is None

    def tokenizer_notes(self, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> list[str]:
        number = splits.train[0].answer
        tokens = len(tokenizer(number, add_special_tokens=False).input_ids)
        uneven = (
            f"the tokenizer writes the ten digits {number} as {tokens} tokens; loss and p > 0.5 by token cannot be "
            "compared between this tokenizer and one that writes one token per digit. Bits can."
        )
        return [*super().tokenizer_notes(tokenizer, splits), *([uneven] if tokens != len(number) else [])]

    @property
    def _names(self) -> tuple[str, str]:
        return "query", "target"

    def _rows(self) -> Rows:
        if self.data is not None:
            return read_file(folder_of(self.data))
        size, draw = self.size or GENERATED, random.Random(f"phonebook, {self.seed}")
        rows = (
            {"query": f"{name}:", "target": "".join(draw.choices("0123456789", k=10))}
            for name in _distinct(FIRST, LAST, size, draw)
        )
        return _generated(self.name, self.seed, rows)

    def _fact(self, row: dict[str, Any]) -> Example:
        fact = super()._fact(row)
        if not (len(fact.answer) == 10 and fact.answer.isascii() and fact.answer.isdigit()):
            raise BadRow(f"field 'target'={short(fact.answer)} should be ten digits.")
        return fact


class CodeWordsTask(MemoryTask):
    """A passphrase of two random words, and its code: words that are drawn from a fixed vocabulary.

    One word is a code word. Many words are a random string over that vocabulary.
    """

    task_names = ("codewords",)
    max_new_tokens: ClassVar[int] = 64

    name: str = "codewords"
    vocabulary: int = Field(64, ge=2, le=len(WORDS))
    """Number of different words in the codes."""
    length: int = Field(1, ge=1, le=1000)
    """Words in a code."""

    def information(self, example: Example) -> float:
        return self.length * math.log2(self.vocabulary)

    @property
    def drawn_by_seed(self) -> bool:
        return True

    @property
    def _names(self) -> tuple[str, str]:
        return "question", "answer"

    def _rows(self) -> Rows:
        size, draw = self.size or GENERATED, random.Random(f"codewords, {self.seed}")
        codes = draw.sample(WORDS, self.vocabulary)
        rows = (
            {"question": f"The passphrase is: {phrase}. The code is:", "answer": f" {' '.join(code)}"}
            for phrase in _distinct(WORDS, WORDS, size, draw)
            for code in [draw.choices(codes, k=self.length)]
        )
        return _generated(self.name, self.seed, rows)


def _distinct(first: list[str], second: list[str], size: int, draw: random.Random) -> list[str]:
    """``size`` different pairs of words."""
    pairs = list(product(first, second))
    if size > len(pairs):
        raise UserError(f"task.size={size} is too large; there are {len(pairs):,} different questions.")
    return [" ".join(pair) for pair in draw.sample(pairs, size)]


def _generated(name: str, seed: int, rows: Iterator[dict[str, str]]) -> Rows:
    """Rows with a hash, as from a file."""
    made = list(rows)
    digest = hashlib.sha256("".join(map(json_line, made)).encode()).hexdigest()
    return Rows(f"{name}, generated from seed {seed}", made, sha256=digest)
