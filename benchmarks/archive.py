"""The runs of a study in one small file, to be kept beside its results: outcomes, losses, scores and answers, but no
adapters, no text of the examples, no logits and no path of this machine. From the folder that the study was run in:

    python benchmarks/archive.py studies/NAME docs/results/study/NAME.tar.xz
    tar -xJf docs/results/study/NAME.tar.xz -C studies     # the study, to be reported or gone on with
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import yaml

from pera_lab.files import json_line, read_lines

LEFT_OUT = {"adapter", "checkpoints", "locks"}


def content(file: Path, names: dict[str, str]) -> bytes:
    """What is kept of a file: of predictions, no prompts and logits; of paths, the ``names`` that stand for them."""
    if file.parent.name == "predictions":
        return "".join(json_line({**row, "prompt": "", "scores": None}) for row in read_lines(file)).encode()
    if file.suffix not in {".json", ".yaml"}:
        return file.read_bytes()
    text = file.read_text()
    for path, name in names.items():
        text = text.replace(path, name)
    return text.encode()


def main() -> None:
    study, output = map(Path, sys.argv[1:])
    names = {str(study.resolve()): f"studies/{study.name}"}
    described = yaml.safe_load((study / "study.yaml").read_text())
    if os.path.isabs(base := described["base"]):
        names[base] = os.path.relpath(base)
    if rows := described["settings"].get("data"):
        names[str(Path(rows).resolve())] = rows
    files = [study / "study.yaml", *sorted(study.glob("runs/*/**/*"))]
    with tarfile.open(output, "w:xz") as archive:
        for file in files:
            name = file.relative_to(study.parent)
            if file.is_file() and not LEFT_OUT & set(name.parts):
                data = content(file, names)
                entry = tarfile.TarInfo(str(name))
                entry.size, entry.mode = len(data), 0o644
                archive.addfile(entry, io.BytesIO(data))


if __name__ == "__main__":
    main()
