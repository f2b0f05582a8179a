"""What every task declares. A family of tasks is one class, and that class is also the ``task`` section of a recipe.

The two base classes hold everything that differs between a language model and a classifier:
:class:`GenerationTask` trains a model that writes answers, :class:`ClassificationTask` a model with a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pera_lab.sections import Section
from pera_lab.tasks.conversations import example_of, fitted, with_reply
from pera_lab.tasks.encoding import (
    CHARACTERS,
    CHAT,
    AnswerCollator,
    Encoded,
    Frame,
    PaddingCollator,
    as_written,
    encode_example,
    encode_texts,
)
from pera_lab.tasks.examples import Example, Splits, Verdict

LOOKED_AT = 10_000
"""Training examples whose answers are compared with what the tokenizer writes."""


class EvaluationSection(Section):
    """How answers are scored. The task decides the defaults and the scorers that fit."""

    scorer: str = "exact_match"
    """"exact_match": the task judges the text that the model writes. "generation": the first of the task's answers that
    occurs in that text counts. "likelihood": the option with the highest log-probability counts. "classification": the
    class, or the number, from the head. "recall": the answer must equal the output, and the stored bits are counted.
    Scores of different scorers are not comparable."""
    batch_size: int = Field(32, ge=1, le=10**6)
    """Prompts answered at a time."""
    max_new_tokens: int | None = Field(16, ge=1, le=10**6)
    """Longest answer in tokens. None for classification."""
    num_beams: int | None = Field(1, ge=1, le=1000)
    """Beams of the search for an answer; 1 is greedy. None for classification."""


class Task(Section):
    """A family of tasks. Its fields are the keys of the recipe's ``task`` section."""

    task_names: ClassVar[tuple[str, ...]] = ()
    """Values of ``task.name`` that belong to this family."""
    task_type: ClassVar[str]
    """PEFT's name of what the model is trained for."""
    scorers: ClassVar[tuple[str, ...]]
    """Values of ``evaluation.scorer`` that fit, the default first."""
    recalls: ClassVar[bool] = False
    """Whether the test rows are the training rows, because the task measures what is remembered."""

    name: str
    """Name of the task."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not cls.serves(name):
            raise ValueError(f"{name!r} is not a task of {cls.__name__}")
        return name

    @classmethod
    def serves(cls, name: str) -> bool:
        """Whether ``name`` is a task of this family. A name in ``task_names`` of another family goes to that family."""
        return name in cls.task_names

    @classmethod
    def known_names(cls) -> Collection[str]:
        """Names to suggest if ``task.name`` is unknown."""
        return cls.task_names

    # Data

    def build(self) -> Splits:
        """Read or generate the examples."""
        raise NotImplementedError

    def question(self, row: dict[str, Any]) -> Any:
        """A row of a user's file as an example without an answer.

        Raises:
            BadRow: a field is missing or has a wrong value.
        """
        raise NotImplementedError

    @property
    def drawn_by_seed(self) -> bool:
        """Whether another ``task.seed`` draws other examples altogether, as for generated data. A study of a task that
        recalls its training rows needs this: it chooses rates on other rows than it reports."""
        return False

    # Model and training

    @property
    def labels(self) -> int | None:
        """Outputs of the classification head (1 for a regression), or None for a language model."""
        return None

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Any], max_length: int | None = None
    ) -> Encoded:
        """Examples as rows of token ids with ``labels``.

        Args:
            tokenizer: the tokenizer of the model.
            examples: examples of this task.
            max_length: longest row in tokens. A language model leaves longer examples out, because the answer is at the
                end; a classifier truncates them.
        """
        raise NotImplementedError

    def check(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Any]) -> None:
        """Check that examples can be encoded, before a training whose model would be scored on them.

        Raises:
            UserError: the chat template rejects an example, or leaves out a part of it.
        """

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
        """The function that makes a batch of rows from :meth:`encode`."""
        raise NotImplementedError

    def tokenizer_notes(self, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> list[str]:
        """Warnings about what the tokenizer changes in the examples."""
        return []

    @property
    def compute_metrics(self) -> Callable[[Any], dict[str, float]] | None:
        """Metrics for the Trainer from logits and labels of the validation rows; None to compute the loss only."""
        return None

    @property
    def best_checkpoint(self) -> tuple[str, bool]:
        """The value that chooses the best checkpoint, and whether greater is better."""
        return "loss", False

    def pretrained_part(self, model: nn.Module) -> nn.Module:
        """The part of a base model that was pretrained, which its fingerprint covers."""
        return model

    # Evaluation

    @property
    def metric(self) -> str:
        """Name of the main metric."""
        return "accuracy"

    @property
    def members(self) -> tuple[str, ...]:
        """The groups of a mix, including groups without data."""
        return ()

    @classmethod
    def evaluation_defaults(cls) -> dict[str, Any]:
        """Defaults of the recipe's ``evaluation`` section."""
        return {"scorer": cls.scorers[0]}

    def check_evaluation(self, spec: EvaluationSection) -> None:
        """Check that an ``evaluation`` section fits this task.

        Raises:
            ValueError: the scorer does not fit, or an option has no use or no value.
        """
        if spec.scorer not in self.scorers:
            right = " or ".join(map(repr, self.scorers))
            raise ValueError(f"evaluation.scorer={spec.scorer!r} does not fit task {self.name!r}; give {right}")

    def prompt_limit(self, max_length: int) -> int | None:
        """Longest prompt in tokens of a model that was trained with ``max_length``; None leaves it to the model."""
        return None

    @property
    def base_refusal(self) -> str | None:
        """Why the base model without an adapter cannot answer; None if it can."""
        return None

    @property
    def text_refusal(self) -> str | None:
        """Why the model cannot write text; None if it can."""
        return None

    def majority(self, splits: Splits) -> float | None:
        """Baseline: the metric if every test row gets the most common training answer; None if there is none."""
        raise NotImplementedError


