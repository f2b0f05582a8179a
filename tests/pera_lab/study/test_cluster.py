"""Studies on a Ray cluster: the results are the local ones, also if a node is lost."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from folders import results
from pera.errors import UserError
from pera_lab.extras import install_command
from pera_lab.report.study import study_sections
from pera_lab.study import cluster, load_study
from pera_lab.study.folder import StudyFolder
from pera_lab.study.plan import known_trials
from pera_lab.study.results import Results
from pera_lab.study.runner import run_study

STEPS = 100
LONG = [f"settings.training.max_steps={STEPS}", "settings.training.save_steps=10"]
"""Training that takes seconds, so that a kill falls into it."""


def tables(folder):
    """The tables of the study's report and of its pictures, without costs."""
    shown = [(s.id, item) for s in study_sections(Results(folder)) if s.id != "costs" for item in s.items]
    found = [(id_, item.content) for id_, item in shown if item.kind == "table"]
    found += [(id_, item.content.table) for id_, item in shown if item.kind == "picture"]
    assert {"summary", "scores", "differences", "rates", "losses", "terms", "interactions"} <= {id_ for id_, _ in found}
    return found


@pytest.fixture
def two_nodes():
    """A Ray cluster of a head without CPUs and two nodes with one CPU each."""
    from ray.cluster_utils import Cluster

    ray_cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield ray_cluster, [ray_cluster.add_node(num_cpus=1) for _ in range(2)]
    ray_cluster.shutdown()


