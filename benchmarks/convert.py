"""Time and error of conversions, each against an alternative.

Truncation against a full SVD; folding against PEFT's conversion; the exported LoRA in plain PEFT against the adapter;
llama.cpp against transformers.

    python benchmarks/convert.py truncation
    python benchmarks/convert.py folding RUN
    python benchmarks/convert.py peft RUN [--problems 50]
    python benchmarks/convert.py llama.cpp RUN [--problems 200]

Each measures both sides in one process and prints the values in docs/results/serving.md. RUN is a run folder of the
recipe relationships-smollm2.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np
import torch

from pera.lora import fold, truncate_factors
from pera.polynomial import lora_factors, num_coefficients
from pera_lab.convert.export import export
from pera_lab.convert.gguf import ADAPTER
from pera_lab.convert.llamacpp import complete, log_probabilities, serving
from pera_lab.convert.verify import compare, logits
from pera_lab.embedded import resolve_gguf
from pera_lab.environment import environment
from pera_lab.intervals import wilson_interval
from pera_lab.opening import locate_run, open_model
from pera_lab.runs import Run
from pera_lab.tasks.encoding import encode_prompt


def timed(function: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """The median time of ``repeats`` calls in seconds, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return median(times), result


def truncation(m: int = 4096, n: int = 4096, r: int = 16, rank: int = 16) -> dict[str, Any]:
    """Truncation of an adapter of rank K to ``rank``, against the SVD of ΔW.

    Truncation uses QR and a K × K SVD in float64. The SVD of ΔW is in float32, which is faster.
    """
    torch.manual_seed(0)
    A, B = torch.randn(r, n, dtype=torch.float64) / n**0.5, torch.randn(m, r, dtype=torch.float64)
    h = torch.randn(num_coefficients(r, "all"), dtype=torch.float64)
    A, B = lora_factors(A, B, h, "all", "rms")
    ours, (A_cut, B_cut) = timed(lambda: truncate_factors(A, B, rank), 5)
    delta = (B @ A).float()
    full, values = timed(lambda: torch.linalg.svd(delta, full_matrices=False)[1])
    optimal = values[rank:].double().norm() / values.double().norm()
    error = (B @ A - B_cut @ A_cut).norm() / (B @ A).norm()
    return {
        "shape": [m, n],
        "r": r,
        "K": len(A),
        "rank": rank,
        "seconds, factors": ours,
        "seconds, m × n SVD": full,
        "times faster": full / ours,
        "relative error": float(error),
        "optimal error": float(optimal),
    }


def folding(run: Run) -> dict[str, Any]:
    """The trained adapter as a LoRA of rank K: folded, against PEFT's ``convert_to_lora`` at the same rank."""
    from peft import convert_to_lora

    model, _ = open_model(locate_run(run), "float32")
    ours, (config, state) = timed(lambda: fold(model), 5)
    theirs, (_, converted) = timed(lambda: convert_to_lora(copy.deepcopy(model), rank=config.r, progressbar=False))
    return {
        "K": config.r,
        "seconds, folded": ours,
        "seconds, convert_to_lora": theirs,
        "times faster": theirs / ours,
        "relative error, folded": _relative_error(model, state),
        "relative error, convert_to_lora": _relative_error(model, converted),
    }


def _relative_error(model: Any, state: dict[str, torch.Tensor]) -> float:
    """The largest ‖ΔW − B A‖_F / ‖ΔW‖_F over the layers."""
    worst = 0.0
    for key, A in state.items():
        if ".lora_A." in key:
            layer = model.base_model.model.get_submodule(key.removeprefix("base_model.model.").partition(".lora_A.")[0])
            delta = layer.get_delta_weight("default").detach().double()
            found = state[key.replace("lora_A", "lora_B")].double() @ A.double()
            worst = max(worst, float((found - delta).norm() / delta.norm()))
    return worst


PLAIN_PEFT = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, prompts, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
with torch.no_grad():
    torch.save([model(input_ids=torch.tensor([ids])).logits[0] for ids in json.load(open(prompts))], out)
