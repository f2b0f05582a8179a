"""Scorers: a model answers examples, each answer is judged, and the answers become a score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from pera.errors import UserError
from pera_lab import processes
from pera_lab.inference import (
    Branches,
    common_length,
    generate,
    generate_ids,
    log_likelihoods,
    takes_padding,
    text_of,
    token_log_likelihoods,
)
from pera_lab.intervals import bootstrap_interval, mean_interval, wilson_interval
from pera_lab.memory import Memory, measure_memory
from pera_lab.models import check_tokens, longest_input
from pera_lab.progress import ProgressBar
from pera_lab.tasks import ClassificationTask, EvaluationSection, Example, GenerationTask, LabelledText, Splits, Task
from pera_lab.tasks.encoding import Prompt, as_scored, as_written, encode_answered, encode_question, encode_texts


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
    """A metric on held-out examples with its 95 % interval: Wilson's for an accuracy, else by bootstrap."""

    n: int
    correct: int | None
    """None for a regression."""
    metric: str
    value: float
    """For a mix, the unweighted mean over the members with data."""
    low: float
    high: float
    seconds: float
    majority: float | None = None
    """Baseline: the metric if every row gets the most common training answer."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further metrics of the task."""
    unparsed: int = 0
    """Outputs without an answer; they count as wrong."""
    shortened: int = 0
    """Prompts that were truncated to the length of the model."""
    parts: dict[str, Part] = field(default_factory=dict)
    """Scores by member of a mix."""
    missing: tuple[str, ...] = ()
    """Members of the mix without data, which have no score."""
    scorer: str = ""
    """Name of the scorer, as in ``evaluation.scorer``."""
    memory: Memory | None = None
    """What is stored of the facts, if the task is tested on its training rows."""


@dataclass(frozen=True)
class Prediction:
    """One answer of the model, judged."""

    prompt: str
    expected: str
    output: str
    correct: bool | None
    """None for a regression."""
    answer: str | None = None
    """The answer found in the output; None if there is none."""
    group: str = ""
    shortened: bool = False
    scores: dict[str, float] | None = None
    """Log-probability of each option, or logit of each class."""
    log_likelihoods: list[float] | None = None
    """Log-probability of each token of the expected answer, if the task measures what is remembered."""


class Output(NamedTuple):
    """What the model answers to one example, before it is judged."""

    answer: str | float
    """Text, an option, the name of a class, or the number of a regression."""
    scores: dict[str, float] | None = None
    """Log-probability of each option, or logit of each class."""
    shortened: bool = False
    """Whether the prompt was truncated."""
    log_likelihoods: list[float] | None = None
    """Log-probability of each token of the expected answer."""


def make_scorer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Any],
    spec: EvaluationSection,
    max_length: int | None,
) -> Scorer:
    """The scorer that ``spec`` names.

    Args:
        model: the model that answers.
        tokenizer: its tokenizer.
        task: the task.
        examples: the examples to answer.
        spec: the recipe's ``evaluation`` section.
        max_length: longest input in tokens, if it is shorter than the model's.
    """
    return SCORERS[spec.scorer](model, tokenizer, task, examples, spec, max_length)


def answer_batches(scorer: Scorer, label: str) -> Iterator[dict[int, Output]]:
    """The outputs for a scorer's examples by their index, one batch at a time, or one for each process.

    The batches do not depend on the number of processes, and every process gets all outputs.

    Args:
        scorer: the scorer.
        label: text of the progress bar.
    """
    size = scorer.spec.batch_size
    equal = size > 1 and len(set(scorer.lengths)) > 1 and not takes_padding(scorer.model)
    batches = _batches(scorer.lengths, size, equal, label)
    while share := list(islice(batches, processes.count())):
        own = share[processes.index()] if processes.index() < len(share) else []
        outputs = dict(zip(own, scorer.answer(own), strict=True)) if own else {}
        yield {row: output for found in processes.gathered(outputs) for row, output in found.items()}


