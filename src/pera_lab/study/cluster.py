"""Runs the trials of a study as Ray tasks, on a cluster or on this machine.

Ray queues the tasks, places them on the nodes and repeats those whose worker was lost. The study folder lies on storage
that all nodes share, so the run folders, their locks and their checkpoints are the same as for local workers.
"""

from __future__ import annotations

import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from pera.errors import UserError, one_line
from pera_lab.extras import missing_extra
from pera_lab.study.folder import StudyFolder
from pera_lab.study.perform import affordable, perform_first
from pera_lab.study.spec import Resources, Study, Trial

LOCAL, AUTO = "local", "auto"
"""Addresses with which Ray starts a cluster on this machine, and finds the one that runs on it."""

RETRIES = 3
"""How often Ray repeats a run whose worker or node was lost."""

VISIBLE = 120.0
"""Seconds until a file that one node has written appears on all. NFS caches for up to a minute that there is none."""


def address_of(on: str) -> str:
    """The address of the Ray cluster that ``--on`` names.

    Args:
        on: "ray" for the cluster of RAY_ADDRESS, or else a new one on this machine; "ray:HOST:PORT"; or "ray:auto".

    Raises:
        UserError: it has another form, nobody answers there, or Ray is not installed.
    """
    engine, colon, address = on.partition(":")
    if engine != "ray" or (colon and not address):
        raise UserError(f"--on={on!r} should be ray, ray:auto or ray:HOST:PORT.")
    key = f"--on={on!r}" if colon else f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')!r}"
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    if address not in (LOCAL, AUTO):
        _check_reachable(key, address)
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # Ray would look for a cluster there for many minutes
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports nothing
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise missing_extra("ray", "ray") from error
    return address


def _check_reachable(key: str, address: str) -> None:
    """Raise UserError unless something listens at ``address``. Ray itself would try for minutes."""
    try:
        place = urlsplit(f"//{address}")
        if "://" in address or not place.hostname or place.port is None:
            raise ValueError
        socket.create_connection((place.hostname, place.port), timeout=10).close()
    except ValueError as error:
        raise UserError(f"{key}: the address should be auto or HOST:PORT of the cluster's head node.") from error
    except OSError as error:
        raise UserError(f"{key}: no Ray cluster answers ({one_line(error)}); check the head node's address.") from error


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Use a Ray cluster while the block runs. Then its tasks of this command are stopped.

    Args:
        address: from :func:`address_of`.

    Raises:
        UserError: the cluster cannot be used or started.
    """
    import ray

    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):  # Ray prints there what it logs of lost nodes
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address == LOCAL else None)
        except Exception as error:
            raise UserError(f"--on: the Ray cluster {address!r} cannot be used ({one_line(error)}).") from error
        try:
            yield
        finally:
            ray.shutdown()


def run_tasks(study: Study, folder: StudyFolder, deadline: float, show: Callable[[str], None]) -> None:
    """Run the remaining trials on the connected cluster, the most informative first.

    Args:
        study: the study.
        folder: its folder, on storage that all nodes share.
        deadline: in seconds since the epoch. No trial is started that is expected to end later.
        show: called with a note about what is running.

    Raises:
        UserError: a node does not share the folder or lacks a package, or the worker of a trial was lost repeatedly.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    path = folder.path.resolve()
    cpus, gpus = demand(study.resources)
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES}
    if not gpus:  # Ray itself would leave them visible
        options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    task: Any = ray.remote(**options)(attempt)
    running: dict[Any, Trial] = {}
    lost: dict[str, str] = {}
    while True:
        started = {trial.name for trial in running.values()} | lost.keys()
        for trial in affordable(study, folder, deadline):
            if trial.name not in started and len(running) <= slots(cpus, gpus):  # one waits, so that no slot is idle
                running[task.remote(trial, path, deadline, cpus, os.getcwd(), sys.argv)] = trial
        if not running:
            break
        show(f"submitted: {len(running)}")
        for reference in ray.wait(list(running), timeout=0.5)[0]:
            trial = running.pop(reference)
            try:
                if ray.get(reference):
                    _wait_for_outcome(folder, trial)
                else:  # another command runs it, or its time is up
                    time.sleep(0.5)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, UserError):
                    raise cause from error
                raise UserError(
                    f"--on: {trial.name!r} could not start on the cluster ({type(cause).__name__}: {one_line(cause)}); "
                    "all nodes need the same pera."
                ) from error
            except RayError as error:
                lost[trial.name] = f"{type(error).__name__}: {one_line(error)}"
    if lost:
        name, reason = next(iter(lost.items()))
        raise UserError(
            f"study: runs that lost their worker {RETRIES + 1} times: {len(lost)}, such as {name!r} ({reason:.200}); "
            "run the same command again."
        )


def demand(resources: Resources) -> tuple[int, float]:
    """The CPUs and GPUs of a trial: what the study says, else one CPU, and one GPU if a node has one.

    Raises:
        UserError: no node of the connected cluster has so many.
    """
    cpus, gpus = resources.cpus or 1, resources.gpus
    if gpus is None:
        gpus = float(slots(1, 1.0) > 0)
    if not slots(cpus, gpus):
        raise UserError(
            f"resources: no node of the Ray cluster has cpus={cpus} and gpus={gpus:g} for a run; lower them or add a "
            "node."
        )
    return cpus, gpus


def slots(cpus: int, gpus: float) -> int:
    """How many tasks the nodes that are alive can run at a time."""
    import ray

    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    by_gpu = [int(node.get("GPU", 0) * (1 / gpus)) if gpus else math.inf for node in found]
    return sum(int(min(node.get("CPU", 0) // cpus, n)) for node, n in zip(found, by_gpu, strict=True))


def attempt(trial: Trial, path: Path, deadline: float, threads: int, place: str, command: list[str]) -> bool:
    """Run a trial in a worker of Ray, unless another worker runs it or its time is up.

    Args:
        trial: the trial.
        path: the folder of its study.
        deadline: in seconds since the epoch. The trial is not started if it is expected to end later.
        threads: number of threads.
        place: the working folder of the command, in which the paths of a study are looked up.
        command: the command line, which is recorded in the run.

    Returns:
        Whether the trial has ended.

    Raises:
        UserError: this node does not have the folder of the study.
    """
    folder = StudyFolder(path)
    if not folder.study_file.is_file():
        raise _not_shared(path, f"is missing on the node {platform.node()!r}")
    with suppress(OSError):  # a study with absolute paths does not need it
        os.chdir(place)
    sys.argv = command
    torch.set_num_threads(threads)
    if folder.outcome(trial) is not None:
        return True
    names = {other.name for other in affordable(trial.study, folder, deadline)}
    return perform_first([trial] if trial.name in names else [], folder)


def _wait_for_outcome(folder: StudyFolder, trial: Trial) -> None:
    """Wait until what a node has written is seen here.

    Raises:
        UserError: it does not appear.
    """
    give_up = time.monotonic() + VISIBLE
    while folder.outcome(trial) is None:
        if time.monotonic() > give_up:
            raise _not_shared(folder.path, f"does not show the run {trial.name!r}, which ended on another node")
        time.sleep(0.2)


def _not_shared(path: Path, reason: str) -> UserError:
    return UserError(f"--output: {str(path)!r} {reason}; give a folder that all nodes share.")
