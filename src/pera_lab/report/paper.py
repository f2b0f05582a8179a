"""The paper's own figures (arXiv 2604.11841), to stand beside a study's, named as what they are."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import Any

GLUE_NAMES = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "qnli": "QNLI", "rte": "RTE", "stsb": "STS-B"}
COMMONSENSE_NAMES = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "social_i_qa": "SIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "ARC-Easy": "ARC-e",
    "ARC-Challenge": "ARC-c",
    "openbookqa": "OBQA",
}
METHODS = {"LoRA", "DoRA", "HiRA", "DeLoRA", "MoRA", "PERA", "full fine-tuning"}
"""The paper's methods that a study may have as well."""


@lru_cache
def tables() -> dict[str, Any]:
    """The tables, as ``paper_tables.json`` holds them."""
    text = (resources.files("pera_lab.report") / "paper_tables.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def beside(tasks: list[str]) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    """Of the paper's table that has the tasks: model, rows, and the names of the tasks there; empty if none has."""
    for names, table, model in (
        (GLUE_NAMES, "table2_glue", "RoBERTa-base"),
        (COMMONSENSE_NAMES, "table1_commonsense", "LLaMA3-8B"),
    ):
        shared = {task: names[task] for task in tasks if task in names}
        if shared:
            rows = [row for row in tables()[table][model] if any(row["method"].startswith(m) for m in METHODS)]
            return model, rows, shared
    return "", [], {}


def sweep(axis: str) -> tuple[list[str], list[float]]:
    """The averages over the eight commonsense tasks, LLaMA3-8B, by "rank", "placement", "data_share" or "terms"."""
    table, key = {
        "rank": ("table9_rank", "r"),
        "placement": ("table10_placement", "placement"),
        "data_share": ("table11_data_share", "share"),
        "terms": ("table12_terms", "terms"),
    }[axis]
    rows = tables()[table]
    return [str(row[key]) for row in rows], [row["average"] for row in rows]
