"""Commands that torchrun starts in two processes: the results of one, and one sentence for a mistake.

The processes are forks of this one, which has imported everything. As under torchrun, this process keeps the store that
they meet at, and ends the others when one fails.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import distributed

import tiny
from pera.errors import UserError
from pera_lab import checkpoints, cli, engines, monitor, processes, progress, scorers, training
from pera_lab.recipe import load_recipe
from pera_lab.runs import Run
from pera_lab.tasks import sources
from pera_lab.trainer import RunTrainer
from pera_lab.training import train

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")

SLOW_RATE = "training.learning_rate=3e-4"


class Ended(NamedTuple):
    """Exit codes of the two processes, and what they printed."""

    codes: list
    text: str


def call(rank, ports, folder, arguments, patch):
    """The ``pera`` command as one of two processes."""
    port = ports.get()
    AcceleratorState._reset_state(reset_partial_state=True)
    os.chdir(folder)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_WORLD_SIZE="2", LOCAL_RANK=str(rank), **address)
    progress.SLOW = 3600  # a slow machine prints no further lines
    sys.stdout = sys.stderr = open(folder / "output.txt", "a", buffering=1)  # noqa: SIM115
    if patch is not None:
        patch(rank)
    sys.argv = ["pera", *map(str, arguments)]
    cli.main()


@pytest.fixture
def two(tmp_path):
    """Runs the ``pera`` command in two processes. ``patch`` is called in each with its number.

    If ``until`` is given, both processes are killed when it returns True.
    """

    def run(*arguments, patch=None, until=None):
        (tmp_path / "output.txt").write_text("")
        fork = multiprocessing.get_context("fork")
        ports = fork.SimpleQueue()
        started = [fork.Process(target=call, args=(i, ports, tmp_path, arguments, patch)) for i in range(2)]
        for process in started:
            process.start()
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # has threads: not forked
        for _ in started:
            ports.put(store.port)
        deadline = time.time() + 120
        while any(process.is_alive() for process in started):
            failed = any(process.exitcode for process in started)
            if (until is not None and until()) or time.time() > deadline:
                for process in started:
                    process.kill()
            elif failed:
                time.sleep(0.2)
                for process in started:
                    process.terminate()
            time.sleep(0.02)
        return Ended([process.exitcode for process in started], (tmp_path / "output.txt").read_text())

    return run


def files(folder):
    """The files of a run that do not depend on the number of processes, by name."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = {"optimizer.bin": "optimizer.pt"}  # what FSDP and other engines call the same file
    found = (path.with_name(names.get(path.name, path.name)) for path in found)
    return {path for path in found if not path.name.startswith(("rng_state", "pytorch_model_fsdp"))}


def differences(a, b):
    """The largest difference of the weights of two adapters."""
    a, b = (load_file(run.adapter.path / "adapter_model.safetensors") for run in (a, b))
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max() for key in a)


def logged(run, *keys):
    return [[line[key] for key in keys] for line in run.metrics()]


def fsdp(**settings):
    """The variables that ``accelerate launch --use_fsdp --fsdp_version 2`` sets in each process."""
    defaults = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": "true"}
    variables = {f"FSDP_{name.upper()}": str(value) for name, value in {**defaults, **settings}.items()}
    return {"ACCELERATE_USE_FSDP": "true", **variables}


def with_variables(variables):
    """A ``patch`` for :func:`two`."""
    return lambda rank: os.environ.update(variables)


ENGINES = {"DDP": {}, "FSDP": fsdp()}

