"""The command line: what each command does, and the one sentence it prints for each mistake."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import requires
from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import pera as package
from pera import PeraConfig
from pera.errors import CheckFailed, UserError
from pera_lab.__main__ import PACKAGES
from pera_lab.evaluation import read_predictions
from pera_lab.extras import install_command
from pera_lab.recipe import load_recipe
from pera_lab.runs import Run
from pera_lab.text import visible

SMALL_QUICKSTART = [
    *("model.dtype=float32", "task.train_size=16", "task.test_size=4", "training.batch_size=2"),
    *("training.max_steps=4", "training.warmup_steps=0"),
]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture
def lora(tiny_llama, tmp_path):
    """Folder of a LoRA on the tiny LLaMA."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


# Commands


def test_version_and_help(pera):
    assert pera("--version") == (0, f"pera {package.__version__}\n", "")
    page = pera("--help")
    assert page.code == 0
    for command in ("quickstart", "train", "evaluate", "merge", "export", "verify"):
        assert command in page.out
    bare = pera()
    assert (bare.code, bare.out.strip(), bare.err) == (2, page.out.strip(), "")


LIGHT_CALLS = """
import contextlib, io, json, sys
from pera_lab.__main__ import main

def call(*arguments):
    sys.argv = ["pera", *arguments]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
    heavy = {"torch", "transformers", "peft", "pera", "matplotlib", "scipy"}
    return code, sorted(heavy & set(sys.modules))

print(json.dumps({line: call(*line.split()) for line in sys.argv[1:]}))
"""


def test_help_version_and_usage_errors_import_nothing_heavy(python):
    codes = {"--help": 0, "--version": 0, "": 2, "trian": 2, "train -h": 0, "study run --help": 0, "verify x": 2}
    codes |= {"recipes": 0, "studies reasoning-smollm2": 0}
    outcomes = json.loads(python(LIGHT_CALLS, *codes).stdout)
    assert outcomes == {line: [code, []] for line, code in codes.items()}


@pytest.mark.parametrize("missing", [["typer"], ["yaml", "scipy"]])
def test_without_the_extra_the_command_says_what_to_install(missing):
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); from pera_lab.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"pera: the command line needs {', '.join(sorted(missing))}; install the extra: {install_command('lab')}\n"
    )


def test_the_packages_that_the_command_checks_are_those_of_the_extra():
    extra = {re.match(r"[\w-]+", line)[0].lower() for line in requires("pera") if re.search("extra == .lab.", line)}
    names = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
    assert {names.get(package, package) for package in PACKAGES} == extra


def test_train_evaluate_merge_export_and_verify(pera, recipe_file, tmp_path, finished_run):
    trained = pera("train", recipe_file, "training.max_steps=4", "--output", "run")
    assert trained.code == 0
    assert "Next: pera evaluate run" in trained.out
    assert "tokens/s" in trained.out
    run = Run(tmp_path / "run")
    assert run.recipe.training.max_steps == 4
    assert [line["step"] for line in run.metrics()] == [2, 4]
    for arguments in (["run", "--base"], ["run"]):
        scored = pera("evaluate", *arguments)
        assert scored.code == 0
        assert "of 8; 95 % interval" in scored.out
    assert set(run.scores()) == {"base", "adapter"}
    for arguments in (["merge", "run", "--output", "merged"], ["export", "run", "--to", "lora", "--output", "lora"]):
        made = pera(*arguments)
        assert made.code == 0
        assert "largest logit difference" in made.out
        assert "of top-1 tokens equal over" in made.out.replace("\n", " ").replace("  ", " ")
    for folder in ("merged", "lora"):
        assert pera("verify", "run", folder).code == 0
    other = pera("verify", "run", finished_run.path)
    assert (other.code, other.err) == (1, "pera: the outputs differ.\n")
    assert "largest logit difference" in other.out


