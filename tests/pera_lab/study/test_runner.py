"""Running a study: every run ends exactly once, also after kills and failures."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from peft import DeloraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import tiny
from pera.errors import UserError
from pera_lab.files import InUse, write_json
from pera_lab.methods import peft_config, resolve_targets
from pera_lab.runs import Run
from pera_lab.study import load_study
from pera_lab.study.folder import StudyFolder
from pera_lab.study.perform import _perform, num_parameters
from pera_lab.study.plan import Expectation, Outcome, best_rate, known_trials
from pera_lab.study.results import Results
from pera_lab.study.runner import run_study, work

LORA, PERA = "family_relationships-lora-r2", "family_relationships-pera-rms-0.3-r2"


def study_of(study_file, *overrides):
    return load_study(str(study_file), list(overrides))


def whole(folder):
    """Outcomes, scores and adapters of the runs, without times."""
    found = {}
    for run in sorted(folder.runs.iterdir()):
        outcome = json.loads((run / "outcome.json").read_text())
        scores = json.loads((run / "scores.json").read_text())["adapter"] if (run / "scores.json").is_file() else {}
        for timed in (outcome, scores):
            for key in ("seconds", "wall_seconds"):
                timed.pop(key, None)
        found[run.name] = (outcome, scores, (run / "adapter" / "adapter_model.safetensors").read_bytes())
    return found


def test_two_methods_two_rates_two_seeds_are_eight_runs(finished):
    best = {"lora": 0.03, "pera-rms-0.3": 0.03}
    assert set(whole(finished)) == {
        *(f"{cell}-choose-lr{rate}-seed1" for cell in (LORA, PERA) for rate in (0.001, 0.03)),
        *(f"{LORA}-report-lr{best['lora']}-seed{seed}" for seed in (42, 43)),
        *(f"{PERA}-report-lr{best['pera-rms-0.3']}-seed{seed}" for seed in (42, 43)),
    }
    assert {outcome["status"] for outcome, _, _ in whole(finished).values()} == {"finished"}


def test_a_trial_leaves_a_run_folder(finished):
    chosen, reported = finished.runs / f"{PERA}-choose-lr0.03-seed1", finished.runs / f"{PERA}-report-lr0.03-seed42"
    assert not (chosen / "scores.json").exists()
    assert {"recipe.yaml", "metrics.jsonl", "cost.json", "scores.json", "effect.json", "interaction.json"} <= {
        path.name for path in reported.iterdir()
    }
    assert not (reported / "checkpoints").exists()
    assert "held_out: 16" in (chosen / "recipe.yaml").read_text()
    assert "held_out: 0" in (reported / "recipe.yaml").read_text()


def test_parameters_are_counted_in_the_adapter(finished):
    """At r = 2 PERA has three coefficients more per layer than LoRA."""
    outcomes = {
        cell: json.loads((finished.runs / f"{cell}-report-lr0.03-seed42" / "outcome.json").read_text())
        for cell in (LORA, PERA)
    }
    tensors = load_file(finished.runs / f"{PERA}-report-lr0.03-seed42" / "adapter" / "adapter_model.safetensors")
    layers = sum(key.endswith("pera_h") for key in tensors)
    assert outcomes[PERA]["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert outcomes[PERA]["parameters"] - outcomes[LORA]["parameters"] == 3 * layers > 0


def test_the_parameters_leave_out_the_norms_that_delora_saves(tmp_path):
    model, run = get_peft_model(tiny.llama(), DeloraConfig(r=2, target_modules=["q_proj"])), Run(tmp_path)
    model.save_pretrained(str(run.adapter.path))
    assert num_parameters(run) == model.num_parameters(only_trainable=True)


@pytest.mark.parametrize(
    ("config", "counts_head"),
    [
        (LoraConfig(r=2, target_modules=["query"], bias="lora_only", modules_to_save=["dense"]), False),
        (peft_config("full", "SEQ_CLS"), True),
    ],
)
def test_the_parameters_leave_out_a_head_except_for_full_fine_tuning(config, counts_head, tiny_bert, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    config.task_type = "SEQ_CLS"
    model, run = get_peft_model(base, resolve_targets(base, config)), Run(tmp_path)
    model.save_pretrained(str(run.adapter.path))
    head = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" in name)
    assert head > 0
    assert num_parameters(run) == model.num_parameters(only_trainable=True) - (0 if counts_head else head)


def test_methods_see_the_same_data_in_the_same_order(study_file, tmp_path):
    """ΔW starts at zero, so the first loss is the base model's on the first batch."""
    small = ["training.max_steps=1", "training.logging_steps=1", "choose.learning_rate=[1e-3]"]
    folder, study = StudyFolder(tmp_path / "first"), study_of(study_file, *small)
    run_study(study, folder)
    first = {run.name: folder.run(run).metrics()[0]["loss"] for run in known_trials(study, folder.outcomes(study))}
    for phase, seed in (("choose", 1), ("report", 42), ("report", 43)):
        lora, pera = (first[f"{cell}-{phase}-lr0.001-seed{seed}"] for cell in (LORA, PERA))
        assert lora == pytest.approx(pera, abs=1e-5)
    assert first[f"{LORA}-report-lr0.001-seed42"] != first[f"{LORA}-report-lr0.001-seed43"]


