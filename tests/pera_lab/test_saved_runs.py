"""Runs saved by pera 0.1.0 load, and evaluating them again gives what it gave then.

The adapters of that version are tested in tests/pera/test_compatibility.py.
"""

import json
import shutil

import pytest
import torch

from pera_lab.diagnose import run_effects
from pera_lab.evaluation import evaluate_run
from pera_lab.files import read_lines
from pera_lab.opening import locate, open_model
from pera_lab.runs import Run


@pytest.fixture
def saved_run(saved, tmp_path):
    """Copies a saved run, by its name."""
    return lambda name: Run(shutil.copytree(saved / "runs" / name, tmp_path / name))


def answers(run, which="adapter"):
    """The rows of the predictions without their scores, and the scores as a tensor."""
    rows = read_lines(run.predictions / f"{which}.jsonl")
    scores = [list((row.pop("scores") or {}).values()) for row in rows]
    assert all(row.pop("log_likelihoods", None) is None for row in rows)  # 0.1.0 had no tasks that record them
    return rows, torch.tensor(scores, dtype=torch.float64)


def without_seconds(scores):
    later = {"seconds", "memory"}  # 0.1.0 had no tasks that measure memory
    return {which: {key: value for key, value in score.items() if key not in later} for which, score in scores.items()}


@pytest.mark.parametrize(
    ("name", "which"), [("own", "adapter"), ("own", "base"), ("sst2", "adapter"), ("family", "adapter")]
)
def test_evaluating_a_saved_run_again_gives_the_same_answers_and_scores(name, which, saved_run):
    run = saved_run(name)
    scores, (rows, logits) = run.scores(), answers(run, which)
    evaluate_run(run, base=which == "base")
    again, logits_again = answers(run, which)
    assert again == rows
    assert logits_again.shape == logits.shape
    assert logits.numel() == 0 or (logits_again - logits).abs().max() <= 1e-6 * logits.abs().max()
    assert without_seconds(run.scores()) == without_seconds(scores)
    assert logits.numel() > 0 or name != "sst2"


def test_the_effect_of_a_saved_run_is_reproduced(saved_run):
    run = saved_run("own")
    then = json.loads(run.effect_file.read_text())
    run.effect_file.unlink()
    run_effects(run)
    now, rounding = json.loads(run.effect_file.read_text()), pytest.approx
    assert now["tokens"] == then["tokens"]
    assert now["loss"] == rounding(then["loss"], rel=1e-6)
    for key in ("without", "without_high_order"):  # differences of two losses
        assert now[key] == rounding(then[key], abs=1e-6 * then["loss"])
    assert now["at_rank_r"] == rounding(then["at_rank_r"], abs=1e-6 * then["loss"])


@pytest.mark.parametrize("name", ["own", "sst2", "family"])
def test_a_saved_run_is_opened_inspected_and_reported(name, saved_run, pera):
    run = saved_run(name)
    assert open_model(locate(str(run.path)))[0].active_adapter == "default"
    assert pera("inspect", run.path).code == 0
    assert pera("report", run.path).code == 0
    page = (run.path / "report.html").read_text()
    assert name in page
    assert "is not a valid record" not in page
