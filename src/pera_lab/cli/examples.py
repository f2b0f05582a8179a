"""The examples at the end of each command's help."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "quickstart": ("pera quickstart", "pera quickstart method.r=4 --output runs/first"),
    "train": (
        "pera train quickstart",
        "pera train mine.yaml training.learning_rate=1e-3 --output runs/mine",
        "pera train runs/mine --resume",
    ),
    "evaluate": ("pera evaluate runs/mine", "pera evaluate runs/mine --base", "pera evaluate runs/mine --json"),
    "predict": ("pera predict runs/mine --input questions.jsonl --output answers.jsonl",),
    "inspect": ("pera inspect runs/mine --layers", "pera inspect runs/mine --effect --json"),
    "merge": ("pera merge runs/mine --output merged", "pera merge runs/mine --output merged --dtype bfloat16"),
    "export": (
        "pera export runs/mine --to lora --output lora",
        "pera export runs/mine --for vllm --max-rank 16 --output lora",
    ),
    "import": ("pera import lora --from lora --output adapter",),
    "verify": ("pera verify runs/mine merged", "pera verify runs/mine lora --prompts prompts.txt --json"),
    "chat": ("pera chat runs/mine --compare", "pera chat smollm2-135m --temperature 0"),
    "report": ("pera report runs/mine", "pera report runs/first runs/second --output both.html"),
    "recipes": ("pera recipes", "pera recipes quickstart > mine.yaml"),
    "studies": ("pera studies", "pera studies reasoning-smollm2 > mine.yaml"),
    "env": ("pera env",),
    "study run": (
        "pera study run reasoning-smollm2 --plan",
        "pera study run reasoning-smollm2 --workers 2 --budget 8",
    ),
    "study report": ("pera study report studies/reasoning-smollm2",),
}


def examples(command: str) -> str:
    """The examples of a command. typer prints each paragraph as a line, and Markdown shows them as code."""
    lines = EXAMPLES[command]
    return "\n\n".join(["Example:" if len(lines) == 1 else "Examples:", *(f"    {line}" for line in lines)])