def test_run_in_the_default_folder_is_resumed_by_its_recipe(pera, recipe_file, tmp_path):
    overrides = ["training.max_steps=4", "training.save_steps=2"]
    first = pera("train", recipe_file, *overrides)
    assert first.code == 0
    assert "since step" not in first.out
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name.startswith("small-")
    run = Run(path)
    adapter = (run.adapter.path / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.adapter.path)
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    again = pera("train", recipe_file, *overrides, "--resume")
    assert again.code == 0
    assert "since step 2, " in again.out
    assert again.out.count("→") == 0  # one loss was logged since
    assert (run.adapter.path / "adapter_model.safetensors").read_bytes() == adapter
    assert list((tmp_path / "runs").iterdir()) == [path]


def test_quickstart_trains_scores_merges_and_exports_even_if_no_step_is_logged(pera, tiny_llama, tmp_path):
    overrides = [f"model.name={tiny_llama}", *SMALL_QUICKSTART, "training.logging_steps=10"]
    done = pera("quickstart", *overrides, "--output", "run")
    assert done.code == 0
    for words in ("base model", "with adapter", "tokens/s", "same outputs", "loss picture", "Next:"):
        assert words in done.out
    assert len(done.out.splitlines()) < 30
    assert "4 steps of 2" in done.err
    base, adapter = done.err.split("The base model answers:")[1].split("With the adapter:")
    for prediction in read_predictions(tmp_path / "run/predictions/adapter.jsonl")[:3]:
        for answers in (base, adapter):
            assert visible(" ".join(prediction.prompt.split())) in answers
        assert repr(visible(" ".join(prediction.output.split()))) in adapter
    run = Run(tmp_path / "run")
    assert set(run.scores()) == {"base", "adapter"}
    for name in ("merged", "lora"):
        assert json.loads((run.path / name / "verification.json").read_text())["agree"] is True
    assert (run.path / "loss.svg").is_file()


def test_failed_check_exits_with_1(pera, run, tiny_llama, tmp_path):
    outcome = pera("verify", tiny_llama, run.adapter.path)
    assert (outcome.code, outcome.err) == (1, "pera: the outputs differ.\n")
    assert "largest logit difference" in outcome.out


# Mistakes: exit code 2, one line with key and value, nothing changed on disk


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", ["No such command 'trian'", "Did you mean 'train'?", "See: pera --help"]),
        ("study rum", ["'rum'", "'run'", "See: pera study --help"]),
        ("train small --otput x", ["--otput", "--output", "See: pera train --help"]),
        ("verify a", ["Missing argument 'B'", "See: pera verify --help"]),
        ("evaluate run --limit 0", ["--limit", "1", "See: pera evaluate --help"]),
        ("evaluate run --limit 3", ["--limit", "--lm-eval", "task.test_size"]),
        ("evaluate run --lm-eval ,", ["--lm-eval", "','", "names no task"]),
        ("evaluate run --lm-eval piqa --scorer likelihood", ["--scorer", "'likelihood'", "--lm-eval"]),
        ("export adapter --to onnx --output x", ["--to", "'onnx'", "'lora', 'gguf'"]),
        ("chat adapter --temperature 1e-320", ["--temperature", "should be 0 or at least 0.01"]),
        ("export adapter --output x", ["--to lora, --to gguf, --to mlx or --for SERVER"]),
    ],
)
def test_usage_errors_are_one_sentence(line, words, refused):
    refused(*line.split(), words=words)


