"""Speed of ranking options with one forward over their common prefix, against one forward per option, on ARC-Easy.

    python benchmarks/likelihood.py ../shared/data/commonsense [--rows 60] [--model smollm2-135m] [--batch-size 8]

Both ways score the same rows alternately in one process, with the same batch size. The benchmark prints the ratio of
the times and the largest difference of a log-probability.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from pera_lab import models
from pera_lab.scorers import answer_batches, make_scorer
from pera_lab.tasks import EvaluationSection, Example
from pera_lab.tasks.commonsense import CommonsenseTask
from pera_lab.tasks.encoding import encode_question


@torch.no_grad()
def one_at_a_time(
    model: Any, tokenizer: Any, task: CommonsenseTask, examples: Sequence[Example], batch_size: int
) -> list[dict[str, float]]:
    """Log-probability of every option after "the correct answer is", each from a forward over the whole text."""
    start = len(tokenizer(task.prefix.rstrip(), add_special_tokens=False).input_ids)
    texts, places = [], []
    for row, example in enumerate(examples):
        prompt = encode_question(tokenizer, example, task.frame).ids
        for option in example.options:
            answer = tokenizer(option, add_special_tokens=False).input_ids
            texts.append(prompt + answer)
            places.append((row, option, len(answer) - start))
    found: list[dict[str, float]] = [{} for _ in examples]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = tokenizer.pad({"input_ids": [texts[i] for i in rows]}, return_tensors="pt")
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        kept = max(places[i][2] for i in rows) + 1
        logits = model(**batch, position_ids=positions, logits_to_keep=kept).logits.log_softmax(-1)
        for i, values in zip(rows, logits, strict=True):
            row, option, size = places[i]
            label = texts[i][-size:]
            found[row][option] = sum(values[-size - 1 + k, token].item() for k, token in enumerate(label))
    return found


def shared(
    model: Any, tokenizer: Any, task: CommonsenseTask, examples: Sequence[Example], spec: EvaluationSection
) -> list[dict[str, float]]:
    """The same from pera's scorer."""
    scorer = make_scorer(model, tokenizer, task, examples, spec, None)
    found: dict[int, Any] = {}
    for answered in answer_batches(scorer, ""):
        found |= answered
    return [found[i].scores for i in range(len(examples))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    model = models.load_model(given.model, dtype="float32")
    tokenizer = models.load_tokenizer(given.model)
    task = CommonsenseTask(name="ARC-Easy", data=given.data, test_size=given.rows)
    examples = task.build().test
    spec = EvaluationSection(scorer="likelihood", batch_size=given.batch_size)
    for _ in range(given.rounds):
        start = time.perf_counter()
        expected = one_at_a_time(model, tokenizer, task, examples, given.batch_size)
        middle = time.perf_counter()
        found = shared(model, tokenizer, task, examples, spec)
        end = time.perf_counter()
        apart = max(abs(a[o] - b[o]) for a, b in zip(expected, found, strict=True) for o in a)
        slow, fast = middle - start, end - middle
        print(
            f"{len(found)} questions: one option at a time {slow:.1f} s, shared prefix {fast:.1f} s, "
            f"{slow / fast:.2f} times faster; largest difference {apart:.1e}"
        )


if __name__ == "__main__":
    main()
