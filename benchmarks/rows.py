"""Peak memory and time to the first step of a training, for files of ten thousand and of a million rows.

Each training is a process of its own. A file is used twice: with an empty cache of token ids, and with a full one. The
peak counts the pages of files that are mapped into memory, which the system can take back; anonymous memory does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RECIPE = """
model: {{name: {model}, dtype: float32}}
method: {{name: lora, r: 2, target_modules: [q_proj]}}
task: {{name: own, data: {data}, test_size: 100}}
training: {{learning_rate: 1.0e-3, max_steps: {steps}, batch_size: 16, logging_steps: 1, save_steps: {steps}}}
"""


def write_rows(file: Path, rows: int) -> None:
    """Write short questions and answers as JSON Lines."""
    with file.open("w") as f:
        for i in range(rows):
            row = {"prompt": f"What is {i} plus {i * 7 % 1000}?", "completion": f"It is {i + i * 7 % 1000}."}
            f.write(json.dumps(row) + "\n")


def write_model(folder: Path) -> None:
    """Write a random model with two layers, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    byte_level = Tokenizer(models.BPE(words, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, **special)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(words), max_position_embeddings=512)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(recipe: Path, output: Path) -> None:
    """Train, and print peak memory and seconds as JSON."""
    import resource

    from pera_lab.recipe import load_recipe
    from pera_lab.runs import Run
    from pera_lab.training import train as train_recipe

    anonymous = [0]
    ended = threading.Event()
    status = Path("/proc/self/status")

    def watch() -> None:
        while not ended.wait(0.05):
            (line,) = (line for line in status.read_text().splitlines() if line.startswith("RssAnon:"))
            anonymous[0] = max(anonymous[0], int(line.split()[1]) * 1024)

    threading.Thread(target=watch, daemon=True).start()
    loaded = load_recipe(str(recipe))
    run = Run.create(loaded, output)
    start, busy = time.perf_counter(), time.process_time()
    train_recipe(loaded, run)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    ended.set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "cpu": busy, "peak": peak, "anonymous": anonymous[0]}))


def main() -> None:
    """Print one line for each training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train(*arguments.child)
        return
    print(f"{'rows':>9}  {'file':>7}  {'cache':5}  {'seconds':>7}  {'cpu':>6}  {'peak':>8}  {'anonymous':>9}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        for rows in arguments.rows:
            data, recipe = folder / f"{rows}.jsonl", folder / f"{rows}.yaml"
            write_rows(data, rows)
            recipe.write_text(RECIPE.format(model=folder / "model", data=data, steps=arguments.steps))
            for cache in ("empty", "full"):
                output = folder / f"{rows}-{cache}"
                command = [sys.executable, __file__, "--child", str(recipe), str(output)]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                size, peak, anonymous = (n / 2**20 for n in (data.stat().st_size, found["peak"], found["anonymous"]))
                print(
                    f"{rows:>9,}  {size:>4.0f} MB  {cache:5}  {found['seconds']:>7.1f}  {found['cpu']:>6.1f}  "
                    f"{peak:>5.0f} MB  {anonymous:>6.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
