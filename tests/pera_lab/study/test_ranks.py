"""The loss of a run at a lower rank."""

from pera_lab.runs import Run
from pera_lab.study.ranks import truncated_loss


def test_the_loss_of_a_run_changes_unless_the_rank_suffices(finished):
    (path,) = finished.runs.glob("*-pera-rms-0.3-*-report-*-seed42")
    labels, loss, change = truncated_loss(Run(path), [1, 5], examples=8)
    assert labels > 0
    assert loss > 0
    assert abs(change[1]) > 1e-6
    assert abs(change[5]) < 1e-6