def start(*arguments, **options):
    """The ``pera`` command in a process group of its own, as in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "pera", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_until(happened, what, seconds=240):
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up, f"{what} did not happen"
        time.sleep(0.05)


def under_way(folder):
    """The runs that have a checkpoint and have not ended."""
    return [
        run
        for run in folder.runs.glob("*")
        if list(run.glob("checkpoints/*/complete")) and not (run / "adapter").exists()
    ]


@pytest.mark.slow
def test_a_study_on_a_cluster_that_loses_a_node_has_the_results_of_a_local_one(two_nodes, study_file, tmp_path):
    ray_cluster, (_, lost) = two_nodes
    local, folder = StudyFolder(tmp_path / "local"), StudyFolder(tmp_path / "cluster")
    run_study(load_study(str(study_file), LONG), local)
    command = start("study", "run", study_file, *LONG, "--on", f"ray:{ray_cluster.address}", "--output", folder.path)
    wait_until(lambda: len(under_way(folder)) == 2 or command.poll() is not None, "training on both nodes")
    ray_cluster.remove_node(lost, allow_graceful=False)
    out, err = command.communicate(timeout=600)
    assert command.returncode == 0, err
    assert [line.split()[0] for line in out.splitlines()] == ["study", "runs", "remaining", "Next:"]
    assert "8 finished" in out
    assert all(line.startswith("study ") or " …" in line for line in err.splitlines()), err
    assert results(folder.runs) == results(local.runs)
    assert tables(folder) == tables(local)
    resumed = [run for run in folder.runs.iterdir() if json.loads((run / "cost.json").read_text())["steps"] < STEPS]
    assert len(resumed) == 1


@pytest.mark.slow
def test_a_run_that_always_loses_its_worker_is_named(study_file, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "RETRIES", 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    one = ["settings.training.max_steps=100000", "grid.method=[lora]", "choose.learning_rate=[1e-3]"]
    folder = StudyFolder(tmp_path / "study")
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run_study, load_study(str(study_file), one), folder, on="ray")
        for _ in range(2):
            wait_until(lambda: running.done() or under_way(folder), "training")
            for process in psutil.Process().children(recursive=True):
                if "attempt" in process.name() or "attempt" in " ".join(process.cmdline()):
                    process.kill()
                    process.wait(60)
            for checkpoint in folder.runs.glob("*/checkpoints/*/complete"):
                checkpoint.unlink()
        with pytest.raises(UserError, match=r"runs that lost their worker 2 times: 1, such as '.*-lr0\.001-seed1'"):
            running.result(240)


@pytest.mark.slow
def test_an_interrupted_command_stops_its_cluster_and_can_be_repeated(study_file, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = StudyFolder(tmp_path / "study")
    command = start("study", "run", study_file, *LONG, "--on", "ray", "--output", folder.path)
    wait_until(lambda: under_way(folder) or command.poll() is not None, "training")
    processes = psutil.Process(command.pid).children(recursive=True)
    os.killpg(command.pid, signal.SIGINT)
    _, err = command.communicate(timeout=120)
    assert command.returncode == 130
    assert all(line.startswith("study ") or " …" in line for line in err.splitlines()), err
    assert psutil.wait_procs(processes, timeout=30)[1] == []
    assert len(run_study(load_study(str(study_file), LONG), folder)) == 8


@pytest.mark.slow
def test_a_study_that_needs_more_than_any_node_has_is_refused(two_nodes, study_file, refused):
    address = f"ray:{two_nodes[0].address}"
    refused("study", "run", study_file, "resources.cpus=2", "--on", address, words=["no node", "cpus=2", "gpus=0"])
    refused("study", "run", study_file, "resources.gpus=0.5", "--on", address, words=["no node", "gpus=0.5"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--on slurm", ["--on='slurm' should be ray, ray:auto or ray:HOST:PORT"]),
        ("--on ray:", ["--on='ray:' should be"]),
        ("--on ray:head", ["--on='ray:head'", "HOST:PORT"]),
        ("--on ray:ray://head:10001", ["HOST:PORT"]),
        ("--on ray:127.0.0.1:1", ["--on='ray:127.0.0.1:1'", "no Ray cluster answers", "refused"]),
        ("--on ray --workers 2", ["--workers", "no effect with --on", "resources.cpus"]),
        ("--plan --on ray", ["--on", "no effect with --plan"]),
        ("--plan --budget 1", ["--budget", "no effect with --plan"]),
        ("--plan --retry", ["--retry", "no effect with --plan"]),
    ],
)
def test_options_that_cannot_be_met_are_refused(options, words, study_file, refused):
    refused("study", "run", study_file, *options.split(), words=words)


def test_an_address_in_the_environment_is_checked_too(study_file, refused, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    refused("study", "run", study_file, "--on", "ray", words=["RAY_ADDRESS='127.0.0.1:1'", "no Ray cluster answers"])


def test_without_ray_the_extra_is_named(study_file, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused("study", "run", study_file, "--on", "ray", words=["'ray'", install_command("ray")])


def test_a_node_without_the_folder_is_named(study_file, tmp_path):
    trial = known_trials(load_study(str(study_file)), {})[0]
    with pytest.raises(UserError, match=r"'.*/away' is missing on the node .*; give a folder that all nodes share"):
        cluster.attempt(trial, tmp_path / "away", math.inf, 1, str(tmp_path), [])


def test_a_run_that_ended_on_a_node_but_is_not_seen_here_is_named(study_file, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "VISIBLE", 0.0)
    trial = known_trials(load_study(str(study_file)), {})[0]
    with pytest.raises(UserError, match=r"does not show the run '.*', which ended on another node; give a folder"):
        cluster._wait_for_outcome(StudyFolder(tmp_path), trial)


def test_a_task_starts_no_run_after_its_time_or_beside_another_worker(study_file, tmp_path, monkeypatch):
    study, folder = load_study(str(study_file)), StudyFolder(tmp_path / "study")
    monkeypatch.setattr("pera_lab.study.perform._perform", lambda *_: pytest.fail("it was started"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    folder.prepare(study)
    trial = known_trials(study, {})[0]
    assert not cluster.attempt(trial, folder.path, time.time(), 1, str(tmp_path), [])
    with folder.in_use(trial):
        assert not cluster.attempt(trial, folder.path, math.inf, 1, str(tmp_path), [])
