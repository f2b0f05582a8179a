"""The runs of a study in one small file, to be kept beside its results: outcomes, losses, scores and answers, but no
adapters and no text of the examples.

    python benchmarks/archive.py studies/NAME docs/results/study/NAME.tar.xz
    tar -xJf docs/results/study/NAME.tar.xz -C studies     # the study, to be reported or gone on with
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

from pera.files import json_line, read_lines

LEFT_OUT = {"adapter", "checkpoints", "locks"}


def content(file: Path) -> bytes:
    """What is kept of a file: of predictions, all but the prompts."""
    if file.parent.name != "predictions":
        return file.read_bytes()
    return "".join(json_line({**row, "prompt": ""}) for row in read_lines(file)).encode()


def main() -> None:
    study, output = map(Path, sys.argv[1:])
    files = [study / "study.yaml", *sorted(study.glob("runs/*/**/*"))]
    with tarfile.open(output, "w:xz") as archive:
        for file in files:
            name = file.relative_to(study.parent)
            if file.is_file() and not LEFT_OUT & set(name.parts):
                data = content(file)
                entry = tarfile.TarInfo(str(name))
                entry.size, entry.mode = len(data), 0o644
                archive.addfile(entry, io.BytesIO(data))


if __name__ == "__main__":
    main()