assert "pera" not in sys.modules
"""


def in_plain_peft(run: Run, problems: int, folder: Path) -> dict[str, Any]:
    """The logits of the exported LoRA in a process that never imports pera, against the adapter's logits."""
    export(locate_run(run), folder / "lora", to="lora")
    model, tokenizer = open_model(locate_run(run), "float32")
    prompts = [example.prompt for example in run.recipe.build_splits().test[:problems]]
    (folder / "prompts.json").write_text(json.dumps([encode_prompt(tokenizer, prompt) for prompt in prompts]))
    base = json.loads((folder / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    arguments = [base, folder / "lora", folder / "prompts.json", folder / "logits.pt"]
    subprocess.run([sys.executable, "-c", PLAIN_PEFT, *map(str, arguments)], check=True)
    agreement = compare(logits(model, tokenizer, prompts), torch.load(folder / "logits.pt"), torch.float32)
    return {"problems": len(prompts), **asdict(agreement)}


def in_llama_cpp(run: Run, problems: int, folder: Path) -> dict[str, Any]:
    """Greedy answers from the HTTP endpoint of llama.cpp, compared with the answers of transformers.

    An F32 GGUF of the same weights is compared token by token. The shipped file is compared by accuracy, with and
    without the adapter.
    """
    length = run.recipe.evaluation.max_new_tokens
    shipped = resolve_gguf(run.recipe.model.name)
    assert shipped is not None
    full = in_float32(shipped, folder / "f32.gguf")
    export(locate_run(run), folder / "gguf", to="gguf")
    adapter = folder / "gguf" / ADAPTER
    model, tokenizer = open_model(locate_run(run), "float32")
    examples = run.recipe.build_splits().test[:problems]
    prompts = [encode_prompt(tokenizer, example.prompt) for example in examples]

    equal, after_ties = 0, 0
    with serving(full, adapter) as address:
        for prompt in prompts[:50]:
            expected = _greedy(model, tokenizer, prompt, length)
            answer = complete(address, prompt, n_predict=length, return_tokens=True)["tokens"]
            answer = [token for token in answer if token != tokenizer.eos_token_id]
            if answer == expected:
                equal += 1
            elif _near_tie(model, prompt, expected, answer):
                after_ties += 1
        rows = log_probabilities(address, prompts[0], model.config.vocab_size, 4)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompts[0]])).logits[0, -4:].log_softmax(-1).clamp(min=-80)
    found: dict[str, Any] = {
        "F32, problems": len(prompts[:50]),
        "F32, answers equal token by token": equal,
        "F32, differ after a near-tie": after_ties,
        "F32, largest difference of log-probabilities": float((rows - logits).abs().max()),
    }
    for name, used in (("base", None), ("adapter", adapter)):
        with serving(shipped, used) as address:
            outputs = [complete(address, prompt, n_predict=length)["content"] for prompt in prompts]
        correct = sum(run.recipe.task.judge(e, output).correct for e, output in zip(examples, outputs, strict=True))
        low, high = wilson_interval(correct, len(examples))
        found[f"{shipped.name}, {name}"] = f"{correct} of {len(examples)} ({low:.3f} to {high:.3f})"
    found["transformers"] = {name: f"{s['correct']} of {s['n']}" for name, s in run.scores().items()}
    return found


def _greedy(model: Any, tokenizer: Any, prompt: list[int], length: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [token for token in output[0, len(prompt) :].tolist() if token != tokenizer.eos_token_id]


@torch.no_grad()
def _near_tie(model: Any, prompt: list[int], expected: list[int], answer: list[int]) -> bool:
    """Whether the logits of the first tokens that differ are within 1e-3 of each other in transformers."""
    same = next((i for i, (a, b) in enumerate(zip(expected, answer, strict=False)) if a != b), None)
    if same is None:
        return False
    logits = model(input_ids=torch.tensor([prompt + expected[:same]])).logits[0, -1]
    return abs(float(logits[expected[same]] - logits[answer[same]])) <= 1e-3


def in_float32(source: Path, target: Path) -> Path:
    """Write a GGUF model with weights dequantized to float32 and everything else unchanged."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["truncation", "folding", "peft", "llama.cpp"])
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--problems", type=int, help="number of test rows of the run (default: 50, llama.cpp 200)")
    chosen = parser.parse_args()
    if chosen.what != "truncation" and chosen.run is None:
        parser.error(f"{chosen.what} needs a run folder")
    if chosen.what == "truncation":
        found = truncation()
    elif chosen.what == "folding":
        found = folding(Run(chosen.run))
    else:
        measure, problems = (in_plain_peft, 50) if chosen.what == "peft" else (in_llama_cpp, 200)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Run(chosen.run), chosen.problems or problems, Path(folder))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(json.dumps({**found, "commit": commit, **environment()}, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