class GenerationTask(Task):
    """A task for a causal language model: a prompt in, text out. Examples are :class:`Example`."""

    task_type: ClassVar[str] = "CAUSAL_LM"
    scorers: ClassVar[tuple[str, ...]] = ("exact_match",)
    max_new_tokens: ClassVar[int] = 16
    """Default length of an answer in tokens."""
    prefix: ClassVar[str] = ""
    """Text that all answers begin with. The likelihood scorer ranks what follows it."""

    @property
    def frame(self) -> Frame:
        """How a prompt is presented to the model."""
        return CHAT

    def judge(self, example: Example, output: str) -> Verdict:
        """The answer in an output, and whether it is right. By default the output must equal the answer, ignoring white
        space at both ends."""
        return Verdict(output, output.strip() == example.answer.strip())

    def information(self, example: Example) -> float | None:
        """Bits of a right answer: log2 of the number of equally likely answers. None if that number is unknown."""
        return None

    def question(self, row: dict[str, Any]) -> Example:
        return example_of(row, answered=False)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Any], max_length: int | None = None
    ) -> Encoded:
        most = None if max_length is None else CHARACTERS * max_length
        tried = [example for example in examples if most is None or example.characters <= most]
        encoded = (encode_example(tokenizer, example, self.frame) for example in tried)
        rows = [row for row in encoded if max_length is None or len(row["input_ids"]) <= max_length]
        return Encoded(rows, len(examples) - len(rows), 0)

    def check(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Any]) -> None:
        for example in examples:
            with_reply(tokenizer, fitted(tokenizer, example))

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
        return AnswerCollator(tokenizer, model)

    def tokenizer_notes(self, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> list[str]:
        examples = [*splits.train[:LOOKED_AT], *splits.validation, *splits.test]
        answers = list(dict.fromkeys(e.answer for e in examples if not e.reply))
        pairs = list(zip(answers, as_written(tokenizer, answers), strict=True))
        changed = [(answer, found) for answer, found in pairs if found is not None and found != answer.strip()]
        lost = [answer for answer, found in pairs if found is None]
        options = {e.options for e in examples if e.options}
        same = [each for each in options if len(set(map(str, as_written(tokenizer, each)))) < len(each)]
        number = f"{len(answers)}" if len(splits.train) <= LOOKED_AT else f"the first {len(answers):,}"
        return [
            *(
                f"the tokenizer changes {len(changed)} of {number} answers, such as {answer!a:.60} to "
                f"{found!a:.60}; they are scored by what it writes."
                for answer, found in changed[:1]
            ),
            *(
                f"{len(lost)} of {number} answers hold unknown characters or the text of a special token, such "
                f"as {answer!a:.60}; the tokenizer cannot write them."
                for answer in lost[:1]
            ),
            *(f"the tokenizer writes two of the options {each!a:.60} alike; no scorer can tell." for each in same[:1]),
        ]

    @classmethod
    def evaluation_defaults(cls) -> dict[str, Any]:
        return {**super().evaluation_defaults(), "max_new_tokens": cls.max_new_tokens}

    def check_evaluation(self, spec: EvaluationSection) -> None:
        super().check_evaluation(spec)
        for key in ("max_new_tokens", "num_beams"):
            if getattr(spec, key) is None:
                raise ValueError(f"evaluation.{key}=None should be a number")

    def majority(self, splits: Splits) -> float | None:
        """Mean accuracy over the groups of the most common training answer of each group; None for free text."""
        if not all(example.options for example in splits.test):
            return None
        answers: dict[str, Counter[str]] = {}
        for example in splits.train:
            answers.setdefault(example.group, Counter())[example.answer] += 1
        tested: dict[str, list[bool]] = {}
        for example in splits.test:
            if example.group not in answers:  # a mixed training file does not say which member a row belongs to
                return None
            commonest = answers[example.group].most_common(1)[0][0]
            tested.setdefault(example.group, []).append(commonest == example.answer)
        return sum(sum(right) / len(right) for right in tested.values()) / len(tested)


class ClassificationTask(Task):
    """A task for an encoder with a head: texts in, a class or a number out. Examples are :class:`LabelledText`."""

    task_type: ClassVar[str] = "SEQ_CLS"
    scorers: ClassVar[tuple[str, ...]] = ("classification",)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes. Empty for a regression, whose label is a real number."""
        raise NotImplementedError

    def measure(self, gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
        """All metrics of the task.

        Args:
            gold: the labels.
            predicted: for each label the predicted class index or number.
        """
        raise NotImplementedError

    def predicted_label(self, logits: Sequence[float]) -> float:
        """The class index, or the number, that the outputs of the head mean."""
        return max(range(len(logits)), key=logits.__getitem__) if self.classes else logits[0]

    @property
    def labels(self) -> int:
        return len(self.classes) or 1

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Any], max_length: int | None = None
    ) -> Encoded:
        kind = int if self.classes else float
        pairs = [encode_texts(tokenizer, row.texts, max_length) for row in examples]
        rows = [{**encoded, "labels": kind(row.label)} for (encoded, _), row in zip(pairs, examples, strict=True)]
        return Encoded(rows, 0, sum(cut for _, cut in pairs))

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
        return PaddingCollator(tokenizer, model)

    @property
    def compute_metrics(self) -> Callable[[Any], dict[str, float]]:
        def compute(prediction: Any) -> dict[str, float]:
            predicted = [self.predicted_label(logits) for logits in prediction.predictions.tolist()]
            return self.measure(prediction.label_ids.tolist(), predicted)

        return compute

    @property
    def best_checkpoint(self) -> tuple[str, bool]:
        return self.metric, True

    def pretrained_part(self, model: nn.Module) -> nn.Module:
        """Everything except the head, which is new and differs by seed."""
        return model.base_model  # type: ignore[return-value]

    @classmethod
    def evaluation_defaults(cls) -> dict[str, Any]:
        return {**super().evaluation_defaults(), "max_new_tokens": None, "num_beams": None}

    def check_evaluation(self, spec: EvaluationSection) -> None:
        super().check_evaluation(spec)
        for key in ("max_new_tokens", "num_beams"):
            if (value := getattr(spec, key)) is not None:
                raise ValueError(f"evaluation.{key}={value}: {self.text_refusal}; leave it out")

    def prompt_limit(self, max_length: int) -> int | None:
        return max_length

    @property
    def base_refusal(self) -> str:
        return f"The base model of {self.name!r} has no trained head, so it has no score and makes no predictions."

    @property
    def text_refusal(self) -> str:
        return f"task {self.name!r} trains a classifier, which writes no text"

    def majority(self, splits: Splits) -> float:
        """The metric if every test row gets the most common training label, or the mean label of a regression."""
        gold = [row.label for row in splits.train]
        constant = Counter(gold).most_common(1)[0][0] if self.classes else sum(gold) / len(gold)
        return self.measure([row.label for row in splits.test], [constant] * len(splits.test))[self.metric]
