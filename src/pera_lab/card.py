"""The model card (README.md) of an adapter, a merged model or an export."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCardData

from pera.tuner.card import CLASSES, IMPORT, METHOD, UNKNOWN_METHOD, base_name, fence, inline_code, loading
from pera_lab.embedded import hub_name
from pera_lab.files import checked, write_atomic
from pera_lab.opening import Location
from pera_lab.recipe import Recipe, write
from pera_lab.text import markdown, visible

Form = Literal["adapter", "merged", "lora", "gguf", "mlx"]

_TITLE = {
    "adapter": "{method} adapter",
    "merged": "Model with a merged {method} adapter",
    "lora": "{method} adapter, exported as a LoRA",
    "gguf": "{method} adapter, exported as a LoRA in GGUF",
    "mlx": "{method} adapter, exported as a LoRA for MLX",
}

_LORA = ("lora", "gguf", "mlx")

_SERVED = {
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
    base, hub_id = base_name(hub_name(location.base))
    base = visible(base)
    adapter = location.require_adapter()
    method, classifies = adapter.method, adapter.config.task_type == "SEQ_CLS"
    needs_pera = method == "PERA" and form == "adapter"
    labels = None if location.run is None else location.run.recipe.task.labels
    library = {"merged": "transformers", "gguf": "gguf", "mlx": "mlx"}.get(form, "peft")
    data = ModelCardData(
        base_model=hub_id,
        library_name=library,
        pipeline_tag="text-classification" if classifies else "text-generation",
        tags=["peft"] * (library == "peft") + (["pera", "lora"] if form in _LORA else [method.lower()]),
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_TITLE[form].format(method=method)}",
        f"Base model: {inline_code(base)}{_quantized(location)}.{f' {METHOD}' if method == 'PERA' else ''}",
        _use(form, base, hub_id, "SEQ_CLS" if classifies else "CAUSAL_LM", IMPORT if needs_pera else "", labels),
        *([UNKNOWN_METHOD] if needs_pera else []),
    ]
    if verification:
        sections += ["## Verification", f"Compared with the adapter it was made from: {markdown(verification)}."]
    if location.run is not None:
        run = location.run
        scores = checked(run.scores(), dict[str, _Figure], repr(str(run.scores_file)))
        if scores:
            sections += ["## Scores", _scores(run.recipe.task.name, scores)]
        sections += ["## Recipe", fence(visible(_without_folders(run.recipe)), "yaml")]
    return "\n\n".join(sections) + "\n"


def _use(form: Form, base: str, hub_id: str | None, task_type: str, imports: str, labels: int | None) -> str:
    """The program or command that loads what a folder holds."""
    if form in _SERVED:
        return fence(_SERVED[form].format(base=shlex.quote(base if hub_id else f"path/to/{base}")), "sh")
    kind = CLASSES[task_type]
    if form == "merged":
        code = f"AutoModelFor{kind}"
        program = f'from transformers import {code}\n\nmodel = {code}.from_pretrained("path/to/this/folder")'
        return fence(program, "python")
    return fence(loading(kind, base, hub_id, "path/to/this/folder", imports, labels), "python")


def _without_folders(recipe: Recipe) -> str:
    """The recipe as YAML, with the names alone of files and folders of this machine."""

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(content) for key, content in value.items()}
        if isinstance(value, list):
            return [shown(content) for content in value]
        return base_name(value)[0] if isinstance(value, str) and os.path.isabs(value) else value

    return write(shown(recipe.model_dump(mode="json")))


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
        head = f"{rows_of} {inline_code(visible(task))}, {_SCORERS.get(scorer) or markdown(scorer)}."
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
