"""The model card (README.md) that ``save_pretrained`` writes next to a PERA adapter."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TypeVar

import peft
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

C = TypeVar("C", bound=PeftConfig)

FILE = "README.md"

METHOD = "Method: Polynomial Expansion Rank Adaptation ([arXiv 2604.11841](https://arxiv.org/abs/2604.11841))."

UNKNOWN_METHOD = (
    "`KeyError: 'PERA'` means that PEFT does not know the method yet. Run `pip install pera`, and `import pera` before "
    "you load the adapter."
)

IMPORT = "import pera  # makes the method known to PEFT\n"

CLASSES = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_CLS": "SequenceClassification",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
}
"""The end of the names of transformers' and PEFT's classes, by type of task."""

_FILLED_IN = {"peft_type", "peft_version", "pera_version", "anchor_names", "auto_mapping", "inference_mode"}
_OF_THE_BASE = {"base_model_name_or_path", "revision", "task_type"}


def update_card(folder: Path, config: PeftConfig, saved_before: PeftConfig | None) -> None:
    """Replace PEFT's card of an adapter, which ``PeftModel.save_pretrained`` has just written.

    A card that somebody edited keeps its text. Its metadata lose the paths of this machine.

    Args:
        folder: folder of the saved adapter. Without weights or a card, nothing is written.
        config: the configuration that was saved.
        saved_before: the configuration that was in the folder before.
    """
    if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        return
    file, generic = folder / FILE, ModelCard.from_template(ModelCardData()).text
    if not file.is_file():  # PEFT saves an adapter with a name in a folder of its own, and the card above it
        above = folder.parent / FILE
        if not above.is_file() or _own_text(ModelCard.load(above).text) != _own_text(generic):
            return
        file = above
    card = ModelCard.load(file)
    of = os.path.relpath(folder, file.parent)
    text = card_text(config, of)
    unedited = [generic, text, *([card_text(saved_before, of)] if saved_before else [])]
    if _own_text(card.text) in map(_own_text, unedited):
        card.text = text
    _, hub_id = base_name(config.base_model_name_or_path)
    tags = {tag for tag in card.data.tags or () if not tag.startswith("base_model:adapter:")}
    card.data.tags = sorted(tags | {"peft", "pera"} | ({f"base_model:adapter:{hub_id}"} if hub_id else set()))
    card.data.base_model = hub_id
    card.save(file)


def card_text(config: PeftConfig, folder: str = ".") -> str:
    """The card without its metadata.

    Args:
        config: the configuration of the adapter.
        folder: the adapter's folder, from the folder of the card.
    """
    name, hub_id = base_name(config.base_model_name_or_path)
    kind = CLASSES.get(str(getattr(config.task_type, "value", config.task_type)))
    path = "path/to/this/folder" if folder == "." else f"path/to/this/folder/{folder}"
    sections = [
        "# PERA adapter",
        f"Base model: {inline_code(name)}. {METHOD}",
        fence(loading(kind, name, hub_id, path), "python"),
        UNKNOWN_METHOD,
        "## Settings",
        fence(settings(config), "python"),
        f"### Framework versions\n\n- PEFT {peft.__version__}",
    ]
    return "\n" + "\n\n".join(sections) + "\n"


def base_name(base: str | None) -> tuple[str, str | None]:
    """The name of a base model without the folders of this machine, and its Hub id if it has one.

    >>> base_name("/home/me/models/llama")
    ('llama', None)
    """
    if not base:
        return "unknown", None
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]", base):  # the cache of the Hub
        return "/".join(cached.groups()), "/".join(cached.groups())
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) and not os.path.exists(base):
        return base, base
    return re.split(r"[/\\]", base.rstrip("/\\"))[-1] or "unknown", None


def loading(
    kind: str | None, name: str, hub_id: str | None, folder: str, imports: str = IMPORT, labels: int | None = None
) -> str:
    """The program that loads an adapter.

    Args:
        kind: end of the name of the model's class, such as "CausalLM". None for another model.
        name: name of the base model.
        hub_id: its Hub id, if it has one.
        folder: the adapter's folder.
        imports: lines before the others.
        labels: outputs of a classification head, which transformers has to know. None for another model.
    """
    head = "" if labels is None else f", num_labels={labels}"
    if kind and hub_id:
        return (
            f"{imports}from peft import AutoPeftModelFor{kind}\n\n"
            f'model = AutoPeftModelFor{kind}.from_pretrained("{folder}"{head})'
        )
    path = json.dumps(f"path/to/{name}", ensure_ascii=False)
    base = f"AutoModelFor{kind}.from_pretrained({path}{head})" if kind else "…  # the base model"
    return (
        f"{imports}from peft import PeftModel\n"
        + (f"from transformers import AutoModelFor{kind}\n" if kind else "")
        + f'\nbase = {base}\nmodel = PeftModel.from_pretrained(base, "{folder}")'
    )


def settings(config: PeftConfig) -> str:
    """The configuration as it is written in Python, without the options at their defaults."""
    plain, values = type(config)().to_dict(), config.to_dict()
    left_out = _FILLED_IN | _OF_THE_BASE
    chosen = {k: v for k, v in values.items() if k == "r" or (k not in left_out and v != plain.get(k))}
    return f"PeraConfig({', '.join(f'{key}={value!r}' for key, value in chosen.items())})"


def inline_code(text: str) -> str:
    """``text`` as inline code, with backticks in it kept as text."""
    text = " ".join(text.split()) or "–"
    space = " " * ("`" in (text[0], text[-1]))  # Markdown drops it
    return f"{_ticks(text, 1)}{space}{text}{space}{_ticks(text, 1)}"


def fence(text: str, language: str) -> str:
    """``text`` as a code block, with fences in it kept as text."""
    return f"{_ticks(text, 3)}{language}\n{text.rstrip()}\n{_ticks(text, 3)}"


def saved_config(folder: Path, kind: type[C]) -> C | None:
    """The configuration in a folder, or None if it holds no valid one."""
    if not (folder / CONFIG_NAME).is_file():
        return None
    try:
        found = kind.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError):
        return None
    return found if isinstance(found, kind) else None


def _own_text(text: str) -> str:
    """The text without the versions that PEFT adds to any card."""
    return re.sub(r"(### Framework versions\s+|^- PEFT .*$)", "", text, flags=re.MULTILINE).strip()


def _ticks(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
