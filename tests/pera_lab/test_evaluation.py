"""The scores of a run."""

import json

import pytest

from pera_lab.evaluation import evaluate_run
from pera_lab.files import locked
from pera_lab.runs import Run


def test_scores_and_predictions_of_base_and_adapter_are_kept_side_by_side(run):
    scores = {which: evaluate_run(run, base=which == "base") for which in ("base", "adapter")}
    content = json.loads(run.scores_file.read_text())
    assert set(content) == {"base", "adapter"}
    for which, score in scores.items():
        lines = [json.loads(line) for line in (run.predictions / f"{which}.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == [example.prompt for example in run.recipe.build_splits().test]
        assert sum(line["correct"] for line in lines) == score.correct == content[which]["correct"]
        assert content[which]["scorer"] == "exact_match"
        assert (content[which]["n"], content[which]["value"]) == (8, score.value)
        assert (content[which]["low"], content[which]["high"]) == (score.low, score.high)
    answers = [(run.predictions / f"{which}.jsonl").read_text() for which in scores]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("damage", [lambda file: file.write_text("{"), lambda file: file.mkdir()])
def test_broken_scores_are_refused_before_the_work(damage, run, refused):
    run.scores_file.unlink(missing_ok=True)
    damage(run.scores_file)
    refused("evaluate", run.path, words=["scores.json"])


def test_scoring_again_replaces_a_score_and_keeps_the_other(run):
    old = {
        "scorer": "exact_match",
        "n": 1,
        "correct": 1,
        "metric": "accuracy",
        "value": 1.0,
        "low": 0.2,
        "high": 1.0,
        "seconds": 0.1,
    }
    run.scores_file.write_text(json.dumps({"base": old, "adapter": old}))
    evaluate_run(run)
    content = json.loads(run.scores_file.read_text())
    assert content["base"] == old
    assert content["adapter"]["n"] == 8


def test_the_base_can_be_scored_before_training(finished_run, tmp_path):
    untrained = Run.create(finished_run.recipe, tmp_path / "untrained")
    assert evaluate_run(untrained, base=True).n == 8
    assert set(untrained.scores()) == {"base"}
    assert not untrained.adapter.path.exists()


def test_an_interrupted_evaluation_of_a_run_resumes(run, interrupt):
    whole = evaluate_run(run)
    answers = (run.predictions / "adapter.jsonl").read_text()
    asked = interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run)
    assert (run.predictions / "adapter.partial.jsonl").is_file()
    assert evaluate_run(run).correct == whole.correct
    assert asked == [4, 4, 4]
    assert (run.predictions / "adapter.jsonl").read_text() == answers
    assert not (run.predictions / "adapter.partial.jsonl").exists()


@pytest.mark.parametrize("which", [[], ["--base"]])
def test_two_evaluations_that_write_one_score_are_refused(which, pera, refused, run):
    name = "base" if which else "adapter"
    with locked(run.path / f".{name}.lock", run.path):
        refused("evaluate", "run", *which, words=[f"run/predictions/{name}.jsonl", "in use by another process"])
        assert pera("evaluate", "run", *([] if which else ["--base"])).code == 0  # the other score
    assert pera("evaluate", "run", *which).code == 0
    assert set(run.scores()) == {"adapter", "base"}
    assert list(run.path.glob(".*")) == []
