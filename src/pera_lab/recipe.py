"""The one description of a run: model, method, task, training, evaluation."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from peft import PeftConfig
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pera.errors import UserError, nearest
from pera.optim import check_groups
from pera.tuner import PeraConfig
from pera_lab import methods
from pera_lab.embedded import EMBEDDED
from pera_lab.tasks import (
    CommonsenseTask,
    Example,
    GlueTask,
    Gsm8kTask,
    Labelled,
    OwnTask,
    ReasoningTask,
    Task,
    commonsense,
    divided,
    gsm8k,
    own,
    reasoning,
)
from pera_lab.tasks.base import Asked, AskedLabels
from pera_lab.tasks.glue import GLUE
from pera_lab.tasks.own import own_example
from pera_lab.tasks.prompts import CHAT, Frame
from pera_lab.tasks.sources import HUB, field


class Section(BaseModel):
    """A part of a recipe or of a study: unknown keys are refused, and booleans where numbers are meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_boolean_is_a_number(cls, value: Any, known: ValidatorFunctionWrapHandler) -> Any:
        found = known(value)
        if isinstance(value, bool) and found is not value:
            raise PydanticCustomError("number", "Input should be a number")
        return found


def _absolute(*words: str) -> AfterValidator:
    """Makes a path of this machine one that holds from every working folder; ``words`` have a meaning of their own."""

    def convert(name: str) -> str:
        path = Path(name).expanduser()
        return os.path.abspath(path) if name not in words and path.exists() else name

    return AfterValidator(convert)


class ModelSection(Section):
    """The base model. A recipe may give its name alone."""

    name: Annotated[str, _absolute(*EMBEDDED)]
    """An embedded model, a folder, a .gguf file or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is bfloat16 where the machine computes in it natively, else float32. Adapters are float32."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check_revision(self) -> ModelSection:
        if self.revision is not None and (self.name in EMBEDDED or Path(self.name).expanduser().exists()):
            raise ValueError(f"revision={self.revision!r} is for a hub id, and {self.name!r} is none; leave it out")
        return self


def _either(sentence: str) -> WrapValidator:
    """One sentence on a value that is neither of two kinds, where pydantic has one for each."""

    def check(value: Any, known: ValidatorFunctionWrapHandler) -> Any:
        try:
            return known(value)
        except ValidationError as error:
            raise PydanticCustomError("either", sentence) from error

    return WrapValidator(check)


Data = Annotated[str, _absolute(HUB)]


class _TaskSection(Section):
    """What all kinds of task have."""

    made: ClassVar[Callable[..., Task]]
    """What makes the task, of the name and, by their names, the other keys."""

    name: str

    def build(self) -> Task:
        """The examples and their scorer."""
        options = self.model_dump()
        return type(self).made(options.pop("name"), **options)

    def question(self, row: dict[str, Any]) -> Any:
        """A row of a user's file as an example without an answer; raises :class:`pera_lab.tasks.sources.BadRow`."""
        return own_example(row, answered=False)

    def asked(self, rows: list[Any]) -> Task:
        """A task of :meth:`question`'s rows, which puts them to the model as it was trained."""
        return Asked(rows, self.frame)

    @property
    def frame(self) -> Frame:
        """How a prompt is put to the model."""
        return CHAT


class ReasoningSection(_TaskSection):
    """Problems of a reasoning-gym data set."""

    made = ReasoningTask

    name: str
    """Name of a reasoning-gym data set."""
    train_size: int = Field(2000, ge=1)
    test_size: int = Field(200, ge=1)
    seed: int = Field(0, ge=0)
    """Draws other problems; the same for every seed of training, so that runs are comparable."""
    options: dict[str, Any] = {}
    """Further options of the data set."""


class GlueSection(_TaskSection):
    """A task of GLUE; :class:`pera_lab.tasks.GlueTask` explains the keys."""

    made = GlueTask

    name: str
    data: Data = HUB
    """A folder, or "hub"."""
    train_size: int | None = Field(None, ge=1)
    test_size: int | None = Field(None, ge=1)
    choose_size: int | None = Field(None, ge=0)
    """Validation rows that choose the checkpoint; by default 1,000 of more than 2,000, else half."""
    seed: int = Field(42, ge=0)
    """Divides the validation set, and draws rows where sizes are given."""

    def question(self, row: dict[str, Any]) -> Labelled:
        return Labelled(tuple(field(row, name) for name in GLUE[self.name].fields), 0)

    def asked(self, rows: list[Any]) -> Task:
        return AskedLabels(rows, GLUE[self.name].names)


