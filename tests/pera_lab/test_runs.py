"""The run folder, and what may stand in its place."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pera.errors import UserError
from pera_lab.models import fingerprint, load_model
from pera_lab.opening import Location, locate, locate_run, open_model
from pera_lab.recipe import load_recipe
from pera_lab.runs import COMPLETE, Run, resumable
from pera_lab.training import train


@pytest.fixture
def recipe(recipe_file):
    return load_recipe(str(recipe_file))


@pytest.fixture
def workplace(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started(workplace):
    """Makes a run folder in ``runs/`` whose recipe was written some seconds ago."""

    def start(recipe, name, age=0, finished=False):
        run = Run.create(recipe, Path("runs") / name)
        time = run.recipe_file.stat().st_mtime - age
        os.utime(run.recipe_file, (time, time))
        if finished:
            run.adapter.path.mkdir()
        return run

    return start


def test_a_run_folder_is_named_after_recipe_and_time_and_holds_the_whole_recipe(recipe, workplace):
    run = Run.create(recipe)
    assert run.path.parent == Path("runs")
    assert run.path.name.startswith("small-2")
    assert run.recipe == recipe
    assert "weight_decay: 0.0" in run.recipe_file.read_text()


def test_two_runs_started_in_one_second_have_a_folder_each(recipe, workplace):
    assert Run.create(recipe).path != Run.create(recipe).path


def test_a_run_that_fails_at_once_takes_away_what_it_made_and_nothing_else(recipe, workplace):
    for other in ([], ["runs/other"], ["runs/mine"]):
        shutil.rmtree(workplace / "runs", ignore_errors=True)
        run = Run.create(recipe, Path("runs/mine/run"))
        for path in other:
            (workplace / path / "file").mkdir(parents=True)
        with pytest.raises(UserError, match="mistake"), run.discarded_on_error():
            raise UserError("mistake")
        assert not run.path.exists()
        assert [path for path in other if not (workplace / path / "file").is_dir()] == []
        assert (workplace / "runs").exists() == bool(other)


def test_a_run_is_kept_once_something_was_saved_or_measured(recipe, workplace):
    run = Run.create(recipe, Path("runs/run"))
    run.validation_file.write_text('{"step": 2, "loss": 1.0}\n')
    with pytest.raises(UserError), run.discarded_on_error():
        raise UserError("mistake")
    run.validation_file.unlink()
    (run.checkpoints / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(UserError), run.discarded_on_error():
        raise UserError("mistake")
    assert run.recipe_file.is_file()


def test_the_newest_unfinished_run_of_a_recipe_is_found(recipe, started):
    started(recipe, "small-20260101-000001", age=30)
    newest = started(recipe, "small-20260101-000002", age=20)
    started(recipe, "small-20260101-000003", age=10, finished=True)
    started(recipe.model_copy(update={"name": "other"}), "other-20260101-000004")
    assert Run.latest_unfinished(recipe).path == newest.path


def test_a_run_of_a_recipe_with_a_longer_name_is_not_taken_for_one_of_this(recipe, started):
    mine = started(recipe, "small-20260101-000001", age=30)
    started(recipe.model_copy(update={"name": "small-other"}), "small-other-20260101-000002")
    assert Run.latest_unfinished(recipe).path == mine.path


def test_a_run_is_resumed_by_its_folder_by_output_or_by_its_recipe(recipe_file, recipe, started):
    run = started(recipe, "small-20260101-000001")
    for source, output in [(str(run.path), None), (str(recipe_file), run.path), (str(recipe_file), None)]:
        assert resumable(source, None, output).path == run.path


def test_checkpoints_that_were_not_saved_completely_are_removed(recipe, workplace):
    run = Run.create(recipe, workplace / "run")
    assert run.last_checkpoint() is None
    for step in (8, 12, 100):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (run.checkpoints / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"cut")
    (run.checkpoints / "checkpoint-8" / COMPLETE).touch()
    (run.checkpoints / "checkpoint-12" / COMPLETE).touch()
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-12"
    assert {path.name for path in run.checkpoints.iterdir()} == {"checkpoint-8", "checkpoint-12"}


def test_what_is_no_checkpoint_is_left_alone(recipe, workplace):
    run = Run.create(recipe, workplace / "run")
    (run.checkpoints / "checkpoint-1x").mkdir(parents=True)
    (run.checkpoints / "checkpoint-2").write_text("mine")
    assert run.last_checkpoint() is None
    assert len(list(run.checkpoints.iterdir())) == 2


@pytest.mark.parametrize("content", ["[]", '"x"', "3"])
def test_a_record_that_is_no_object_is_refused(content, run):
    for file in (run.scores_file, run.data_file, run.environment_file):
        file.write_text(content)
    for read in (run.scores, lambda: run.check_data({}), lambda: open_model(locate_run(run))):
        with pytest.raises(UserError, match=r"json' should hold a JSON object, and holds .*; restore or remove it\.$"):
            read()


@pytest.mark.parametrize("base", [None, ["x"], {"dtype": ["float32"]}])
def test_a_record_of_the_base_that_cannot_be_is_refused(base, run):
    run.environment_file.write_text(json.dumps({"base_model": base}))
    with pytest.raises(UserError, match=r"environment.json': base_model=.* should hold name, dtype and fingerprint"):
        open_model(locate_run(run))


def test_a_line_that_was_cut_off_is_left_out_of_the_metrics(recipe, workplace):
    run = Run.create(recipe, workplace / "run")
    assert run.metrics() == []
    run.metrics_file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert run.metrics() == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]


def test_the_environment_is_recorded(finished_run, tiny_llama):
    record = json.loads(finished_run.environment_file.read_text())
    assert record["seed"] == 42
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "pera", "transformers", "peft"} <= set(record["versions"])
    assert record["base_model"] == {
        "name": str(tiny_llama),
        "dtype": "float32",
        "fingerprint": fingerprint(load_model(str(tiny_llama), dtype="float32")),
    }
    assert isinstance(record["command"], list)


def test_files_that_are_not_those_a_run_was_begun_with_are_refused(recipe, workplace):
    run = Run.create(recipe, workplace / "run")
    files = {"train": {"mix": {"sha256": "1" * 64}}, "validation": {"rows": 3}, "test": {"piqa": {"sha256": "2" * 64}}}
    run.check_data(files)  # nothing is recorded
    run.data_file.write_text(json.dumps({**files, "notes": []}))
    run.check_data({**files, "validation": {"rows": 4}})
    for change, words in [
        ({"test": {"piqa": {"sha256": "3" * 64}}}, r"'test\.piqa' is not .* begins with 3+, in data\.json"),
        ({"validation": {"sha256": "3" * 64}}, r"'validation' is not .* data\.json with none"),
        ({"train": {}}, r"'train\.mix' is not .* begins with none"),
    ]:
        with pytest.raises(UserError, match=rf"^task\.data: the file of {words}"):
            run.check_data({**files, **change})
    run.data_file.write_text('{"notes": []}')  # nor is it here
    run.check_data(files)


@pytest.mark.parametrize(("key", "was"), [("dtype", "bfloat16"), ("fingerprint", "0123456789abcdef")])
def test_a_run_is_not_gone_on_with_on_another_base(key, was, run):
    record = json.loads(run.environment_file.read_text())
    record["base_model"][key] = was
    run.environment_file.write_text(json.dumps(record))
    shutil.rmtree(run.adapter.path)
    with pytest.raises(UserError, match=rf"^--resume: .* was begun with '.*' of the {key} {was}, and here it has "):
        train(run.recipe, run, resume=True)
    assert json.loads(run.environment_file.read_text()) == record


def test_a_run_says_what_its_adapter_and_base_are(finished_run, tiny_llama):
    location = locate(str(finished_run.path))
    assert location.run.path == finished_run.path
    assert (location.adapter.path, location.base) == (finished_run.adapter.path, str(tiny_llama))


def test_an_adapter_folder_says_what_its_base_is(finished_run, tiny_llama):
    location = locate(str(finished_run.adapter.path))
    assert location.adapter.path == finished_run.adapter.path
    assert location == Location(None, location.adapter, str(tiny_llama))


def test_anything_else_is_a_model(tiny_llama):
    for name in (str(tiny_llama), "smollm2-135m", "a/b"):
        assert locate(name) == Location(None, None, name)


def test_an_adapter_without_a_base_is_refused(run):
    config = json.loads((run.adapter.path / "adapter_config.json").read_text())
    (run.adapter.path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base_model_name_or_path"):
        locate(str(run.adapter.path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: [c], "adapter_config.json names no peft_type"),
        (lambda c: {k: v for k, v in c.items() if k != "peft_type"}, "adapter_config.json names no peft_type"),
        (lambda c: {**c, "peft_type": "NOTHING"}, "peft_type='NOTHING' is not a method"),
        (lambda c: {**c, "r": 0}, "adapter_config.json: r=0 should be"),
        (lambda c: {**c, "terms": "cubes"}, "adapter_config.json: terms='cubes' is not known"),
        (lambda c: {**c, "target_modules": 5}, "adapter_config.json: target_modules=5 should be a list of names"),
        (lambda c: {**c, "target_modules": [5]}, r"adapter_config.json: target_modules=\[5\] should be a list"),
        (lambda c: {**c, "exclude_modules": 3}, "adapter_config.json: exclude_modules=3 should be a list"),
        (lambda c: {**c, "modules_to_save": 3}, "adapter_config.json: modules_to_save=3 should be a list"),
        (lambda c: {**c, "base_model_name_or_path": 5}, "adapter_config.json: base_model_name_or_path=5 should be a"),
        (lambda c: {**c, "revision": ["main"]}, r"adapter_config.json: revision=\['main'\] should be a string"),
        (lambda c: {**c, "pera_version": 99}, "adapter_config.json: pera_version=99 is newer than the layout"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change, sentence, run):
    file = run.adapter.path / "adapter_config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=f"^{str(run.adapter.path)!r}: {sentence}"):
        _ = run.adapter.config


def test_an_adapter_saved_as_bin_says_how_to_write_it_anew(run):
    torch.save({}, run.adapter.path / "adapter_model.bin")
    (run.adapter.path / "adapter_model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"weights in adapter_model\.bin, and only safetensors is read; .*save_pretrained"
    ):
        open_model(locate_run(run))


def test_weights_in_float8_are_read(run, change_weights):
    change_weights(
        run.adapter.path / "adapter_model.safetensors", lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()}
    )
    open_model(locate_run(run))


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ([0], "does not fit its .*configuration: .*the weights file lacks '.*tokens_delta'"),
        ("ab", "adapter_config.json: trainable_token_indices='ab' should be a list of token ids"),
    ],
)
def test_tokens_that_were_not_trained_are_refused(tokens, sentence, run):
    file = run.adapter.path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": tokens}))
    with pytest.raises(UserError, match=sentence):
        open_model(locate_run(run))


def test_a_tokenizer_saved_with_the_adapter_takes_the_place_of_the_bases(run, tiny_llama):
    own = AutoTokenizer.from_pretrained(tiny_llama)
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(run.adapter.path)
    for name in (run.path, run.adapter.path):
        assert open_model(locate(str(name)))[1].chat_template == own.chat_template


def test_a_run_is_opened_with_its_adapter(finished_run, tiny_llama, logits):
    model, tokenizer = open_model(locate(str(finished_run.path)), "float32")
    assert isinstance(model, PeftModel)
    assert not model.training
    assert tokenizer.padding_side == "left"
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama))
    assert (logits(model) - logits(tiny_llama)).abs().max() > 0.1


def test_a_saved_adapter_gives_identical_logits_in_a_fresh_process(finished_run, tiny_llama, logits, fresh_logits):
    model, _ = open_model(locate(str(finished_run.path)), "float32")
    fresh = fresh_logits({"run": (tiny_llama, finished_run.adapter.path)}, import_pera=True)
    assert torch.equal(fresh["run"], logits(model))


def test_adapters_of_other_methods_are_loaded_too(tiny_llama, tmp_path, logits):
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    saved = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), lora)
    saved.save_pretrained(tmp_path)
    model, _ = open_model(locate(str(tmp_path)), "float32")
    assert torch.equal(logits(model), logits(saved))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: dict(list(w.items())[1:]), "the weights file lacks 'base_model.*'"),
        (lambda w: {**w, "base_model.model.new.pera_A": torch.zeros(1)}, "the base model has no place for '.*new"),
    ],
)
def test_weights_that_do_not_match_the_base_by_name_are_refused(change, sentence, run, tiny_llama, change_weights):
    change_weights(run.adapter.path / "adapter_model.safetensors", change)
    with pytest.raises(UserError, match=f"^{str(run.adapter.path)!r} does not fit the base model: {sentence}"):
        run.adapter.load_on(load_model(str(tiny_llama)))


def test_a_run_can_be_moved(run, tmp_path, logits):
    before = logits(open_model(locate(str(run.path)), "float32")[0])
    moved = shutil.move(run.path, tmp_path / "elsewhere")
    assert torch.equal(logits(open_model(locate(str(moved)), "float32")[0]), before)


def test_a_resumed_run_that_fails_to_start_is_not_discarded(pera, run, monkeypatch):
    for folder in (run.adapter.path, run.checkpoints):
        shutil.rmtree(folder)
    run.metrics_file.unlink()
    recipe = run.recipe_file.read_text()
    monkeypatch.setattr("pera_lab.models.load_model", lambda *_, **__: (_ for _ in ()).throw(UserError("no model")))
    assert pera("train", run.path, "--resume").code == 2
    assert run.recipe_file.read_text() == recipe
