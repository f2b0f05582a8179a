"""Families of tasks come from entry points; a name belongs to one of them."""

from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace

import pytest

from pera.errors import UserError
from pera_lab import plugins
from pera_lab.recipe import parse_recipe
from pera_lab.tasks import GenerationTask, families, family_of, registry
from pera_lab.tasks.glue import GlueTask
from pera_lab.tasks.reasoning import ReasoningTask


class Backwards(GenerationTask):
    task_names = ("backwards",)
    size: int = 3


class Mnli(GenerationTask):
    task_names = ("mnli",)


class Anything(GenerationTask):
    @classmethod
    def serves(cls, name):
        return True


NOT_A_TASK = 3


@pytest.fixture
def install(monkeypatch):
    """Adds an entry point of another package."""

    def add(value):
        entry = EntryPoint("words", value, registry.GROUP)
        object.__setattr__(entry, "dist", SimpleNamespace(name="pera-words"))
        found = {registry.GROUP: [*entry_points(group=registry.GROUP), entry]}
        monkeypatch.setattr(plugins, "entry_points", lambda group: found.get(group) or entry_points(group=group))
        families.cache_clear()

    yield add
    families.cache_clear()


def test_pera_registers_its_own_families():
    assert set(families()) >= {"commonsense", "glue", "gsm8k", "own", "reasoning"}


def test_a_name_that_no_family_declares_is_one_of_reasoning_gym():
    assert (family_of("mnli"), family_of("leg_counting")) == (GlueTask, ReasoningTask)


def test_a_family_of_another_package_is_a_section_of_a_recipe(install):
    install(f"{__name__}:Backwards")
    content = {"name": "x", "model": "a/b", "method": {"name": "lora"}, "training": {"max_steps": 1}}
    recipe = parse_recipe({**content, "task": {"name": "backwards", "size": 4}})
    assert recipe.task == Backwards(name="backwards", size=4)
    assert recipe.model_dump()["task"] == {"name": "backwards", "size": 4}
    with pytest.raises(UserError, match=r"^task\.siez is not a key of a recipe; did you mean 'size'\?$"):
        parse_recipe({**content, "task": {"name": "backwards", "siez": 4}})


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (f"{__name__}:NOT_A_TASK", r"of package 'pera-words' should be a class derived from Task\.$"),
        (f"{__name__}:Mnli", r"^pera\.tasks: packages 'pera' and 'pera-words' both define 'mnli'; uninstall"),
        (f"{__name__}:Anything", r"^name='leg_counting' is served by both ReasoningTask and Anything\.$"),
    ],
)
def test_a_family_that_cannot_be_used_is_an_error(value, sentence, install):
    install(value)
    with pytest.raises(UserError, match=sentence):
        family_of("leg_counting")


def test_a_class_accepts_the_names_of_its_family_only():
    with pytest.raises(ValueError, match="'sst-2' is not a task of GlueTask"):
        GlueTask(name="sst-2")