@pytest.mark.parametrize(
    "line",
    [
        *("quickstart", "study run small", "study report study", "inspect run", "merge run --output merged"),
        *("export run --to lora --output lora", "import lora --from lora --output run", "verify run run", "chat run"),
        *("report run", "env"),
    ],
)
def test_commands_that_run_in_one_process_are_refused_in_several(line, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = " ".join(line.split()[: 2 if line.startswith("study") else 1])
    refused(*line.split(), words=["WORLD_SIZE=2", f"'pera {command}'", "one process", "without torchrun"])


def test_lm_eval_is_refused_in_several_processes(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("evaluate", "run", "--lm-eval", "piqa", words=["WORLD_SIZE=2", "--lm-eval", "one process"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainign.seed=1", ["trainign", "'training'"]),
        ("training.sead=1", ["training.sead", "'seed'"]),
        ("method.normalisation=rms", ["method.normalisation", "'method.normalization'"]),
        ("max_steps", ["'max_steps'", "key.subkey=value"]),
        ("training={epochs: 1, max_steps: 2}", ["max_steps", "epochs"]),
        ("method.r=0", ["r=0"]),
        ("method.terms=cubes", ["terms='cubes'"]),
        ("method={name: pera, r: 1, terms: cross}", ["r=1", "terms='cross'"]),
        ("method={name: lora, r: 0}", ["method", "0"]),
        ("method.target_modules=[q_proj, v_prj]", ["target_modules", "'v_prj'", "'v_proj'"]),
        ("method.target_modules='q_proj, v_proj'", ["target_modules", "q_proj, v_proj"]),
        ("method.target_modules=[input_layernorm]", ["target_modules", "input_layernorm", "LlamaRMSNorm"]),
        ("method={name: lora, target_modules: [q_proj, nope]}", ["target_modules", "'nope'"]),
        ("method={name: lora, target_modules: [q_proj, 5]}", ["method: target_modules=", "should be a list of names"]),
        ("method={name: lora, rank_pattern: {q_prj: 2}}", ["method: rank_pattern: 'q_prj'", "'q_proj'"]),
        ("method={name: lora, bias: foo}", ["method: PEFT cannot use {", "'bias': 'foo'", "NotImplementedError: "]),
        ("method={name: lora, layer_replication: [[0, 9]]}", ["'layer_replication': [[0, 9]]", "IndexError: "]),
        ("method={name: lora, init_lora_weights: loftq}", ["method.init_lora_weights='loftq'", "changes the base"]),
        (
            "method.name=lora",
            ["method.normalization is an option of pera, not of lora", "'method={name: lora, …}'"],
        ),
        ("model.name=./missing", ["model", "'./missing'"]),
        ("model.name=nobodys-model", ["model", "'nobodys-model'"]),
        ("task.name=family", ["task.name='family'"]),
        ("task.options.x=1", ["task.options", "'x': 1"]),
        ("task={name: leg_counting, options: {max_animals: 1, min_animals: 1}}", ["task.train_size=2000"]),
        ("training.max_length=3", ["training.max_length=3"]),
        ("training.report_to=[nonsense]", ["training.report_to", "nonsense"]),
    ],
)
def test_invalid_recipe_values_are_rejected(override, words, refused, recipe_file):
    refused("train", recipe_file, override, "--output", "run", words=words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["recipe", "mine.yaml", "does not exist"]),
        ("model: [", ["recipe", "mine.yaml", "not valid YAML"]),
        ("- model", ["recipe", "mine.yaml", "keys and values"]),
        (b"\xff\xfe", ["recipe", "mine.yaml"]),
        ("model: smollm2-135m", ["method is missing", "task is missing", "training is missing"]),
        ("modle: smollm2-135m", ["modle", "'model'"]),
    ],
)
def test_invalid_recipe_files_are_rejected(content, words, refused, tmp_path):
    if content is not None:
        (tmp_path / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("train", "mine.yaml", "--output", "run", words=words)


@pytest.mark.parametrize(
    "command",
    [["train", "RECIPE"], ["quickstart"], ["merge", "run"], ["export", "run", "--to", "lora"]],
    ids=lambda command: command[0],
)
def test_existing_output_is_rejected(command, refused, run, recipe_file, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    command = [recipe_file if word == "RECIPE" else word for word in command]
    refused(*command, "--output", "full", words=["output", "'full'", "not empty"])
    refused(*command, "--output", "file", words=["output", "'file'", "is a file"])
    refused(*command, "--output", "file/below", words=["output", "file/below'"])


@pytest.fixture
def no_model(monkeypatch):
    """No command may load a model."""
    monkeypatch.setattr("pera_lab.models.load_model", lambda *_, **__: pytest.fail("a model is loaded"))


UNUSABLE = {
    "loop": "symbolic links",
    "n" * 256: "File name too long",
    "file/below": "Not a directory",
    "/proc/x/y": "No such file or directory",
    "null\0": "null",
}
TAKEN = {
    "/dev/null": "is a file",
    "file": "is a file",
    "full": "not empty",
    "full/": "not empty",
    "run": "not empty",
    "run/adapter": "not empty",
    "BASE": "not empty",
    ".": "not empty",
}


@pytest.mark.parametrize(
    "command",
    ["train RECIPE", "quickstart", "study run STUDY", "merge run", "export run --to lora", "import lora --from lora"],
)
@pytest.mark.usefixtures("no_model")
def test_an_unusable_output_folder_is_rejected_before_a_model_is_loaded(
    command, refused, run, lora, recipe_file, tiny_llama, tmp_path, capsys
):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    study = {"base": str(recipe_file), "grid": {"task": "family_relationships", "method": "lora"}}
    (tmp_path / "study.yaml").write_text(
        json.dumps({**study, "choose": {"learning_rate": [1e-3], "rows": 8}, "report": {"seeds": [1]}})
    )
    names = {"RECIPE": str(recipe_file), "STUDY": "study.yaml"}
    capsys.readouterr()  # what the fixtures printed
    for output, words in {**UNUSABLE, **TAKEN}.items():
        place = output.replace("BASE", str(tiny_llama))
        refused(*(names.get(word, word) for word in command.split()), "--output", place, words=["output", words])


@pytest.mark.parametrize(
    "command", ["predict run --input rows.jsonl --output", "report run --output", "inspect run --effect --plot"]
)
@pytest.mark.usefixtures("no_model")
def test_an_unusable_output_file_is_rejected_before_a_model_is_loaded(command, refused, run, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hello"}\n')
    end = {"predict": ".jsonl", "report": ".html", "inspect": ".svg"}[command.split()[0]]
    (tmp_path / f"loop{end}").symlink_to(f"loop{end}")
    (tmp_path / "file").touch()
    (tmp_path / f"folder{end}").mkdir()
    for output, word in {**{key + end: word for key, word in UNUSABLE.items()}, f"folder{end}": "folder"}.items():
        refused(*command.split(), output, words=[word])
    if end == ".jsonl":
        for output in ("rows.jsonl", "run", "/dev/null"):
            refused(*command.split(), output, words=["--output", output, "exists"])


@pytest.fixture
def commands(refused):
    """Checks that merge, export and verify reject the adapter folder "adapter" in the same way."""

    def check(words, *, verify=True):
        refused("merge", "adapter", "--output", "out", words=words)
        refused("export", "adapter", "--to", "lora", "--output", "out", words=words)
        if verify:
            refused("verify", "adapter", "adapter", words=words)

    return check


@pytest.fixture
def adapter(run, tmp_path):
    """A trained adapter in "adapter", for the test to damage."""
    return Path(shutil.copytree(run.adapter.path, tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("adapter_model.safetensors", Path.unlink, ["'adapter'", "has no adapter_model.safetensors"]),
        ("adapter_model.safetensors", cut, ["adapter_model.safetensors'", "not a complete safetensors file"]),
        ("adapter_config.json", Path.unlink, ["'adapter'", "not a run folder, an adapter folder"]),
        ("adapter_config.json", cut, ["adapter_config.json'", "not valid JSON"]),
    ],
)
def test_broken_adapter_folders_are_rejected(name, damage, words, commands, adapter):
    damage(adapter / name)
    commands(words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 64, "head_dim": 16}, ["'adapter'", "pera_A"]),
        ({"num_hidden_layers": 1}, ["'adapter'", "does not fit", "layers.1."]),
        ({"num_hidden_layers": 3}, ["'adapter'", "does not fit", "layers.2."]),
    ],
)
def test_adapter_of_another_base_is_rejected(options, words, commands, adapter, save_llama, tmp_path):
    save_llama(tmp_path / "other", **options)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "other")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    commands(words)


