"""A run or an adapter becomes scores."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pera.errors import UserError, missing_extra
from pera_lab.card import write_card
from pera_lab.files import Journal, checked, json_line, write_atomic, write_json
from pera_lab.models import longest_input
from pera_lab.opening import locate_run, open_model
from pera_lab.recipe import EvaluationSection, Recipe
from pera_lab.runs import Run
from pera_lab.tasks import ClassificationTask, Example, GenerationTask, Labelled, Task
from pera_lab.tasks.prompts import Prompt, encode_answered, encode_question, encode_texts


@dataclass(frozen=True)
class Part:
    """Accuracy on the rows of one member of a mix, with Wilson's 95 % interval."""

    n: int
    correct: int
    unparsed: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """A metric on held-out examples, with its 95 % interval: Wilson's for an accuracy, else by bootstrap."""

    n: int
    correct: int | None
    """None for a regression."""
    metric: str
    value: float
    """Of a mix, the unweighted mean over the members that there are data for."""
    low: float
    high: float
    seconds: float
    majority: float | None = None
    """The metric of the commonest training answer, given to every row."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further metrics of the task."""
    unparsed: int = 0
    """Outputs in which the task found no answer; they count as wrong."""
    shortened: int = 0
    """Prompts that were cut to the length of the model."""
    parts: dict[str, Part] = field(default_factory=dict)
    """By member of a mix."""
    missing: tuple[str, ...] = ()
    """Members of the mix without data; no figure stands for them."""


@dataclass(frozen=True)
class Prediction:
    """One answer of the model."""

    prompt: str
    expected: str
    output: str
    correct: bool | None
    """None for a regression, which is never quite right."""
    answer: str | None = None
    """What the task found in the output; None if nothing."""
    group: str = ""
    shortened: bool = False
    scores: dict[str, float] | None = None
    """Log-probability of each option, or the logit of each class."""


def read_predictions(file: Path) -> list[Prediction]:
    """The answers in a file that :func:`evaluate_run` left.

    Raises:
        UserError: it cannot be read, was cut off, or holds something else.
    """
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} cannot be read: {' '.join(str(error).split())}.") from error
    return checked(lines, list[Prediction], repr(str(file)))


def evaluate_run(run: Run, *, base: bool = False, scorer: str | None = None, console: Console | None = None) -> Score:
    """Score the adapter of a run, or its base model alone, on the held-out examples of its task.

    The score goes to ``scores.json`` under "adapter" or "base", the answers to ``predictions/``; with another scorer
    than the recipe's, its name stands behind that. Answers are kept as they come, and a restart after an interruption
    makes only those that are missing.

    Raises:
        UserError: the scorer does not fit the task, the data are not those of the training, or the base of a classifier
            is asked for, which has no head. Or as :func:`require_packages`.
    """
    recipe = run.recipe.with_scorer(scorer)
    require_packages(recipe)
    task, spec = recipe.build_task(), recipe.evaluation
    run.check_data(task.manifest)
    if base and task.labels is not None:
        raise UserError(
            f"--base: the base model of {recipe.task.name!r} has no trained head, so there is nothing to score; "
            'the majority baseline stands in scores.json under "adapter".'
        )
    location = locate_run(run)._replace(adapter=None) if base else locate_run(run)
    which = "base" if base else "adapter"
    name = which if spec.scorer == run.recipe.evaluation.scorer else f"{which}-{spec.scorer}"
    model, tokenizer = open_model(location, recipe.model.dtype)
    content = recipe.model_dump(mode="json", exclude={"name"})
    key = {"which": which, "recipe": content, "data": dict(task.manifest)}
    journal = Journal(run.predictions / f"{name}.partial.jsonl", key)
    if journal.found and console is not None:
        console.print(f"going on after {len(journal.found)} of {len(task.test)} answers", soft_wrap=True)
    max_length = recipe.training.max_length if task.labels is not None else None
    score, predictions = evaluate(model, tokenizer, task, spec, which, console, journal=journal, max_length=max_length)
    write_atomic(run.predictions / f"{name}.jsonl", "".join(json_line(asdict(p)) for p in predictions))
    write_json(run.scores_file, {**run.scores(), name: {"scorer": spec.scorer, **asdict(score)}})
    journal.close()
    if run.finished:
        write_card(run.adapter.path, "adapter", locate_run(run))
    return score