UNEVEN = "task.train_size=62"
"""The last batch of 4 has 2 rows, one for each process."""
LANGUAGE = {
    "uneven": (UNEVEN, "training.max_steps=null", "training.epochs=2", "method.dropout=0"),
    "one row in the last batch": ("task.train_size=61", "training.max_steps=17", "method.dropout=0"),
    "accumulation": (UNEVEN, "training.gradient_accumulation_steps=3", "method.dropout=0"),
    "by length": (UNEVEN, "training.group_by_length=true", "method.dropout=0"),
    "packing": (UNEVEN, "training.packing=true", "training.max_steps=null", "training.epochs=2", "method.dropout=0"),
    "checkpointing": ("training.gradient_checkpointing=true", "method.dropout=0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("overrides", LANGUAGE.values(), ids=LANGUAGE)
def test_two_processes_train_the_adapter_of_one(two, train_run, recipe_file, tmp_path, overrides, engine):
    one = train_run(tmp_path / "one", SLOW_RATE, *overrides)
    ended = two("train", recipe_file, SLOW_RATE, *overrides, "--output", "two", patch=with_variables(engine))
    run = Run(tmp_path / "two")
    assert ended.codes == [0, 0], ended.text
    assert ended.text.count("adapter ") == 1  # only the main process prints
    assert "2 processes, effective batch size" in ended.text
    assert differences(one, run) < 1e-6
    assert files(run.path) == files(one.path) | {(run.path / "report.html").relative_to(run.path)}
    assert logged(run, "step", "epoch", "learning_rate") == logged(one, "step", "epoch", "learning_rate")
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(torch.tensor(logged(run, key)), torch.tensor(logged(one, key)), rtol=1e-4, atol=1e-5)
    for a, b in zip(run.metrics(), one.metrics(), strict=True):
        assert a.get("first_epoch", {}) == pytest.approx(b.get("first_epoch", {}), rel=1e-4)
    record = json.loads(run.environment_file.read_text())
    assert record["processes"] == 2
    assert record["effective_batch_size"] == 4 * run.recipe.training.gradient_accumulation_steps
    assert "effective_batch_size" in (run.path / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_read_long_data_from_one_cache(two, train_run, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(sources, "LONG", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [{"prompt": f"question {i}", "completion": f"{i}"} for i in range(90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (SLOW_RATE, "method.dropout=0", "task=own", f"task.data={tmp_path / 'rows.jsonl'}")
    one = train_run(tmp_path / "one", *overrides)
    made = tmp_path / "datasets" / "pera"
    (complete,) = made.iterdir()
    complete.rename(tmp_path / "complete")
    ended = two("train", one.recipe_file, "--output", "two")
    assert ended.codes == [0, 0], ended.text
    assert list(made.iterdir()) == [complete]
    assert (complete / "rows.arrow").read_bytes() == (tmp_path / "complete" / "rows.arrow").read_bytes()
    assert differences(one, Run(tmp_path / "two")) < 1e-6


@pytest.mark.slow
def test_two_processes_train_on_a_4_bit_base_as_one(two, train_run, recipe_file, save_llama, tmp_path):
    pytest.importorskip("bitsandbytes")
    save_llama(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    base = (f"model.name={tmp_path / 'wide'}", "model.quantization=nf4")
    one = train_run(tmp_path / "one", *base, SLOW_RATE, "method.dropout=0")
    ended = two("train", recipe_file, *base, SLOW_RATE, "method.dropout=0", "--output", "two")
    assert ended.codes == [0, 0], ended.text
    assert differences(one, Run(tmp_path / "two")) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{}, fsdp(transformer_cls_to_wrap="BertLayer")], ids=ENGINES)
@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_two_processes_validate_as_one(two, glue_recipe, tiny_bert, tmp_path, task, engine):
    model = shutil.copytree(tiny_bert, tmp_path / "bert")  # without dropout, which differs in each process
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    (model / "config.json").write_text(json.dumps(config))
    sizes = ["training.train_share=0.9", "training.batch_size=4", "evaluation.batch_size=6"]  # with uneven last batches
    overrides = [f"task.name={task}", f"model.name={model}", *sizes, SLOW_RATE]
    recipe = load_recipe(str(glue_recipe), overrides)
    one, run = Run.create(recipe, tmp_path / "one"), Run(tmp_path / "two")
    train(recipe, one)
    ended = two("train", glue_recipe, *overrides, "--output", "two", patch=with_variables(engine))
    assert ended.codes == [0, 0], ended.text
    assert differences(one, run) < 1e-6
    assert len(one.validation()) == 3
    for a, b in zip(run.validation(), one.validation(), strict=True):
        assert a == pytest.approx(b, abs=2e-3)  # a rank correlation of outputs that are nearly equal
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_the_adapter_of_one_process(two, train_run, recipe_file, tmp_path, stage):
    def configure(rank):  # as accelerate launch does
        zero = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
        os.environ.update(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0", ACCELERATE_USE_DEEPSPEED="true", **zero)

    one, run = train_run(tmp_path / "one", SLOW_RATE, *LANGUAGE["uneven"]), Run(tmp_path / "two")
    ended = two("train", recipe_file, SLOW_RATE, *LANGUAGE["uneven"], "--output", "two", patch=configure)
    assert ended.codes == [0, 0], ended.text
    assert differences(one, run) < 1e-6
    assert logged(run, "step", "epoch", "learning_rate") == logged(one, "step", "epoch", "learning_rate")
    shutil.rmtree(run.adapter.path)
    ended = two("train", "two", "--resume", patch=configure)
    assert ended.codes == [2, 2]
    assert "written by DeepSpeed" in ended.text.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [{}, fsdp(auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading="false")], ids=ENGINES
)
def test_killed_processes_are_resumed_to_the_same_bits(two, recipe_file, tmp_path, engine):
    overrides = ("training.max_steps=40", "training.save_steps=4", UNEVEN)
    undisturbed, killed = Run(tmp_path / "undisturbed"), Run(tmp_path / "killed")
    patch = with_variables(engine)
    assert two("train", recipe_file, *overrides, "--output", "undisturbed", patch=patch).codes == [0, 0]
    second = killed.checkpoints / "checkpoint-8"
    until = (second / "complete").is_file
    two("train", recipe_file, *overrides, "--output", "killed", patch=patch, until=until)
    assert killed.last_checkpoint() is not None
    assert not killed.finished
    ended = two("train", "killed", "--resume", patch=patch)
    assert ended.codes == [0, 0], ended.text
    assert differences(killed, undisturbed) == 0
    for run in (killed, undisturbed):
        assert [line["step"] for line in run.metrics()] == list(range(2, 41, 2))
    assert logged(killed, "loss", "grad_norm") == logged(undisturbed, "loss", "grad_norm")
    assert files(killed.path) == files(undisturbed.path)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(two, recipe_file, tmp_path):
    def interrupt_second(rank):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        compute_loss = RunTrainer.compute_loss

        def acting(trainer, model, *rest, **options):
            if rank == 1 and model.training and trainer.state.global_step == 4:
                signal.raise_signal(signal.SIGINT)
            return compute_loss(trainer, model, *rest, **options)

        RunTrainer.compute_loss = acting

    ended = two("train", recipe_file, "--output", "run", patch=interrupt_second)
    assert ended.codes[0] == 130
    command = "resume in 2 processes with: pera train run --resume"
    assert ended.text.count(f"stopped after step 5 of 12; {command}\n") == 1
    ended = two("train", "run", "--resume")
    assert ended.codes == [0, 0], ended.text
    assert "resuming after step 5 of 12\n" in ended.text
    assert [line["step"] for line in Run(tmp_path / "run").metrics()] == [2, 4, 5, 6, 8, 10, 12]


def content(folder, names):
    """The files as they are compared: a score without the seconds that it took."""
    found = {name: (folder / name).read_text() for name in names}
    return {name: [line for line in text.splitlines() if '"seconds"' not in line] for name, text in found.items()}


@pytest.mark.slow
def test_two_processes_evaluate_as_one_also_after_a_kill(two, pera, run, tmp_path):
    head, evaluation = run.recipe_file.read_text().split("\nevaluation:")
    run.recipe_file.write_text(f"{head}\nevaluation:{evaluation.replace('batch_size: 4', 'batch_size: 3')}")
    one, journal = tmp_path / "one", run.predictions / "adapter.partial.jsonl"
    shutil.copytree(run.path, one)
    assert pera("evaluate", one).code == 0

    def stop_after_the_first_batches(rank):
        real, asked = scorers.generate, []

        def generate(*arguments):
            asked.append(arguments)
            if len(asked) == 2:
                time.sleep(60)
            return real(*arguments)

        scorers.generate = generate

    def answered():
        return journal.is_file() and journal.read_text().count("index") == 6

    two("evaluate", "run", patch=stop_after_the_first_batches, until=answered)
    assert not run.scores_file.exists()
    ended = two("evaluate", "run")
    assert ended.codes == [0, 0], ended.text
    assert "resuming after 6 of 8 answers" in ended.text
    assert ended.text.count("95 % interval") == 1
    names = ["scores.json", "predictions/adapter.jsonl"]
    assert content(run.path, names) == content(one, names)
    assert {path.name for path in run.predictions.iterdir()} == {"adapter.jsonl"}


@pytest.mark.slow
def test_two_processes_predict_as_one(two, pera, run, glue_run, tmp_path):
    questions = [{"prompt": f"What relation is {name} to Zoe?"} for name in ("Luna", "Ethan", "Sarah", "Liam", "Al")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"sentence": "dull " * i}) + "\n" for i in range(1, 6)))
    for folder, rows in (("run", "rows.jsonl"), ("glue-run", "texts.jsonl")):
        command = ("predict", folder, "--input", rows, "--batch-size", "2", "--output")
        assert pera(*command, "one.jsonl").code == 0
        ended = two(*command, "two.jsonl")
        assert ended.codes == [0, 0], ended.text
        assert ended.text.count("5 rows answered") == 1
        assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
        assert "'two.jsonl' exists" in sentence(two(*command, "two.jsonl"))
        for file in ("one.jsonl", "two.jsonl"):
            (tmp_path / file).unlink()


def sentence(ended):
    """The one sentence that both processes end with."""
    assert ended.codes == [2, 2]
    assert ended.text.startswith("pera: ")
    assert ended.text.count("\n") == 1, ended.text
    return ended.text


@pytest.mark.slow
def test_a_mistake_ends_both_processes_with_one_sentence(two, recipe_file, run, tmp_path, tree):
    before = {path: content for path, content in tree().items() if path.name != "output.txt"}
    assert "'run' exists and is not empty" in sentence(two("train", recipe_file, "--output", "run"))
    assert "training.batch_size=3 cannot be divided" in sentence(
        two("train", recipe_file, "training.batch_size=3", "--output", "new")
    )
    assert "'pera merge' runs in one process" in sentence(two("merge", "run", "--output", "merged"))
    assert "--otput" in sentence(two("train", recipe_file, "--otput", "new"))
    assert "'run' is finished" in sentence(two("train", "run", "--resume"))
    assert {path: content for path, content in tree().items() if path.name != "output.txt"} == before


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_both(two, recipe_file, tmp_path, monkeypatch):
    def break_second(rank):
        if rank == 1:
            monkeypatch.setattr(training, "open_model", lambda *_: raise_(UserError("no such model here.")))

    def raise_(error):
        raise error

    ended = two("train", recipe_file, "--output", "new", patch=break_second)
    assert sentence(ended) == "pera: no such model here.\n"
    assert not (tmp_path / "new").exists()

    def stop_second(rank):
        if rank == 1:
            monkeypatch.setattr(monitor.Monitor, "on_step_end", lambda *_, **__: raise_(UserError("the step broke.")))

    monkeypatch.setattr(processes, "GRACE", processes.timedelta(seconds=1))
    ended = two("train", recipe_file, "--output", "new", patch=stop_second)
    assert ended.codes[1] == 2
    assert ended.codes[0] != 0
    assert ended.text.count("pera: ") == 1
    assert ended.text.endswith("pera: the step broke.\n")


def test_a_batch_that_cannot_be_divided_is_refused(recipe_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    recipe = load_recipe(str(recipe_file), ["training.batch_size=8"])
    with pytest.raises(UserError, match=r"training.batch_size=8 cannot be divided over 3 processes.* multiple of 3"):
        engines.check(recipe.training.batch_size, None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    engines.check(recipe.training.batch_size, None)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"USE_FSDP": "true"}, "FSDP divides weights over processes, and there is one; set num_processes"),
        ({"MIXED_PRECISION": "bf16"}, "mixed_precision=bf16 .* model.dtype"),
        ({"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage=3 .* zero3_save_16bit_model=true"),
    ],
)
def test_settings_of_accelerate_that_a_run_cannot_have_are_refused(variables, words, refused, recipe_file, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    line = refused("train", recipe_file, "--output", "new", words=["accelerate: "])
    assert re.search(words, line)


BLOCKS = "LlamaDecoderLayer"


@pytest.mark.parametrize(
    ("settings", "overrides", "words"),
    [
        ({"version": 1}, (), "fsdp_version=1: .* set it to 2"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, (), "fsdp_state_dict_type=SHARDED.* set it to FULL_STATE_DICT"),
        ({"offload_params": "true"}, (), "fsdp_offload_params=true: .* set it to false"),
        ({"activation_checkpointing": "true"}, (), "fsdp_activation_checkpointing=true: .*training.gradient_checkp"),
        ({"ignored_modules": ".*mlp"}, (), r"fsdp_ignored_modules=\.\*mlp: .* leave it out"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, (), "SIZE_BASED_WRAP .* set it to TRANSFORMER_BASED_WRAP"),
        ({}, ("model.quantization=nf4",), "model.quantization='nf4' is not supported with FSDP"),
    ],
)
def test_settings_of_fsdp_that_were_not_tried_are_refused(settings, overrides, words, recipe_file, monkeypatch):
    for name, value in {"WORLD_SIZE": 2, **fsdp(**settings)}.items():
        monkeypatch.setenv(name, str(value))
    recipe = load_recipe(str(recipe_file), list(overrides))
    with pytest.raises(UserError, match=words):
        engines.check(recipe.training.batch_size, recipe.model.quantization)


@pytest.mark.parametrize(
    ("wrapped", "words"),
    [
        ("LlamaDecoder", "LlamaDecoder is not in the model; set .*wrap=<class of the blocks>"),
        (f"LlamaModel,{BLOCKS}", f"LlamaModel holds the embeddings; set .*wrap={BLOCKS}"),
    ],
)
def test_units_that_fsdp_cannot_make_are_refused(wrapped, words, tiny_llama, monkeypatch):
    for name, value in fsdp().items():
        monkeypatch.setenv(name, value)
    model = tiny.llama()
    engines.check_units(model)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", wrapped)
    with pytest.raises(UserError, match=words):
        engines.check_units(model)


def test_commands_without_training_refuse_fsdp(run, refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for command in (["evaluate", run.path], ["chat", run.path]):
        refused(*command, words=["ACCELERATE_USE_FSDP=true", f"'pera {command[0]}' does not divide", "without FSDP"])


def test_engines_do_not_load_each_others_checkpoints(run, refused, monkeypatch):
    shutil.rmtree(run.adapter.path)
    checkpoint = run.last_checkpoint()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"written without FSDP and cannot be resumed with it; start .* without FSDP"):
        checkpoints.check(checkpoint, None)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    (checkpoint / "pytorch_model_fsdp.bin").touch()
    refused("train", run.path, "--resume", words=["written with FSDP", "cannot be resumed without it"])


def test_another_number_of_processes_cannot_resume_a_run(run, refused, monkeypatch):
    shutil.rmtree(run.adapter.path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"'.*run' was started with 1 process and cannot be resumed with 2"):
        run.check_processes()
    monkeypatch.delenv("WORLD_SIZE")
    run.check_processes()
    record = json.loads(run.environment_file.read_text())
    assert (record["processes"], record["effective_batch_size"]) == (1, 4)
    run.environment_file.write_text(json.dumps({**record, "processes": 2}))
    refused("train", run.path, "--resume", words=["--resume", "2 processes", "with 1", "start 2"])
    refused("train", run.path, "training.batch_size=8", "--resume", words=["training.batch_size", "differs"])


def test_variables_that_are_not_numbers_mean_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("RANK", "one")
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
