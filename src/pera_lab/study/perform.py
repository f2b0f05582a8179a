"""Runs the trials of a study, one at a time: training, scores, outcome."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace

from peft.utils.constants import DUMMY_TARGET_MODULES

from pera.errors import PeraError, one_line
from pera.tuner import PeraConfig
from pera_lab.adapters import HEAD
from pera_lab.diagnose import run_effects
from pera_lab.diagnose.effect import run_loss
from pera_lab.evaluation import evaluate_run
from pera_lab.files import InUse, read_as, write_json
from pera_lab.monitor import LossNotFinite, rose
from pera_lab.progress import showing
from pera_lab.runs import Run
from pera_lab.study.folder import StudyFolder
from pera_lab.study.interaction import run_interaction
from pera_lab.study.plan import Expectation, Outcome, known_trials
from pera_lab.study.spec import Study, Trial
from pera_lab.training import TrainingSummary, train

EFFECT_EXAMPLES = 128
"""The most held-out examples that the effect of the high-order terms is measured on: about nine float32 passes."""


def affordable(study: Study, folder: StudyFolder, deadline: float) -> list[Trial]:
    """The remaining trials that are expected to end before ``deadline``, in seconds since the epoch."""
    outcomes = folder.outcomes(study)
    expected = Expectation(study, outcomes)
    remaining = [trial for trial in known_trials(study, outcomes) if trial.name not in outcomes]
    return [trial for trial in remaining if time.time() + (expected(trial) or 0) < deadline]


def perform_first(trials: list[Trial], folder: StudyFolder, started: Callable[[str], None] | None = None) -> bool:
    """Run the first trial that no other worker runs.

    Args:
        trials: the trials.
        folder: the folder of their study.
        started: called with the name of the trial before it starts.

    Returns:
        Whether there was one. It may have ended in the meantime.
    """
    for trial in trials:
        try:
            with folder.in_use(trial):
                if folder.outcome(trial) is None:
                    if started is not None:
                        started(trial.name)
                    _perform(trial, folder)
        except InUse:
            continue
        return True
    return False


def _perform(trial: Trial, folder: StudyFolder) -> None:
    """Start or resume one trial, score it, and write its outcome."""
    run, start = folder.run(trial), time.perf_counter()
    try:
        with showing(None):  # the study shows its own progress
            outcome = _run(trial, run)
    except InUse:  # by another command
        raise
    except LossNotFinite as error:
        outcome = Outcome("diverged", str(error))
    except Exception as error:  # one failed run must not stop the others
        kind = "" if isinstance(error, PeraError) else f"{type(error).__name__}: "
        outcome = Outcome("failed", f"{kind}{one_line(error)}")
    run.path.mkdir(parents=True, exist_ok=True)
    outcome = replace(outcome, wall_seconds=round(time.perf_counter() - start, 2))
    write_json(run.path / "outcome.json", asdict(outcome))
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def _run(trial: Trial, run: Run) -> Outcome:
    recipe = trial.recipe()
    run.trust_remote_code = recipe.model.trust_remote_code  # the user's study decides, not the run folder
    if not run.recipe_file.is_file():
        shutil.rmtree(run.path, ignore_errors=True)  # killed before the recipe was written
        run = Run.create(recipe, run.path)
    if run.finished:
        run.remove_stale_lock()
    else:
        train(recipe, run, resume=True)
    if trial.phase == "report":
        _report(trial, run)
    outcome = Outcome("finished", "", run_loss(run), _training_seconds(run), num_parameters(run))
    losses = [line["loss"] for line in run.metrics()]
    if rose(losses):
        error = f"the training loss rose from {losses[0]:.4g} to {losses[-1]:.4g}"
        return replace(outcome, status="diverged", error=error)
    return outcome


def _report(trial: Trial, run: Run) -> None:
    """Score a reported run and measure the effect of its terms, as far as this was not done before."""
    if "adapter" not in run.scores():
        evaluate_run(run)
    if isinstance(trial.recipe().peft_config(), PeraConfig) and not run.effect_file.is_file():
        run_effects(run, examples=EFFECT_EXAMPLES, ranks=False)
    if trial.seed == trial.study.report_seeds(trial.cell)[0] and not run.interaction_file.is_file():
        run_interaction(run)


def _training_seconds(run: Run) -> float | None:
    """Seconds of the whole training, extrapolated from the time since it was last resumed."""
    cost, metrics = read_as(run.cost_file, TrainingSummary), run.metrics()
    return cost.seconds * metrics[-1]["step"] / cost.steps if metrics and cost.steps else None


def num_parameters(run: Run) -> int:
    """Trained parameters without a classification head, which all methods share. For full fine-tuning, all of them."""
    is_full = getattr(run.adapter.config, "target_modules", None) == DUMMY_TARGET_MODULES
    return sum(n for key, n in run.adapter.sizes.items() if is_full or not HEAD.search(key))
