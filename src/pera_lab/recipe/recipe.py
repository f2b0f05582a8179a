"""The complete description of a run: model, method, task, training and evaluation."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pera.errors import UserError, nearest
from pera.tuner import PeraConfig
from pera_lab import methods
from pera_lab.embedded import EMBEDDED
from pera_lab.files import user_path
from pera_lab.placement import Attention, DeviceMap
from pera_lab.quantization import Quantization
from pera_lab.recipe.syntax import write
from pera_lab.recipe.training import TrainingSection
from pera_lab.recipe.yaml import apply_overrides, parse, read_yaml
from pera_lab.sections import GrownSection, Section, absolute_path, flatten, name_alone
from pera_lab.tasks import EvaluationSection, Splits, Task, known_names, parse_task, subsample
from pera_lab.tasks.registry import declared_names


class ModelSection(GrownSection):
    """The base model. A recipe can give the name alone."""

    newer = ("quantization", "attn_implementation", "device_map")

    name: Annotated[str, absolute_path(*EMBEDDED)]
    """Name of an embedded model, a folder, a .gguf file or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is bfloat16 if the hardware supports it natively, else float32. Adapters are always float32."""
    quantization: Quantization | None = None
    """Quantize the linear layers while loading: nf4 or fp4 (4 bits, double quantization), int8 (LLM.int8()) or
    torchao-int8 (weights only). ``dtype`` is then the dtype of the computation."""
    attn_implementation: Attention | None = None
    """How attention is computed; by default as transformers chooses."""
    device_map: DeviceMap | None = None
    """How layers are placed on several accelerators, which compute one after another; by default all are on one."""
    trust_remote_code: bool = False
    """Whether to run code that comes with the model."""

    @model_validator(mode="after")
    def _check_revision(self) -> ModelSection:
        if self.revision is not None and (self.name in EMBEDDED or os.path.exists(user_path(self.name))):
            raise ValueError(f"revision={self.revision!r} needs a Hub id, and {self.name!r} is not one; leave it out")
        return self


class Recipe(Section):
    """The complete description of a run. :func:`load_recipe` reads one."""

    name: str
    """Names the run folder; by default the name of the recipe file."""
    model: Annotated[ModelSection, BeforeValidator(name_alone)]
    """The base model."""
    method: dict[str, Any]
    """``name``, a name in :func:`pera_lab.methods.known_methods`, and that method's options."""
    task: Annotated[SerializeAsAny[Task], PlainValidator(parse_task)]
    """What is learned: the name of a task alone, or a section with ``name`` and the options of its family."""
    training: TrainingSection
    """How the adapter is trained."""
    evaluation: EvaluationSection = Field(default_factory=dict, validate_default=True)
    """How answers are scored; by default as the task says."""

    @field_validator("evaluation", mode="before")
    @classmethod
    def _add_defaults_of_the_task(cls, value: Any, info: ValidationInfo) -> Any:
        task = info.data.get("task")
        return {**task.evaluation_defaults(), **value} if isinstance(value, dict) and task is not None else value

    @model_validator(mode="after")
    def _check_evaluation(self) -> Recipe:
        self.task.check_evaluation(self.evaluation)
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
                        f"training.{key}.h={value['h']} has no effect, because only pera trains h, "
                        "with coefficients='learned' and terms other than 'none'; leave it out."
                    )
        return self

    @model_validator(mode="after")
    def _check_packing(self) -> Recipe:
        if self.training.packing and self.task.task_type != "CAUSAL_LM":
            raise ValueError(
                f"training.packing=true needs a language model, and task {self.task.name!r} trains a classifier; leave "
                "it out."
            )
        return self

    @model_validator(mode="after")
    def _check_quantization(self) -> Recipe:
        kind, config = self.model.quantization, self.peft_config()
        if kind is None:
            return self
        if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
            raise ValueError(
                f"model.quantization={kind!r}: method.name={self.method['name']!r} trains the weights of the base "
                "model, which are packed then; give an adapter such as pera or lora, or leave quantization out."
            )
        init = getattr(config, "init_lora_weights", None)
        if str(init).lower().startswith(("pissa", "olora")):
            raise ValueError(
                f"model.quantization={kind!r}: method.init_lora_weights={init!r} decomposes the base model, which "
                "would give another adapter after a merge; leave one of them out."
            )
        if kind == "torchao-int8" and config.peft_type not in ("PERA", "LORA"):
            raise ValueError(
                f"model.quantization={kind!r}: method.name={self.method['name']!r} does not support torchao's weights; "
                "give pera or lora, or model.quantization=int8."
            )
        return self

    def peft_config(self) -> PeftConfig:
        """The PEFT configuration of the adapter."""
        return methods.peft_config(
            self.method["name"],
            self.task.task_type,
            **{key: value for key, value in self.method.items() if key != "name"},
        )

    def build_splits(self) -> Splits:
        """The examples of the task, with the rows that ``training`` asks for."""
        return subsample(self.task.build(), share=self.training.train_share, held_out=self.training.held_out)

    def with_scorer(self, scorer: str | None) -> Recipe:
        """The recipe with another scorer; None keeps the recipe's. UserError if the scorer does not fit the task."""
        if scorer is None:
            return self
        content = self.model_dump(mode="json")
        return parse_recipe({**content, "evaluation": {**content["evaluation"], "scorer": scorer}})

    def to_yaml(self) -> str:
        """The recipe with every default filled in."""
        return write(self.model_dump(mode="json"))

    def record(self) -> str:
        """The text of ``recipe.yaml`` in a run folder: every default is filled in, and comments show the method's."""
        options = methods.other_options(self.method, self.peft_config())
        lines = [f"# {line}" for line in write(options).splitlines()] if options else []
        return self.to_yaml() + "".join(f"{line}\n" for line in ["# All other options of the method:", *lines] if lines)

    def check_effects(self) -> None:
        """Check that no key is set to a value that changes nothing.

        The recipe of an existing run is not checked, so that a run of an earlier version can be read.

        Raises:
            UserError: a key has no effect.
        """
        training, keys = self.training, type(self.task).model_fields
        rows = getattr(self.task, "validation_size", 0)
        if training.eval_steps is None and rows and keys["validation_size"].default == 0:
            raise UserError(
                f"task.validation_size={rows} takes rows out of the training that nothing uses, because "
                "training.eval_steps is not set; set it, or leave validation_size out."
            )


