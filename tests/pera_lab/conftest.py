"""Fixtures of the laboratory's tests: recipes, trained runs, and the command."""

import json
import shutil
import sys
from typing import NamedTuple

import pytest

from pera_lab import cli, progress, scorers
from pera_lab.recipe import load_recipe
from pera_lab.runs import Run
from pera_lab.training import train

RECIPE = """
model: {name: MODEL, dtype: float32}
method:
  name: pera
  r: 4
  normalization: rms
  init_coefficients: 0.3
  dropout: 0.1
  target_modules: [q_proj, v_proj, up_proj, down_proj]
task: {name: family_relationships, train_size: 64, test_size: 8}
training: {learning_rate: 3.0e-2, max_steps: 12, batch_size: 4, save_steps: 4, logging_steps: 2}
evaluation: {max_new_tokens: 4, batch_size: 4}
"""


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory):
    """A folder with a few rows of sst2 and stsb, whose labels follow from their words."""
    folder = tmp_path_factory.mktemp("glue")
    words = ["dull film", "fine film"]
    pairs = [{"sentence1": "a " * (i % 6), "sentence2": "a a", "label": float(i % 6)} for i in range(70) if i % 6]
    rows = {"sst2": [{"sentence": f"{words[i % 2]} {i % 7}", "label": i % 2} for i in range(64)], "stsb": pairs}
    for name, content in rows.items():
        (folder / name).mkdir()
        for split in ("train", "validation"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


GLUE_RECIPE = """
model: {name: MODEL, dtype: float32}
method: {name: pera, r: 2, normalization: rms, init_coefficients: 0.3, target_modules: [query, value]}
task: {name: sst2, data: DATA}
training: {learning_rate: 1.0e-2, epochs: 3, batch_size: 8, logging_steps: 4, eval_steps: epoch, keep: best}
"""


@pytest.fixture(scope="session")
def glue_recipe(tiny_bert, glue_folder, tmp_path_factory):
    """A recipe file for a small run on the tiny BERT."""
    file = tmp_path_factory.mktemp("recipes") / "classify.yaml"
    file.write_text(GLUE_RECIPE.replace("MODEL", str(tiny_bert)).replace("DATA", str(glue_folder)))
    return file


@pytest.fixture(scope="session")
def finished_glue_run(glue_recipe, tmp_path_factory):
    """A trained run of ``glue_recipe``. Tests must not change it."""
    recipe = load_recipe(str(glue_recipe))
    run = Run.create(recipe, tmp_path_factory.mktemp("runs") / "glue")
    train(recipe, run)
    return run


@pytest.fixture
def glue_run(finished_glue_run, tmp_path):
    """A copy of ``finished_glue_run`` that a test may change."""
    shutil.copytree(finished_glue_run.path, tmp_path / "glue-run")
    return Run(tmp_path / "glue-run")


@pytest.fixture(scope="session")
def recipe_file(tiny_llama, tmp_path_factory):
    """A recipe file for a small run on the tiny LLaMA, with dropout, three checkpoints and a high learning rate."""
    file = tmp_path_factory.mktemp("recipes") / "small.yaml"
    file.write_text(RECIPE.replace("MODEL", str(tiny_llama)))
    return file


@pytest.fixture(scope="session")
def train_run(recipe_file):
    """Trains ``recipe_file`` with overrides into a folder."""

    def train_into(folder, *overrides):
        recipe = load_recipe(str(recipe_file), list(overrides))
        run = Run.create(recipe, folder)
        train(recipe, run)
        return run

    return train_into


@pytest.fixture(scope="session")
def finished_run(train_run, tmp_path_factory):
    """A trained run of ``recipe_file``. Tests must not change it."""
    return train_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of ``finished_run`` that a test may change."""
    shutil.copytree(finished_run.path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture
def interrupt(monkeypatch):
    """``interrupt(n)`` raises KeyboardInterrupt in the n-th batch of an evaluation.

    It returns a list that receives the number of prompts of each batch, the interrupted one included.
    """

    def at(batch):
        generate, asked = scorers.generate, []

        def interrupted(model, tokenizer, prompts, *rest):
            asked.append(len(prompts))
            if len(asked) == batch:
                raise KeyboardInterrupt
            return generate(model, tokenizer, prompts, *rest)

        monkeypatch.setattr(scorers, "generate", interrupted)
        return asked

    return at


class Outcome(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def pera(monkeypatch, capsys, tmp_path):
    """Runs the ``pera`` command in this process, in an empty working folder. A slow machine prints no further lines."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLOW", "PERIOD"):
        monkeypatch.setattr(progress, name, 3600)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pera", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return Outcome(exit.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def tree(tmp_path):
    """The contents of the working folder by path, None for a folder."""
    return lambda: {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}


@pytest.fixture
def refused(pera, tree):
    """Runs the ``pera`` command and checks that it exits with code 2, prints one line with all ``words`` and changes no
    file. Returns the line."""

    def call(*arguments, words):
        before = tree()
        outcome = pera(*arguments)
        assert outcome.code == 2
        assert outcome.out == ""
        assert outcome.err.startswith("pera: ")
        assert outcome.err.count("\n") == 1
        assert outcome.err.endswith("\n")
        assert [word for word in words if word not in outcome.err] == [], outcome.err
        assert tree() == before
        return outcome.err

    return call
