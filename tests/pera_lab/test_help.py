"""What the help of the commands says, what a shell completes, and the recipes and studies that are listed."""

import shlex

import pytest
from typer.main import get_command

from pera_lab.cli.app import app
from pera_lab.cli.examples import EXAMPLES
from pera_lab.recipe import load_recipe
from pera_lab.shipped import shipped_files, shipped_summary, shipped_text

GROUP = get_command(app)
COMMANDS = {name: command for name, command in GROUP.commands.items() if name != "study"}
COMMANDS |= {f"study {name}": command for name, command in GROUP.commands["study"].commands.items()}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_short_and_long_help_are_the_same(command, pera):
    short, long = pera(*command.split(), "-h"), pera(*command.split(), "--help")
    assert (short.code, short.err) == (0, "")
    assert short.out == long.out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_has_examples_that_the_command_accepts(name, pera):
    shown = " ".join(pera(*name.split(), "--help").out.split())
    for line in EXAMPLES[name]:
        assert line in shown
        words = shlex.split(line.partition(" >")[0])[1 + len(name.split()) :]
        context = COMMANDS[name].make_context(name, words)  # parses, and does not run
        assert context.args == []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_that_may_be_left_out_says_its_default(name, pera):
    context = COMMANDS[name].make_context(name, [], resilient_parsing=True)
    silent = []
    for option in COMMANDS[name].params:
        record = option.get_help_record(context)
        if option.param_type_name == "option" and not option.required and not option.is_flag:
            silent += [option.name] if "default" not in record[1] else []
    assert silent == []


COMPLETION = """
import contextlib, io, os, sys
from pera_lab.__main__ import main

os.environ |= {"_PERA_COMPLETE": "complete_bash", "COMP_WORDS": sys.argv[1], "COMP_CWORD": sys.argv[2]}
sys.argv = ["pera"]
with contextlib.suppress(SystemExit):
    main()
print(sorted({"torch", "transformers", "peft", "pera"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("pera ev", ["evaluate"]),
        ("pera train comm", [name for name in shipped_files("recipes") if name.startswith("comm")]),
        ("pera study run reas", ["reasoning-smollm2"]),
    ],
)
def test_a_shell_completes_commands_and_shipped_names_without_torch(line, found, python):
    *shown, heavy = python(COMPLETION, line, str(len(line.split()) - 1)).stdout.split("\n")[:-1]
    assert shown == found
    assert heavy == "[]"


@pytest.mark.parametrize("kind", ["recipes", "studies"])
def test_shipped_files_are_listed_and_printed(kind, pera):
    listed = pera(kind)
    assert listed.code == 0
    *lines, how = listed.out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_files(kind)
    for line, name in zip(lines, shipped_files(kind), strict=True):
        assert line.split(maxsplit=1)[1] == shipped_summary(kind, name)
        assert not shipped_summary(kind, name).startswith("#")
        assert pera(kind, name).out == shipped_text(kind, name)
    assert f"pera {kind} {shipped_files(kind)[-1]} > mine.yaml" in how


def test_a_printed_recipe_is_the_recipe(pera, tmp_path):
    (tmp_path / "quickstart.yaml").write_text(pera("recipes", "quickstart").out)
    assert load_recipe(str(tmp_path / "quickstart.yaml")) == load_recipe("quickstart")


def test_an_unknown_shipped_name_is_refused(refused):
    refused("recipes", "quikstart", words=["'quikstart'", "did you mean 'quickstart'?"])