class CommonsenseSection(_TaskSection):
    """Commonsense tasks; :class:`pera_lab.tasks.CommonsenseTask` explains the keys."""

    made = CommonsenseTask

    name: str
    """"commonsense", or one member alone."""
    names: list[str] | None = Field(None, min_length=1)
    """The members of the mix; by default all eight."""
    data: Data = HUB
    """A folder, a mixed file, or "hub"."""
    train_size: int | None = Field(None, ge=1)
    shares: Annotated[
        dict[str, Annotated[float, Field(ge=0, strict=True)]] | Literal["equal"] | None,
        _either("Input should be a number of at least 0 for each task, such as {boolq: 1, piqa: 3}, or 'equal'"),
    ] = None
    caps: dict[str, Annotated[int, Field(ge=1, strict=True)]] | None = None
    test_size: int | None = Field(None, ge=1)
    validation_size: int = Field(commonsense.VALIDATION, ge=0)
    validation_seed: int | None = Field(None, ge=0)
    protocol: Literal["llm-adapters", "hira"] = "hira"
    loss: Literal["answer", "all"] | None = None
    seed: int = Field(42, ge=0)

    def question(self, row: dict[str, Any]) -> Example:
        return own_example(
            row, {"prompt": "instruction"} if "instruction" in row else None, template="plain", answered=False
        )

    @property
    def frame(self) -> Frame:
        return commonsense.frame_of(self.protocol, self.loss)


class Gsm8kSection(_TaskSection):
    """GSM8K; :class:`pera_lab.tasks.Gsm8kTask` explains the keys."""

    made = Gsm8kTask

    name: str
    data: Data = HUB
    train_size: int | None = Field(None, ge=1)
    test_size: int | None = Field(None, ge=1)
    validation_size: int = Field(0, ge=0)
    annotations: bool = False
    seed: int = Field(42, ge=0)

    def question(self, row: dict[str, Any]) -> Example:
        return own_example(row, {"prompt": "question"} if "question" in row else None, answered=False)


class OwnSection(_TaskSection):
    """A user's own data; :class:`pera_lab.tasks.OwnTask` explains the keys."""

    made = OwnTask

    name: str
    data: Data
    """A file, a folder, or a hub id."""
    columns: dict[Literal["prompt", "completion", "messages"], str] = {}
    template: Literal["chat", "plain"] = "chat"
    train_size: int | None = Field(None, ge=1)
    test_size: int | None = Field(200, ge=1)
    validation_size: int = Field(0, ge=0)
    seed: int = Field(42, ge=0)

    def question(self, row: dict[str, Any]) -> Example:
        columns = {str(name): column for name, column in self.columns.items()}
        return own_example(row, columns, template=self.template, answered=False)

    @property
    def frame(self) -> Frame:
        return own.frame_of(self.template)


SECTIONS: dict[str, type[_TaskSection]] = {
    "reasoning": ReasoningSection,
    "glue": GlueSection,
    "commonsense": CommonsenseSection,
    "gsm8k": Gsm8kSection,
    "own": OwnSection,
}
"""The kinds of task. A recipe tells them apart by the task's name."""

_KINDS = {
    **dict.fromkeys(GLUE, "glue"),
    **dict.fromkeys((commonsense.ALL, *commonsense.MEMBERS), "commonsense"),
    gsm8k.NAME: "gsm8k",
    own.NAME: "own",
}


def _kind(task: Any) -> str:
    """The kind of a task section; any other name is taken for one of reasoning-gym."""
    name = task.get("name") if isinstance(task, dict) else getattr(task, "name", None)
    return _KINDS.get(str(name), "reasoning")


def _known_task(value: Any) -> Any:
    value = _name_alone(value)
    if isinstance(value, dict) and "data" in value and str(value.get("name")) not in _KINDS:
        name = str(value.get("name", ""))
        raise ValueError(f"name={name!r} is not a task that has data; {nearest(name, _KINDS)}")
    return value