@pytest.mark.slow
def test_dropout_does_not_change_the_order_of_rows_in_later_epochs(study_file, tmp_path):
    """At a learning rate near zero every loss is the base model's on its batch."""
    small = ["training.max_steps=null", "training.epochs=2", "training.logging_steps=1", "choose.learning_rate=[1e-9]"]
    methods = "grid.method=[{name: lora, dropout: 0},{name: lora, label: dropped, dropout: 0.5}]"
    folder = StudyFolder(tmp_path / "epochs")
    study = study_of(study_file, *small, methods, "training.group_by_length=true", "report.seeds=[42]")
    work(study, folder, math.inf)
    lora, dropped = (
        [line["loss"] for line in folder.run(trial).metrics()]
        for trial in known_trials(study, folder.outcomes(study))
        if trial.phase == "report"
    )
    assert lora == pytest.approx(dropped, abs=1e-5)
    half = len(lora) // 2
    assert lora[:half] != pytest.approx(lora[half:], abs=1e-3)


def test_a_finished_study_is_not_run_again(finished, study_file):
    before = {path: path.stat().st_mtime_ns for path in finished.runs.rglob("*")}
    run_study(study_of(study_file), finished)
    assert {path: path.stat().st_mtime_ns for path in finished.runs.rglob("*")} == before


def test_what_killed_workers_left_of_ended_runs_is_removed(finished, study_file, tmp_path):
    folder = StudyFolder(Path(shutil.copytree(finished.path, tmp_path / "copy")))
    before = {path.relative_to(folder.path) for path in folder.path.rglob("*")}
    run = folder.run(known_trials(study_of(study_file), {})[0])
    (run.checkpoints / "checkpoint-2").mkdir(parents=True)
    (folder.locks / f"{run.path.name}.lock").touch()
    run_study(study_of(study_file), folder)
    assert {path.relative_to(folder.path) for path in folder.path.rglob("*")} == before


def test_a_run_that_another_command_trains_is_left_to_it(study_file, tmp_path):
    folder, study = StudyFolder(tmp_path / "study"), study_of(study_file, "settings.training.max_steps=1")
    folder.prepare(study)
    trial = known_trials(study, {})[0]
    run = Run.create(trial.recipe(), folder.run(trial).path)
    with run.in_use(), pytest.raises(InUse):
        _perform(trial, folder)
    assert folder.outcome(trial) is None


def test_a_folder_that_holds_something_else_is_refused(refused, study_file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    refused("study", "run", study_file, "--output", "mine", words=["'mine'", "not empty"])


@pytest.mark.slow
def test_two_workers_share_the_runs(finished, study_file, tmp_path):
    folder = StudyFolder(tmp_path / "two")
    run_study(study_of(study_file), folder, workers=2)
    assert whole(folder) == whole(finished)


@pytest.fixture
def started(monkeypatch, study_file, tmp_path):
    """Runs the small study with processes that do nothing. Returns the visible GPUs and the threads of each."""

    def run(workers, gpus, *overrides):
        found = []

        class Idle(multiprocessing.Process):
            exitcode = 0

            def __init__(self, target, args):
                self.threads = args[-1]

            def start(self):
                found.append((os.environ.get("CUDA_VISIBLE_DEVICES"), self.threads))

            def is_alive(self):
                return False

        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        monkeypatch.setattr("torch.get_num_threads", lambda: 8)
        monkeypatch.setattr("os.cpu_count", lambda: 8)
        monkeypatch.setattr(multiprocessing.get_context("spawn").__class__, "Process", Idle)
        before = dict(os.environ)
        run_study(study_of(study_file, *overrides), StudyFolder(tmp_path / "idle"), workers=workers)
        assert dict(os.environ) == before
        return found

    return run


@pytest.mark.parametrize(
    ("workers", "gpus", "visible", "overrides", "expected"),
    [
        (2, 2, None, [], ["0", "1"]),
        (3, 2, None, [], ["0", "1", "0"]),
        (2, 2, "5,7", [], ["5", "7"]),
        (2, 1, "5", [], ["5", "5"]),
        (2, 0, None, [], [None, None]),
        (1, 2, None, ["resources.gpus=0"], [""]),
        (4, 2, None, ["resources.gpus=0.5"], ["0", "1", "0", "1"]),
    ],
)
def test_each_worker_sees_its_own_gpu(workers, gpus, visible, overrides, expected, started, monkeypatch):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu for gpu, _ in started(workers, gpus, *overrides)] == expected