class Scorer:
    """Answers examples in batches and judges the answers."""

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
        """Length of each input in tokens."""

    def answer(self, rows: list[int]) -> list[Output]:
        """The outputs for the examples with the indices ``rows``."""
        raise NotImplementedError

    def judge(self, row: int, output: Output) -> Prediction:
        """The judged output for the example with the index ``row``."""
        raise NotImplementedError

    def score(self, splits: Splits, predictions: list[Prediction], seconds: float) -> Score:
        """The score of all predictions.

        Args:
            splits: the examples of the task.
            predictions: one for each test example.
            seconds: how long the answers took.
        """
        parts = {
            group: _part([p for p in predictions if p.group == group])
            for group in sorted({p.group for p in predictions})
        }
        grouped = set(parts) != {""}
        low, high = mean_interval([(part.correct, part.n) for part in parts.values()])
        return Score(
            n=len(predictions),
            correct=sum(part.correct for part in parts.values()),
            metric="accuracy" if len(parts) == 1 else "mean accuracy",
            value=sum(part.accuracy for part in parts.values()) / len(parts),
            low=low,
            high=high,
            seconds=seconds,
            majority=self._majority(splits),
            unparsed=sum(part.unparsed for part in parts.values()),
            shortened=sum(p.shortened for p in predictions),
            parts=parts if grouped else {},
            missing=tuple(name for name in self.task.members if grouped and name not in parts),
            scorer=self.spec.scorer,
        )

    def _majority(self, splits: Splits) -> float | None:
        return self.task.majority(splits) if splits.train else None


class GenerationScorer(Scorer):
    """The model writes an answer, which the task judges."""

    task: GenerationTask

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.examples = [as_scored(self.tokenizer, example) for example in self.examples]
        room = self.limit - (self.spec.max_new_tokens or 0)
        self.prompts = [encode_question(self.tokenizer, e, self.task.frame, room) for e in self.examples]
        if any(prompt.shortened and not prompt.text for prompt in self.prompts):
            raise UserError(
                f"evaluation.max_new_tokens={self.spec.max_new_tokens} leaves no room for the question in the "
                f"{self.limit} tokens of the model; give fewer."
            )
        check_tokens(self.model, self.tokenizer, (prompt.ids for prompt in self.prompts))
        self.lengths = [len(prompt.ids) for prompt in self.prompts]
        self.taught = self._as_taught()

    def _as_taught(self) -> list[Example]:
        """The examples with answer and options as the tokenizer writes them, where it writes them at all."""
        texts = list(dict.fromkeys(text for e in self.examples for text in (e.answer, *e.options)))
        found = dict(zip(texts, as_written(self.tokenizer, texts), strict=True))
        new = {text: text if written is None else written for text, written in found.items()}
        return [replace(e, answer=new[e.answer], options=tuple(new[o] for o in e.options)) for e in self.examples]

    def answer(self, rows: list[int]) -> list[Output]:
        ids = [self.prompts[i].ids for i in rows]
        texts = generate(self.model, self.tokenizer, ids, self.spec.max_new_tokens or 1, self.spec.num_beams or 1)
        return [Output(text, None, self.prompts[i].shortened) for i, text in zip(rows, texts, strict=True)]

    def judge(self, row: int, output: Output) -> Prediction:
        example: Example = self.examples[row]
        text = str(output.answer)
        answer, correct = self.task.judge(example, text)
        if not correct and self.taught[row] != example:
            answer, correct = self.task.judge(self.taught[row], text)
        return Prediction(example.prompt, example.answer, text, correct, answer, example.group, output.shortened)