def load_recipe(source: str, overrides: list[str] | None = None, *, recorded: bool = False) -> Recipe:
    """Read a recipe.

    Args:
        source: path of a YAML file, or the name of a recipe that ships with pera.
        overrides: changes of single keys, as in :func:`apply_overrides`. Overrides come before the section of
            ``by_task`` for the chosen task, and that section comes before the rest of the file.
        recorded: whether the file is the record of an existing run, in which a key without effect is no mistake.

    Raises:
        UserError: the recipe does not exist or is not YAML, a key or a task is unknown (the message suggests the
            nearest one), a value does not fit, or a key has no effect.
    """
    if os.path.isfile(Path(source) / "recipe.yaml"):
        raise UserError(
            f"recipe: {source!r} is a run; resume it with --resume, or give {source}/recipe.yaml to start a new run."
        )
    name, content = read_yaml(source, "recipe", "recipes")
    by_task = content.pop("by_task", {})
    if not isinstance(by_task, dict) or not all(isinstance(section, dict) for section in by_task.values()):
        raise UserError(f"recipe: by_task in {source!r} should hold sections of a recipe, by the name of a task.")
    for key in by_task:
        if key not in declared_names() and key not in (known := known_names()):
            raise UserError(f"recipe: by_task.{key} in {source!r} is not the name of a task; {nearest(key, known)}")
    task = name_alone(_overridden(content, overrides).get("task"))
    if isinstance(task, dict) and str(task.get("name")) in by_task:
        content = _merged(content, by_task[str(task["name"])])
    recipe = parse_recipe({"name": name, **_overridden(content, overrides)})
    if not recorded:
        recipe.check_effects()
    return recipe


def _overridden(content: dict[str, Any], overrides: list[str] | None) -> dict[str, Any]:
    content = copy.deepcopy(content)
    apply_overrides(content, overrides or [])
    return content


def _merged(content: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``content`` with the keys of ``other``, section by section."""
    return content | {
        key: _merged(content[key], value) if isinstance(value, dict) and isinstance(content.get(key), dict) else value
        for key, value in other.items()
    }


def parse_recipe(content: dict[str, Any]) -> Recipe:
    """A recipe from its content; UserError as for :func:`load_recipe`."""
    return parse(Recipe, content, "recipe")


def difference(a: Recipe, b: Recipe) -> str | None:
    """The first key in which two recipes differ, not counting their names; None if they are equal."""
    x, y = (
        {key: value for key, value in flatten(recipe.model_dump(exclude={"name"})).items() if value != {}}
        for recipe in (a, b)
    )
    return next((key for key in {**x, **y} if x.get(key) != y.get(key)), None)
