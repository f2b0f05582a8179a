"""Every server that runs on a CPU serves an export as PERA computes it in transformers.

Each test runs the command that `pera export --for` prints and asks for 20 answers without sampling. The results are
collected in build/serving/results.jsonl; `python tests/serving/table.py` prints them.
"""

import json
import runpy
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from clients import CLIENTS, Request, gguf_of
from environments import ENVIRONMENTS, FOLDER, CannotInstall, install
from greedy import greedy
from peft import LoHaConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pera import PeraConfig
from pera_lab.convert.export import export
from pera_lab.convert.servers import SERVERS
from pera_lab.embedded import embedded_folder, state_rope_theta
from pera_lab.files import locked
from pera_lab.opening import locate_adapter

pytestmark = pytest.mark.slow

COUNT, TOP = 16, 5
TOLERANCE = {"llama.cpp": 0.1, "mistralrs": 0.1}
"""Largest difference of log-probabilities that rounding explains. llama.cpp stores keys and values in float16, and
mistral.rs differs as much on the base alone. For the others it is 1e-3."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "r = 4, q and v": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "r = 8, all linear": {"r": 8, "target_modules": LINEAR},
    "r = 16, all linear": {"r": 16, "target_modules": LINEAR},
    "two of three blocks": {"r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
    "half of a fused pair": {"r": 4, "target_modules": ["k_proj", "gate_proj"]},
    "embeddings": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "patterns": {"r": 4, "target_modules": ATTENTION, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    "anchors": {"r": 4, "target_modules": LINEAR, "anchors": 3},
    "LoHa, r = 4": LoHaConfig(r=4, alpha=64, target_modules=LINEAR, init_weights=False, task_type="CAUSAL_LM"),
    "new tokens": {"r": 8, "target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
    "SmolLM2, trained": None,
}
"""Configurations by name: the options of PERA, the configuration of another method, or None for :func:`trained`."""

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NEW_TOKENS = ["<|user|>", "<|answer|>"]
TEMPLATE_WITH_NEW_TOKENS = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}<|answer|>"
QUESTIONS = [
    f"{question} {thing}"
    for question in ("What is the name of", "Tell me something about", "Where can one find", "Who was the first to see")
    for thing in ("the sea?", "a mountain in Peru?", "the moon?", "an old library?", "the red house by the river?")
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a LLaMA with three blocks, of sizes that the kernels of the servers accept.

    Its tokens are pieces of ASCII text, because some servers return text only.
    """
    folder = tmp_path_factory.mktemp("serving") / "base"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=160,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=["Ġ", *string.ascii_letters, *string.digits, *string.punctuation],
        show_progress=False,
    )
    bpe.train_from_iterator(QUESTIONS, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    state_rope_theta(folder)
    write_gguf(model, tokenizer, gguf_of(folder))
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Folder of an adapter by its name in ADAPTERS."""

    def make(name):
        folder = tmp_path_factory.getbasetemp() / "serving-adapters" / str(list(ADAPTERS).index(name))
        if ADAPTERS[name] is None:
            return trained()
        if not folder.is_dir():
            torch.manual_seed(0)
            config = ADAPTERS[name]
            if isinstance(config, dict):
                config = PeraConfig(task_type="CAUSAL_LM", init_weights=False, normalization="rms", **config)
            model = AutoModelForCausalLM.from_pretrained(base)
            if name == "new tokens":
                tokenizer = AutoTokenizer.from_pretrained(base)
                tokenizer.add_tokens(NEW_TOKENS)
                tokenizer.chat_template = TEMPLATE_WITH_NEW_TOKENS
                tokenizer.save_pretrained(folder)
                model.resize_token_embeddings(len(tokenizer))
            adapted = get_peft_model(model, config)
            with torch.no_grad():
                for key, parameter in adapted.named_parameters():
                    if parameter.requires_grad and "pera_h" not in key:
                        parameter.add_(0.03 * torch.randn_like(parameter))
            adapted.save_pretrained(folder)
        return folder

    return make


def write_gguf(*arguments):
    """Write a LLaMA and its tokenizer as a GGUF file."""
    originals = Path(__file__).parents[1] / "pera_lab" / "malformed" / "originals.py"
    runpy.run_path(str(originals))["write_gguf"](*arguments)


def trained():
    """Folder of an adapter that was trained for a few steps on SmolLM2, once."""
    run = FOLDER / "smollm2" / "run"
    if not (run / "adapter").is_dir():
        shutil.rmtree(run.parent, ignore_errors=True)
        # Under another name the folder is a model like any other, not the embedded one, whose commands name the hub.
        base = run.parent / "base"
        shutil.copytree(embedded_folder("smollm2-135m"), base)
        state_rope_theta(base)  # an older version may have converted it
        write_gguf(AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base), gguf_of(base))
        command = [sys.executable, "-m", "pera_lab", "train", "quickstart", f"model={base}"]
        subprocess.run([*command, "training.max_steps=30", "--output", str(run)], check=True)
    return run / "adapter"


class Reference(NamedTuple):
    """What every server is asked, and what PERA answers in transformers."""

    asked: dict
    adapted: list
    without: list
    """Answers of the base model."""


@pytest.fixture(scope="module")
def reference(adapter):
    """The answers of an adapter, by its name in ADAPTERS."""
    found = {}

    def of(name):
        if name not in found:
            location = locate_adapter(str(adapter(name)))
            tokenizer = AutoTokenizer.from_pretrained(location.tokenizer or location.base)
            base = AutoModelForCausalLM.from_pretrained(location.base, dtype="float32")
            if location.tokenizer is not None:
                base.resize_token_embeddings(len(tokenizer))
            model = PeftModel.from_pretrained(base, adapter(name))
            chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
            texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
            asked = {"prompts": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]}
            asked |= {"count": COUNT, "top": TOP, "end": tokenizer.eos_token_id}
            adapted = greedy(model, **asked)
            with model.disable_adapter():
                without = greedy(model, **asked)
            found[name] = Reference({**asked, "questions": QUESTIONS, "texts": texts}, adapted, without)
        return found[name]

    return of


def kind(environment):
    """The name in SERVERS of what an environment holds."""
    return environment.partition("-")[0]


CASES = [
    (environment, name)
    for environment in ENVIRONMENTS
    for name in ADAPTERS
    if (name != "embeddings" or SERVERS[kind(environment)].embeddings)
    and (name != "new tokens" or environment == "vllm")  # not tried in the others
]


@pytest.mark.parametrize(("environment", "name"), CASES)
def test_a_server_answers_as_the_adapter(environment, name, adapter, reference, tmp_path):
    try:
        programs = install(environment)
    except CannotInstall as reason:
        pytest.skip(f"{environment} cannot be installed: {reason}")
    asked, expected, without = reference(name)
    location = locate_adapter(str(adapter(name)))
    made = export(location, tmp_path / "served", server=kind(environment))
    (FOLDER / "logs").mkdir(exist_ok=True)
    request = Request(
        start=made.start,
        base=made.base or Path(location.base),
        output=tmp_path / "served",
        bin=programs,
        log=FOLDER / "logs" / f"{environment} {name}.log",
        **asked,
    )
    answers = [[until(asked["end"], answer) for answer in side] for side in CLIENTS[kind(environment)](request)]
    tolerance = TOLERANCE.get(kind(environment), 1e-3)
    references = (expected,) if made.base else (expected, without)  # a base of its own has the new tokens
    sides = [compared(*both, tolerance) for both in zip(answers, references, strict=False)]
    record(environment, name, request, *sides)
    assert compared(without, expected, 0.0)["equal"] < 0.8 * sides[0]["tokens"], (
        "the adapter hardly changes the answers"
    )
    for side in sides:
        assert side["equal"] == side["tokens"] > 0
        assert side["difference"] < tolerance


def until(end, answer):
    """An answer up to the token that ends it, which some servers include."""
    tokens, ranked = answer
    length = tokens.index(end) if end in tokens else len(tokens)
    return tokens[:length], ranked[:length]


def compared(answers, expected, tolerance):
    """Number of tokens compared and equal, and the largest difference of log-probabilities at the equal ones.

    Rounding may decide between two tokens whose log-probabilities differ by less than twice the tolerance. An answer
    that takes the other one is compared up to there, and counted as a near-tie.
    """
    total = equal = ties = 0
    difference = 0.0
    for (tokens, ranked), (wanted, wanted_ranked) in zip(answers, expected, strict=True):
        for i, token in enumerate(wanted):
            first, second = (value for _, value in wanted_ranked[i][:2])
            if i >= len(tokens) or tokens[i] != token:
                tie = first - second < 2 * tolerance
                ties += tie
                total += 0 if tie else len(wanted) - i
                break
            total += 1
            equal += 1
            there = dict(map(tuple, ranked[i]))
            both = [abs(there[other] - value) for other, value in wanted_ranked[i] if other in there or other == token]
            difference = max(difference, *both)
    return {"tokens": total, "equal": equal, "near-ties": ties, "difference": difference}


def record(environment, name, request, served, of_base=None):
    """Add a result to the file, in place of an earlier one of the same server and adapter."""
    file = FOLDER / "results.jsonl"
    command = request.start.replace(str(request.output), "OUT").replace(str(request.base), "BASE")
    server, version = ENVIRONMENTS[environment].server
    new = {"environment": environment, "server": server, "version": version, "adapter": name, "command": command}
    with locked(FOLDER / "results.lock", file, wait=True):
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        lines = [line for line in lines if (line["environment"], line["adapter"]) != (environment, name)]
        lines.append({**new, **served, "base": of_base})
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
