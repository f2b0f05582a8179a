"""Commands that are killed at random moments. The next command has the results of an undisturbed one, and nothing is
left over.

The commands run in forks of this process, which has imported everything, so that the kills fall into their work. The
counts are in docs/results/reliability.md.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from typing import NamedTuple

import pytest

from folders import results
from pera_lab import cli

KILLS = {"train": 25, "merge": 20, "export": 15, "evaluate": 15, "predict": 15, "study run": 10}

STUDY = """
base: {recipe}
settings: {{training: {{max_steps: 4, save_steps: 2}}}}
grid: {{task: family_relationships, method: [pera-rms-0.3], r: [2]}}
choose: {{learning_rate: [1e-3, 3e-2], seeds: [1], rows: 16}}
report: {{seeds: [42]}}
"""


class Command(NamedTuple):
    """A command that is killed, and the ones that are called next."""

    first: list
    again: list
    """The command that continues the work."""
    refused: tuple = ()
    """What is called if that is refused, because the work was complete when the command was killed."""


@pytest.fixture
def commands(recipe_file, tmp_path):
    (tmp_path / "small.yaml").write_text(STUDY.format(recipe=recipe_file))
    questions = [{"prompt": f"What relation is {name} to Zoe?"} for name in ("Luna", "Ethan", "Sarah", "Liam") * 5]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    evaluate, study = ["evaluate", "run"], ["study", "run", tmp_path / "small.yaml", "--output", "study"]
    merge, export = ["merge", "run", "--output", "m"], ["export", "run", "--to", "lora", "--output", "lora"]
    predict = ["predict", "run", "--input", tmp_path / "rows.jsonl", "--output", "answers.jsonl"]
    return {
        "train": Command(["train", recipe_file, "--output", "new"], ["train", "new", "--resume"], (["report", "new"],)),
        "merge": Command(merge, merge),
        "export": Command(export, export),
        "evaluate": Command(evaluate, evaluate),
        "predict": Command(predict, predict),
        "study run": Command(study, study),
    }


def call(folder, arguments):
    """The ``pera`` command in this process."""
    os.chdir(folder)
    sys.argv = ["pera", *map(str, arguments)]
    with open(folder.parent / "output.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    cli.main()


def start(folder, arguments):
    process = multiprocessing.get_context("fork").Process(target=call, args=(folder, arguments))
    process.start()
    return process


def ended(folder, arguments):
    """The exit code of the command."""
    process = start(folder, arguments)
    process.join()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_command_is_repeated_with_the_results_of_an_undisturbed_one(
    name, commands, finished_run, tmp_path, capsys
):
    command, draw, moments = commands[name], random.Random(f"kills of {name}"), []

    def workplace(number):
        folder = tmp_path / str(number) / "work"
        shutil.copytree(finished_run.path, folder / "run")
        return folder

    ended(workplace("warm"), command.first)
    undisturbed = workplace("undisturbed")
    begun = time.perf_counter()
    assert ended(undisturbed, command.first) == 0
    duration, expected = time.perf_counter() - begun, results(undisturbed)

    calls = 0
    while len(moments) < KILLS[name]:
        calls += 1
        folder, moment = workplace(calls), draw.random()
        process = start(folder, command.first)
        time.sleep(moment * duration)
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster than the undisturbed one
            shutil.rmtree(folder.parent)
            continue
        moments.append(moment)
        begun = not (name == "train" and not (folder / "new" / "recipe.yaml").is_file())
        if (code := ended(folder, command.again if begun else command.first)) != 0:
            assert code == 2
            assert [ended(folder, further) for further in command.refused] == [0] * len(command.refused)
        assert results(folder) == expected, f"killed after {moment:.3f} of {duration:.2f} s"
        shutil.rmtree(folder.parent)
    quarters = Counter(int(4 * moment) for moment in moments)
    with capsys.disabled():
        print(f"\n| {name} | {len(moments)} | {duration:.2f} s | {' | '.join(str(quarters[q]) for q in range(4))} |")
