"""Runs commands in forked copies of a process that has imported everything, and measures them.

Importing torch and transformers takes seconds, a fork milliseconds. This process never runs an operation of torch, so
it has one thread and can be forked safely.
"""

import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import originals

SECONDS, BYTES = 30, 2 * 1024**3
"""The limits of one command."""


@dataclass
class Outcome:
    """What a command did. ``code`` is negative if it was ended by a signal."""

    code: int
    out: str
    err: str
    seconds: float
    peak: int
    what: str = ""
    """How the originals were changed."""
    changes: dict[str, str] = field(default_factory=dict)
    """"new", "gone" or "changed" by path in the working folder."""


class Server:
    """Prepares working folders and runs commands in them.

    Args:
        folder: an empty folder. Every command runs in its subfolder ``work``, so that absolute paths stay valid.
    """

    def __init__(self, folder: Path) -> None:
        self.work, self._originals, self._logs = folder / "work", folder / "originals", folder / "logs"
        self._logs.mkdir()
        _import("pera_lab.cli.app", "pera_lab.cli.console", *LAZY)
        self._write_originals()

    def _write_originals(self) -> None:
        self.work.mkdir()
        originals.write_texts(self.work)
        self._fork(lambda: originals.write_models(self.work), expected=0)
        modules = self._logs / "modules.json"
        for command in originals.COMMANDS:
            self._fork(lambda command=command: _main(command.split(), modules), expected=0)
            _import(*json.loads(modules.read_text()))
        (self.work / "run" / "report.html").unlink()
        shutil.copytree(self.work / "run", self.work / "unfinished")
        shutil.rmtree(self.work / "unfinished" / "adapter")
        shutil.rmtree(self.work / "unfinished" / "checkpoints" / "checkpoint-2")
        for name in ("cost.json", "scores.json", "predictions"):
            _remove(self.work / "unfinished" / name)
        self.work.rename(self._originals)

    def run(
        self, arguments: list[str], prepare: Callable[[Path], None], stdin: bytes = b"", *, fresh: bool = False
    ) -> Outcome:
        """Copy the originals, change them with ``prepare`` and run a command.

        Args:
            arguments: of the ``pera`` command.
            prepare: changes the copy.
            stdin: what the command reads from the terminal.
            fresh: run ``python -m pera`` instead of a fork.
        """
        _remove(self.work)
        shutil.copytree(self._originals, self.work, symlinks=True)
        what = self._fork(lambda: prepare(self.work), expected=0).out.strip()
        before = snapshot(self.work)
        command = (lambda: _execute(arguments)) if fresh else (lambda: _main(arguments))
        outcome = self._fork(command, stdin)
        outcome.what = what
        after = snapshot(self.work)
        for path in sorted({*before, *after}):
            if before.get(path) != after.get(path):
                outcome.changes[path] = "new" if path not in before else "gone" if path not in after else "changed"
        return outcome

    def _fork(self, function: Callable[[], None], stdin: bytes = b"", expected: int | None = None) -> Outcome:
        """Run a function in a fork, in the working folder."""
        (self._logs / "in").write_bytes(stdin)
        sys.stdout.flush()
        sys.stderr.flush()
        start = time.perf_counter()
        if (child := os.fork()) == 0:
            _become(self.work, self._logs, function)
        status, used = _wait(child, start)
        seconds = time.perf_counter() - start
        out, err = ((self._logs / name).read_bytes().decode(errors="replace") for name in ("out", "err"))
        outcome = Outcome(os.waitstatus_to_exitcode(status), out, err, seconds, used.ru_maxrss * 1024)
        if expected not in (None, outcome.code):
            raise RuntimeError(f"exit code {outcome.code}:\n{out}\n{err}")
        return outcome


def _wait(child: int, start: float):
    """Wait for a child, and kill it and its children if it exceeds a limit by far."""
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            return status, used
        if time.perf_counter() - start > SECONDS + 1 or _memory(child) > 2 * BYTES:
            os.killpg(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            return status, used
        time.sleep(0.005)


def _memory(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _become(work: Path, logs: Path, function: Callable[[], None]) -> None:
    """Redirect the standard streams, run a function and end this process."""
    code = 1
    try:
        os.setpgid(0, 0)
        for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", WRITE), ("err", WRITE))):
            os.dup2(os.open(logs / name, flags, 0o600), number)
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        os.chdir(work)
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def _main(arguments: list[str], modules: Path | None = None) -> None:
    from pera_lab.cli.app import main

    sys.argv = ["pera", *arguments]
    try:
        main()
    finally:
        if modules is not None:
            modules.write_text(json.dumps(list(sys.modules)))


def _execute(arguments: list[str]) -> None:
    os.execv(sys.executable, [sys.executable, "-m", "pera", *arguments])


def _import(*names: str) -> None:
    for name in names:
        if not name.startswith(("pyarrow", "__")):  # pyarrow starts threads
            try:
                importlib.import_module(name)
            except Exception:  # a module that another one has made, not one of a file
                continue


LAZY = ("transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert", "transformers.trainer")


def snapshot(folder: Path) -> dict[str, str]:
    """What is at each path below ``folder``: its kind, and the hash of its content."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                content = f"link to {os.readlink(path)}"
            elif stat.S_ISREG(mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                content = "folder" if stat.S_ISDIR(mode) else "device"
            found[str(path.relative_to(folder))] = content
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
