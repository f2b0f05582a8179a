"""Run the tests of the method with older releases: ``python tests/compat/run.py [NAME ...] [-- PYTEST ARGUMENTS]``.

Each release of PEFT and transformers is installed once into ``.venv/compat``, in front of the installed ones. The
table at the end says what passed. torch and Python are the installed ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HUB = ["huggingface_hub>=0.30,<1.0"]
RELEASES = {
    "peft-0.18": ["peft==0.18.1", "transformers==4.57.1", "tokenizers>=0.22,<0.23", *HUB],
    "peft-0.19": ["peft==0.19.1", "transformers==4.57.1", "tokenizers>=0.22,<0.23", *HUB],
    "peft-0.20": ["peft==0.20.0", "transformers==4.57.1", "tokenizers>=0.22,<0.23", *HUB],
    "transformers-4.51": ["peft==0.20.0", "transformers==4.51.3", "tokenizers>=0.21,<0.22", *HUB],
}
"""Name and requirements: LLaMA-Factory pins PEFT 0.18, ms-swift needs it below 0.21."""
NEWER = [
    *("integration/test_compile.py", "integration/test_trainer.py", "integration/test_trl.py", "test_lora.py"),
    *("test_optim.py", "tuner/test_convolution.py", "tuner/test_model.py", "tuner/test_quantised.py"),
]
"""Files of tests that import what only the newest releases have, such as PEFT's ``convert_to_lora``."""


def install(name: str) -> Path:
    """The folder with the packages of a release."""
    folder = ROOT / ".venv" / "compat" / name
    if not (folder / "installed").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, *RELEASES[name]], check=True)
        (folder / "installed").touch()
    return folder


def main() -> int:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    names, arguments = sys.argv[1:split] or list(RELEASES), sys.argv[split + 1 :]
    ignored = [f"--ignore=tests/pera/{file}" for file in NEWER]
    rows = []
    for name in names:
        path = os.pathsep.join([str(install(name)), str(ROOT / "src")])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *arguments, *ignored]
        command.append("tests/pera")
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
        sys.stdout.write(done.stdout)
        last = re.sub(r" in [\d.]+s.*", "", (done.stdout.strip().splitlines() or ["nothing"])[-1].strip("= "))
        rows.append((name, ", ".join(RELEASES[name][:2]), last, done.returncode))
    for row in (("release", "packages", "outcome", "exit code"), *rows):
        print("| " + " | ".join(map(str, row)) + " |")
    return int(any(code for *_, code in rows))


if __name__ == "__main__":
    sys.exit(main())
