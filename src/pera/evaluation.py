"""A run or an adapter becomes scores."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from pera.card import write_card
from pera.errors import missing_extra
from pera.files import disk_errors, write_atomic, write_json
from pera.recipe import EvaluationSection
from pera.runs import Run, open_model
from pera.tasks import Example, Task
from pera.tasks.prompts import encode_prompt


@dataclass(frozen=True)
class Score:
    """Accuracy on held-out examples, with Wilson's 95 % interval."""

    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """One answer of the model."""

    prompt: str
    expected: str
    output: str
    correct: bool


def evaluate_run(run: Run, *, base: bool = False, console: Console | None = None) -> Score:
    """Score the adapter of a run, or its base model alone, on the held-out examples of its task.

    The score goes to ``scores.json`` under "adapter" or "base", the answers to ``predictions/``.
    """
    recipe = run.recipe
    location = run.location._replace(adapter=None) if base else run.location
    model, tokenizer = open_model(location, recipe.model.dtype)
    which = "base" if base else "adapter"
    score, predictions = evaluate(model, tokenizer, recipe.build_task(), recipe.evaluation, which, console)
    with disk_errors(run.predictions):
        run.predictions.mkdir(exist_ok=True)
    write_atomic(run.predictions / f"{which}.jsonl", "".join(_line(p) for p in predictions))
    write_json(run.scores_file, {**run.scores(), which: {"scorer": recipe.evaluation.scorer, **asdict(score)}})
    if run.adapter.is_dir():
        write_card(run.adapter, "adapter", run.location)
    return score


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    spec: EvaluationSection,
    label: str = "model",
    console: Console | None = None,
) -> tuple[Score, list[Prediction]]:
    """Answer the held-out examples of a task, decoding greedily, and score them."""
    start = time.perf_counter()
    outputs = generate(
        model,
        tokenizer,
        [example.prompt for example in task.test],
        batch_size=spec.batch_size,
        max_new_tokens=spec.max_new_tokens,
        label=f"answering ({label})",
        console=console,
    )
    predictions = [_judge(task, example, output) for example, output in zip(task.test, outputs, strict=True)]
    correct = sum(p.correct for p in predictions)
    low, high = wilson_interval(correct, len(predictions))
    seconds = time.perf_counter() - start
    return Score(len(predictions), correct, correct / len(predictions), low, high, round(seconds, 1)), predictions


def _judge(task: Task, example: Example, output: str) -> Prediction:
    return Prediction(example.prompt, example.answer, output, task.score(example, output) >= 1.0)


def _line(prediction: Prediction) -> str:
    """One line of JSON, also for readers that take other characters than a newline for the end of a line."""
    text = json.dumps(asdict(prediction), ensure_ascii=False)
    return re.sub("[\x85\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise missing_extra("scipy", "eval") from error
    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    label: str = "answering",
    console: Console | None = None,
) -> list[str]:
    """Greedy answers in the order of the prompts; batches are formed by length and padded on the left."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    answers = [""] * len(encoded)
    device = next(model.parameters()).device
    columns: list[Any] = [TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console or Console(quiet=True), disable=console is None) as progress:
        bar = progress.add_task("", total=len(encoded))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch: Any = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt").to(device)
            output = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text.strip()
            progress.advance(bar, len(rows))
    return answers