def test_missing_base_is_rejected(commands, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/model"}))
    commands(["model", "'/gone/model'"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_tensors_that_are_not_real_numbers_are_rejected(dtype, commands, refused, adapter, change_weights):
    change_weights(adapter / "adapter_model.safetensors", lambda w: {key: x.to(dtype) for key, x in w.items()})
    words = ["'adapter'", "pera_A has dtype", str(dtype).removeprefix("torch."), "floating-point"]
    commands(words)
    refused("inspect", "adapter", words=words)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_lora_whose_change_of_the_base_cannot_be_repeated_is_rejected(init, refused, lora):
    file = lora / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": init}))
    for call in (["merge"], ["import", "--from", "lora"]):
        refused(
            call[0], "lora", *call[1:], "--output", "out", words=[f"init_lora_weights='{init}'", "changed the base"]
        )
    for call in (["verify", "lora", "lora"], ["chat", "lora"], ["inspect", "lora"]):
        refused(*call, words=[f"init_lora_weights='{init}'", "changed the base"])


def test_nan_in_an_adapter_is_rejected(commands, adapter, change_weights):
    def spoil(weights):
        next(iter(weights.values()))[0] = torch.nan
        return weights

    change_weights(adapter / "adapter_model.safetensors", spoil)
    commands(["NaNs detected"], verify=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--for", "vlm"], ["--for: 'vlm'", "did you mean 'vllm'"]),
        (["--for", "vllm", "--to", "gguf"], ["--to gguf", "vllm, which reads lora"]),
        (["--to", "lora", "--max-rank", "4", "--energy", "0.9"], ["--max-rank=4 and --energy=0.9", "give only one"]),
        (["--to", "lora", "--max-rank", "0"], ["--max-rank=0", "at least 1"]),
        (["--to", "lora", "--energy", "1.5"], ["--energy=1.5", "above 0 and at most 1"]),
    ],
)
def test_export_rejects_invalid_options(options, words, refused, run):
    refused("export", "run", *options, "--output", "out", words=words)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ({"r": 32}, ["--for", "vllm"], ["K = 560", "vllm accepts at most 512", "--max-rank 512"]),
        ({"bias": "pera_only"}, ["--for", "vllm"], ["bias='pera_only'", "which vllm cannot hold", "pera merge"]),
        ({"modules_to_save": ["lm_head"]}, ["--to", "gguf"], ["modules_to_save=['lm_head']", "cannot hold"]),
    ],
)
def test_export_rejects_what_its_target_cannot_carry(method, options, words, refused, save_llama, tmp_path):
    save_llama(tmp_path / "base", attention_bias=True, tie_word_embeddings=False)
    config = PeraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **method})
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(
        tmp_path / "adapter"
    )
    refused("export", "adapter", *options, "--output", "out", words=words)