def test_workers_have_the_threads_of_the_study_or_divide_those_of_the_machine(started):
    assert [threads for _, threads in started(4, 0)] == [2, 2, 2, 2]
    assert [threads for _, threads in started(2, 0, "resources.cpus=3")] == [3, 3]


@pytest.mark.parametrize(
    ("workers", "override", "message"),
    [
        (3, "resources.gpus=1", r"resources\.gpus=1: 3 workers need 3 GPUs, but this machine has 2"),
        (5, "resources.gpus=0.5", r"resources\.gpus=0\.5: 5 workers need 3 GPUs, but this machine has 2"),
        (3, "resources.cpus=3", r"resources\.cpus=3: 3 workers need 9 CPUs, but this machine has 8"),
    ],
)
def test_resources_that_this_machine_lacks_are_refused(workers, override, message, started, tmp_path):
    with pytest.raises(UserError, match=message):
        started(workers, 2, override)
    assert not (tmp_path / "idle").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_workers_exit_when_their_parent_dies(study_file, tmp_path, sent):
    folder, study = StudyFolder(tmp_path / "stopped"), study_of(study_file, "settings.training.max_steps=100000")
    process = multiprocessing.get_context("fork").Process(target=run_study, args=(study, folder), kwargs={"workers": 2})
    process.start()
    give_up = time.monotonic() + 120
    while len(training := list(folder.runs.glob("*/metrics.jsonl"))) < 2 and time.monotonic() < give_up:
        time.sleep(0.2)
    assert len(training) == 2
    os.kill(process.pid, sent)
    process.join(60)
    assert process.exitcode is not None
    time.sleep(2)
    sizes = [file.stat().st_size for file in training]
    time.sleep(3)
    assert [file.stat().st_size for file in training] == sizes
    assert folder.outcomes(study) == {}


def test_a_trial_that_another_worker_runs_is_skipped(study_file, tmp_path):
    folder, study = StudyFolder(tmp_path / "locked"), study_of(study_file, "settings.training.max_steps=1")
    folder.prepare(study)
    first = known_trials(study, {})[0]
    with folder.in_use(first):
        process = multiprocessing.get_context("fork").Process(target=work, args=(study, folder, math.inf))
        process.start()
        others = [trial.name for trial in known_trials(study, {})[1:]]
        give_up = time.monotonic() + 120
        while not set(others) <= folder.outcomes(study).keys() and time.monotonic() < give_up:
            time.sleep(0.2)
        time.sleep(2)
        assert process.is_alive()  # it waits, because the reported trials depend on this one
        process.kill()
        process.join()
    assert first.name not in folder.outcomes(study)
    assert set(others) <= folder.outcomes(study).keys()


def test_a_failed_run_is_recorded_and_the_others_continue(study_file, tmp_path, monkeypatch):
    from pera_lab.study import perform

    def train(recipe, run, **options):
        if recipe.method["name"] == "lora":
            raise RuntimeError("out of\nluck")
        return trained(recipe, run, **options)

    trained = perform.train
    monkeypatch.setattr(perform, "train", train)
    folder, study = StudyFolder(tmp_path / "failing"), study_of(study_file, "training.max_steps=1")
    outcomes = run_study(study, folder)
    assert {n: o.error for n, o in outcomes.items() if o.status == "failed"} == {
        f"{LORA}-choose-lr{rate}-seed1": "RuntimeError: out of luck" for rate in (0.001, 0.03)
    }
    assert sum(o.status == "finished" for o in outcomes.values()) == 4
    monkeypatch.setattr(perform, "train", trained)
    assert len(run_study(study, folder)) == 6  # failed runs are repeated only on request
    assert len(run_study(study, folder, retry=True)) == 8


