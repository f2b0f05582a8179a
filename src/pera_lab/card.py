"""The model card (README.md) of an adapter, a merged model or an export."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCardData

from pera_lab.embedded import hub_name
from pera_lab.files import checked, write_atomic
from pera_lab.opening import Location
from pera_lab.text import markdown, visible

Form = Literal["adapter", "merged", "lora", "gguf", "mlx"]

_TITLE = {
    "adapter": "{method} adapter",
    "merged": "Model with a merged {method} adapter",
    "lora": "{method} adapter, exported as a LoRA",
    "gguf": "{method} adapter, exported as a LoRA in GGUF",
    "mlx": "{method} adapter, exported as a LoRA for MLX",
}

_PERA = " Method: Polynomial Expansion Rank Adaptation ([arXiv 2604.11841](https://arxiv.org/abs/2604.11841))."

_USE = {
    "adapter": "{imports}from peft import AutoPeftModelFor{kind}\n\n"
    'model = AutoPeftModelFor{kind}.from_pretrained("path/to/this/folder")',
    "merged": "from transformers import AutoModelFor{kind}\n\n"
    'model = AutoModelFor{kind}.from_pretrained("path/to/this/folder")',
    "lora": "from peft import AutoPeftModelFor{kind}\n\n"
    'model = AutoPeftModelFor{kind}.from_pretrained("path/to/this/folder")',
    "gguf": "llama-server --model BASE.gguf --lora path/to/this/folder/adapter.gguf",
    "mlx": "mlx_lm.server --model {base} --adapter-path path/to/this/folder",
}


def write_card(folder: Path, form: Form, location: Location, verification: str | None = None) -> None:
    """Write :func:`card` as ``README.md``."""
    write_atomic(folder / "README.md", card(form, location, verification))


def card(form: Form, location: Location, verification: str | None = None) -> str:
    """Metadata for the Hub, the code to load a folder, and the scores and recipe of its run.

    Args:
        form: what the folder holds.
        location: the adapter that it was made from.
        verification: the result of the comparison with that adapter, if one was made.
    """
    base = hub_name(location.base)
    adapter = location.require_adapter()
    method, classifies = adapter.method, adapter.config.task_type == "SEQ_CLS"
    imports = "import pera  # makes the method known to PEFT\n" if method == "PERA" else ""
    data = ModelCardData(
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
        library_name={"merged": "transformers", "gguf": "gguf", "mlx": "mlx"}.get(form, "peft"),
        pipeline_tag="text-classification" if classifies else "text-generation",
        tags=["pera", "lora"] if form in ("lora", "gguf", "mlx") else [method.lower()],
    )
    kind = "SequenceClassification" if classifies else "CausalLM"
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_TITLE[form].format(method=method)}",
        f"Base model: {_code(base)}{_quantized(location)}.{_PERA if method == 'PERA' else ''}",
        _fence(
            _USE[form].format(imports=imports, base=shlex.quote(base), kind=kind),
            "sh" if form in ("gguf", "mlx") else "python",
        ),
    ]
    if verification:
        sections += ["## Verification", f"Compared with the adapter it was made from: {markdown(verification)}."]
    if location.run is not None:
        run = location.run
        scores = checked(run.scores(), dict[str, _Figure], repr(str(run.scores_file)))
        if scores:
            sections += ["## Scores", _scores(run.recipe.task.name, scores)]
        sections += ["## Recipe", _fence(run.recipe.to_yaml(), "yaml")]
    return "\n\n".join(sections) + "\n"


def _quantized(location: Location) -> str:
    kind = None if location.run is None else location.run.recipe.model.quantization
    return "" if kind is None else f", quantized to {kind} for training and scores"


@dataclass(frozen=True)
class _Figure:
    """The part of a score in ``scores.json`` that a card shows."""

    n: int
    metric: str
    value: float
    low: float
    high: float
    scorer: str


def _scores(task: str, scores: dict[str, _Figure]) -> str:
    """One table per scorer, since the values of two scorers are not comparable."""
    blocks = []
    for scorer in dict.fromkeys(s.scorer for s in scores.values()):
        rows = [
            f"| {markdown(which.removesuffix(f'-{scorer}'))} | {s.n} | {100 * s.value:.1f} % | "
            f"{100 * s.low:.1f} to {100 * s.high:.1f} % |"
            for which, s in scores.items()
            if s.scorer == scorer
        ]
        metric = next(s.metric for s in scores.values() if s.scorer == scorer)
        rows_of = "Rows of" if scorer == "recall" else "Held-out rows of"
        head = f"{rows_of} {_code(task)}, {_SCORERS.get(scorer) or markdown(scorer)}."
        columns = f"| | n | {markdown(metric)} | 95 % interval |"
        blocks.append("\n".join([head, "", columns, "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(blocks)


_SCORERS = {
    "exact_match": "answers judged by the task's own scorer",
    "generation": "the first answer found in what the model writes",
    "likelihood": "options ranked by log-probability",
    "recall": "exact answers by greedy decoding, tested on the facts that the adapter was trained on",
    "classification": "the class or number of the head",
}


def _code(text: str) -> str:
    """``text`` as inline code, with backticks in it kept as text."""
    text = " ".join(visible(text).split()) or "–"
    space = " " * ("`" in (text[0], text[-1]))  # Markdown drops it
    return f"{_ticks(text, 1)}{space}{text}{space}{_ticks(text, 1)}"


def _fence(text: str, language: str) -> str:
    """``text`` as a code block, with fences in it kept as text."""
    text = visible(text)
    return f"{_ticks(text, 3)}{language}\n{text.rstrip()}\n{_ticks(text, 3)}"


def _ticks(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