def test_changed_base_is_rejected(refused, run, save_llama, tmp_path):
    """The recipe points to another model of the same shape; the message names both models."""
    torch.manual_seed(1)
    other, trained_on = tmp_path / "other", run.recipe.model.name
    model = AutoModelForCausalLM.from_pretrained(trained_on)
    model.apply(lambda module: torch.nn.init.normal_(module.weight) if isinstance(module, torch.nn.Linear) else None)
    shutil.copytree(trained_on, other)
    model.save_pretrained(other)
    run.recipe_file.write_text(run.recipe_file.read_text().replace(trained_on, str(other)))
    words = [f"was trained on '{trained_on}' with fingerprint", f"the base model '{other}' has"]
    refused("merge", "run", "--output", "out", words=words)
    for form in ("lora", "gguf"):
        refused("export", "run", "--to", form, "--output", "out", words=words)
    refused("verify", "run", "run", words=words)


def test_a_pipe_in_the_place_of_a_file_is_refused(refused, run, save_llama, tmp_path):
    base = save_llama(tmp_path / "base")
    (base / "model.safetensors").unlink()
    for pipe in (base / "model.safetensors", tmp_path / "prompts.txt"):
        os.mkfifo(pipe)
    refused("chat", "base", words=["'base/model.safetensors' is a pipe"])
    refused("verify", "run", "run", "--prompts", "prompts.txt", words=["'prompts.txt' is a pipe"])


def test_a_gguf_adapter_is_no_base(pera, refused, run):
    assert pera("export", "run", "--to", "gguf", "--output", "gguf").code == 0
    words = ["'gguf/adapter.gguf' holds", "give a whole model, not an adapter"]
    refused("chat", "gguf/adapter.gguf", words=words)