def _name_alone(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


TaskSection = Annotated[
    Annotated[ReasoningSection, Tag("reasoning")]
    | Annotated[GlueSection, Tag("glue")]
    | Annotated[CommonsenseSection, Tag("commonsense")]
    | Annotated[Gsm8kSection, Tag("gsm8k")]
    | Annotated[OwnSection, Tag("own")],
    Discriminator(_kind),
    BeforeValidator(_known_task),
]
"""What is learned and what is asked. A recipe may give the task's name alone."""


class TrainingSection(Section):
    """How it is learned. Exactly one of ``max_steps`` and ``epochs``."""

    learning_rate: float = Field(1e-4, gt=0)
    lr_ratio: dict[str, float] = {}
    """Rates of "B", "h" and "other" over that of A, as in :func:`pera.optim.parameter_groups`."""
    max_steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    warmup_steps: int = Field(0, ge=0)
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Warm-up as a share of all steps, in the place of ``warmup_steps``."""
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: float | dict[str, float] = 0.0
    """For all parameters, or by group, as in :func:`pera.optim.parameter_groups`."""
    max_grad_norm: float = Field(1.0, ge=0)
    gradient_checkpointing: bool = False
    train_share: float = Field(1.0, gt=0, le=1)
    """Share of the training rows that is used."""
    held_out: int = Field(0, ge=0)
    """Training rows that are scored in the place of the test rows, and not trained on; to choose settings by."""
    group_by_length: bool = False
    """Batches of examples of about one length, drawn at random: less padding, another order."""
    max_length: int = Field(1024, ge=1)
    """Longer training examples, in tokens, are left out and counted; texts to classify are cut and counted."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Covers initialisation, data order and dropout."""
    logging_steps: int = Field(10, ge=1)
    save_steps: int = Field(50, ge=1)
    """Steps between checkpoints."""
    eval_steps: Annotated[
        Annotated[int, Field(ge=1)] | Literal["epoch"] | None,
        _either("Input should be a whole number of at least 1, or 'epoch'"),
    ] = None
    """Steps between measurements on the task's validation rows, or "epoch"; by default there are none."""
    keep: Literal["last", "best"] = "last"
    """The adapter after the last step, or the best one measured on the validation rows: by loss, for classification by
    the task's metric. Checkpoints are then saved with each measurement."""
    report_to: list[str] = []
    """Trackers passed on to transformers: tensorboard, trackio, wandb."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of max_steps and epochs")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give one of warmup_steps and warmup_ratio")
        if self.lr_scheduler == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError("lr_scheduler='constant' has no warm-up; give 'constant_with_warmup', or no warm-up")
        if self.keep == "best" and self.eval_steps is None:
            raise ValueError("keep='best' needs eval_steps, the steps between measurements, or 'epoch'")
        return self

    @model_validator(mode="before")
    @classmethod
    def _check_groups(cls, section: Any) -> Any:
        if isinstance(section, dict):
            check_groups(section.get("lr_ratio", {}), section.get("weight_decay", 0.0))
        return section


class EvaluationSection(Section):
    """How answers are scored."""

    scorer: Literal["exact_match", "generation", "likelihood", "classification"] = "exact_match"
    """"exact_match": an answer counts as right if the task's own scorer gives it full marks. "generation": the first of
    the task's answers that occurs in what the model writes. "likelihood": the option of the highest log-probability.
    "classification": the class, or the number, of the head. Figures of two scorers are not comparable."""
    batch_size: int = Field(32, ge=1)
    max_new_tokens: int | None = Field(16, ge=1)
    """Longest answer; by default as :data:`ANSWERS` says, nothing for classification."""
    num_beams: int | None = Field(1, ge=1)
    """Beams of the search for an answer; 1 is greedy. Nothing for classification."""


_SCORERS: dict[str, tuple[str, ...]] = {
    "reasoning": ("exact_match",),
    "glue": ("classification",),
    "commonsense": ("generation", "likelihood"),
    "gsm8k": ("exact_match",),
    "own": ("exact_match",),
}
"""The scorers of each kind of task, the default first."""

ANSWERS = {"reasoning": 16, "commonsense": 16, "gsm8k": 512, "own": 256}
"""Tokens of the longest answer, by default, of each kind of task in which one is written."""

_WRITING = ("max_new_tokens", "num_beams")


class Recipe(Section):
    """A run, completely described. :func:`load_recipe` reads one."""

    name: str
    """Names the run folder; by default the file's name."""
    model: Annotated[ModelSection, BeforeValidator(_name_alone)]
    method: dict[str, Any]
    """``name``, a name in :func:`pera_lab.methods.known_methods`, and that method's options."""
    task: TaskSection
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="before")
    @classmethod
    def _evaluation_of_the_task(cls, content: Any) -> Any:
        """Fill in the scorer and the longest answer that the kind of task has by default."""
        if not isinstance(content, dict) or not isinstance(content.get("evaluation", {}), dict):
            return content
        kind = _kind(_name_alone(content.get("task")))
        written = {"max_new_tokens": ANSWERS[kind]} if kind in ANSWERS else dict.fromkeys(_WRITING)
        return {**content, "evaluation": {"scorer": _SCORERS[kind][0], **written, **content.get("evaluation", {})}}

    @model_validator(mode="after")
    def _check_evaluation(self) -> Recipe:
        kind, spec = _kind(self.task), self.evaluation
        if spec.scorer not in _SCORERS[kind]:
            right = " or ".join(map(repr, _SCORERS[kind]))
            raise ValueError(f"evaluation.scorer={spec.scorer!r} does not fit task {self.task.name!r}; give {right}")
        for key in _WRITING:
            if kind == "glue" and getattr(spec, key) is not None:
                raise ValueError(f"evaluation.{key}={getattr(spec, key)}: a classifier writes nothing; leave it out")
            if kind != "glue" and getattr(spec, key) is None:
                raise ValueError(f"evaluation.{key}=None should be a number")
        return self

    @model_validator(mode="after")
    def _check_method(self) -> Recipe:
        if not isinstance(self.method.get("name"), str):
            raise ValueError(f"method.name is missing; {nearest('', methods.known_methods())}")
        config = self.peft_config()
        if not (isinstance(config, PeraConfig) and config.learns_coefficients):
            for key in ("lr_ratio", "weight_decay"):
                value = getattr(self.training, key)
                if isinstance(value, dict) and "h" in value:
                    raise ValueError(
                        f"training.{key}.h={value['h']} has no h to act on, which only pera trains, "
                        "with coefficients='learned' and terms other than 'none'; leave it out."
                    )
        return self

    def peft_config(self) -> PeftConfig:
        """The configuration of the adapter."""
        return methods.peft_config(
            self.method["name"], self.task_type, **{key: value for key, value in self.method.items() if key != "name"}
        )

    @property
    def task_type(self) -> str:
        """PEFT's name of what the model is trained for."""
        return "SEQ_CLS" if _kind(self.task) == "glue" else "CAUSAL_LM"

    def build_task(self) -> Task:
        """The examples and their scorer."""
        return divided(self.task.build(), share=self.training.train_share, held_out=self.training.held_out)

    def with_scorer(self, scorer: str | None) -> Recipe:
        """The recipe with another scorer.

        Raises:
            UserError: it does not fit the task.
        """
        if scorer is None:
            return self
        content = self.model_dump(mode="json")
        return parse_recipe({**content, "evaluation": {**content["evaluation"], "scorer": scorer}})

    def to_yaml(self) -> str:
        """The recipe with every default filled in."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text


def load_recipe(source: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        source: path of a YAML file, or the name of a recipe that ships with pera.
        overrides: ``key.subkey=value`` each; the value is read as YAML. ``data=`` stands for ``task.data=``, and
            ``task=NAME`` for ``task.name=NAME``. What the file says under ``by_task`` of the task that is then asked
            for goes before the rest of the file, and after the overrides.

    Raises:
        UserError: no such recipe, not YAML, an unknown key or task in ``by_task`` (the nearest known one is named), a
            value that does not fit.
    """
    if os.path.isfile(Path(source) / "recipe.yaml"):
        raise UserError(
            f"recipe: {source!r} is a run; go on with --resume, or give {source}/recipe.yaml to start anew."
        )
    name, content = read_yaml(source, "recipe", "recipes")
    by_task = content.pop("by_task", {})
    if not isinstance(by_task, dict) or not all(isinstance(section, dict) for section in by_task.values()):
        raise UserError(f"recipe: by_task in {source!r} should hold sections of the recipe by name of the task.")
    unknown = [key for key in by_task if key not in _KINDS and key not in reasoning.names()]
    if unknown:
        known = nearest(unknown[0], {*_KINDS, *reasoning.names()})
        raise UserError(f"recipe: by_task.{unknown[0]} in {source!r} is not the name of a task; {known}")
    task = _name_alone(_overridden(content, overrides).get("task"))
    if isinstance(task, dict) and str(task.get("name")) in by_task:
        content = _merged(content, by_task[str(task["name"])])
    return parse_recipe({"name": name, **_overridden(content, overrides)})


