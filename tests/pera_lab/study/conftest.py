"""A small study of the tiny LLaMA."""

import pytest

from pera_lab.study import load_study
from pera_lab.study.folder import StudyFolder
from pera_lab.study.runner import run_study

STUDY = """
base: {recipe}
settings:
  training: {{max_steps: 6, save_steps: 2}}
grid:
  task: family_relationships
  method: [lora, pera-rms-0.3]
  r: [2]
choose: {{learning_rate: [1e-3, 3e-2], seeds: [1], rows: 16}}
report: {{seeds: [42, 43]}}
"""


@pytest.fixture(scope="session")
def study_file(recipe_file, tmp_path_factory):
    """Two methods, two rates, two seeds: eight runs of six steps."""
    file = tmp_path_factory.mktemp("studies") / "small.yaml"
    file.write_text(STUDY.format(recipe=recipe_file))
    return file


@pytest.fixture(scope="session")
def finished(study_file, tmp_path_factory):
    """The folder of the small study, run without interruption. Do not write to it."""
    folder = StudyFolder(tmp_path_factory.mktemp("study") / "whole")
    run_study(load_study(str(study_file)), folder)
    return folder
