"""The scores of a run."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file

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


@pytest.mark.parametrize(
    "damage", [lambda f: f.write_text("{"), lambda f: f.mkdir(), lambda f: f.write_text('{"a": 1}')]
)
def test_broken_scores_are_refused_before_the_work(damage, run, refused):
    run.scores_file.unlink(missing_ok=True)
    damage(run.scores_file)
    refused("evaluate", run.path, words=["scores.json"])


def test_a_broken_adapter_is_refused_before_its_base_is_scored(run, refused):
    (run.adapter.path / "adapter_config.json").write_text("{")
    refused("evaluate", run.path, "--base", words=["adapter_config.json"])


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


@pytest.fixture(scope="module")
def trained_facts(train_run, tmp_path_factory):
    """A run that stores four phone numbers."""
    book = ["task={name: phonebook, size: 4}", "evaluation.max_new_tokens=10"]
    return train_run(tmp_path_factory.mktemp("facts") / "run", *book)


@pytest.fixture
def facts_run(trained_facts, tmp_path):
    """A copy of ``trained_facts`` that a test may change."""
    return Run(Path(shutil.copytree(trained_facts.path, tmp_path / "facts")))


def test_bits_per_parameter_count_every_trained_parameter(facts_run):
    base, adapter = (evaluate_run(facts_run, base=which).memory for which in (True, False))
    weights = load_file(facts_run.adapter.path / "adapter_model.safetensors")
    assert any("pera_h" in name for name in weights)
    assert adapter.parameters == sum(weight.numel() for weight in weights.values())
    assert adapter.bits_per_parameter == adapter.bits / adapter.parameters
    assert (base.parameters, base.bits_per_parameter) == (None, None)
    assert adapter.tokens == base.tokens == 40
    assert adapter.bits > base.bits
    assert facts_run.scores()["adapter"]["memory"] == asdict(adapter)


def test_training_and_pages_say_that_the_trained_facts_are_tested(facts_run, pera):
    assert json.loads(facts_run.data_file.read_text())["notes"] == []
    said = pera("evaluate", facts_run.path)
    assert said.code == 0
    lines = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in said.out.splitlines()}
    assert lines["tested on"] == "the facts that it was trained on"
    memory = facts_run.scores()["adapter"]["memory"]
    assert lines["bits stored"].startswith(f"{memory['bits']:,.0f} of 133 (95 % interval over facts ".replace("-", "−"))
    assert lines["bits per parameter"].endswith(f"({memory['parameters']:,} trained parameters)")
    assert lines["tokens with p > 0.5"].endswith(" of 40 answer tokens")
    page = (facts_run.path / "report.html").read_text()
    assert "Tested on the facts that the adapter was trained on." in page
    assert "What the adapter has stored" in page
    card = (facts_run.adapter.path / "README.md").read_text()
    assert "Rows of `phonebook`, exact answers by greedy decoding, tested on the facts" in card
    assert "Held-out" not in card


def test_own_facts_are_counted_against_the_base_model(train_run, tmp_path, pera):
    rows = [{"question": f"Where is {name}?", "answer": place} for name, place in (("Ann", "Rome"), ("Bob", "Oslo"))]
    (tmp_path / "own.csv").write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    own = f"task={{name: facts, data: {tmp_path / 'own.csv'}}}"
    run = train_run(tmp_path / "own", own, "evaluation.max_new_tokens=16")
    alone = pera("evaluate", run.path).out
    assert "unknown, because task.answers does not say" in alone
    assert f"unknown until the base model is scored: pera evaluate {run.path} --base" in alone
    pera("evaluate", run.path, "--base")
    base, adapter = (run.scores()[which]["memory"] for which in ("base", "adapter"))
    bits = (base["loss"] - adapter["loss"]) * adapter["tokens"] / math.log(2)
    assert f"bits over the base model {bits:,.0f} (95 %" in " ".join(pera("evaluate", run.path).out.split())


def test_rows_of_a_phone_book_can_be_answered(facts_run, pera, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"query": "Ann Bell:"}\n')
    assert pera("predict", facts_run.path, "--input", "rows.jsonl", "--output", "answers.jsonl").code == 0
    (row,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert set(row) == {"query", "prediction"}
