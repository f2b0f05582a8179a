"""What scripts read: results as one JSON document on standard output, and everything else on standard error."""

import json
import math
import shlex
from dataclasses import replace

import pytest

from pera_lab.cli import console
from pera_lab.recipe import Recipe
from pera_lab.runs import Run

AGREEMENT = {
    *("prompts", "tokens", "max_difference", "tolerance", "dtype", "near_ties", "same_top1", "kl_divergence"),
    *("of", "against", "agree"),
}


def document(outcome, code=0):
    """The JSON document that a command printed, in which no number is NaN or infinite."""
    assert outcome.code == code, outcome.err

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(outcome.out, parse_constant=refuse)


def test_evaluate_prints_the_score_that_it_writes(pera, run):
    found = document(pera("evaluate", run.path, "--json"))
    assert found.keys() == {"run", "which", "score", "written", "report"}
    assert (found["run"], found["which"]) == (str(run.path), "adapter")
    assert found["score"] == run.scores()["adapter"]
    assert json.loads((run.path / "scores.json").read_text())["adapter"] == found["score"]
    assert (run.path / "report.html").is_file()


def test_merge_verify_and_export_print_their_comparison(pera, run):
    merged = document(pera("merge", run.path, "--output", "merged", "--json"))
    assert (merged.keys(), merged["output"]) == ({"output", "agreement"}, "merged")
    assert (merged["agreement"].keys(), merged["agreement"]["agree"]) == (AGREEMENT, True)
    verified = document(pera("verify", run.path, "merged", "--json"))
    assert (verified["a"], verified["b"], verified["agreement"]["agree"]) == (str(run.path), "merged", True)
    exported = document(pera("export", run.path, "--for", "vllm", "--max-rank", 1, "--output", "lora", "--json"))
    assert exported.keys() == {"output", "base", "form", "good", "start", "truncation", "agreement"}
    assert (exported["output"], exported["form"], exported["truncation"]["rank"]) == ("lora", "lora", 1)
    assert exported["start"].startswith("vllm serve")
    assert exported["base"] is None


def test_a_failed_check_prints_its_document_and_exits_with_1(pera, run, tiny_llama):
    outcome = pera("verify", run.path, tiny_llama, "--json")
    assert outcome.err == "pera: the outputs differ.\n"
    assert document(outcome, code=1)["agreement"]["agree"] is False


def test_a_mistake_prints_no_document(refused):
    refused("evaluate", "nowhere", "--json", words=["'nowhere'"])


def test_numbers_that_json_lacks_become_null(capsys):
    console.print_json({"a": [math.inf, (math.nan, 1.5)], "b": {1: "é[red]"}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, [None, 1.5]], "b": {"1": "é[red]"}}


def test_what_a_library_prints_goes_to_standard_error(capsys):
    with console.stdout_for_json():
        print("from a library")
        console.print_json({"a": 1})
    console.out.print("later")
    assert capsys.readouterr() == ('{\n  "a": 1\n}\nlater\n', "from a library\n")


def test_quiet_training_prints_its_result_and_warnings_alone(pera, recipe_file, tmp_path, monkeypatch):
    build = Recipe.build_splits
    monkeypatch.setattr(Recipe, "build_splits", lambda self: replace(build(self), missing=["one part is missing"]))
    usual = pera("train", recipe_file, "training.max_steps=2", "--output", "usual")
    assert "warning: one part is missing\n" in usual.err
    assert "run folder" in usual.err
    quiet = pera("train", recipe_file, "training.max_steps=2", "--output", "quiet", "--quiet")
    assert (quiet.code, quiet.err) == (0, "warning: one part is missing\n")
    assert "Next: pera evaluate quiet\n" in quiet.out
    assert Run(tmp_path / "quiet").finished
    assert "run folder" in pera("train", recipe_file, "training.max_steps=2", "--output", "later").err


def test_quiet_commands_print_their_errors(pera):
    mistake = pera("evaluate", "nowhere", "-q")
    assert (mistake.code, mistake.out) == (2, "")
    assert mistake.err.startswith("pera: 'nowhere'")


@pytest.mark.parametrize("name", ["plain", "it's a[v1]"])
def test_a_printed_command_can_be_copied(name, pera, recipe_file, tmp_path):
    done = pera("train", recipe_file, "training.max_steps=1", "--output", tmp_path / name)
    assert f"Next: pera evaluate {shlex.quote(str(tmp_path / name))}\n" in done.out
    assert f"{tmp_path / name}/adapter\n" in done.out


def test_no_color_means_no_colour(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    plain = console._Plain(stderr=True, force_terminal=True, **console._AS_IT_IS)
    plain.print("warning:", style="yellow", end=" ")
    assert "\x1b[3" not in capsys.readouterr().err
    monkeypatch.delenv("NO_COLOR")
    coloured = console._Plain(stderr=True, force_terminal=True, color_system="standard", **console._AS_IT_IS)
    coloured.print("warning:", style="yellow", end=" ")
    assert "\x1b[33m" in capsys.readouterr().err
