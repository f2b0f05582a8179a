"""Runs malformed inputs and judges what the commands do with them.

``python tests/pera_lab/malformed/malformed.py`` runs all of them and prints the table of docs/results/reliability.md.
With names it runs these families, or single inputs such as recipes-17, whose output it prints.
"""

import argparse
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from families import FAMILIES, Input, inputs
from mutations import short
from server import BYTES, SECONDS, Outcome, Server

CHECK_FAILED = re.compile(r"the outputs differ|the outputs of the merged model or of the LoRA export differ")
"""Messages of exit code 1: a comparison was made and failed."""


BEGUN = re.compile("^run folder ", re.MULTILINE)
"""A training that stops after it announced its run folder is no refusal: the folder is kept."""


def faults(given: Input, outcome: Outcome) -> list[str]:
    """What is wrong with the outcome of a malformed input."""
    found = []
    both = outcome.out + outcome.err
    if "Traceback (most recent call last)" in both:
        found.append("traceback")
    if "executed" in outcome.changes:
        found.append("code was executed")
    if outcome.seconds > SECONDS:
        found.append(f"took {outcome.seconds:.0f} s")
    if outcome.peak > BYTES:
        found.append(f"took {outcome.peak / 1e9:.1f} GB")
    if outcome.code == 1:
        failed_trial = given.command == "study run" and re.search(r"\d+ failed", outcome.out)
        if not failed_trial and not CHECK_FAILED.search(outcome.err):
            found.append("exit code 1 without a failed check")
    elif outcome.code not in (0, 2):
        found.append(f"exit code {outcome.code}")
    if outcome.code == 2 and not BEGUN.search(outcome.err):
        lines = [line for line in outcome.err.splitlines() if " …" not in line]  # a stage on a slow machine
        if len(lines) != 1 or not lines[0].startswith("pera: "):
            found.append(f"{len(lines)} lines on stderr")
        if outcome.changes:
            found.append(f"changed {', '.join(f'{path} ({how})' for path, how in list(outcome.changes.items())[:4])}")
    return found


def run(server: Server, given: Input, *, fresh: bool = False) -> dict:
    """Run one input. Returns a record of it."""
    outcome = server.run(given.arguments, given.prepare, given.stdin, fresh=fresh)
    return {
        **{
            "name": given.name,
            "family": given.family,
            "command": given.command,
            "arguments": given.arguments,
            "what": outcome.what,
        },
        **{
            "code": outcome.code,
            "seconds": outcome.seconds,
            "peak": outcome.peak,
            "out": outcome.out,
            "err": outcome.err,
        },
        "faults": faults(given, outcome) + (results(server.work, given, outcome) if outcome.code == 0 else []),
    }