def require_packages(recipe: Recipe) -> None:
    """Raise UserError if a package that the scores of ``recipe`` need is not installed; call it before the work."""
    needed = {"scipy": "scipy"} | ({"sklearn": "scikit-learn"} if recipe.task_type == "SEQ_CLS" else {})
    for module, package in needed.items():
        if find_spec(module) is None:
            raise missing_extra(package, "lab")


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    spec: EvaluationSection,
    label: str = "model",
    console: Console | None = None,
    *,
    journal: Journal | None = None,
    max_length: int | None = None,
) -> tuple[Score, list[Prediction]]:
    """Answer the held-out examples of a task by the scorer of ``spec``, and score the answers.

    Args:
        journal: keeps the answers as they come; those that it has are not made again.
        max_length: the longest input in tokens, where the model alone does not say it.
    """
    start = time.perf_counter()
    found: dict[int, Prediction] = {i: Prediction(**row) for i, row in journal.found.items()} if journal else {}
    todo = [i for i in range(len(task.test)) if i not in found]
    scorer = make_scorer(model, tokenizer, task, [task.test[i] for i in todo], spec, max_length)
    for answered in answer_batches(scorer, f"answering ({label})", console):
        new = {todo[row]: prediction for row, prediction in answered.items()}
        found |= new
        if journal:
            journal.add({i: asdict(prediction) for i, prediction in new.items()})
    predictions = [found[i] for i in range(len(task.test))]
    return _score(task, predictions, round(time.perf_counter() - start, 1)), predictions


def make_scorer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Any],
    spec: EvaluationSection,
    max_length: int | None,
) -> Scorer:
    """The scorer that ``spec`` names, for some examples of a task."""
    return SCORERS[spec.scorer](model, tokenizer, task, examples, spec, max_length)


def answer_batches(scorer: Scorer, label: str, console: Console | None) -> Iterator[dict[int, Prediction]]:
    """The predictions for a scorer's examples, by their place, a batch at a time."""
    for rows in _batches(scorer.lengths, scorer.spec.batch_size, label, console):
        yield dict(zip(rows, scorer.answer(rows), strict=True))