def _overridden(content: dict[str, Any], overrides: list[str] | None) -> dict[str, Any]:
    content = copy.deepcopy(content)
    for override in overrides or []:
        apply_override(content, override)
    return content


def _merged(content: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``content`` with the keys of ``other``, section by section."""
    return content | {
        key: _merged(content[key], value) if isinstance(value, dict) and isinstance(content.get(key), dict) else value
        for key, value in other.items()
    }


def read_yaml(source: str, kind: str, shipped: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the YAML file ``source``, or of the one of that name in pera's folder ``shipped``; ``kind``
    says in messages what it is.

    Raises:
        UserError: no such file, not YAML, no keys and values.
    """
    path = Path(source)
    known = shipped_files(shipped)
    if os.path.isfile(path):
        text, name = _read(path, kind), path.stem
    elif source in known:
        text, name = (resources.files("pera_lab") / shipped / f"{source}.yaml").read_text(encoding="utf-8"), source
    elif path.suffix in (".yaml", ".yml") or "/" in source:
        raise UserError(f"{kind}: file {source!r} does not exist.")
    else:
        raise UserError(f"{kind}: {source!r} is no file and no {kind} of pera's; {nearest(source, known)}")
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{kind}: {source!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        example = "model: smollm2-135m" if kind == "recipe" else "base: quickstart"
        raise UserError(f"{kind}: {source!r} should hold keys and values, such as {example}.")
    return name, content


def _read(path: Path, kind: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{kind}: {str(path)!r} is not a text file that can be read: {error}.") from error


def parse_recipe(content: dict[str, Any]) -> Recipe:
    """A recipe from its content; raises :class:`UserError` as :func:`load_recipe` does."""
    return parse(Recipe, content, "recipe")


M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], content: dict[str, Any], kind: str) -> M:
    """``content`` as a ``model``; every mistake in it is named in one sentence of a :class:`UserError`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError("; ".join(_sentence(e, model, kind) for e in error.errors())) from error


def difference(a: Recipe, b: Recipe) -> str | None:
    """The first key in which two recipes differ, their names apart; None if they are the same."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for key, below in value.items() for k, v in flat(below, f"{prefix}.{key}".lstrip(".")).items()}

    x, y = flat(a.model_dump(exclude={"name"})), flat(b.model_dump(exclude={"name"}))
    return next((key for key in {**x, **y} if x.get(key) != y.get(key)), None)


def shipped_recipes() -> list[str]:
    """Names of the recipes that ship with pera."""
    return shipped_files("recipes")


def shipped_files(folder: str) -> list[str]:
    """Names of the YAML files in a folder of pera's."""
    return sorted(f.name.removesuffix(".yaml") for f in (resources.files("pera_lab") / folder).iterdir())


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which 1e-3 is a number, as in YAML 1.2, and a key given twice is a mistake, as is {boolq:1}, which
    has the key "boolq:1" and no value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, value in node.value:
            if value.value == "" and value.style is key.style is None and ":" in key.value:
                raise yaml.YAMLError(f"{key.value!r} has no value; a space belongs behind its colon")
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one key of a recipe's content, given as ``key.subkey=value``."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} should have the form key.subkey=value.")
    *parents, last = ["task", "data"] if key == "data" else key.split(".")
    section = content
    for parent in parents:
        below = section.setdefault(parent, {})
        if isinstance(below, str) and parent in ("model", "task"):  # the short form, a name alone
            below = section[parent] = {"name": below}
        if not isinstance(below, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section.")
        section = below
    try:
        new = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or error
        raise UserError(f"override {override!r}: the value is not valid YAML: {reason}.") from error
    if key == "task" and isinstance(new, str) and isinstance(section.get("task"), dict):
        section["task"]["name"] = new  # another task of the same recipe
    else:
        section[last] = new


def _sentence(error: Any, model: type[BaseModel], what: str) -> str:
    location = error["loc"]
    kind = location[1] if location[0:1] == ("task",) and location[1:2] and location[1] in SECTIONS else None
    where = ".".join(str(part) for part in location if part != kind)
    if error["type"] == "extra_forbidden":
        known = SECTIONS[kind].model_fields if kind else _known_keys(model, location[:-1])
        return f"{where} is not a key of a {what}; {nearest(str(location[-1]), known)}"
    if error["type"] == "missing":
        return f"{where} is missing in the {what}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}={error['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    section: Any = model
    for part in location:
        if not isinstance(part, int):  # the place in a list
            section = section.model_fields[part].annotation
        section = next(iter(get_args(section)), section)
    return list(section.model_fields)
