"""Random facts for benchmarks/memory.py, drawn from a seed."""

from __future__ import annotations

import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pera_lab.models import load_tokenizer

BASE = "smollm2-135m"
PHONEBOOK = Path(__file__).parents[2] / "shared/data/phonebook/PB32000.jsonl"
CHOOSING = 1000
"""Seeds from here on draw the facts on which rates are chosen. No other run uses those facts."""


class Facts(NamedTuple):
    """Questions with answers of one or more tokens, and the answers that are equally likely for each token."""

    questions: list[list[int]]
    answers: list[list[int]]
    candidates: list[int]

    @property
    def bits(self) -> float:
        """Information of all answers."""
        return sum(map(len, self.answers)) * math.log2(len(self.candidates))


@cache
def tokenizer() -> Any:
    return load_tokenizer(BASE)


@cache
def words() -> list[int]:
    """Tokens that are one lower-case English-like word with its space, 4 to 8 letters."""
    known = tokenizer().get_vocab()
    found = [(piece, i) for piece, i in known.items() if piece[0] == "Ġ" and 4 <= len(piece) - 1 <= 8]
    return [i for piece, i in sorted(found) if piece[1:].isascii() and piece[1:].isalpha() and piece[1:].islower()]


def phonebook(count: int, seed: int) -> Facts:
    """Rows of PhoneBook: the first 1,200 rows of a fixed order for choosing rates, the others for reporting."""
    rows = [json.loads(line) for line in PHONEBOOK.read_text().splitlines()]
    random.Random(0).shuffle(rows)
    pool = rows[:1200] if seed >= CHOOSING else rows[1200:]
    chosen = random.Random(seed).sample(pool, count)
    return _numbers([row["query"] for row in chosen], [row["target"] for row in chosen])


def generated(count: int, seed: int) -> Facts:
    """Names of two words and ten random digits, of the form of PhoneBook."""
    draw = random.Random(f"generated {seed}")
    pieces = [tokenizer().decode([i]).strip().capitalize() for i in words()]
    names: set[str] = set()
    while len(names) < count:
        names.add(f"{draw.choice(pieces)} {draw.choice(pieces)}:")
    return _numbers(sorted(names), ["".join(draw.choices("0123456789", k=10)) for _ in names])


def _numbers(questions: list[str], numbers: list[str]) -> Facts:
    digits = [tokenizer().convert_tokens_to_ids(str(d)) for d in range(10)]
    return Facts(
        [tokenizer()(q)["input_ids"] for q in questions], [[digits[int(d)] for d in n] for n in numbers], digits
    )


def codes(count: int, seed: int, wording: str = "The passphrase is:", answers: int = 64) -> Facts:
    """Passphrases of two random words, each with one of 64 words as its answer."""
    draw = random.Random(f"codes {seed}")
    start = tokenizer()(wording)["input_ids"]
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < count:
        pairs.add((draw.choice(words()), draw.choice(words())))
    candidates = draw.sample(words(), answers)
    return Facts([[*start, *pair] for pair in sorted(pairs)], [[draw.choice(candidates)] for _ in pairs], candidates)


def strings(count: int, seed: int) -> Facts:
    """Random strings of 16 tokens over 2,048, each after two random words that name it."""
    draw = random.Random(f"strings {seed}")
    symbols = words()[:2048]
    pairs = draw.sample(words()[2048:], 2 * count)
    questions = [pairs[2 * i : 2 * i + 2] for i in range(count)]
    return Facts(questions, [draw.choices(symbols, k=16) for _ in questions], symbols)


FACTS = {
    "phonebook": phonebook,
    "generated": generated,
    "codes": codes,
    "codes-10": lambda count, seed: codes(count, seed, answers=10),
    "codes-reworded": lambda count, seed: codes(count, seed, "Say the secret word for"),
    "strings": strings,
}