def results(folder: Path, given: Input, outcome: Outcome) -> list[str]:
    """What is wrong with the results of a command that ended with exit code 0."""
    found = [f"left {path}" for path in outcome.changes if "partial" in path or re.search(r"\.[0-9a-f]{8}$", path)]
    written = WRITTEN.get(given.command, "$.")
    output = given.arguments[given.arguments.index("--output") + 1] if "--output" in given.arguments else None
    for path, how in outcome.changes.items():
        if how != "new" and not re.match(written, path) and not (output and Path(path).is_relative_to(output)):
            found.append(f"{how} {path}")
    if given.command == "inspect" and "--json" in given.arguments:
        found += _json_fault(outcome.out, "the output")
    for path in outcome.changes:
        file = folder / path
        if file.is_file() and file.suffix in (".json", ".jsonl") and "checkpoints" not in file.parts:
            for line in [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines():
                found += _json_fault(line, path)
        if file.suffix == ".safetensors" and (fault := _tensor_fault(file)):
            found.append(f"{path}: {fault}")
    if output and given.command in EXPECTED and given.arguments[-1:] != ["--plan"]:
        expected = next((name for name in EXPECTED[given.command] if (folder / output / name).exists()), None)
        if expected is None and not (given.command == "study run" and "--plan" in given.arguments):
            found.append(f"{output} has none of {', '.join(EXPECTED[given.command])}")
    return found


WRITTEN = {
    "evaluate": r"[^/]+/(scores|lm_eval)\.json|[^/]+/report\.html|[^/]+/predictions/|[^/]+/adapter/README\.md",
    "inspect": r"[^/]+/(effect\.json|report\.html)|out\.svg",
    "train": r"unfinished/",
    "report": r"[^/]+/report\.html",
    "study run": r"study/",
    "study report": r"study/report",
}
"""Files that a command may change, apart from its output, by command."""

EXPECTED = {
    "train": ["adapter/adapter_model.safetensors"],
    "merge": ["model.safetensors", "model.safetensors.index.json"],
    "export": ["adapter_model.safetensors", "adapter.gguf"],
    "import": ["adapter_model.safetensors"],
    "predict": ["."],
    "report": ["."],
    "study run": ["study.yaml"],
}
"""Files in the output of a command, of which one must be there."""


def _json_fault(text: str, name: str) -> list[str]:
    """Python's reader accepts NaN, other readers do not."""

    def refuse(constant: str) -> None:
        raise ValueError(f"holds {constant}")

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError as error:
        return [f"{name} is not JSON: {error}"]
    return []


def _tensor_fault(file: Path) -> str:
    """Whether a safetensors file holds numbers that are not finite. Read without torch, which this process avoids."""
    import numpy as np
    from safetensors import safe_open

    try:
        with safe_open(file, "numpy") as tensors:
            bad = [name for name in tensors.keys() if not np.isfinite(tensors.get_tensor(name)).all()]  # noqa: SIM118
    except TypeError:  # bfloat16
        return ""
    return f"{bad[0]} is not finite" if bad else ""


def records(names: Iterable[str], *, fresh: bool = False) -> Iterator[dict]:
    """Run families and single inputs."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        for name in names:
            family, _, number = name.rpartition("-")
            for given in inputs(name) if name in FAMILIES else [inputs(family)[int(number)]]:
                yield run(server, given, fresh=fresh)


def table(found: list[dict], key: str) -> str:
    """Counts as a Markdown table, with one row for each value of ``key``."""
    rows = [f"| {key} | inputs | exit 0 | exit 2 | exit 1 | slowest | largest peak memory |", "|" + " --- |" * 7]
    for name in [*dict.fromkeys(record[key] for record in found), "all"]:
        group = [record for record in found if name in (record[key], "all")]
        codes = Counter(record["code"] for record in group)
        slowest, peak = max(record["seconds"] for record in group), max(record["peak"] for record in group)
        counts = " | ".join(str(n) for n in (len(group), codes[0], codes[2], codes[1]))
        rows.append(f"| {name} | {counts} | {slowest:.1f} s | {peak / 1e9:.2f} GB |")
    return "\n".join(rows)


def report(found: list[dict]) -> str:
    """Every input with a fault, and how to run it again."""
    bad = [record for record in found if record["faults"]]
    return "\n".join(
        f"{record['name']}: pera {' '.join(map(short, record['arguments']))} | {record['what']} | "
        f"{'; '.join(record['faults'])} | {record['err'].strip()[-300:]!a}"
        for record in bad
    )


def main() -> None:
    """Run the families and inputs that the command line names, by default all families."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", default=list(FAMILIES))
    options.add_argument("--json", action="store_true", help="print one JSON object for each input")
    options.add_argument("--fresh", action="store_true", help="run every command in a process of its own")
    chosen = options.parse_args()
    found = []
    for record in records(chosen.names, fresh=chosen.fresh):
        found.append(record)
        if chosen.json:
            print(json.dumps(record), flush=True)
        elif record["name"] in chosen.names:
            print(*(f"{key}: {value}" for key, value in record.items()), "", sep="\n")
    if not chosen.json:
        print(table(found, "family"), table(found, "command"), report(found), sep="\n\n")


if __name__ == "__main__":
    main()