class Scorer:
    """Makes the predictions of a batch of examples; ``lengths`` are those of the inputs in tokens."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        task: Any,
        examples: Sequence[Any],
        spec: EvaluationSection,
        max_length: int | None,
    ) -> None:
        self.model, self.tokenizer, self.task, self.examples, self.spec = model, tokenizer, task, examples, spec
        self.limit = min(max_length or 10**9, longest_input(model, tokenizer))
        self.lengths: list[int] = []

    def answer(self, rows: list[int]) -> list[Prediction]:
        """The predictions for ``rows`` of the examples."""
        raise NotImplementedError


class _Generation(Scorer):
    """Writes an answer, which the task judges."""

    task: GenerationTask

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        room = self.limit - (self.spec.max_new_tokens or 0)
        self.prompts = [encode_question(self.tokenizer, e, self.task.frame, room) for e in self.examples]
        if any(prompt.shortened and not prompt.text for prompt in self.prompts):
            raise UserError(
                f"evaluation.max_new_tokens={self.spec.max_new_tokens} leaves no room for the question in the "
                f"{self.limit} tokens of the model; give fewer."
            )
        self.lengths = [len(prompt.ids) for prompt in self.prompts]

    def answer(self, rows: list[int]) -> list[Prediction]:
        ids = [self.prompts[i].ids for i in rows]
        texts = _write(self.model, self.tokenizer, ids, self.spec.max_new_tokens or 1, self.spec.num_beams or 1)
        return [self._judged(i, text) for i, text in zip(rows, texts, strict=True)]

    def _judged(self, row: int, output: str) -> Prediction:
        example: Example = self.examples[row]
        answer, correct = self.task.judge(example, output)
        cut = self.prompts[row].shortened
        return Prediction(example.prompt, example.answer, output, correct, answer, example.group, cut)


class Branches(NamedTuple):
    """Continuations of one text: the tokens that all of them begin with, from which of them on the log-probability is
    wanted, and what follows in each."""

    shared: list[int]
    start: int
    suffixes: list[list[int]]


class _Likelihood(Scorer):
    """The option with the highest log-probability behind the prefix that all answers share."""

    task: GenerationTask

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if any(not example.options for example in self.examples):
            raise UserError(f"evaluation.scorer='likelihood' needs options to rank, and {self.task.name!r} has none.")
        self.prompts = [encode_question(self.tokenizer, e, self.task.frame, self.limit - 16) for e in self.examples]
        self.branches = [self._branches(e, p) for e, p in zip(self.examples, self.prompts, strict=True)]
        self.lengths = [len(b.shared) for b in self.branches]

    def _branches(self, example: Example, prompt: Prompt) -> Branches:
        def ids(answer: str) -> list[int]:
            before, behind = encode_answered(self.tokenizer, prompt, self.task.frame, answer)
            return before + behind

        options = [ids(option) for option in example.options]
        shared = min(_common(options), min(map(len, options)) - 1)  # each option keeps a token of its own
        start = min(shared, _common([options[0], ids(self.task.prefix.rstrip())]))
        return Branches(options[0][:shared], start, [option[shared:] for option in options])

    def answer(self, rows: list[int]) -> list[Prediction]:
        likelihoods = log_likelihoods(self.model, self.tokenizer, [self.branches[i] for i in rows])
        return [self._ranked(i, values) for i, values in zip(rows, likelihoods, strict=True)]

    def _ranked(self, row: int, values: list[float]) -> Prediction:
        example: Example = self.examples[row]
        scores = dict(zip(example.options, values, strict=True))
        best = max(scores, key=lambda option: scores[option])
        right, cut = best == example.answer, self.prompts[row].shortened
        return Prediction(example.prompt, example.answer, best, right, best, example.group, cut, scores)


def _common(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    return next(
        (i for i, tokens in enumerate(zip(*sequences)) if len(set(tokens)) > 1),  # noqa: B905
        min(map(len, sequences)),
    )


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer: PreTrainedTokenizerBase, batch: list[Branches]) -> list[list[float]]:
    """Log-probability of each continuation of each text, from its ``start`` on.

    What the continuations of a text share is read once. Where each has one token of its own, as "1" to "5" behind
    "answer", that is all; else the rest is read with the keys and values that were kept.
    """
    device = next(model.parameters()).device
    accepted = inspect.signature(_base(model).forward).parameters

    def padded(sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        found: Any = tokenizer.pad({"input_ids": sequences}, return_tensors="pt", padding_side=side)
        return found["input_ids"].to(device), found["attention_mask"].to(device)

    ids, mask = padded([b.shared for b in batch], "left")
    kept = max(len(b.shared) - b.start for b in batch) + 1
    longer = [(i, j) for i, b in enumerate(batch) for j, suffix in enumerate(b.suffixes) if len(suffix) > 1]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": bool(longer)}
    if "position_ids" in accepted:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = kept
    output = model(**inputs)
    logits = output.logits[:, -kept:].float().log_softmax(-1)
    found = []
    for row, b in zip(logits, batch, strict=True):
        label = b.shared[b.start :]
        own = sum(row[-len(label) - 1 + i, token].item() for i, token in enumerate(label))
        found.append([own + row[-1, suffix[0]].item() for suffix in b.suffixes])
    if longer:
        rest = [batch[i].suffixes[j] for i, j in longer]
        tail, tail_mask = padded([suffix[:-1] for suffix in rest], "right")
        rows = torch.tensor([i for i, _ in longer], device=device)
        cache = output.past_key_values
        cache.batch_select_indices(rows)
        inputs = {"input_ids": tail, "past_key_values": cache, "use_cache": True}
        inputs["attention_mask"] = torch.cat([mask[rows], tail_mask], 1)
        if "position_ids" in accepted:
            inputs["position_ids"] = mask[rows].sum(1, keepdim=True) + torch.arange(tail.shape[1], device=device)
        logits = model(**inputs).logits.float().log_softmax(-1)
        for (i, j), row, suffix in zip(longer, logits, rest, strict=True):
            found[i][j] += sum(row[k, token].item() for k, token in enumerate(suffix[1:]))
    return found


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


class _Classification(Scorer):
    """The class, or the number, of the head."""

    task: ClassificationTask

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        real = not self.task.names
        self.encoded = [encode_texts(self.tokenizer, row, self.limit, real=real) for row in self.examples]
        self.lengths = [len(encoded["input_ids"]) for encoded, _ in self.encoded]

    @torch.no_grad()
    def answer(self, rows: list[int]) -> list[Prediction]:
        columns = ("input_ids", "token_type_ids", "attention_mask")
        inputs = [{k: v for k, v in self.encoded[i][0].items() if k in columns} for i in rows]
        batch: Any = self.tokenizer.pad(inputs, return_tensors="pt").to(next(self.model.parameters()).device)
        logits = self.model(**batch).logits.float().tolist()
        return [self._labelled(i, values) for i, values in zip(rows, logits, strict=True)]

    def _labelled(self, row: int, logits: list[float]) -> Prediction:
        example: Labelled = self.examples[row]
        prompt, cut = example.prompt, self.encoded[row][1]
        names = self.task.names
        if not names:
            number = repr(logits[0])
            return Prediction(prompt, repr(example.label), number, None, number, shortened=cut)
        best = max(range(len(names)), key=logits.__getitem__)
        label = int(example.label)
        scores = dict(zip(names, logits, strict=True))
        return Prediction(prompt, names[label], names[best], best == label, names[best], shortened=cut, scores=scores)


SCORERS: dict[str, Callable[..., Scorer]] = {
    "exact_match": _Generation,
    "generation": _Generation,
    "likelihood": _Likelihood,
    "classification": _Classification,
}


def _score(task: Task, predictions: list[Prediction], seconds: float) -> Score:
    n, shortened = len(predictions), sum(p.shortened for p in predictions)
    majority = task.majority() if task.train else None
    if isinstance(task, ClassificationTask):
        names = task.names
        convert: Callable[[Any], float] = (lambda text: names.index(text)) if names else float
        gold, predicted = [convert(p.expected) for p in predictions], [convert(p.answer) for p in predictions]
        metrics = task.measure(gold, predicted)
        value = metrics.pop(task.metric)
        correct = sum(bool(p.correct) for p in predictions) if names else None
        if task.metric == "accuracy" and correct is not None:
            low, high = wilson_interval(correct, n)
        else:
            low, high = bootstrap_interval(lambda g, p: task.measure(g, p)[task.metric], gold, predicted)
        return Score(n, correct, task.metric, value, low, high, seconds, majority, metrics, shortened=shortened)
    parts = {
        group: _part([p for p in predictions if p.group == group]) for group in sorted({p.group for p in predictions})
    }
    grouped = set(parts) != {""}
    correct, unparsed = sum(p.correct for p in parts.values()), sum(p.unparsed for p in parts.values())
    value = sum(p.accuracy for p in parts.values()) / len(parts)
    low, high = _mean_interval(list(parts.values()))
    return Score(
        *(n, correct, "accuracy" if len(parts) == 1 else "mean accuracy", value, low, high, seconds, majority),
        unparsed=unparsed,
        shortened=shortened,
        parts=parts if grouped else {},
        missing=tuple(name for name in task.members if grouped and name not in parts),
    )


def _part(predictions: list[Prediction]) -> Part:
    n, correct = len(predictions), sum(bool(p.correct) for p in predictions)
    return Part(n, correct, sum(p.answer is None for p in predictions), correct / n, *wilson_interval(correct, n))


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise missing_extra("scipy", "lab") from error
    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(
    metric: Callable[[Sequence[float], Sequence[float]], float], gold: Sequence[float], predicted: Sequence[float]
) -> tuple[float, float]:
    """95 % interval of a metric over examples: the percentiles of 1,000 resamples of the pairs, always the same."""
    import numpy as np

    pairs, generator = np.array([gold, predicted]), np.random.default_rng(0)
    drawn = (pairs[:, generator.integers(len(gold), size=len(gold))] for _ in range(1000))
    values = [metric(sample[0].tolist(), sample[1].tolist()) for sample in drawn]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _mean_interval(parts: list[Part]) -> tuple[float, float]:
    """95 % interval of an unweighted mean of independent accuracies, from Wilson's of each (MOVER; Zou and Donner 2008,
    doi 10.1002/sim.3095); of one accuracy it is Wilson's."""
    value = sum(p.accuracy for p in parts) / len(parts)
    below, above = (math.hypot(*(p.accuracy - end for p, end in zip(parts, ends, strict=True))) / len(parts)
                    for ends in ([p.low for p in parts], [p.high for p in parts]))  # fmt: skip
    return value - below, value + above


@torch.no_grad()
def _write(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int, num_beams: int = 1
) -> list[str]:
    """The answers to one batch of prompts, without sampling."""
    batch: Any = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(next(model.parameters()).device)
    beams = {"num_beams": num_beams} if num_beams > 1 else {}
    output = model.generate(
        **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id, **beams
    )
    texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _batches(lengths: list[int], batch_size: int, label: str, console: Console | None) -> Iterator[list[int]]:
    """Rows of one batch after the other, the longest first, so that a batch too large for the memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    columns: list[Any] = [TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console or Console(quiet=True), disable=console is None) as progress:
        bar = progress.add_task("", total=len(order))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows
            progress.advance(bar, len(rows))
