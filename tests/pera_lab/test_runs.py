"""The run folder, and which run a command resumes."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from pera.errors import UserError
from pera_lab.checkpoints import COMPLETE
from pera_lab.files import lock_of, unfinished
from pera_lab.models import fingerprint, load_model
from pera_lab.opening import locate_run, open_model
from pera_lab.recipe import load_recipe
from pera_lab.runs import Run, resumable
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


def test_a_run_folder_is_named_after_recipe_and_time_and_holds_the_resolved_recipe(recipe, workplace):
    run = Run.create(recipe)
    assert run.path.parent == Path("runs")
    assert run.path.name.startswith("small-2")
    assert run.recipe == recipe
    assert "weight_decay: 0.0" in run.recipe_file.read_text()


@pytest.mark.parametrize("name", ["", "..", "a/b", "../../a", "a\0b", "a\\b", "x" * 400])
def test_a_name_that_no_folder_can_have_needs_an_output(name, recipe, workplace):
    named = recipe.model_copy(update={"name": name})
    with pytest.raises(UserError, match=r"^name='.*' cannot be the name of a folder; change it or give --output"):
        Run.create(named)
    assert list(workplace.iterdir()) == []
    assert Run.create(named, Path("run")).recipe.name == name


def test_an_unfinished_run_is_found_by_a_name_with_brackets(recipe, workplace):
    run = Run.create(recipe.model_copy(update={"name": "llama[v1]*?"}))
    assert Run.latest_unfinished(run.recipe).path == run.path


def test_two_runs_started_in_the_same_second_get_different_folders(recipe, workplace):
    assert Run.create(recipe).path != Run.create(recipe).path


def test_a_run_that_fails_at_once_removes_only_what_it_created(recipe, workplace):
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


def test_an_interrupted_run_keeps_what_it_logged_and_a_refused_one_does_not(recipe, workplace):
    run = Run.create(recipe, Path("runs/run"))
    for file in (run.validation_file, run.metrics_file):
        file.write_text('{"step": 2, "loss": 1.0}\n')
        with pytest.raises(KeyboardInterrupt), run.discarded_on_error():
            raise KeyboardInterrupt
        assert file.is_file()
    with pytest.raises(UserError), run.discarded_on_error():
        raise UserError("the loss is not finite")
    assert not run.path.exists()


def test_a_failed_run_is_kept_if_anything_was_saved(recipe, workplace):
    run = Run.create(recipe, Path("runs/run"))
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


def test_a_run_of_a_recipe_with_a_longer_name_is_not_resumed(recipe, started):
    mine = started(recipe, "small-20260101-000001", age=30)
    started(recipe.model_copy(update={"name": "small-other"}), "small-other-20260101-000002")
    assert Run.latest_unfinished(recipe).path == mine.path


def test_a_run_is_resumed_by_its_folder_by_output_or_by_its_recipe(recipe_file, recipe, started):
    run = started(recipe, "small-20260101-000001")
    for source, output in [(str(run.path), None), (str(recipe_file), run.path), (str(recipe_file), None)]:
        assert resumable(source, None, output).path == run.path


def test_incomplete_checkpoints_are_removed(recipe, workplace):
    run = Run.create(recipe, workplace / "run")
    assert run.last_checkpoint() is None
    for step in (8, 12, 100):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (run.checkpoints / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"cut")
    (run.checkpoints / "checkpoint-8" / COMPLETE).touch()
    (run.checkpoints / "checkpoint-12" / COMPLETE).touch()
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-12"
    run.remove_incomplete_checkpoints()
    assert {path.name for path in run.checkpoints.iterdir()} == {"checkpoint-8", "checkpoint-12"}


def test_other_files_among_the_checkpoints_are_kept(recipe, workplace):
    run = Run.create(recipe, workplace / "run")
    (run.checkpoints / "checkpoint-1x").mkdir(parents=True)
    (run.checkpoints / "checkpoint-2").write_text("mine")
    assert run.last_checkpoint() is None
    run.remove_incomplete_checkpoints()
    assert len(list(run.checkpoints.iterdir())) == 2


def test_a_record_that_is_not_an_object_is_rejected(run):
    for file in (run.scores_file, run.data_file, run.environment_file):
        file.write_text("[]")
    for read in (run.scores, lambda: run.check_data({}), lambda: open_model(locate_run(run))):
        with pytest.raises(UserError, match=r"json' should hold a JSON object but holds \[\]; restore or remove it\.$"):
            read()


def test_a_truncated_last_line_is_left_out_of_the_metrics(recipe, workplace):
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


def test_data_files_that_changed_since_the_start_are_rejected(recipe, workplace):
    run = Run.create(recipe, workplace / "run")
    files = {"train": {"mix": {"sha256": "1" * 64}}, "validation": {"rows": 3}, "test": {"piqa": {"sha256": "2" * 64}}}
    run.check_data(files)  # nothing is recorded
    run.data_file.write_text(json.dumps({**files, "notes": []}))
    run.check_data({**files, "validation": {"rows": 4}})
    for change, words in [
        (
            {"test": {"piqa": {"sha256": "3" * 64}}},
            r"'test\.piqa' file changed since '.*' was started \(SHA-256 3+… now, 2+… in data\.json\)",
        ),
        ({"validation": {"sha256": "3" * 64}}, r"'validation' file changed .* none in data\.json"),
        ({"train": {}}, r"'train\.mix' file changed .*SHA-256 none now"),
    ]:
        with pytest.raises(UserError, match=rf"^task\.data: the {words}"):
            run.check_data({**files, **change})
    run.data_file.write_text('{"notes": []}')  # nor here
    run.check_data(files)


@pytest.mark.parametrize(("key", "was"), [("dtype", "bfloat16"), ("fingerprint", "0123456789abcdef")])
def test_a_run_is_not_resumed_on_another_base_model(key, was, run):
    record = json.loads(run.environment_file.read_text())
    record["base_model"][key] = was
    run.environment_file.write_text(json.dumps(record))
    shutil.rmtree(run.adapter.path)
    with pytest.raises(UserError, match=rf"^--resume: .* was started on '.*' with {key} {was}, which is .* now"):
        train(run.recipe, run, resume=True)
    assert json.loads(run.environment_file.read_text()) == record


def test_a_resumed_run_that_fails_to_start_is_not_discarded(pera, run, monkeypatch):
    for folder in (run.adapter.path, run.checkpoints):
        shutil.rmtree(folder)
    run.metrics_file.unlink()
    recipe = run.recipe_file.read_text()
    monkeypatch.setattr("pera_lab.models.load_model", lambda *_, **__: (_ for _ in ()).throw(UserError("no model")))
    assert pera("train", run.path, "--resume").code == 2
    assert run.recipe_file.read_text() == recipe


def contents(folder):
    """Bytes and time of change of every file in a folder."""
    return {p: (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_a_refused_resume_changes_nothing(pera, run):
    shutil.rmtree(run.adapter.path)
    shutil.rmtree(run.checkpoints / "checkpoint-12")
    (run.checkpoints / "checkpoint-12").mkdir()  # incomplete
    weights = run.checkpoints / "checkpoint-8" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    before = contents(run.path)
    assert pera("train", run.path, "--resume").code == 2
    assert contents(run.path) == before


def test_of_two_trainings_in_one_folder_one_is_refused(pera, recipe_file, run, finished_run, tmp_path):
    """The folder is held by this process; a lock belongs to an open file, so the command is refused as another one."""
    shutil.rmtree(run.adapter.path)
    with run.in_use():
        before = contents(run.path)
        outcome = pera("train", run.path, "--resume")
        assert (outcome.code, outcome.err) == (
            2,
            f"pera: {str(run.path)!r} is in use by another process; wait until it ends, or stop it.\n",
        )
        assert contents(run.path) == before
    (tmp_path / "new").mkdir()
    with Run(tmp_path / "new").in_use():
        assert "in use by another process" in pera("train", recipe_file, "--output", "new").err
    assert list((tmp_path / "new").iterdir()) == []
    assert pera("train", run.path, "--resume").code == 0
    assert not run.lock_file.exists()


def test_trainings_that_start_at_the_same_moment_have_a_folder_each_or_are_refused(recipe, workplace):
    context, start = multiprocessing.get_context("fork"), multiprocessing.get_context("fork").Barrier(8)
    results = context.Queue()

    def create(output):
        start.wait()
        try:
            with Run.create(recipe, output).discarded_on_error():
                results.put("created")
        except UserError as error:
            results.put(str(error))

    processes = [context.Process(target=create, args=(Path("mine") if i % 2 else None,)) for i in range(8)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert found.count("created") == 5
    assert len(list((workplace / "runs").iterdir())) == 4
    assert [path.name for path in (workplace / "mine").iterdir()] == ["recipe.yaml"]


def test_a_folder_that_was_left_before_its_recipe_was_written_can_be_used(recipe, workplace):
    run = Run(workplace / "run")
    run.path.mkdir()
    for file in (run.lock_file, unfinished(run.recipe_file), lock_of(run.recipe_file)):
        file.touch()
    assert [path.name for path in Run.create(recipe, run.path).path.iterdir()] == ["recipe.yaml"]


def test_a_folder_that_holds_a_run_is_refused_with_the_way_to_continue_it(refused, recipe_file, run):
    refused("train", recipe_file, "--output", "run", words=["'run'", "not empty", "pera train run --resume"])


def test_a_finished_run_is_trained_further_as_the_message_says(pera, refused, recipe_file, run, tmp_path):
    message = refused("train", "run", "training.max_steps=24", "--resume", words=["'run' is finished", "max_steps"])
    assert "pera merge run --output MERGED" in message
    assert "model.name=MERGED" in message
    assert pera("merge", "run", "--output", "merged").code == 0
    assert pera("train", recipe_file, "model.name=merged", "training.max_steps=2", "--output", "further").code == 0
    first = Run(tmp_path / "further").metrics()[0]["loss"]
    assert first < run.metrics()[0]["loss"] - 1  # it starts from what the run learned


def test_the_lock_of_a_process_that_was_killed_after_training_is_removed(pera, run):
    run.lock_file.touch()
    assert pera("train", "run", "--resume").code == 2
    assert not run.lock_file.exists()
