"""A small LLaMA pretrained here on real text, the second base of benchmarks/memory.py.

    python benchmarks/memory_base.py [--data ../shared/data]   # writes build/memory-base; half an hour on a busy core

Four blocks of width 256 with SmolLM2's tokenizer read the texts of QNLI, MRPC, HellaSwag and GSM8K once, 3.6 million
tokens. In training the softmax is over the tokens of the batch, because one over all 49,152 would take most of
the time. The last 100 sequences are held out. memory.py loads the folder for runs with ``base="small"``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from grid import fit, minibatches
from memory_facts import tokenizer

FOLDER = Path(__file__).parents[1] / "build" / "memory-base"
WIDTH = 128
"""Tokens of a sequence."""
BATCH = 32
RATE = 2e-3
HELD_OUT = 100


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def texts(data: Path) -> Iterator[str]:
    for name, keys in (("qnli", ("question", "sentence")), ("mrpc", ("sentence1", "sentence2"))):
        for part in ("train", "validation"):
            for row in map(json.loads, (data / "glue" / name / f"{part}.jsonl").read_text().splitlines()):
                yield " ".join(row[key] for key in keys)
    for part in ("train", "test"):
        for row in json.loads((data / "commonsense" / "hellaswag" / f"{part}.json").read_text()):
            yield row["instruction"]
        for row in map(json.loads, (data / "gsm8k" / f"{part}.jsonl").read_text().splitlines()):
            yield f"{row['question']}\n{row['answer']}"


def sequences(data: Path) -> Tensor:
    """The texts in a random order, one after another, cut into ``(sequences, WIDTH)`` tokens."""
    encoded = tokenizer()(list(texts(data)), add_special_tokens=False)["input_ids"]
    order = torch.randperm(len(encoded)).tolist()
    end = tokenizer().eos_token_id
    tokens = torch.tensor(list(chain.from_iterable([*encoded[i], end] for i in order)))
    return tokens[: len(tokens) // WIDTH * WIDTH].view(-1, WIDTH)


def pretrain(data: Path) -> tuple[LlamaForCausalLM, float]:
    """The model after one epoch, and its loss on the held-out sequences, nats per token."""
    torch.manual_seed(0)
    rows = sequences(data)
    train, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    model = LlamaForCausalLM(config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    steps, start = len(train) // BATCH, time.perf_counter()

    def loss_of(batch: Tensor) -> Tensor:
        present, labels = train[batch].unique(return_inverse=True)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=train[batch]).last_hidden_state
            logits = hidden[:, :-1] @ model.lm_head.weight[present].T
        return cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())

    def watch(step: int, loss: float) -> None:
        if step % 20 == 0:
            print(f"step {step} of {steps} · loss {loss:.3f} · {time.perf_counter() - start:.0f} s", flush=True)

    fit(optimizer, minibatches(len(train), BATCH, steps), steps, loss_of, watch)
    with torch.no_grad():
        losses = [float(model(input_ids=row, labels=row).loss) for row in held_out.split(1)]
    return model, sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="default: ../shared/data")
    model, loss = pretrain(parser.parse_args().data)
    model.save_pretrained(FOLDER)
    tokenizer().save_pretrained(FOLDER)
    print(f"held-out loss {loss:.3f} nats per token; {FOLDER}")


if __name__ == "__main__":
    main()