@pytest.mark.parametrize("trusted", [False, True])
def test_the_study_decides_whether_code_of_its_base_may_run(trusted, study_file, tmp_path, monkeypatch):
    seen = []

    def look(_recipe, run, **_):
        seen.append(run.trust_remote_code)
        raise UserError("seen")

    monkeypatch.setattr("pera_lab.study.perform.train", look)
    study, folder = (
        study_of(study_file, f"settings.model.trust_remote_code={json.dumps(trusted)}"),
        StudyFolder(tmp_path),
    )
    folder.prepare(study)
    resumed = next(iter(known_trials(study, {})))
    Run.create(resumed.recipe(), folder.run(resumed).path)
    run_study(study, folder)
    assert set(seen) == {trusted}
    assert len(seen) > 1  # a resumed run and new ones


def test_a_training_that_is_not_finite_is_recorded_as_diverged(study_file, tmp_path):
    overrides = ["choose.learning_rate=[1e-2,3e38]", "training.weight_decay=10", "grid.method=[lora]"]
    folder = StudyFolder(tmp_path / "diverging")
    outcomes = run_study(study_of(study_file, *overrides, "report.seeds=[42]"), folder)
    lost = outcomes[f"{LORA}-choose-lr3e+38-seed1"]
    assert lost.status == "diverged"
    assert "not finite" in lost.error
    assert outcomes[f"{LORA}-report-lr0.01-seed42"].status == "finished"


def test_a_rising_loss_is_recorded_as_diverged(study_file, tmp_path, monkeypatch):
    monkeypatch.setattr("pera_lab.monitor.DIVERGED", 0.1)
    overrides = [
        "grid.method=[lora]",
        "choose.learning_rate=[1e-3]",
        "training.max_steps=2",
        "training.logging_steps=1",
    ]
    (lost,) = run_study(study_of(study_file, *overrides), StudyFolder(tmp_path / "risen")).values()
    assert lost.status == "diverged"
    assert re.fullmatch(r"the training loss rose from \d[\d.]* to \d[\d.]*", lost.error)


def test_a_folder_with_other_settings_is_rejected(finished, study_file, tmp_path):
    shutil.copytree(finished.path, tmp_path / "copy")
    with pytest.raises(UserError, match=r"training\.batch_size differs from the recipe of .*; undo the change or give"):
        run_study(study_of(study_file, "training.batch_size=2"), StudyFolder(tmp_path / "copy"))


def test_other_settings_are_rejected_also_in_runs_beyond_the_grid(finished, study_file, tmp_path):
    """The grid has none of the old rates, but may be extended to one of them."""
    shutil.copytree(finished.path, tmp_path / "copy")
    grid = ["choose.learning_rate=[2.5e-4,5e-4]", "choose.extend=1", "training.batch_size=2"]
    with pytest.raises(UserError, match=r"training\.batch_size differs from the recipe of .*; undo the change or give"):
        run_study(study_of(study_file, *grid), StudyFolder(tmp_path / "copy"))


def test_a_run_whose_rate_has_many_digits_is_resumed(study_file, tmp_path):
    rates = [10**-2.5, 0.01]
    study, folder = study_of(study_file, f"choose.learning_rate={rates}", "grid.method=[lora]"), StudyFolder(tmp_path)
    folder.prepare(study)
    for trial in known_trials(study, {}):
        Run.create(trial.recipe(), folder.run(trial).path)
    folder.prepare(study)
    assert {path.name for path in folder.runs.iterdir()} == {f"{LORA}-choose-lr{rate}-seed1" for rate in rates}


def test_missing_data_are_reported_before_the_first_run(pera, refused, glue_recipe, tmp_path):
    study = {
        **{"base": str(glue_recipe), "grid": {"task": "sst2", "method": "lora"}, "report": {"seeds": [42]}},
        "choose": {"learning_rate": [1e-3], "rows": 8},
    }
    (tmp_path / "glue.yaml").write_text(json.dumps(study))
    wrong = ["study", "run", "glue.yaml", "training.epochs=1", "--output", "study"]
    refused(*wrong, "data=/nowhere", words=["/nowhere"])
    refused(*wrong, "choose.rows=64", words=["training.held_out=64 leaves none of the 64 training rows"])
    failed = pera(*wrong, "model=/gone/model")
    assert (failed.code, "'/gone/model'" in failed.out) == (1, True)
    refused(*wrong, words=["model.name differs", "remove failed runs with --retry"])
    assert pera(*wrong, "--retry").code == 0  # what failed is forgotten, its settings too


