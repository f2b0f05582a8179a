"""Shared by all tests: no network, a fixed seed, and the same hypothesis examples in every run."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and runs in several processes are compared bit by bit

import pytest
import torch
from hypothesis import HealthCheck, settings
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pera import PeraConfig

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

PEOPLE = ("Ethan", "Jennifer", "Liam", "Alice", "Zoe", "Edward", "Luna", "Jayden", "Elizabeth", "Sarah", "Lily", "Mary")
RELATIONS = ("daughter", "father", "father-in-law", "mother", "son", "husband", "wife", "grandmother", "brother")


def _sentences():
    for i, name in enumerate(PEOPLE * 5):
        one, two, three = (PEOPLE[(i * step + step) % len(PEOPLE)] for step in (1, 5, 7))
        yield (
            f"{name} is married to {one}. They have a child called {two}. {two} is married to {three}.\n\n"
            f"What relation is {two} to {one}? Answer with a single word. {RELATIONS[i % len(RELATIONS)]} "
            f"What is {three} to {name}? Respond only with the word that describes their relationship."
        )


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with a chat template, trained on sentences like the problems of family_relationships."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_sentences(), trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="left", **special)


@pytest.fixture(scope="session")
def save_llama(tokenizer):
    """Save a random LLaMA with its tokenizer. The same options give the same weights."""

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
    """Folder of a LLaMA with two layers and separate embeddings and head."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_gpt2(tokenizer, tmp_path_factory):
    """Folder of a GPT-2 with two layers: ``Conv1D`` with biases, and a head tied to the embeddings."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
    special = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tokenizer, tmp_path_factory):
    """Folder of a BERT with two layers and no head."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"vocab_size": len(tokenizer), "pad_token_id": 2, "max_position_embeddings": 64}
    BertModel(BertConfig(**sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def biased_llama(save_llama, tmp_path_factory):
    """Folder of a LLaMA with biases in its attention."""
    return save_llama(tmp_path_factory.mktemp("models") / "biased", attention_bias=True, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tied_llama(save_llama, tmp_path_factory):
    """Folder of a LLaMA with tied embeddings."""
    return save_llama(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def save_adapter():
    """Save a random adapter with a large effect, and return the adapted model.

    A ``tokenizer`` is saved with it, and the base is resized to its number of tokens, as TRL does.
    """

    def save(folder, base, tokenizer=None, **options):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base)
        if tokenizer is not None:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            tokenizer.save_pretrained(folder)
        chosen = {"task_type": "CAUSAL_LM", "r": 3, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
        adapted = get_peft_model(model, PeraConfig(**{**chosen, **options}))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "pera_h" not in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        adapted.save_pretrained(folder)
        return adapted.eval()

    return save


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folder with a base model, adapters and runs that pera 0.1.0 saved at commit f969fb9, as tiny as they can be.

    It holds ``base``, ``encoder``, ``adapters/*``, ``runs/*`` and ``logits.safetensors``, which has the token ids and
    the logits that each adapter gave. Text files name this folder as SAVED. Copy what a test changes.
    """
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(Path(__file__).parent / "saved_0.1.0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for pattern in ("*.json", "*.yaml", "*.md"):
        for file in folder.rglob(pattern):
            text = file.read_text()
            if "SAVED" in text:
                file.write_text(text.replace("SAVED", str(folder / "saved")))
    return folder / "saved"


@pytest.fixture
def own_tokenizer(tiny_llama):
    """The tokenizer of the tiny models with another chat template and two more tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<|user|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    return tokenizer


@pytest.fixture
def adapter(save_adapter, tiny_llama, tmp_path):
    """Folder of an adapter with rms normalization on the tiny LLaMA. Tests may damage it."""
    save_adapter(tmp_path / "adapter", tiny_llama, normalization="rms")
    return tmp_path / "adapter"


@pytest.fixture
def unmerged():
    """The base model with a saved adapter on it."""
    return lambda base, adapter: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


@pytest.fixture
def change_weights():
    """Apply a function to the dictionary of tensors in a safetensors file."""

    def change(file, function):
        save_file(function(load_file(file)), file, metadata={"format": "pt"})

    return change


@pytest.fixture(scope="session")
def python():
    """Run a program in a fresh Python process."""

    def run_program(program, *arguments, check=True, **options):
        command = [sys.executable, "-c", program, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        assert not check or result.returncode == 0, result.stderr
        return result

    return run_program


TOKENS = torch.arange(3, 63).reshape(2, 30) * 5 % 300


@pytest.fixture(scope="session")
def logits():
    """Logits of a model, or of the model in a folder, for fixed tokens."""

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
    """Logits, as from ``logits``, that PEFT computes in a fresh process without pera, or with ``import_pera``.

    ``jobs`` maps names to ``(base, adapter)`` or ``(model, None)``. The result maps the names to logits.
    """

    def of(jobs, *, import_pera=False):
        folder = tmp_path_factory.mktemp("fresh")
        save_file({"tokens": TOKENS}, folder / "tokens.safetensors")
        paths = {name: [str(base), adapter and str(adapter)] for name, (base, adapter) in jobs.items()}
        program = "import pera\n" * import_pera + FRESH
        done = python(program, json.dumps(paths), folder / "tokens.safetensors", folder / "logits.safetensors")
        assert done.stdout.split() == [str(import_pera)]
        return load_file(folder / "logits.safetensors")

    return of