class RecallScorer(GenerationScorer):
    """Greedy decoding of as many tokens as the answer has, and the log-probability of each token of the answer.

    If the task teaches an end token, decoding stops at it, and it is not counted.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        pairs = zip(self.prompts, self.examples, strict=True)
        frame = self.task.frame
        self.answers = [encode_answered(self.tokenizer, prompt, frame, e.answer)[1] for prompt, e in pairs]
        longest, most = max(map(len, self.answers), default=0), self.spec.max_new_tokens or 0
        if most < (needed := longest + frame.end * bool(longest)):
            raise UserError(
                f"evaluation.max_new_tokens={most} is less than the {needed} tokens of the longest answer; give "
                f"{needed} or more."
            )
        check_tokens(self.model, self.tokenizer, self.answers)
        self.lengths = [len(p.ids) + len(a) for p, a in zip(self.prompts, self.answers, strict=True)]

    def answer(self, rows: list[int]) -> list[Output]:
        prompts, answers = ([of[i] for i in rows] for of in ([p.ids for p in self.prompts], self.answers))
        most = [len(a) + self.task.frame.end if a else self.spec.max_new_tokens or 1 for a in answers]
        written = generate_ids(self.model, self.tokenizer, prompts, max(most))
        known = [k for k, a in enumerate(answers) if a]  # the rows of a prediction have no answers
        found = token_log_likelihoods(
            self.model, self.tokenizer, [prompts[k] for k in known], [answers[k] for k in known]
        )
        likelihoods = dict(zip(known, found, strict=True))
        return [
            Output(
                text_of(self.tokenizer, ids[:length]),
                shortened=self.prompts[i].shortened,
                log_likelihoods=likelihoods[k].tolist() if k in likelihoods else None,
            )
            for k, (i, ids, length) in enumerate(zip(rows, written, most, strict=True))
        ]

    def judge(self, row: int, output: Output) -> Prediction:
        return replace(super().judge(row, output), log_likelihoods=output.log_likelihoods)

    def score(self, splits: Splits, predictions: list[Prediction], seconds: float) -> Score:
        information = [self.task.information(example) for example in splits.test]
        memory = measure_memory(information, [p.log_likelihoods or [] for p in predictions])
        return replace(super().score(splits, predictions, seconds), metric=self.task.metric, memory=memory)


class LikelihoodScorer(Scorer):
    """The answer is the option with the highest log-probability, after the prefix that all answers share."""

    task: GenerationTask

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if any(not example.options for example in self.examples):
            raise UserError(f"evaluation.scorer='likelihood' needs options to rank, and {self.task.name!r} has none.")
        self.prompts = [encode_question(self.tokenizer, e, self.task.frame, self._room(e)) for e in self.examples]
        self.branches = [self._branches(e, p) for e, p in zip(self.examples, self.prompts, strict=True)]
        check_tokens(self.model, self.tokenizer, (ids for b in self.branches for ids in (b.shared, *b.suffixes)))
        self.lengths = [len(b.shared) for b in self.branches]

    def _room(self, example: Example) -> int:
        """Longest prompt in tokens: the longest option fits behind it. Published scores keep 16 tokens for options."""
        longest = max(len(self.tokenizer(o, add_special_tokens=False).input_ids) for o in example.options)
        if longest >= self.limit:
            raise UserError(
                f"{example.place or 'options'}: an option has {longest} tokens, but the model reads at most "
                f"{self.limit}; shorten it."
            )
        return self.limit - max(16, longest)

    def _branches(self, example: Example, prompt: Prompt) -> Branches:
        def ids(answer: str) -> list[int]:
            before, behind = encode_answered(self.tokenizer, prompt, self.task.frame, answer)
            return before + behind

        options = [ids(option) for option in example.options]
        shared = min(common_length(options), min(map(len, options)) - 1)  # each option keeps at least one token
        start = min(shared, common_length([options[0], ids(self.task.prefix.rstrip())]))
        return Branches(options[0][:shared], start, [option[shared:] for option in options])

    def answer(self, rows: list[int]) -> list[Output]:
        outputs = []
        likelihoods = log_likelihoods(self.model, self.tokenizer, [self.branches[i] for i in rows])
        for i, values in zip(rows, likelihoods, strict=True):
            scores = dict(zip(self.examples[i].options, values, strict=True))
            best = max(scores, key=lambda option: scores[option])
            outputs.append(Output(best, scores, self.prompts[i].shortened))
        return outputs

    def judge(self, row: int, output: Output) -> Prediction:
        example: Example = self.examples[row]
        best, right = str(output.answer), output.answer == example.answer
        prompt, expected, cut = example.prompt, example.answer, output.shortened
        return Prediction(prompt, expected, best, right, best, example.group, cut, output.scores)


class ClassificationScorer(Scorer):
    """The answer is the class, or the number, from the head."""

    task: ClassificationTask

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.encoded = [encode_texts(self.tokenizer, row.texts, self.limit) for row in self.examples]
        check_tokens(self.model, self.tokenizer, (encoded["input_ids"] for encoded, _ in self.encoded))
        self.lengths = [len(encoded["input_ids"]) for encoded, _ in self.encoded]

    @torch.no_grad()
    def answer(self, rows: list[int]) -> list[Output]:
        columns = ("input_ids", "token_type_ids", "attention_mask")
        inputs = [{k: v for k, v in self.encoded[i][0].items() if k in columns} for i in rows]
        batch: Any = self.tokenizer.pad(inputs, return_tensors="pt").to(next(self.model.parameters()).device)
        logits = self.model(**batch).logits.float().tolist()
        return [self._output(values, self.encoded[i][1]) for i, values in zip(rows, logits, strict=True)]

    def _output(self, logits: list[float], shortened: bool) -> Output:
        names, label = self.task.classes, self.task.predicted_label(logits)
        if not names:
            return Output(label, None, shortened)
        return Output(names[int(label)], dict(zip(names, logits, strict=True)), shortened)

    def judge(self, row: int, output: Output) -> Prediction:
        example: LabelledText = self.examples[row]
        names, text, cut = self.task.classes, str(output.answer), output.shortened
        if not names:
            return Prediction(example.prompt, repr(example.label), text, None, text, shortened=cut)
        expected = names[int(example.label)]
        return Prediction(example.prompt, expected, text, text == expected, text, shortened=cut, scores=output.scores)

    def score(self, splits: Splits, predictions: list[Prediction], seconds: float) -> Score:
        names = self.task.classes
        convert: Callable[[Any], float] = names.index if names else float
        gold, predicted = [convert(p.expected) for p in predictions], [convert(p.answer) for p in predictions]
        metrics, metric = self.task.measure(gold, predicted), self.task.metric
        correct = sum(bool(p.correct) for p in predictions) if names else None
        if metric == "accuracy" and correct is not None:
            low, high = wilson_interval(correct, len(predictions))
        else:
            low, high = bootstrap_interval(lambda g, p: self.task.measure(g, p)[metric], gold, predicted)
        return Score(
            n=len(predictions),
            correct=correct,
            metric=metric,
            value=metrics.pop(metric),
            low=low,
            high=high,
            seconds=seconds,
            majority=self._majority(splits),
            metrics=metrics,
            shortened=sum(p.shortened for p in predictions),
            scorer=self.spec.scorer,
        )


SCORERS: dict[str, Callable[..., Scorer]] = {
    "exact_match": GenerationScorer,
    "generation": GenerationScorer,
    "recall": RecallScorer,
    "likelihood": LikelihoodScorer,
    "classification": ClassificationScorer,
}
"""The scorers by the value of ``evaluation.scorer``."""


def _part(predictions: list[Prediction]) -> Part:
    n, correct = len(predictions), sum(bool(p.correct) for p in predictions)
    return Part(n, correct, sum(p.answer is None for p in predictions), correct / n, *wilson_interval(correct, n))


def _batches(lengths: list[int], batch_size: int, equal: bool, label: str) -> Iterator[list[int]]:
    """The indices of each batch. The longest inputs come first, so that a batch too large for memory fails at once.

    With ``equal`` all inputs of a batch have one length, for models whose output changes with padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    groups = [list(group) for _, group in groupby(order, lengths.__getitem__)] if equal else [order]
    with ProgressBar(label) as bar:
        done = 0
        for group in groups:
            for start in range(0, len(group), batch_size):
                bar.update(done, len(order))
                yield group[start : start + batch_size]
                done += len(group[start : start + batch_size])
        bar.update(len(order))