def test_a_budget_of_zero_starts_no_run(study_file, tmp_path):
    assert run_study(study_of(study_file), StudyFolder(tmp_path / "none"), budget=0) == {}


def test_a_run_that_is_expected_to_exceed_the_budget_is_not_started(study_file, tmp_path):
    folder, study = StudyFolder(tmp_path / "dear"), study_of(study_file)
    folder.prepare(study)
    first = folder.run(known_trials(study, {})[0])
    first.path.mkdir()
    write_json(first.path / "outcome.json", asdict(Outcome("finished", loss=1.0, wall_seconds=3600.0)))
    assert list(run_study(study, folder, budget=0.5)) == [first.path.name]


def test_rates_come_before_seeds_and_the_middle_of_the_grid_comes_first(study_file):
    study = study_of(study_file, "choose.learning_rate=[1e-3,1e-2,1e-1]", "grid.method=[lora,dora]")
    trials = known_trials(study, {})
    assert [(t.cell.method.label, t.learning_rate) for t in trials[:2]] == [("lora", 1e-2), ("dora", 1e-2)]
    assert {t.phase for t in trials} == {"choose"}
    done = {t.name: Outcome("finished", loss=t.learning_rate) for t in trials if t.cell.method.label == "lora"}
    reported = [t for t in known_trials(study, done) if t.phase == "report"]
    assert [(t.cell.method.label, t.learning_rate, t.seed) for t in reported] == [("lora", 1e-3, s) for s in (42, 43)]


def test_a_best_rate_at_an_edge_is_followed_beyond_it(study_file):
    study = study_of(study_file, "choose.learning_rate=[1e-3,2e-3]", "choose.extend=2", "grid.method=[lora]")
    outcomes, seen = {}, []
    for _ in range(5):
        for trial in known_trials(study, outcomes):
            if trial.name not in outcomes and trial.phase == "choose":
                seen.append(trial.learning_rate)
                outcomes[trial.name] = Outcome("finished", loss=abs(math.log(trial.learning_rate / 5e-3)))
    assert sorted(seen) == [1e-3, 2e-3, 4e-3, 8e-3]
    assert {t.learning_rate for t in known_trials(study, outcomes) if t.phase == "report"} == {4e-3}


def test_a_failed_or_diverged_rate_is_not_chosen(study_file):
    study = study_of(study_file)
    (cell, *_) = study.cells()
    small, large = sorted((t for t in known_trials(study, {}) if t.cell == cell), key=lambda trial: trial.learning_rate)
    for lost in (Outcome("diverged"), Outcome("diverged", loss=0.1)):  # not finite, or finite but too large
        outcomes = {small.name: lost, large.name: Outcome("finished", loss=9.0)}
        assert best_rate(study, cell, outcomes, [0.001, 0.03]) == 0.03
    outcomes[large.name] = Outcome("failed", "no luck")
    assert best_rate(study, cell, outcomes, [0.001, 0.03]) is None


def test_failed_rates_do_not_count_for_the_edge_of_the_grid(study_file, tmp_path):
    study = study_of(study_file, "choose.learning_rate=[1e-3,2e-3,4e-3]", "grid.method=[lora]")
    folder, (cell,) = StudyFolder(tmp_path / "edges"), study.cells()
    folder.prepare(study)
    trials = {trial.learning_rate: trial for trial in known_trials(study, {})}

    def end(rate, **outcome):
        folder.run(trials[rate]).path.mkdir(exist_ok=True)
        write_json(folder.run(trials[rate]).path / "outcome.json", outcome)

    for rate, loss in ((1e-3, 0.5), (2e-3, 0.4), (4e-3, 0.6)):
        end(rate, status="finished", loss=loss)
    assert not Results(folder).at_grid_edge(cell)
    end(4e-3, status="failed", error="out of memory")
    assert Results(folder).at_grid_edge(cell)


def test_the_expected_duration_is_that_of_similar_trials(study_file):
    study = study_of(study_file)
    trials = known_trials(study, {})
    outcomes = {trials[0].name: Outcome("finished", loss=1.0, wall_seconds=10.0)}
    expected = Expectation(study, outcomes)
    assert expected(trials[1]) == 10.0
    assert len(expected.remaining()) == 7
    assert Expectation(study, {})(trials[0]) is None
