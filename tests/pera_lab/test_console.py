"""What the commands print: names from files stay text, in tables, messages and progress bars."""

import io
import json
import os
import shutil
import sys

import pytest
from rich.console import Console

from pera_lab import cli
from pera_lab.cli import console
from pera_lab.progress import ProgressBar, say, showing

NAME = "q_\x1b]0;title\x07\x9b31m\u202e[red]x[/red]\r:smile:\ud800"
SHOWN = r"q_\x1b]0;title\x07\x9b31m\u202e[red]x[/red]\x0d:smile:\ud800"


def test_printed_strings_and_cells_are_text(capsys, monkeypatch):
    monkeypatch.setattr(console.out, "width", 300)
    table = console.Facts(NAME)
    table.add_row(NAME, NAME)
    for printed, times in ((NAME, 1), (table, 3)):
        console.out.print(printed)
        assert capsys.readouterr().out.count(SHOWN) == times


@pytest.mark.parametrize("terminal", [True, False])
def test_label_and_note_of_a_progress_bar_are_text(terminal):
    file = io.StringIO()
    with showing(Console(file=file, width=300, force_terminal=terminal, _environ={})):
        with ProgressBar(f"{{x}}{NAME}") as bar:
            bar.update(1, 2, NAME)
            bar.line()
        say(NAME)
    assert f"{{x}}{SHOWN}" in file.getvalue()
    assert file.getvalue().count(SHOWN) >= 3
    assert NAME not in file.getvalue()


def test_layer_names_in_a_weights_file_are_shown_on_one_line(pera, adapter, change_weights):
    def renamed(tensors):
        return {key.replace("layers.0.self_attn.q_proj", f"{NAME[:-1]}\nz"): value for key, value in tensors.items()}

    change_weights(adapter / "adapter_model.safetensors", renamed)
    found = pera("inspect", adapter, "--layers")
    assert found.code == 0
    assert "".join(SHOWN[:-6].split()) + r"\x0az" in "".join(line.partition(" ")[0] for line in found.out.split("\n"))
    assert not set(found.out) & set("\x1b\x07\x9b\u202e\r")


@pytest.mark.parametrize("command", ["train", "evaluate", "inspect", "merge", "verify", "report", "chat"])
def test_names_in_messages_are_text(command, refused):
    options = {"merge": ["--output", "out"], "verify": ["base"]}.get(command, [])
    line = refused(command, f"{NAME[:-1]}\nz", *options, words=["[red]x[/red]", ":smile:"])
    assert not set(line) & set("\x1b\x07\x9b\u202e\r")


def test_paths_with_brackets_are_printed_whole(pera, run):
    folder = run.path.rename(run.path.with_name("llama[v1]" + "-long" * 20))
    assert f"report written to {folder}/report.html\n" in pera("report", folder).out


@pytest.fixture
def streams(monkeypatch, tmp_path):
    """Runs the ``pera`` command with other standard streams. Returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, **replaced):
        monkeypatch.setattr(sys, "argv", ["pera", *map(str, arguments)])
        with monkeypatch.context() as patch:
            for stream in (console.out, console.progress):
                patch.setattr(stream, "quiet", False)
            for name, stream in replaced.items():
                patch.setattr(sys, name, stream)
            with pytest.raises(SystemExit) as exit:
                cli.main()
        return exit.value.code

    return call


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_consoles_that_are_not_utf_8_get_other_characters(encoding, streams, run, recipe_file, tmp_path):
    shutil.move(run.path, tmp_path / "Läufe 日本")
    commands = {
        "inspect": (["Läufe 日本"], "1"),
        "report": (["Läufe 日本", "--output", "seite→.html"], "report written to"),
        "chat": (["Läufe 日本"], "> "),
        "evaluate": (["Läufe 日本"], "interval"),
        "train": ([recipe_file, "training.max_steps=1", "name=ñ日", "--output", "neu日"], "Next: pera evaluate"),
        "--help": ([], "Usage"),
        "verify": (["Läufe 日本", "Läufe 日本"], "against"),
        "env": ([], "torch"),
    }
    for command, (arguments, shown) in commands.items():
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        typed = io.TextIOWrapper(io.BytesIO("gr\xfc\xdfe\n".encode("latin-1")), encoding="utf-8")
        assert streams(command, *arguments, stdin=typed, stdout=out, stderr=err) == 0
        assert shown.encode() in out.buffer.getvalue()
    line = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert streams("train", "→.yaml", "--output", "日本", stderr=line) == 2
    assert line.buffer.getvalue() == b"pera: recipe: file '?.yaml' does not exist.\n"


def test_what_nobody_reads_does_not_stop_a_command(streams, recipe_file, tmp_path):
    def unread():
        reads, writes = os.pipe()
        os.close(reads)
        return open(writes, "w", buffering=1)

    small = [recipe_file, "training.max_steps=1", "--output"]
    assert streams("train", *small, "broken", stdout=unread(), stderr=unread()) == 0
    assert streams("train", *small, "closed", stdout=None, stderr=None) == 0
    for name in ("broken", "closed"):
        assert (tmp_path / name / "report.html").is_file()


def test_file_names_that_are_not_text_work(pera, recipe_file, tmp_path):
    rows = "rows\udcff.jsonl"
    content = "".join(json.dumps({"prompt": f"{i}", "completion": "a"}) + "\n" for i in range(9))
    (tmp_path / rows).write_text(content)
    task = ["task={name: own, test_size: 2}", f"data={rows}"]
    trained = pera("train", recipe_file, *task, "training.max_steps=1", "--output", "run")
    assert trained.code == 0, trained.err
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["command"][-1] == "run"
    for arguments in (["predict", "run", "--input", rows, "--output", "answers\udcff.jsonl"], ["evaluate", "run"]):
        assert pera(*arguments).code == 0
    assert "report\\udcff.html" in pera("report", "run", "--output", "report\udcff.html").out
    assert {path.suffix for path in tmp_path.glob("*\udcff*")} == {".html", ".jsonl"}


def test_an_output_folder_that_is_not_text_is_refused(refused, recipe_file):
    refused("train", recipe_file, "--output", "run\udcff", words=["output: 'run\\udcff' is not UTF-8"])


CLOSED = """
import os, sys
from pera_lab.cli.console import accept_any_text
for number in range(3):
    os.close(number)
accept_any_text()
sys.exit(os.open(os.devnull, os.O_RDONLY))
"""


def test_a_file_never_takes_the_place_of_a_closed_stream(python):
    assert python(CLOSED, check=False).returncode > 2


def test_facts_are_aligned_and_not_wrapped(capsys):
    table = console.Facts("title")
    table.add_row("path", "a/" * 100)
    table.add_row("two lines", "first\nsecond")
    console.out.print(table, soft_wrap=True)
    shown = ["title", f"path       {'a/' * 100}", "two lines  first", "           second"]
    assert capsys.readouterr().out.splitlines() == shown
