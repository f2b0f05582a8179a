"""The folder of a study."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pera.errors import UserError
from pera_lab.files import (
    InUse,
    check_output,
    disk_errors,
    lock_of,
    locked,
    read_as,
    require_free,
    unfinished,
    write_atomic,
)
from pera_lab.recipe import difference
from pera_lab.runs import Run
from pera_lab.study.plan import Outcome, known_trials
from pera_lab.study.spec import Phase, Study, Trial, load_study


class StudyFolder:
    """The folder of a study: ``study.yaml``, run folders in ``runs/`` and the workers' locks in ``locks/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study_file = path / "study.yaml"
        self.runs = path / "runs"
        self.locks = path / "locks"

    @property
    def study(self) -> Study:
        """The study that was last run in the folder.

        Raises:
            UserError: the folder holds no study.
        """
        if not self.study_file.is_file():
            raise UserError(f"{str(self.path)!r} is not the folder of a study; start one with: pera study run STUDY")
        return load_study(str(self.study_file))

    def run(self, trial: Trial) -> Run:
        """The run folder of a trial. It need not exist."""
        return Run(self.runs / trial.name)

    def outcome(self, trial: Trial) -> Outcome | None:
        """How a trial ended, or None if it has not ended."""
        file = self.runs / trial.name / "outcome.json"
        return read_as(file, Outcome) if file.is_file() else None

    def outcomes(self, study: Study) -> dict[str, Outcome]:
        """The outcomes of the trials that have ended, by name."""
        found: dict[str, Outcome] = {}
        while True:  # when some trials have ended, others become known
            before = len(found)
            for trial in known_trials(study, found):
                if trial.name not in found and (outcome := self.outcome(trial)) is not None:
                    found[trial.name] = outcome
            if len(found) == before:
                return found

    def remaining(self, study: Study) -> list[Trial]:
        """The trials that are known so far and have not ended, the most informative first."""
        outcomes = self.outcomes(study)
        return [trial for trial in known_trials(study, outcomes) if trial.name not in outcomes]

    def prepare(self, study: Study, *, retry: bool = False) -> None:
        """Create the folder, or check that its runs belong to ``study``.

        Args:
            study: the study to run.
            retry: remove the runs that failed.

        Raises:
            UserError: a run in the folder has other settings, the folder holds something else than a study, or it
                cannot be written.
        """
        check_output(self.path)
        if not (self.study_file.is_file() and self.runs.is_dir()):
            own = (self.runs, self.locks, lock_of(self.study_file), unfinished(self.study_file))  # left by a kill
            require_free(self.path, replaced=False, ignored=own)
        existing = self._existing(study)
        for trial in existing:
            run, failed = self.run(trial), self._failed(trial)
            if (failed and retry) or not run.recipe_file.is_file():
                continue
            if (changed := difference(run.recipe, trial.recipe())) is not None:
                forget = ", remove failed runs with --retry," if failed else ""
                raise UserError(
                    f"study: {changed} differs from the recipe of {str(run.path)!r}; "
                    f"undo the change{forget} or give another folder with --output."
                )
        with disk_errors(self.path):
            for folder in (self.runs, self.locks):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.study_file, study.to_yaml())
        for trial in existing:
            with suppress(InUse), self.in_use(trial):
                if retry and self._failed(trial):
                    shutil.rmtree(self.run(trial).path)
                elif self.outcome(trial) is not None:  # a worker may have been killed before it removed them
                    shutil.rmtree(self.run(trial).checkpoints, ignore_errors=True)

    @contextmanager
    def in_use(self, trial: Trial) -> Iterator[None]:
        """Keep other workers from running a trial while the block runs; raises InUse if one runs it."""
        with locked(self.locks / f"{trial.name}.lock", self.run(trial).path):
            yield

    def _failed(self, trial: Trial) -> bool:
        outcome = self.outcome(trial)
        return outcome is not None and outcome.status == "failed"

    def _existing(self, study: Study) -> list[Trial]:
        """The trials of ``study`` that have a run folder, also if their turn has not come."""
        cells, found = {cell.label: cell for cell in study.cells()}, []
        for folder in sorted(self.runs.glob("*")):
            parts = re.fullmatch(r"(.+)-(choose|report)-lr([\d.]+(?:e[+-]?\d+)?)-seed(\d+)", folder.name)
            if parts is not None and (cell := cells.get(parts[1])) is not None:
                phase: Phase = "choose" if parts[2] == "choose" else "report"
                found.append(Trial(study, cell, phase, float(parts[3]), int(parts[4])))
        return found
