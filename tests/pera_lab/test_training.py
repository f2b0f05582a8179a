"""Training: the run folder, reproducibility, interruptions, and the options of a recipe."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import RwkvConfig, RwkvForCausalLM, TrainingArguments

from pera.errors import UserError
from pera_lab.checkpoints import COMPLETE
from pera_lab.diagnose.effect import run_loss
from pera_lab.monitor import rate_hint
from pera_lab.opening import locate_run, open_model
from pera_lab.recipe import load_recipe
from pera_lab.runs import Run
from pera_lab.tasks.encoding import IGNORED, encode_example
from pera_lab.trainer import RunTrainer
from pera_lab.training import _arguments, train

STEPS = [2, 4, 6, 8, 10, 12]


def same_adapter(a, b):
    """Whether two runs have the same adapter, byte for byte."""
    return all(
        (a.adapter.path / name).read_bytes() == (b.adapter.path / name).read_bytes()
        for name in ("adapter_model.safetensors", "adapter_config.json")
    )


def measured(run):
    """The metrics without the one that measures this machine."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in run.metrics()]


def tokens(run):
    """Tokens that were trained on since the run was last resumed."""
    return json.loads(run.cost_file.read_text())["tokens"]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_training_leaves_a_run_folder(finished_run, tiny_llama):
    names = {path.name for path in finished_run.path.iterdir()}
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "adapter"} <= names
    config = json.loads((finished_run.adapter.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)
    assert (config["peft_type"], config["r"], config["pera_dropout"]) == ("PERA", 4, 0.1)
    weights = load_file(finished_run.adapter.path / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert {key.rpartition(".")[2] for key in weights} == {"pera_A", "pera_B", "pera_h"}


def test_training_learns_and_the_high_order_terms_take_part(finished_run):
    losses = [line["loss"] for line in finished_run.metrics()]
    assert losses[-1] < losses[0] - 1
    weights = load_file(finished_run.adapter.path / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0.01 for key, weight in weights.items() if key.endswith("pera_B"))
    assert all((weight - 0.3).abs().max() > 0.01 for key, weight in weights.items() if key.endswith("pera_h"))


def test_the_metrics_record_each_logged_step(finished_run):
    metrics = finished_run.metrics()
    assert [line["step"] for line in metrics] == STEPS
    for line in metrics:
        assert {"epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(line)
        assert line["tokens_per_second"] > 0
        assert line["grad_norm"] > 0
    rates = [line["learning_rate"] for line in metrics]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < rates[0] < 0.03


def test_the_last_two_checkpoints_are_kept_and_marked_complete(finished_run):
    assert {path.name for path in finished_run.checkpoints.iterdir()} == {"checkpoint-8", "checkpoint-12"}
    assert all((path / COMPLETE).is_file() for path in finished_run.checkpoints.iterdir())


def test_one_seed_gives_one_adapter_and_another_gives_another(finished_run, train_run, tmp_path):
    assert same_adapter(finished_run, train_run(tmp_path / "again"))
    other = train_run(tmp_path / "other", "training.seed=43")
    files = [run.adapter.path / "adapter_model.safetensors" for run in (finished_run, other)]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_the_seed_decides_initialization_and_data_order(train_run, tmp_path):
    """After one step A is as it was drawn, and the loss is the base model's on the first batch."""
    overrides = ["training.max_steps=1", "training.logging_steps=1"]
    runs = [train_run(tmp_path / str(seed), *overrides, f"training.seed={seed}") for seed in (1, 2)]
    a, b = (load_file(run.adapter.path / "adapter_model.safetensors") for run in runs)
    assert [key for key in a if key.endswith("pera_A") and torch.allclose(a[key], b[key], atol=1e-3)] == []
    losses = [run.metrics()[0]["loss"] for run in runs]
    assert losses[0] != losses[1]


def without_adapter(run):
    """Killed between the last checkpoint and the adapter."""


def without_last_checkpoint(run):
    """Killed between two checkpoints."""
    shutil.rmtree(run.checkpoints / "checkpoint-12")


def with_unmarked_checkpoint(run):
    """Killed when a checkpoint was about to be complete."""
    (run.checkpoints / "checkpoint-12" / COMPLETE).unlink()


def with_cut_checkpoint(run):
    """Killed while a checkpoint was being saved."""
    with_unmarked_checkpoint(run)
    cut(run.checkpoints / "checkpoint-12" / "adapter_model.safetensors")
    (run.checkpoints / "checkpoint-12" / "trainer_state.json").unlink()


def with_cut_metrics(run):
    """Killed while a line of the metrics was being written."""
    without_last_checkpoint(run)
    cut(run.metrics_file)


def without_checkpoints(run):
    """Killed before the first checkpoint was complete."""
    shutil.rmtree(run.checkpoints / "checkpoint-8")
    with_cut_checkpoint(run)


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (without_adapter, 0),
        (without_last_checkpoint, 4 / 12),
        (with_unmarked_checkpoint, 4 / 12),
        (with_cut_checkpoint, 4 / 12),
        (with_cut_metrics, 4 / 12),
        (without_checkpoints, 1),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(damage, left, run, finished_run):
    shutil.rmtree(run.adapter.path)
    damage(run)
    train(run.recipe, run, resume=True)
    assert same_adapter(run, finished_run)
    assert tokens(run) / tokens(finished_run) == pytest.approx(left, abs=0.05)
    if damage is with_cut_metrics:
        assert [line["step"] for line in run.metrics() if line["step"] > 8] == [10, 12]
    else:
        assert measured(run) == measured(finished_run)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def with_code(content):
    return {**content, "state": Evil()}


def with_other_shapes(content):
    states = {key: {**state, "exp_avg": torch.zeros(3)} for key, state in content["state"].items()}
    return {**content, "state": states}


@pytest.mark.parametrize(
    ("step", "name", "change"),
    [
        (8, "optimizer.pt", with_code),
        (8, "scheduler.pt", with_code),
        (8, "rng_state.pth", with_code),
        (12, "optimizer.pt", with_code),
        (8, "optimizer.pt", with_other_shapes),
        (8, "optimizer.pt", lambda content: {"state": {}, "param_groups": []}),
        (8, "optimizer.pt", lambda content: [1]),
        (8, "rng_state.pth", lambda content: {**content, "python": (3, (1,), None)}),
        (8, "scheduler.pt", lambda content: {**content, "last_epoch": 2}),
        (8, "rng_state.pth", lambda content: {"cpu": content["cpu"]}),
        (8, "trainer_state.json", lambda content: {**content, "global_step": "8"}),
        (8, "trainer_state.json", lambda content: {**content, "global_step": 4}),
        (8, "trainer_state.json", lambda content: [content]),
        (8, "trainer_state.json", lambda content: {**content, "unknown": 1}),
        (8, "adapter_model.safetensors", lambda content: dict(list(content.items())[1:])),
        (8, "adapter_model.safetensors", lambda content: {key: weight[:1] for key, weight in content.items()}),
    ],
)
def test_a_checkpoint_with_other_content_is_refused_and_nothing_in_it_runs(step, name, change, pera, run, tmp_path):
    shutil.rmtree(run.adapter.path)
    shutil.copytree(run.checkpoints / "checkpoint-8", run.checkpoints / "checkpoint-4")
    if step == 8:
        without_last_checkpoint(run)
    file = run.checkpoints / f"checkpoint-{step}" / name
    if name.endswith(".json"):
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    elif name.endswith(".safetensors"):
        save_file({key: weight.contiguous() for key, weight in change(load_file(file)).items()}, file)
    else:
        torch.save(change(torch.load(file, weights_only=False)), file)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    outcome = pera("train", run.path, "--resume")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert f"{str(file)!r} is broken (" in outcome.err
    older = run.checkpoints / ("checkpoint-4" if step == 8 else "checkpoint-8")
    assert f"delete {str(file.parent)!r} to resume from {str(older)!r}." in outcome.err
    assert not (tmp_path / "executed").exists()
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_run_that_was_moved_is_resumed_with_its_own_best_checkpoint(finished_glue_run, tmp_path):
    """The state of the Trainer names the best checkpoint by the path that it had."""
    best = json.loads((finished_glue_run.last_checkpoint() / "trainer_state.json").read_text())["best_global_step"]
    folder = Path(shutil.copytree(finished_glue_run.path, tmp_path / "moved"))
    run = Run(folder)
    shutil.rmtree(run.adapter.path)
    state = run.last_checkpoint() / "trainer_state.json"
    content = json.loads(state.read_text())
    content |= {"max_steps": content["max_steps"] + 1, "best_model_checkpoint": f"/gone/checkpoint-{best}"}
    state.write_text(json.dumps(content))
    train(run.recipe, run, resume=True)
    kept = load_file(run.checkpoints / f"checkpoint-{best}" / "adapter_model.safetensors")
    adapter = load_file(run.adapter.path / "adapter_model.safetensors")
    assert all(torch.equal(adapter[key], weight) for key, weight in kept.items())


@pytest.mark.parametrize(
    ("step", "name"),
    [(8, "adapter_model.safetensors"), (8, "trainer_state.json"), (8, "optimizer.pt"), (12, "rng_state.pth")],
)
def test_a_broken_checkpoint_is_named(step, name, run):
    shutil.rmtree(run.adapter.path)
    if step == 8:
        without_last_checkpoint(run)
    checkpoint = run.checkpoints / f"checkpoint-{step}"
    cut(checkpoint / name)
    with pytest.raises(
        UserError, match=rf"^--resume: {str(checkpoint / name)!r} .* delete {str(checkpoint)!r} to resume"
    ):
        train(run.recipe, run, resume=True)
    assert checkpoint.is_dir()


def test_a_missing_file_of_a_checkpoint_is_named(run):
    shutil.rmtree(run.adapter.path)
    without_last_checkpoint(run)
    checkpoint, name = run.checkpoints / "checkpoint-8", "scheduler.pt"
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=rf"^--resume: {str(checkpoint / name)!r} is broken \(it is missing\); delete"):
        train(run.recipe, run, resume=True)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "trainer_state.json"])
