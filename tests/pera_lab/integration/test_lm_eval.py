"""lm-eval loads a PERA adapter with ``peft=`` after ``import pera``, and pera evaluate runs it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reference import relative_error
from tiny import adapt

datasets = pytest.importorskip("datasets")
lm_eval = pytest.importorskip("lm_eval")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

KIN = ["mother", "father", "sister", "brother", "aunt", "uncle"]
QUESTIONS = [
    {"question": f"Who is the {kin} of Ada?", "choices": ["Annabella", "Byron", "nobody"], "answer": number % 3}
    for number, kin in enumerate(KIN)
]
TASK = {
    "task": "tiny",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
}


@pytest.fixture
def folders(tiny_llama, tmp_path):
    """The folder of an adapter, and of the model it is merged into."""
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    model = adapt(AutoModelForCausalLM.from_pretrained(tiny_llama), target_modules="all-linear", normalization="rms")
    model.save_pretrained(adapter)
    model.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(merged)
    return adapter, merged


def evaluate(**model):
    """Accuracy, and the log-likelihood of each choice of each question."""
    results = lm_eval.simple_evaluate(
        "hf",
        {name: str(folder) for name, folder in model.items()},
        tasks=[{**TASK, "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(QUESTIONS)}}],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    likelihoods = [[choice[0][0] for choice in sample["resps"]] for sample in results["samples"]["tiny"]]
    return results["results"]["tiny"]["acc,none"], torch.tensor(likelihoods)


def test_an_adapter_scores_like_the_merged_model(folders, tiny_llama):
    adapter, merged = folders
    accuracy, likelihoods = evaluate(pretrained=tiny_llama, peft=adapter)
    expected_accuracy, expected = evaluate(pretrained=merged)
    assert accuracy == expected_accuracy
    assert relative_error(likelihoods, expected) <= 1e-5
    assert relative_error(likelihoods, evaluate(pretrained=tiny_llama)[1]) > 1e-2


@pytest.mark.slow
def test_the_lm_eval_command_needs_an_import_of_pera(folders, tiny_llama, python, tmp_path):
    (tmp_path / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    files = {"data_files": {"test": str(tmp_path / "questions.json")}}
    (tmp_path / "tiny.yaml").write_text(json.dumps({**TASK, "dataset_path": "json", "dataset_kwargs": files}))
    adapter, _ = folders
    command = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    model = ["--model", "hf", "--model_args", f"pretrained={tiny_llama},peft={adapter}", "--device", "cpu"]
    task = ["--tasks", "tiny", "--include_path", tmp_path, "--output_path", tmp_path / "out.json"]
    without = python(command, *model, *task, check=False)
    assert without.returncode != 0
    assert without.stderr.strip().endswith("KeyError: 'PERA'")
    python(f"import pera; {command}", *model, *task)
    (results,) = tmp_path.glob("**/*out_*.json")
    accuracy, _ = evaluate(pretrained=tiny_llama, peft=adapter)
    assert json.loads(results.read_text())["results"]["tiny"]["acc,none"] == accuracy


@pytest.fixture
def tasks_folder(tmp_path):
    """A folder with the task as a file, as for lm-eval's ``--include_path``."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    files = {"data_files": {"test": str(folder / "questions.json")}}
    (folder / "tiny.yaml").write_text(json.dumps({**TASK, "dataset_path": "json", "dataset_kwargs": files}))
    return folder


def test_pera_evaluate_runs_lm_eval_with_the_adapter(run, pera, tasks_folder):
    for which in ([], ["--base"]):
        done = pera("evaluate", run.path, "--lm-eval", "tiny", "--include-path", tasks_folder, *which)
        assert done.code == 0
        assert "not comparable with pera's own scores" in done.out
    found = json.loads(run.lm_eval_file.read_text())
    for which, adapter in (("adapter", {"peft": str(run.adapter.path)}), ("base", {})):
        accuracy, _ = evaluate(pretrained=run.recipe.model.name, **adapter)
        assert found[which]["tiny"]["acc,none"] == accuracy
        assert found[which]["tiny"]["n"] == len(QUESTIONS)
    assert not run.scores_file.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lm-eval", "arc_eesy"], ["'arc_eesy' is not an lm-eval task", "'arc_easy'"]),
        (["--lm-eval", "arc_easy", "--scorer", "likelihood"], ["--scorer", "'likelihood' has no effect"]),
        (["--limit", "3"], ["--limit", "--lm-eval"]),
    ],
)
def test_invalid_options_of_pera_evaluate_are_rejected(arguments, words, refused, run):
    refused("evaluate", run.path, *arguments, words=words)
