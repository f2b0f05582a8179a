"""A study ends with every run exactly once, whatever happens on the way."""

import json

import pytest

from pera.study import load_study
from pera.study.runner import StudyFolder, run_study


@pytest.fixture(scope="session")
def finished(study_file, tmp_path_factory):
    """The folder of the small study, run without interruption. Not to be written to."""
    folder = StudyFolder(tmp_path_factory.mktemp("study") / "whole")
    run_study(load_study(str(study_file)), folder)
    return folder


def test_all(finished):
    for f in sorted(finished.runs.iterdir()):
        print(f.name, json.loads((f / "outcome.json").read_text()))
    assert 0
