"""One small file with the runs of a study, to keep next to its results.

Run it in the folder that the study was run in:

    python -m pera_lab.study.archive studies/NAME docs/results/study/NAME.tar.xz
    tar -xJf docs/results/study/NAME.tar.xz -C studies     # the study, to report or to resume
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import typer

from pera_lab.files import json_line, read_lines, write_atomic
from pera_lab.recipe import read_yaml

LEFT_OUT = {"adapter", "checkpoints", "locks"}


def write_archive(study: Path, output: Path) -> None:
    """Pack outcomes, losses, scores and answers of a study's runs.

    Adapters, checkpoints, prompts, logits and paths of this machine are left out.

    Args:
        study: the folder of the study.
        output: the file to write, ending in ``.tar.xz``.
    """
    names = {str(study.resolve()): f"studies/{study.name}"}
    _, described = read_yaml(str(study / "study.yaml"), "study", "studies")
    if os.path.isabs(base := described["base"]):
        names[base] = os.path.relpath(base)
    if data := described["settings"].get("data"):
        names[str(Path(data).resolve())] = data
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for file in [study / "study.yaml", *sorted(study.glob("runs/*/**/*"))]:
            name = file.relative_to(study.parent)
            if file.is_file() and not LEFT_OUT & set(name.parts):
                content = _content(file, names)
                entry = tarfile.TarInfo(str(name))
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
    write_atomic(output, packed.getvalue())


def _content(file: Path, names: dict[str, str]) -> bytes:
    """The part of a file that is kept, with its paths replaced by ``names``."""
    if file.parent.name == "predictions":
        return "".join(json_line({**row, "prompt": "", "scores": None}) for row in read_lines(file)).encode()
    if file.suffix not in {".json", ".yaml"}:
        return file.read_bytes()
    text = file.read_text(encoding="utf-8")
    for path, name in names.items():
        text = text.replace(path, name)
    return text.encode()


if __name__ == "__main__":
    typer.run(write_archive)
