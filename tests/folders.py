"""What a command leaves behind, to compare two calls of it."""

import json

MEASURED = {"seconds", "tokens_per_second", "wall_seconds", "training_seconds"}
"""Fields that differ between two equal calls."""
RECORDS = {"environment.json", "cost.json", "report.html", "trainer_state.json", "training_args.bin"}
"""Files with times."""


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(found) for key, found in value.items() if key not in MEASURED}
    return value


def results(folder):
    """The content of every file below a folder by path, without measured times."""

    def content(path):
        if path.is_dir() or path.name in RECORDS or path.suffix in (".pt", ".pth"):
            return None
        if path.suffix == ".jsonl":
            return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        if path.suffix == ".json":
            found = without_times(json.loads(path.read_text()))
            if path.name == "adapter_config.json":  # PEFT writes a set
                found["target_modules"].sort()
            return found
        return path.read_bytes()

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}