def test_a_pipe_in_a_checkpoint_is_refused(name, run):
    shutil.rmtree(run.adapter.path)
    file = run.checkpoints / "checkpoint-12" / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=rf"^--resume: {str(file)!r} is broken \(it is missing\)"):
        train(run.recipe, run, resume=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.dropout=0"],
        ["method={name: lora, r: 2, target_modules: [q_proj]}"],
        ["training.lr_ratio={B: 2, h: 0.5}", "training.weight_decay={A: 0.1}"],
        ["training.max_steps=null", "training.epochs=0.75", "training.gradient_accumulation_steps=2"],
        ["training.save_steps=3", "training.lr_scheduler=cosine", "training.warmup_steps=5"],
        ["training.max_steps=null", "training.epochs=2", "training.save_steps=16", "training.group_by_length=true"],
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_for_other_recipes(overrides, train_run, tmp_path):
    whole = train_run(tmp_path / "whole", *overrides)
    steps = [int(path.name.rpartition("-")[2]) for path in whole.checkpoints.iterdir()]
    assert len(steps) == 2
    halted = Run(Path(shutil.copytree(whole.path, tmp_path / "halted")))
    shutil.rmtree(halted.adapter.path)
    shutil.rmtree(halted.checkpoints / f"checkpoint-{max(steps)}")
    train(halted.recipe, halted, resume=True)
    assert same_adapter(halted, whole)
    assert 0 < tokens(halted) < 0.6 * tokens(whole)
    assert [line["step"] for line in halted.metrics()] == [line["step"] for line in whole.metrics()]


def test_a_run_without_its_adapter_is_not_trained_further(train_run, tmp_path):
    """At a constant rate a further step would show; at the end of a linear schedule the rate is zero."""
    whole = train_run(tmp_path / "whole", "training.lr_scheduler=constant")
    halted = Run(Path(shutil.copytree(whole.path, tmp_path / "halted")))
    shutil.rmtree(halted.adapter.path)
    train(halted.recipe, halted, resume=True)
    assert same_adapter(halted, whole)
    assert measured(halted) == measured(whole)


KILLED_WHILE_SAVING = """
import os, signal, torch
from pera_lab.cli import main
save = torch.save
def killed(content, file, **options):
    if "checkpoint-8" in str(file):
        open(file, "wb").write(b"cut")
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, file, **options)
torch.save = killed
main()
"""


def test_a_training_that_is_killed_while_it_saves_resumes_to_the_same_adapter(
    pera, python, recipe_file, finished_run, tmp_path
):
    killed = python(KILLED_WHILE_SAVING, "train", recipe_file, "--output", tmp_path / "run", check=False)
    assert killed.returncode == -signal.SIGKILL
    run = Run(tmp_path / "run")
    assert not run.adapter.path.exists()
    assert (run.checkpoints / "checkpoint-4" / COMPLETE).is_file()
    assert pera("train", run.path, "--resume").code == 0
    assert same_adapter(run, finished_run)
    assert tokens(run) / tokens(finished_run) == pytest.approx(8 / 12, abs=0.05)
    assert measured(run) == measured(finished_run)


def test_the_summary_counts_what_was_done(recipe_file, tmp_path, tokenizer):
    recipe = load_recipe(str(recipe_file), ["training.max_steps=null", "training.epochs=1", "training.batch_size=1"])
    summary = train(recipe, Run.create(recipe, tmp_path / "run"))
    lengths = [len(encode_example(tokenizer, example)["input_ids"]) for example in recipe.build_splits().train]
    assert summary.tokens == sum(lengths)
    assert summary.left_out == 0
    assert summary.seconds > 0
    assert summary.peak_memory > 100e6
    assert 0 < summary.final_loss < 10


def test_examples_that_are_too_long_are_left_out_and_counted(recipe_file, tmp_path, tokenizer):
    recipe = load_recipe(str(recipe_file), ["training.max_steps=1"])
    lengths = sorted(len(encode_example(tokenizer, example)["input_ids"]) for example in recipe.build_splits().train)
    recipe = load_recipe(str(recipe_file), ["training.max_steps=1", f"training.max_length={lengths[9]}"])
    summary = train(recipe, Run.create(recipe, tmp_path / "run"))
    assert summary.left_out == sum(length > lengths[9] for length in lengths) > 0


def test_gradient_checkpointing_changes_nothing_but_memory(finished_run, train_run, tmp_path):
    run = train_run(tmp_path / "run", "training.gradient_checkpointing=true")
    found, expected = (load_file(r.adapter.path / "adapter_model.safetensors") for r in (run, finished_run))
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-3, atol=1e-4)


