"""A classifier from recipe to score: the head, the best checkpoint, and what needs a head."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from pera.errors import UserError
from pera_lab.diagnose import run_effects
from pera_lab.evaluation import evaluate, evaluate_run
from pera_lab.models import DTYPES
from pera_lab.opening import locate, locate_run, open_model
from pera_lab.recipe import load_recipe
from pera_lab.runs import Run
from pera_lab.training import train


def weights(run):
    return load_file(run.adapter.path / "adapter_model.safetensors")


def test_the_head_is_saved_with_the_adapter(finished_glue_run):
    config = json.loads((finished_glue_run.adapter.path / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert weights(finished_glue_run)["base_model.model.classifier.weight"].shape == (2, 32)


def test_rows_and_validation_metrics_are_recorded(finished_glue_run, glue_folder):
    record = json.loads(finished_glue_run.data_file.read_text())
    assert record["train"]["source"] == str(glue_folder / "sst2" / "train.jsonl")
    assert record["notes"] == ["32 of 32 test rows also occur in the training data."]
    lines = finished_glue_run.validation()
    assert [line["epoch"] for line in lines] == [1.0, 2.0, 3.0]
    assert all({"loss", "accuracy"} <= set(line) for line in lines)


def test_changed_data_is_neither_trained_on_nor_scored(glue_run):
    record = json.loads(glue_run.data_file.read_text())
    record["test"]["sha256"] = "0" * 64
    glue_run.data_file.write_text(json.dumps(record))
    for command in (evaluate_run, run_effects, lambda run: train(run.recipe, run, resume=True)):
        with pytest.raises(UserError, match=r"^task\.data: the 'test' file changed since '.*' was started"):
            command(glue_run)


def test_a_classifier_learns_and_is_scored(glue_run):
    score = evaluate_run(glue_run)
    assert (score.n, score.metric) == (32, "accuracy")
    assert score.value > 0.9 > score.majority
    content = json.loads(glue_run.scores_file.read_text())["adapter"]
    assert content["scorer"] == "classification"
    lines = [json.loads(line) for line in (glue_run.predictions / "adapter.jsonl").read_text().splitlines()]
    assert {line["output"] for line in lines} == {"negative", "positive"}
    assert sum(line["correct"] for line in lines) == score.correct
    assert all(max(line["scores"], key=line["scores"].get) == line["output"] for line in lines)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_head_is_float32_on_a_half_precision_base(dtype, glue_recipe, tmp_path, pera):
    recipe = load_recipe(str(glue_recipe), [f"model.dtype={dtype}"])
    run = Run.create(recipe, tmp_path / "run")
    train(recipe, run)
    assert {weight.dtype for weight in weights(run).values()} == {torch.float32}
    model, tokenizer = open_model(locate_run(run), dtype)
    assert model.get_base_model().bert.dtype == DTYPES[dtype]
    logits = model(**tokenizer("fine film", return_tensors="pt")).logits
    assert logits.dtype == torch.float32
    assert evaluate_run(run).value > 0.9
    assert pera("merge", run.path, "--output", tmp_path / "merged", "--dtype", dtype).code == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.classifier.weight.dtype == DTYPES[dtype]


def test_a_batch_gives_what_single_texts_give(glue_run):
    model, tokenizer = open_model(locate_run(glue_run))
    recipe, splits = glue_run.recipe, glue_run.recipe.build_splits()
    one, many = (
        evaluate(model, tokenizer, recipe.task, splits, recipe.evaluation.model_copy(update={"batch_size": n}))[1]
        for n in (1, 16)
    )
    for a, b in zip(one, many, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-4)


def test_a_regression_is_measured_by_its_correlation(glue_recipe, tmp_path):
    recipe = load_recipe(str(glue_recipe), ["task=stsb", "training.epochs=1"])
    run = Run.create(recipe, tmp_path / "run")
    train(recipe, run)
    score = evaluate_run(run)
    assert (score.metric, score.correct, score.majority) == ("pearson", None, 0.0)
    assert set(score.metrics) == {"spearman"}
    assert -1 <= score.low <= score.value <= score.high <= 1
    assert weights(run)["base_model.model.classifier.weight"].shape == (1, 32)


def test_the_best_checkpoint_is_kept(glue_recipe, tmp_path):
    """At a rate that destroys the model the last checkpoint is not the best."""
    overrides = ["training.learning_rate=0.3", "training.epochs=6", "training.lr_scheduler=constant"]
    recipe = load_recipe(str(glue_recipe), overrides)
    run = Run.create(recipe, tmp_path / "run")
    train(recipe, run)
    best = max(run.validation(), key=lambda line: (line["accuracy"], -line["step"]))
    kept = load_file(run.checkpoints / f"checkpoint-{best['step']}" / "adapter_model.safetensors")
    assert all(torch.equal(weight, kept[key]) for key, weight in weights(run).items())


def test_a_run_without_its_adapter_gets_the_best_checkpoint(glue_run):
    expected = (glue_run.adapter.path / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(glue_run.adapter.path)
    train(glue_run.recipe, glue_run, resume=True)
    assert (glue_run.adapter.path / "adapter_model.safetensors").read_bytes() == expected


def test_a_resumed_run_equals_an_uninterrupted_one(glue_run):
    expected = (glue_run.adapter.path / "adapter_model.safetensors").read_bytes()
    measured = glue_run.validation()
    last = max(glue_run.checkpoints.iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(glue_run.adapter.path)
    shutil.rmtree(last)
    train(glue_run.recipe, glue_run, resume=True)
    assert (glue_run.adapter.path / "adapter_model.safetensors").read_bytes() == expected
    for line, before in zip(glue_run.validation(), measured, strict=True):
        assert (line["step"], line["loss"]) == (before["step"], before["loss"])


def test_long_texts_are_truncated_and_counted(glue_recipe, tmp_path):
    recipe = load_recipe(str(glue_recipe), ["training.max_length=4", "training.epochs=1"])
    run = Run.create(recipe, tmp_path / "run")
    assert train(recipe, run).shortened == 64
    assert evaluate_run(run).shortened == 32


def test_the_base_model_of_a_classifier_cannot_be_scored(glue_run):
    with pytest.raises(UserError, match=r"^--base: The base model of 'sst2' has no trained head"):
        evaluate_run(glue_run, base=True)


def test_the_run_is_opened_with_its_head(finished_glue_run):
    model, tokenizer = open_model(locate(str(finished_glue_run.path)))
    assert model.get_base_model().num_labels == 2
    assert tokenizer.padding_side == "right"


def test_the_effect_of_the_terms_is_measured_on_labels(glue_run):
    effects = run_effects(glue_run, examples=16)
    assert effects.tokens == 16
    assert effects.without["high_order"] != 0


def test_a_classifier_merges_into_a_plain_model(glue_run, tmp_path, pera):
    assert pera("merge", glue_run.path, "--output", "merged").code == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    model, tokenizer = open_model(locate(str(glue_run.path)))
    batch = tokenizer(["fine film 1", "dull film 2"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task=sst3", ["'sst3'", "did you mean 'sst2'"]),
        ("task=mrpc", ["mrpc/train", "is missing"]),
        ("data=nowhere", ["task.data='nowhere' does not exist"]),
        ("task.trainsize=3", ["task.trainsize is not a key of a recipe", "'train_size'"]),
        ("evaluation.max_new_tokens=3", ["evaluation.max_new_tokens=3", "trains a classifier, which writes no text"]),
        ("evaluation.scorer=likelihood", ["evaluation.scorer='likelihood' does not fit task 'sst2'", "classification"]),
        ("training.eval_steps=null", ["keep='best' needs eval_steps"]),
        ("training.eval_steps=0", ["training.eval_steps=0: input should be a whole number of at least 1"]),
        ("training.warmup_steps=3", ["give one of warmup_steps and warmup_ratio"]),
    ],
)
def test_a_recipe_that_cannot_be_trained(override, words, refused, glue_recipe):
    more = ["training.warmup_ratio=0.1"] if "warmup" in override else []
    refused("train", glue_recipe, override, *more, "--output", "run", words=words)


def test_a_classifier_exports_as_a_lora_with_its_head(glue_run, tmp_path, pera):
    assert pera("export", glue_run.path, "--to", "lora", "--output", "lora").code == 0
    assert json.loads((tmp_path / "lora" / "verification.json").read_text())["agree"] is True
    assert pera("verify", glue_run.path, "lora").code == 0


def test_a_classifier_has_a_card_of_its_kind_and_does_not_chat(glue_run, refused):
    card = (glue_run.adapter.path / "README.md").read_text()
    assert re.search(r"AutoModelForSequenceClassification\.from_pretrained\(.*, num_labels=2\)", card)
    assert "pipeline_tag: text-classification" in card
    refused("chat", glue_run.path, words=["is a classifier", "pera predict"])
