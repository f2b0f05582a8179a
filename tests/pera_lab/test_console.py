"""What the commands print: names from files stay text, in tables, messages and progress bars."""

import io

import pytest
from rich.console import Console

from pera_lab.cli import console
from pera_lab.progress import ProgressBar

NAME = "q_\x1b]0;title\x07\x9b31m\u202e[red]x[/red]\r:smile:\ud800"
SHOWN = r"q_\x1b]0;title\x07\x9b31m\u202e[red]x[/red]\x0d:smile:\ud800"


def test_printed_strings_and_cells_are_text(capsys, monkeypatch):
    monkeypatch.setattr(console.out, "width", 300)
    table = console.facts(NAME)
    table.add_row(NAME, NAME)
    for printed, times in ((NAME, 1), (table, 3)):
        console.out.print(printed)
        assert capsys.readouterr().out.count(SHOWN) == times


def test_label_and_note_of_a_progress_bar_are_text():
    file = io.StringIO()
    with ProgressBar(f"{{x}}{NAME}", Console(file=file, width=300)) as bar:
        bar.update(1, 2, NAME)
    assert f"{{x}}{SHOWN}" in file.getvalue()
    assert file.getvalue().count(SHOWN) == 2


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