def test_one_process_takes_one_gpu(recipe_file, monkeypatch, tmp_path):
    recipe = load_recipe(str(recipe_file))
    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(lambda arguments: torch.device("cpu")))
    monkeypatch.setattr(TrainingArguments, "_n_gpu", 4, raising=False)
    arguments = _arguments(recipe, Run(tmp_path))
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)


def test_the_adapter_of_a_bfloat16_base_is_float32(train_run, tmp_path):
    run = train_run(tmp_path / "run", "model.dtype=bfloat16", "training.max_steps=2")
    assert json.loads(run.environment_file.read_text())["base_model"]["dtype"] == "bfloat16"
    weights = load_file(run.adapter.path / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_a_dtype_that_the_processor_emulates_is_noted(train_run, tmp_path, monkeypatch, fast):
    monkeypatch.setattr("pera_lab.training.device", lambda: torch.device("cpu"))
    monkeypatch.setattr("pera_lab.training.fast_dtype", lambda: fast)
    run = train_run(tmp_path / "run", "model.dtype=bfloat16", "training.max_steps=1")
    notes = json.loads(run.data_file.read_text())["notes"]
    assert [note.partition(" saves")[0] for note in notes] == ["model.dtype=bfloat16"] * (fast is torch.float32)


def test_the_optimizer_has_the_groups_of_the_recipe(train_run, finished_run, tmp_path):
    run = train_run(tmp_path / "run", "training.lr_ratio={B: 2, h: 0.5}", "training.weight_decay={A: 0.1}")
    saved = torch.load(run.checkpoints / "checkpoint-8" / "optimizer.pt")["param_groups"]
    found = {g["name"]: (g["initial_lr"], g["lr"] / g["initial_lr"], g["weight_decay"]) for g in saved}
    left = pytest.approx(4 / 12)
    assert found == {"A": (0.03, left, 0.1), "B": (0.06, left, 0.0), "h": (0.015, left, 0.0)}
    rates = [[line["learning_rate"] for line in r.metrics()] for r in (run, finished_run)]
    assert rates[0] == rates[1]


def test_after_one_step_each_group_has_moved_by_its_ratio(train_run, tmp_path):
    """The first step of Adam has the length of the rate, whatever the gradient."""
    once = ["training.max_steps=1", "training.logging_steps=1"]
    plain, grouped = (
        load_file(train_run(tmp_path / name, *once, *more).adapter.path / "adapter_model.safetensors")
        for name, more in [("plain", []), ("grouped", ["training.lr_ratio={B: 4, h: 0.5}"])]
    )
    for key, weight in plain.items():
        kind = key.rpartition("_")[2]
        start, ratio = {"A": (weight, 1), "B": (0, 4), "h": (0.3, 0.5)}[kind]
        torch.testing.assert_close(grouped[key] - start, ratio * (weight - start), rtol=1e-4, atol=1e-6)


def test_ratios_of_one_are_no_ratios(train_run, finished_run, tmp_path):
    assert same_adapter(train_run(tmp_path / "run", "training.lr_ratio={B: 1, h: 1}"), finished_run)


def test_a_group_without_parameters_is_an_error(train_run, tmp_path):
    with pytest.raises(
        UserError, match=r"^training: lr_ratio\['other'\] applies to no trained parameter; this model has"
    ):
        train_run(tmp_path / "run", "training.lr_ratio.other=2")


def test_a_log_gets_one_line_for_each_logging_step(pera, recipe_file):
    lines = pera("train", recipe_file, "--output", "run").err.splitlines()
    assert lines[0].startswith("run folder run: pera on ")
    assert re.fullmatch(r"about \d+ s for 12 steps", lines[1])
    facts = r"loss \d\.\d{4} · rate \d\.\de-\d\d · [\d,]+ tokens/s · \d+\.\d GB"
    for step, line in zip(STEPS, lines[2:], strict=True):
        left = "" if step == 12 else r" · \d+ s left"
        assert re.fullmatch(rf"training step {step} of 12 · {facts}{left}", line)


def test_the_validation_and_the_checkpoint_that_was_kept_are_shown(pera, glue_recipe):
    outcome = pera("train", glue_recipe, "training.learning_rate=1", "--output", "run")
    run = Run(Path("run"))
    scores = {line["step"]: line["accuracy"] for line in run.validation()}
    assert re.findall(r"validation at step (\d+): .*accuracy ([\d.]+)", outcome.err) == [
        (str(step), f"{score:.4g}") for step, score in scores.items()
    ]
    kept = max(scores, key=scores.__getitem__)
    assert f"kept the checkpoint of step {kept}, the best on the validation rows\n" in outcome.err
    assert f"The checkpoint of step {kept} was kept" in Path("run/report.html").read_text()


def test_a_rate_that_learned_nothing_is_named_at_the_end(pera, recipe_file):
    outcome = pera("train", recipe_file, "training.learning_rate=1e-12", "--output", "run")
    assert outcome.code == 0
    assert re.fullmatch(
        r"warning: training\.learning_rate=1e-12: the loss went from [\d.]+ to [\d.]+, which is within its noise; "
        "raise the learning rate, or train longer.",
        outcome.err.splitlines()[-1],
    )


@pytest.mark.parametrize(
    ("losses", "shape"),
    [
        ([2.0, 2.1, 1.9, 2.05, 1.95, 2.0], "noise"),
        ([2.0, 1.9, 1.85, 1.75, 1.7, 1.6], "trend"),
        ([2.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 0.95, 1.05, 1.0], "fall"),
        ([2.0, 2.0, 2.0, 2.0, 2.0, 2.0], "constant"),
        ([2.0, 2.1, 1.9, 2.0], "few"),
        ([2.0, 2.1, 4.1], "rise"),
    ],
)
def test_noise_is_told_from_learning(losses, shape):
    hint = rate_hint(1e-4, losses)
    assert (hint is not None) == (shape in ("noise", "constant", "rise"))
    assert hint is None or hint.endswith("lower the learning rate." if shape == "rise" else "or train longer.")


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(n, action)`` calls ``action`` before the backward pass of step n."""

    def register(step, action):
        compute_loss = RunTrainer.compute_loss

        def acting(trainer, model, *rest, **options):
            if model.training and trainer.state.global_step == step - 1:
                action()
            return compute_loss(trainer, model, *rest, **options)

        monkeypatch.setattr(RunTrainer, "compute_loss", acting)

    # background jobs ignore SIGINT, and SIGTERM would end the tests
    before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}
    yield register
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_ends_a_training_with_a_checkpoint_to_resume_from(pera, recipe_file, finished_run, at_step):
    at_step(5, lambda: signal.raise_signal(signal.SIGINT))
    stopped = pera("train", recipe_file, "--output", "a run")
    assert stopped.code == 130
    assert "stopping after this step, with a checkpoint; Ctrl-C again stops at once\n" in stopped.err
    last = "pera: stopped after step 5 of 12; resume with: pera train 'a run' --resume\n"
    assert stopped.err.endswith(last)
    resumed = pera("train", "a run", "--resume")
    assert resumed.code == 0
    assert resumed.err.startswith("resuming after step 5 of 12\n")
    assert same_adapter(Run(Path("a run")), finished_run)


def test_a_second_signal_ends_a_training_at_once(pera, recipe_file, at_step):
    at_step(5, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    stopped = pera("train", recipe_file, "--output", "run")
    assert (stopped.code, stopped.out) == (130, "")
    assert "resume with" not in stopped.err
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["checkpoint-4"]


def test_a_signal_in_the_last_step_lets_the_adapter_be_saved(pera, recipe_file, at_step, finished_run):
    at_step(12, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = pera("train", recipe_file, "--output", "run")
    assert stopped.code == 143
    assert stopped.err.endswith("pera: interrupted after the last step; the adapter is saved in run/adapter\n")
    assert same_adapter(Run(Path("run")), finished_run)


def test_without_asking_for_it_a_training_leaves_signals_alone(recipe_file, at_step, tmp_path):
    at_step(5, lambda: signal.raise_signal(signal.SIGINT))
    recipe = load_recipe(str(recipe_file))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, Run.create(recipe, tmp_path / "run"))


@pytest.mark.parametrize("step", [5, 8])
def test_a_signal_at_and_between_evaluations_changes_no_result(step, pera, glue_recipe, at_step, finished_glue_run):
    at_step(step, lambda: signal.raise_signal(signal.SIGINT))
    assert pera("train", glue_recipe, "--output", "run").code == 130
    assert [line["step"] for line in Run(Path("run")).validation()] == [8] * (step == 8)
    assert pera("train", Path("run").resolve(), "--resume").code == 0
    assert Run(Path("run")).validation() == finished_glue_run.validation()
    assert same_adapter(Run(Path("run")), finished_glue_run)


def test_save_steps_hold_when_the_best_checkpoint_is_kept(glue_recipe, at_step, tmp_path):
    def stop():
        raise KeyboardInterrupt

    at_step(12, stop)
    recipe = load_recipe(str(glue_recipe), ["training.save_steps=3"])
    run = Run.create(recipe, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, run)
    assert run.last_checkpoint().name == "checkpoint-9"
    assert (run.checkpoints / "checkpoint-8").is_dir()


@pytest.mark.parametrize("logging_steps", [1, 50])
def test_a_loss_that_is_not_finite_is_an_error_and_leaves_no_adapter(
    logging_steps, train_run, tiny_llama, change_weights, tmp_path
):
    shutil.copytree(tiny_llama, tmp_path / "base")
    change_weights(tmp_path / "base" / "model.safetensors", lambda tensors: {k: 1e38 * t for k, t in tensors.items()})
    overrides = [f"model.name={tmp_path / 'base'}", f"training.logging_steps={logging_steps}"]
    with pytest.raises(UserError, match=r"^training\.learning_rate=0\.03: the loss is not finite at step \d+"):
        train_run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "adapter").exists()


def test_weights_that_are_not_finite_are_an_error_even_if_every_loss_is(train_run, tmp_path):
    overrides = ["training.learning_rate=3e38", "training.weight_decay=3e38", "training.max_steps=1"]
    with pytest.raises(UserError, match=r"^training\.learning_rate=3e\+38: the weights are not finite at step 1"):
        train_run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "adapter").exists()


def test_evaluations_that_never_come_are_an_error(glue_recipe, pera, refused):
    for keep in ("best", "last"):
        options = [f"training.keep={keep}", "training.eval_steps=100"]
        words = ["training.eval_steps=100 has no effect, because the training has 24 steps"]
        refused("train", glue_recipe, *options, "--output", "run", words=words)


def test_the_recipe_in_the_folder_is_the_one_that_was_trained(finished_run, recipe_file):
    content = yaml.safe_load(finished_run.recipe_file.read_text())
    given = yaml.safe_load(recipe_file.read_text())
    assert content["method"] == given["method"]
    assert content["training"]["weight_decay"] == 0.0


def first_epoch(run):
    """Labels and summed loss of the first epoch, as ``metrics.jsonl`` records them."""
    parts = [line["first_epoch"] for line in run.metrics() if "first_epoch" in line]
    return sum(part["labels"] for part in parts), sum(part["nats"] for part in parts)


ASLEEP = ["training.learning_rate=1e-30", "training.gradient_accumulation_steps=2", "training.batch_size=4"]


def test_the_losses_of_the_first_epoch_are_those_of_each_row(train_run, tmp_path):
    """The adapter does not move, so the reference is the loss of the base model on each row alone. An epoch has 3 steps
    of 2 batches, and a line is logged every 2 steps."""
    method = "method={name: lora, r: 2, target_modules: [q_proj]}"
    run = train_run(tmp_path / "run", *ASLEEP, method, "task.train_size=24", "training.max_steps=5")
    assert [line.get("first_epoch", {}).get("since") for line in run.metrics()] == [0, 2, None]
    base, tokenizer = open_model(locate_run(run, base=True), "float32")
    labels, nats = 0, 0.0
    for row in run.recipe.task.encode(tokenizer, run.recipe.build_splits().train).rows:
        logits = base(torch.tensor([row["input_ids"]])).logits[0].detach().log_softmax(-1)
        learned = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
        labels += len(learned)
        nats -= sum(float(logits[i - 1, row["labels"][i]]) for i in learned)
    assert first_epoch(run) == (labels, pytest.approx(nats, rel=1e-5))


def test_the_losses_of_the_first_epoch_of_a_classifier_are_those_of_each_row(glue_recipe, tmp_path):
    """A classifier's loss is a mean over the batch, also with gradient accumulation. BERT has dropout."""
    recipe = load_recipe(str(glue_recipe), [*ASLEEP, "training.epochs=2"])
    run = Run.create(recipe, tmp_path / "run")
    train(recipe, run)
    labels, nats = first_epoch(run)
    rows = len(recipe.build_splits().train)
    assert labels == rows
    assert nats == pytest.approx(run_loss(run) * rows, rel=0.1)


def test_packing_changes_no_result(train_run, tmp_path):
    rows = [{"prompt": "why? " * (i % 9), "completion": "because " * (i % 4 + 1)} for i in range(1, 80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["prompt"]))
    task = ("task=own", f"task.data={tmp_path / 'rows.jsonl'}", "task.validation_size=7", "training.eval_steps=4")
    options = (*task, "training.learning_rate=3e-4", "method.dropout=0")
    plain, packed = (train_run(tmp_path / p, f"training.packing={p}", *options) for p in ("false", "true"))
    assert tokens(packed) < tokens(plain)
    a, b = (load_file(run.adapter.path / "adapter_model.safetensors") for run in (plain, packed))
    for key, tensor in a.items():
        torch.testing.assert_close(b[key], tensor, rtol=0, atol=1e-6)
    for of in (Run.metrics, Run.validation):
        losses, expected = ([line["loss"] for line in of(run)] for run in (packed, plain))
        assert losses == pytest.approx(expected, rel=1e-5)
        assert len(losses) > 2


def test_packing_is_refused_where_it_would_change_the_training(
    refused, recipe_file, glue_recipe, tokenizer, tmp_path, capsys
):
    torch.manual_seed(0)
    RwkvForCausalLM(RwkvConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2)).save_pretrained(tmp_path / "rwkv")
    tokenizer.save_pretrained(tmp_path / "rwkv")
    capsys.readouterr()  # the progress of saving
    words = ["training.packing=true", "RwkvForCausalLM with pera", "leave it out"]
    options = [f"model.name={tmp_path / 'rwkv'}", "method.target_modules=[key]", "training.packing=true"]
    refused("train", recipe_file, *options, "--output", tmp_path / "run", words=words)
    words = ["training.packing=true", "task 'sst2' trains a classifier"]
    refused("train", glue_recipe, "training.packing=true", "--output", tmp_path / "run", words=words)
