"""What all tests share: no network, a fixed seed, and the same hypothesis examples on every run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and runs in several processes are compared bit by bit
os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pera import cli, evaluation
from pera.recipe import load_recipe
from pera.runs import Run
from pera.tasks import ReasoningTask
from pera.training import train

settings.register_profile(
    "same_examples",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("same_examples")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)

RECIPE = """
model: {name: MODEL, dtype: float32}
method:
  name: pera
  r: 4
  normalization: rms
  init_coefficients: 0.3
  dropout: 0.1
  target_modules: [q_proj, v_proj, up_proj, down_proj]
task: {name: family_relationships, train_size: 64, test_size: 8}
training: {learning_rate: 3.0e-2, max_steps: 12, batch_size: 4, save_steps: 4, logging_steps: 2}
evaluation: {max_new_tokens: 4, batch_size: 4}
"""


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with a chat template, trained on problems of the task."""
    task = ReasoningTask("family_relationships", train_size=64, test_size=8)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([f"{example.prompt} {example.answer}" for example in task.train], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="left", **special)


@pytest.fixture(scope="session")
def save_llama(tokenizer):
    """Saves a random LLaMA with its tokenizer; the same weights for the same options."""

    def save(folder, dtype=torch.float32, **options):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape = {**sizes, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
        special = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        LlamaForCausalLM(LlamaConfig(**{**shape, **special, **options})).to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_llama(save_llama, tmp_path_factory):
    """Folder of a LLaMA of two layers with separate embeddings and head."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_gpt2(tokenizer, tmp_path_factory):
    """Folder of a GPT-2 of two layers: ``Conv1D`` with biases, head tied to the embeddings."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
    special = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tokenizer, tmp_path_factory):
    """Folder of a BERT of two layers, an encoder without a head."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"vocab_size": len(tokenizer), "pad_token_id": 2, "max_position_embeddings": 64}
    BertModel(BertConfig(**sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory):
    """A folder with sst2 and stsb of some rows; the label is in the words."""
    folder = tmp_path_factory.mktemp("glue")
    words = ["dull film", "fine film"]
    pairs = [{"sentence1": "a " * (i % 6), "sentence2": "a a", "label": float(i % 6)} for i in range(70) if i % 6]
    rows = {"sst2": [{"sentence": f"{words[i % 2]} {i % 7}", "label": i % 2} for i in range(64)], "stsb": pairs}
    for name, content in rows.items():
        (folder / name).mkdir()
        for split in ("train", "validation"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


GLUE_RECIPE = """
model: {name: MODEL, dtype: float32}
method: {name: pera, r: 2, normalization: rms, init_coefficients: 0.3, target_modules: [query, value]}
task: {name: sst2, data: DATA}
training: {learning_rate: 1.0e-2, epochs: 3, batch_size: 8, logging_steps: 4, eval_steps: epoch, keep: best}
"""


@pytest.fixture(scope="session")
def glue_recipe(tiny_bert, glue_folder, tmp_path_factory):
    """A small run on the tiny BERT."""
    file = tmp_path_factory.mktemp("recipes") / "classify.yaml"
    file.write_text(GLUE_RECIPE.replace("MODEL", str(tiny_bert)).replace("DATA", str(glue_folder)))
    return file


@pytest.fixture(scope="session")
def finished_glue_run(glue_recipe, tmp_path_factory):
    """The small run on the tiny BERT, trained. Not to be written to."""
    recipe = load_recipe(str(glue_recipe))
    run = Run.create(recipe, tmp_path_factory.mktemp("runs") / "glue")
    train(recipe, run)
    return run


@pytest.fixture
def glue_run(finished_glue_run, tmp_path):
    """A copy of the finished run of a classifier, to be written to."""
    shutil.copytree(finished_glue_run.path, tmp_path / "glue-run")
    return Run(tmp_path / "glue-run")


@pytest.fixture(scope="session")
def recipe_file(tiny_llama, tmp_path_factory):
    """A small run on the tiny LLaMA: dropout, three checkpoints, a rate at which B and h move far."""
    file = tmp_path_factory.mktemp("recipes") / "small.yaml"
    file.write_text(RECIPE.replace("MODEL", str(tiny_llama)))
    return file


@pytest.fixture(scope="session")
def train_run(recipe_file):
    """Trains the small recipe, with overrides, into a folder."""

    def train_into(folder, *overrides):
        recipe = load_recipe(str(recipe_file), list(overrides))
        run = Run.create(recipe, folder)
        train(recipe, run)
        return run

    return train_into


@pytest.fixture(scope="session")
def finished_run(train_run, tmp_path_factory):
    """The small recipe, trained without interruption. Not to be written to: :func:`run` is a copy."""
    return train_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run, to be written to."""
    shutil.copytree(finished_run.path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture
def interrupt(monkeypatch):
    """``interrupt(n)`` ends an evaluation by KeyboardInterrupt at its n-th batch, once. The list that it returns gets
    the number of prompts of each batch, that one included."""

    def at(batch):
        write, asked = evaluation._write, []

        def interrupted(model, tokenizer, prompts, *rest):
            asked.append(len(prompts))
            if len(asked) == batch:
                raise KeyboardInterrupt
            return write(model, tokenizer, prompts, *rest)

        monkeypatch.setattr(evaluation, "_write", interrupted)
        return asked

    return at


@pytest.fixture
def change_weights():
    """Rewrites the tensors of a safetensors file by a function of their dictionary."""

    def change(file, function):
        save_file(function(load_file(file)), file, metadata={"format": "pt"})

    return change


class Outcome(NamedTuple):
    """What a command left with: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def pera(monkeypatch, capsys, tmp_path):
    """Calls the ``pera`` command in this process, in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pera", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return Outcome(exit.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def tree(tmp_path):
    """What lies in the working folder: the content of every file, None for a folder."""
    return lambda: {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}


@pytest.fixture
def refused(pera, tree):
    """Calls the ``pera`` command and checks that it refuses: exit code 2, one line that has all of ``words``, nothing
    changed on the disk. Returns the line."""

    def call(*arguments, words):
        before = tree()
        outcome = pera(*arguments)
        assert outcome.code == 2
        assert outcome.out == ""
        assert outcome.err.startswith("pera: ")
        assert outcome.err.count("\n") == 1
        assert outcome.err.endswith("\n")
        assert [word for word in words if word not in outcome.err] == [], outcome.err
        assert tree() == before
        return outcome.err

    return call


@pytest.fixture(scope="session")
def python():
    """Runs a program in a fresh Python process."""

    def run_program(program, *arguments, check=True, **options):
        command = [sys.executable, "-c", program, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        assert not check or result.returncode == 0, result.stderr
        return result

    return run_program


TOKENS = torch.arange(3, 63).reshape(2, 30) * 5 % 300


@pytest.fixture(scope="session")
def logits():
    """Logits of a model, or of a folder with one, on some tokens."""

    @torch.no_grad()
    def of(model):
        if isinstance(model, str | Path):
            model = AutoModelForCausalLM.from_pretrained(model)
        return model.eval()(TOKENS).logits

    return of


FRESH = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
_, jobs, tokens, results = sys.argv
logits = {}
for name, (base, adapter) in json.loads(jobs).items():
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits[name] = model.eval()(load_file(tokens)["tokens"]).logits
save_file(logits, results)
print("pera" in sys.modules)
"""


@pytest.fixture(scope="session")
def fresh_logits(python, tmp_path_factory):
    """Logits, as of :func:`logits`, that PEFT gives in a fresh process which does not import pera unless told to:
    by name, for ``(base, adapter)``, or ``(model, None)``, by name."""

    def of(jobs, *, import_pera=False):
        folder = tmp_path_factory.mktemp("fresh")
        save_file({"tokens": TOKENS}, folder / "tokens.safetensors")
        paths = {name: [str(base), adapter and str(adapter)] for name, (base, adapter) in jobs.items()}
        program = "import pera\n" * import_pera + FRESH
        done = python(program, json.dumps(paths), folder / "tokens.safetensors", folder / "logits.safetensors")
        assert done.stdout.split() == [str(import_pera)]
        return load_file(folder / "logits.safetensors")

    return of