def test_gguf_base_of_another_architecture_is_rejected(pera, refused, run, tmp_path):
    assert pera("export", "run", "--to", "gguf", "--output", "gguf").code == 0
    writer = gguf.GGUFWriter(tmp_path / "qwen2.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    words = ["'qwen2.gguf' is a model of 'qwen2'", "for 'llama'"]
    refused("verify", "run", "gguf", "--llama-cpp", "--base", "qwen2.gguf", words=words)


def test_import_rejects_a_pera_adapter(refused, run, lora):
    refused("import", "run", "--from", "lora", "--output", "out", words=["'run' is a PERA adapter", "only a LoRA"])


def test_verify_rejects_what_is_not_a_model(refused, tiny_llama, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name, words in {
        "notes.txt": ["'notes.txt' is a file"],
        "folder": ["'folder' is not a run folder"],
        "nothing": ["'nothing' is not an embedded model"],
        "./nothing": ["'./nothing' does not exist"],
        "nobody/model": ["'nobody/model' cannot be loaded"],
    }.items():
        refused("verify", tiny_llama, name, words=words)
        refused("verify", name, tiny_llama, words=words)


def test_include_path_must_be_a_folder(refused, run):
    words = ["--include-path='nope' is not a folder"]
    refused("evaluate", "run", "--lm-eval", "arc_easy", "--include-path", "nope", words=words)


def test_report_output_must_end_in_html(refused, run, tmp_path):
    (tmp_path / "x.pdf").write_text("mine")
    refused("report", "run", "--output", "x.pdf", words=["--output='x.pdf'", "should end in .html"])


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("training.get_peft_model", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
        ("training.get_peft_model", RuntimeError("Storage size calculation overflowed with sizes=[9, 9]")),
        ("training.set_seed", MemoryError()),
        (
            "models.AutoModelForCausalLM.from_pretrained",
            RuntimeError("[enforce fail at alloc_cpu.cpp:126] . DefaultCPUAllocator: can't allocate memory: you"),
        ),
    ],
)
def test_out_of_memory_is_one_sentence(where, error, refused, recipe_file, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"pera_lab.{where}", fail)
    words = ["pera: out of memory; lower training.batch_size", "training.gradient_checkpointing=true"]
    refused("train", recipe_file, "--output", "run", words=words)


@pytest.mark.parametrize(
    "error",
    [RuntimeError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError,
     OSError, EOFError, BrokenPipeError, UnicodeError, AssertionError],
)  # fmt: skip
def test_an_unexpected_error_is_one_sentence_with_its_type(error, refused, recipe_file, monkeypatch):
    def fail(*_, **__):
        raise error("a defect\n  of two lines " + "x" * 5000)

    monkeypatch.setattr("pera_lab.training.set_seed", fail)
    words = [f"unexpected {error.__name__}: ", "a defect", "two lines x", " … ", "PERA_DEBUG=1 shows the traceback"]
    line = refused("train", recipe_file, "--output", "run", words=words)
    assert "Traceback" not in line
    assert len(line) < 1100


def test_a_refusal_of_the_first_step_is_one_line_and_leaves_nothing(refused, glue_recipe):
    """The recipe's data also give a warning, which a training that begins prints."""
    refused(*("train", glue_recipe, "--output", "run", "training.eval_steps=1000"), words=["has no effect, because"])


def test_an_error_of_the_system_names_the_file(refused, recipe_file, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "some/file")

    monkeypatch.setattr("pera_lab.training.set_seed", fail)
    line = refused("train", recipe_file, "--output", "run", words=["'some/file': No space left on device"])
    assert "unexpected" not in line


def test_pera_debug_shows_the_traceback_of_every_error(pera, recipe_file, monkeypatch):
    monkeypatch.setenv("PERA_DEBUG", "1")
    outcome = pera("train", recipe_file, "method.terms=cubes", "--output", "run")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("pera: method: terms='cubes'")


def test_an_interrupt_is_quiet(pera, recipe_file, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pera_lab.training.get_peft_model", interrupt)
    assert pera("train", recipe_file, "--output", "run") == (130, "", "")


@pytest.mark.parametrize("code", [0, 1, 2])
def test_warnings_come_after_a_success_and_not_with_a_refusal(code, pera, monkeypatch, caplog):
    def work():
        for category in (UserWarning, UserWarning, FutureWarning):
            warnings.warn(f"the adapter\nis old: {category.__name__}", category, stacklevel=1)
        logging.getLogger("some.library").warning("no kernel")
        if code:
            raise [CheckFailed, UserError][code - 1]("no")
        return {"versions": {}}

    monkeypatch.setattr("pera_lab.environment.environment", work)
    outcome = pera("env")
    warned = ["warning: the adapter is old: UserWarning"] if code < 2 else []
    assert (outcome.code, outcome.err.splitlines()) == (code, warned + ["pera: no"] * (code > 0))
    assert caplog.messages == []


def test_evaluate_needs_a_run_folder(refused, finished_run, tiny_llama):
    for name in (finished_run.adapter.path, tiny_llama):
        refused("evaluate", name, words=[f"'{name}' is not a run folder"])


def test_merge_and_export_need_an_adapter(refused, tiny_llama):
    refused("merge", tiny_llama, "--output", "out", words=[f"'{tiny_llama}' has no adapter"])
    refused("export", tiny_llama, "--to", "lora", "--output", "out", words=[f"'{tiny_llama}' has no adapter"])


def test_unfinished_run_is_rejected(refused, run):
    shutil.rmtree(run.adapter.path)
    words = ["'run' is an unfinished run", "pera train run --resume"]
    refused("evaluate", "run", words=words)
    refused("merge", "run", "--output", "out", words=words)
    refused("export", "run", "--to", "lora", "--output", "out", words=words)


def test_resume_rejects_missing_finished_and_changed_runs(refused, run, recipe_file, tmp_path):
    refused("train", recipe_file, "--resume", words=["--resume", "no unfinished run of 'small'"])
    refused("train", recipe_file, "--resume", "--output", "none", words=["--resume", "'none' is not a run folder"])
    for arguments in (["run"], [recipe_file, "--output", "run"]):
        refused("train", *arguments, "--resume", words=["--resume", "'run' is finished"])
    shutil.rmtree(run.adapter.path)
    for arguments in (["run"], [recipe_file, "--output", "run"]):
        refused("train", *arguments, "training.seed=7", "--resume", words=["--resume", "training.seed", "'run'"])
    refused("train", "run", "--resume", "--output", "other", words=["--output='other'"])
    refused("train", recipe_file, "--output", "run", words=["'run' exists and is not empty"])


def test_failed_resume_leaves_the_run_unchanged(refused, run):
    shutil.rmtree(run.adapter.path)
    shutil.rmtree(run.checkpoints)
    run.metrics_file.unlink()
    base = run.recipe.model.name
    run.recipe_file.write_text(run.recipe_file.read_text().replace(base, "/gone/model"))
    refused("train", "run", "--resume", words=["model", "'/gone/model'"])


def test_training_that_fails_before_its_first_step_leaves_nothing(pera, recipe_file, tree, monkeypatch):
    def fail(*_, **__):
        raise UserError("no memory")

    monkeypatch.setattr("pera_lab.training.Trainer.train", fail)
    before = tree()
    assert pera("train", recipe_file, "--output", "run").code == 2
    assert tree() == before


def test_quickstart_of_a_classifier_is_rejected_before_training(refused, tiny_bert, glue_folder):
    overrides = [f"model={tiny_bert}", f"task={{name: mrpc, data: {glue_folder}}}", "method.target_modules=all-linear"]
    overrides += ["evaluation.scorer=classification", "evaluation.max_new_tokens=null"]
    refused("quickstart", *overrides, "--output", "run", words=["no trained head", "pera train quickstart"])


def test_rejected_quickstart_leaves_nothing(refused, tiny_llama):
    overrides = [f"model.name={tiny_llama}", *SMALL_QUICKSTART, "method.target_modules=[nope]"]
    refused("quickstart", *overrides, "--output", "run", words=["target_modules: 'nope'"])


# In a separate process


@pytest.mark.parametrize(
    "command",
    [[sys.executable, "-m", "pera"], [sys.executable, "-m", "pera_lab"], [str(Path(sys.executable).parent / "pera")]],
)
def test_script_and_modules_run_the_command(command):
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"pera {package.__version__}\n")


def test_mistake_is_one_line_without_a_traceback(recipe_file, tmp_path):
    arguments = ["train", recipe_file, "method.target_modules=[q_proj, nope]", "--output", tmp_path / "run"]
    command = [sys.executable, "-m", "pera_lab", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    *stages, said = result.stderr.splitlines()  # a slow machine names the stages before
    assert all(" …" in line for line in stages)
    assert said.startswith("pera: ")
    assert "'nope'" in said
    assert not (tmp_path / "run").exists()


FULL_DISK = """
import contextlib, io, json, resource, sys
from pera_lab.cli import main
from transformers import Trainer

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def call(*arguments, size=10_000):
    error = io.StringIO()
    sys.argv = ["pera", *arguments]
    limit(size)
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
    limit(resource.RLIM_INFINITY)
    return code, error.getvalue()

recipe = sys.argv[1]
outcomes = {
    "merge": call("merge", "run", "--output", "merged"),
    "export": call("export", "run", "--to", "lora", "--output", "lora"),
    "train": call("train", recipe, "--output", "no-checkpoint"),
}
train = Trainer.train

def train_until_the_disk_is_full(*arguments, **options):
    result = train(*arguments, **options)
    limit(10_000)
    return result

Trainer.train = train_until_the_disk_is_full
outcomes["adapter"] = call("train", recipe, "--output", "no-adapter", size=resource.RLIM_INFINITY)
print(json.dumps(outcomes))
"""


@pytest.mark.slow
def test_full_disk_is_one_sentence_and_keeps_existing_files(
    python, pera, run, recipe_file, tree, tmp_path, finished_run
):
    before = tree()
    outcomes = json.loads(python(FULL_DISK, recipe_file, cwd=tmp_path).stdout)
    for command, output in [
        ("merge", "merged"),
        ("export", "lora"),
        ("train", "no-checkpoint"),
        ("adapter", "adapter"),
    ]:
        code, error = outcomes[command]
        last = error.splitlines()[-1]
        assert code == 2
        assert "Traceback" not in error
        assert last.startswith("pera: output: ")
        assert output in last
        assert "cannot be written" in last
    after = tree()
    assert {path: content for path, content in after.items() if path in before} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "no-checkpoint", "no-adapter"}
    for name in ("no-checkpoint", "no-adapter"):
        left = Run(tmp_path / name)
        assert [path.name for path in left.path.iterdir() if path.name.startswith("adapter")] == []
        assert pera("train", name, "--resume").code == 0
        adapter, expected = (r.adapter.path / "adapter_model.safetensors" for r in (left, finished_run))
        assert adapter.read_bytes() == expected.read_bytes()


@pytest.mark.slow
def test_quickstart_on_the_embedded_model(pera, fresh_logits, tmp_path):
    """The quickstart with 20 steps: merge and export agree with the adapter in pera and in plain PEFT."""
    torch.set_num_threads(2)
    overrides = ["model.dtype=float32", "training.max_steps=20", "task.test_size=8", "task.train_size=160"]
    done = pera("quickstart", *overrides, "--output", "run")
    torch.set_num_threads(1)
    assert done.code == 0
    run = Run(tmp_path / "run")
    assert load_recipe("quickstart").method == run.recipe.method
    assert run.recipe.method["normalization"] == "rms"
    for name in ("merged", "lora"):
        record = json.loads((run.path / name / "verification.json").read_text())
        assert record["max_difference"] <= 1e-3
        assert (record["same_top1"], record["tolerance"], record["dtype"]) == (1.0, 1e-3, "float32")
        assert record["tokens"] > 300
    base = json.loads((run.adapter.path / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapted = fresh_logits({"run": (base, run.adapter.path)}, import_pera=True)["run"]
    jobs = {"base": (base, None), "merged": (run.path / "merged", None), "lora": (base, run.path / "lora")}
    plain = fresh_logits(jobs)
    assert (plain["base"] - adapted).abs().max() > 0.5
    best = adapted.topk(2).values
    clear = best[..., 0] - best[..., 1] > 1e-3
    for name in ("merged", "lora"):
        assert (plain[name] - adapted).abs().max() <= 1e-3
        assert torch.equal(plain[name].argmax(-1)[clear], adapted.argmax(-1)[clear])
