"""Recall of an adapter that was trained on facts, by everything that can run it.

    python benchmarks/recall.py RUN [--output FOLDER]

The run is exported with `pera export` to a LoRA and to GGUF and merged with `pera merge`. Greedy decoding of all facts
is then done by pera, by plain PEFT in a process that does not import pera, by the merged model in bfloat16 (where the
processor computes in it), by llama.cpp on the base's GGUF file as it is and with its weights in float32, and by LoRAs
that are truncated to lower ranks. The table shows the recall of each, and how many answers equal pera's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from convert import in_float32
from pera_lab.convert.llamacpp import complete, serving
from pera_lab.embedded import resolve_gguf
from pera_lab.environment import fast_dtype
from pera_lab.models import load_tokenizer, local_folder
from pera_lab.runs import Run

PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
base, adapter, dtype, prompts, length = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
assert "pera" not in sys.modules
model.eval()
answers = []
for prompt in prompts:
    ids = torch.tensor([prompt])
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length)
    answers.append(found[0, len(prompt):].tolist())
json.dump(answers, sys.stdout)
"""


def plain(base: str, adapter: Path | None, dtype: str, prompts: list[list[int]], length: int) -> list[list[int]]:
    """Greedy answers of transformers, or of transformers and PEFT, in a process of its own."""
    task = json.dumps([base, adapter and str(adapter), dtype, prompts, length])
    done = subprocess.run([sys.executable, "-c", PLAIN], input=task, capture_output=True, text=True, check=True)
    found: list[list[int]] = json.loads(done.stdout)
    return found


def llama_cpp(base: Path, adapter: Path, prompts: list[list[int]], length: int) -> list[list[int]]:
    """Greedy answers of llama.cpp."""
    with serving(base, adapter) as address:
        return [complete(address, p, n_predict=length, return_tokens=True)["tokens"][:length] for p in prompts]


def pera(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pera", *arguments], check=True, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, help="folder for the exported models (default: a temporary one)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[], help="truncate the LoRA to these ranks too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(options.run, options.output or Path(temporary), options.ranks)


def measure(folder: Path, output: Path, ranks: Sequence[int]) -> None:
    run = Run(folder)
    recipe = run.recipe
    tokenizer = load_tokenizer(recipe.model.name)
    facts = recipe.build_splits().test
    prompts = [tokenizer(fact.prompt, add_special_tokens=False)["input_ids"] for fact in facts]
    expected = [tokenizer(fact.answer, add_special_tokens=False)["input_ids"] for fact in facts]
    length = max(map(len, expected))
    pera("evaluate", str(folder))
    predictions = [json.loads(line) for line in (folder / "predictions/adapter.jsonl").read_text().splitlines()]
    own = [tokenizer(row["output"], add_special_tokens=False)["input_ids"] for row in predictions]
    pera("export", str(folder), "--to", "lora", "--output", str(output / "lora"))
    pera("export", str(folder), "--to", "gguf", "--output", str(output / "gguf"))
    pera("merge", str(folder), "--output", str(output / "merged"))
    base = str(local_folder(recipe.model.name))
    model = resolve_gguf(recipe.model.name)
    print("| run by | recall | answers equal to pera's |\n| --- | --- | --- |")

    def show(name: str, answers: list[list[int]]) -> None:
        right = sum(a[: len(e)] == e for a, e in zip(answers, expected, strict=True))
        same = sum(a[: len(b)] == b for a, b in zip(answers, own, strict=True))
        print(f"| {name} | {right} of {len(facts)} | {same} of {len(facts)} |", flush=True)

    show("pera", own)
    show("LoRA, plain PEFT, float32", plain(base, output / "lora", "float32", prompts, length))
    if fast_dtype() is torch.bfloat16:  # elsewhere it is emulated, about a hundred times slower
        show("LoRA, plain PEFT, bfloat16", plain(base, output / "lora", "bfloat16", prompts, length))
        show("merged, transformers, bfloat16", plain(str(output / "merged"), None, "bfloat16", prompts, length))
    for rank in ranks:
        pera("export", str(folder), "--to", "lora", "--max-rank", str(rank), "--output", str(output / f"lora-{rank}"))
        show(f"LoRA truncated to rank {rank}", plain(base, output / f"lora-{rank}", "float32", prompts, length))
    if model is not None:
        adapter = output / "gguf/adapter.gguf"
        show(f"GGUF, llama.cpp on {model.name}", llama_cpp(model, adapter, prompts, length))
        plain_model = in_float32(model, output / "base.gguf")
        show("GGUF, llama.cpp on the same base in float32", llama_cpp(plain_model, adapter, prompts, length))


if __name__ == "__main__":
    main()
