"""Run the tests of the installed PEFT with PERA in their lists: ``python tests/peft_suite/run.py [PYTEST ARGUMENTS]``.

The tests come from PEFT's source distribution, which is downloaded once into ``.venv/peft_suite``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ["tests/test_custom_models.py", "tests/test_decoder_models.py"]


def fetch(folder: Path) -> Path:
    """Folder of the source distribution of the installed PEFT, below ``folder``."""
    name = f"peft-{version('peft')}"
    if not (folder / name / "tests" / "__init__.py").exists():
        with tempfile.TemporaryDirectory() as download:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            subprocess.run([*pip, "--no-binary", ":all:", "--dest", download, name.replace("-", "==")], check=True)
            with tarfile.open(next(Path(download).glob("*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
        (folder / name / "tests" / "__init__.py").touch()  # missing in the distribution
    return folder / name


def main() -> int:
    source = fetch(HERE.parents[1] / ".venv" / "peft_suite")
    models = source.parent / "models"
    models.mkdir(exist_ok=True)
    plugin = ["-p", "rows", "-p", "no:cacheprovider", "-o", "addopts=", f"--models={models}"]
    command = [sys.executable, "-m", "pytest", *plugin, "-q", "-W", "ignore", *sys.argv[1:], *FILES]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{source}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=source, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
