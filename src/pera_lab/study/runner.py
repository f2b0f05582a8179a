"""Runs a study with one worker or several. It can be killed and resumed at any time."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from pera.errors import UserError
from pera_lab.progress import ProgressBar
from pera_lab.study import cluster
from pera_lab.study.folder import StudyFolder
from pera_lab.study.perform import affordable, perform_first
from pera_lab.study.plan import Expectation, Outcome
from pera_lab.study.spec import Resources, Study, Trial
from pera_lab.training import check_packages


def run_study(
    study: Study,
    folder: StudyFolder,
    *,
    workers: int = 1,
    on: str | None = None,
    budget: float | None = None,
    retry: bool = False,
) -> dict[str, Outcome]:
    """Run the remaining trials of a study. Trials that have ended are not touched.

    Args:
        study: the study.
        folder: its folder. Runs in it are resumed.
        workers: number of processes. The same command can add processes at any time.
        on: the Ray cluster that runs the trials, instead of ``workers``, as in :func:`cluster.address_of`.
        budget: hours. No run is started that is expected to end later.
        retry: repeat the runs that failed.

    Returns:
        The outcomes by name of trial.

    Raises:
        UserError: as :meth:`StudyFolder.prepare`; the data of a task are missing; this machine or the cluster lacks the
            resources of the study; or workers were killed.
    """
    deadline = math.inf if budget is None else time.time() + 3600 * budget
    if on is not None:
        address = cluster.address_of(on)
        _check_data(study)
        with cluster.connected(address):
            cluster.demand(study.resources)
            folder.prepare(study, retry=retry)
            with _Bar(study, folder) as bar:
                cluster.run_tasks(study, folder, deadline, bar.show)
        return folder.outcomes(study)
    _check_cpus(workers, study.resources.cpus)
    gpus = _gpu_of_each(workers, study.resources.gpus)
    _check_data(study)
    folder.prepare(study, retry=retry)
    if workers == 1 and study.resources == Resources():
        with _Bar(study, folder) as bar:
            work(study, folder, deadline, bar)
        return folder.outcomes(study)
    context = multiprocessing.get_context("spawn")
    threads = study.resources.cpus or max(1, torch.get_num_threads() // workers)
    processes = [context.Process(target=_worker, args=(folder.path, deadline, threads)) for _ in range(workers)]
    try:
        for process, gpu in zip(processes, gpus, strict=True):
            with _visible_gpu(gpu):
                process.start()
        with _Bar(study, folder) as bar:
            while any(process.is_alive() for process in processes):
                bar.show("")
                time.sleep(0.5)
    finally:
        for process in processes:  # alive only after an interruption
            if process.is_alive():
                process.terminate()
                process.join()
    if codes := [process.exitcode for process in processes if process.exitcode]:
        raise UserError(
            f"study: {len(codes)} of {workers} workers stopped (exit code {codes[0]}); run the same command again."
        )
    return folder.outcomes(study)


def _check_data(study: Study) -> None:
    """Raise UserError if a task lacks data or rows, or a run a package, before every run fails for this reason."""
    for cell in {(cell.task.label, cell.train_share): cell for cell in study.cells()}.values():
        recipe = Trial(study, cell, "choose", study.choose.learning_rate[0], 0).recipe()
        check_packages(recipe)
        recipe.build_splits()


def work(study: Study, folder: StudyFolder, deadline: float, bar: _Bar | None = None) -> None:
    """Run one trial after another.

    Args:
        study: the study.
        folder: its folder.
        deadline: in seconds since the epoch. No trial is started that is expected to end later.
        bar: shows the running trial.
    """
    while trials := affordable(study, folder, deadline):
        if not perform_first(trials, folder, None if bar is None else bar.show):
            time.sleep(0.5)  # the trials that others run may make further trials known


def _check_cpus(workers: int, cpus: int | None) -> None:
    """Raise UserError if this machine has too few CPUs for each worker to have as many as it asks for."""
    count = os.cpu_count() or 1
    if cpus is not None and workers * cpus > count:
        raise UserError(
            f"resources.cpus={cpus}: {workers} workers need {workers * cpus} CPUs, but this machine has {count}; lower "
            "resources.cpus or --workers."
        )


def _gpu_of_each(workers: int, share: float | None) -> list[str | None]:
    """The GPU of each worker, as CUDA_VISIBLE_DEVICES names it. Workers share GPUs if there are too few.

    Args:
        workers: number of workers.
        share: the part of a GPU that a worker needs. With None, it takes what there is.

    Returns:
        The GPU by worker: "" for none, None for the one that this process would take.

    Raises:
        UserError: there are too few GPUs for ``share``.
    """
    count = torch.cuda.device_count()
    if share == 0:
        return [""] * workers
    if share is not None and count * int(1 / share) < workers:
        raise UserError(
            f"resources.gpus={share:g}: {workers} workers need {math.ceil(workers / int(1 / share))} GPUs, but this "
            f"machine has {count}; lower resources.gpus or --workers."
        )
    if count < 2:
        return [None] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else [str(i) for i in range(count)]
    return [names[i % count] for i in range(workers)]


@contextmanager
def _visible_gpu(gpu: str | None) -> Iterator[None]:
    """Show only ``gpu`` to the processes that start in the block; None shows all."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        if gpu is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


def _worker(path: Path, deadline: float, threads: int) -> None:
    Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    folder = StudyFolder(path)
    work(folder.study, folder, deadline)


def _exit_with_parent() -> None:
    """Exit when the parent process dies. The interrupted run can be resumed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Bar:
    """A progress bar: the runs that have ended, and an estimate of the remaining time."""

    def __init__(self, study: Study, folder: StudyFolder) -> None:
        self._study, self._folder = study, folder
        self._bar = ProgressBar("study", remaining=False)

    def __enter__(self) -> _Bar:
        self._bar.__enter__()
        self.show("")
        return self

    def __exit__(self, *error: Any) -> None:
        self.show("")
        self._bar.__exit__(*error)

    def show(self, running: str) -> None:
        """Update the bar. ``running`` is the name of the running trial."""
        if self._bar.hidden:
            return
        outcomes = self._folder.outcomes(self._study)
        remaining = Expectation(self._study, outcomes).remaining()
        known = [seconds for seconds in remaining if seconds is not None]
        note = f"remaining: about {sum(known) / 3600:.1f} h" if known else ""
        failed = sum(outcome.status == "failed" for outcome in outcomes.values())
        note = " · ".join(filter(None, (running, note, f"{failed} failed" if failed else "")))
        self._bar.update(len(outcomes), len(outcomes) + len(remaining), note)
        if running:
            self._bar.line()
