"""Pictures of a training."""

import json
from xml.etree import ElementTree

import pytest

from pera.errors import UserError
from pera_lab.report.pictures import loss_picture


def test_format_follows_the_file_ending(finished_run, tmp_path):
    loss_picture(finished_run, tmp_path / "loss.svg")
    assert ElementTree.parse(tmp_path / "loss.svg").getroot().tag.endswith("svg")
    loss_picture(finished_run, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    loss_picture(finished_run, tmp_path / "loss.pdf")
    assert (tmp_path / "loss.pdf").read_bytes().startswith(b"%PDF")


def test_picture_depends_on_the_losses(run, tmp_path):
    loss_picture(run, tmp_path / "before.png")
    lines = [{**line, "loss": line["loss"] / (1 + line["step"])} for line in run.metrics()]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss_picture(run, tmp_path / "after.png")
    assert (tmp_path / "before.png").read_bytes() != (tmp_path / "after.png").read_bytes()


def test_run_without_metrics_is_rejected(run, tmp_path):
    run.metrics_file.unlink()
    with pytest.raises(UserError, match=r"run' has no metrics; train it first"):
        loss_picture(run, tmp_path / "loss.svg")
    assert not (tmp_path / "loss.svg").exists()


@pytest.mark.parametrize("name", ["loss.doc", "loss"])
def test_unknown_ending_is_rejected(name, finished_run, tmp_path):
    with pytest.raises(UserError, match=f"{name!r} .*svg"):
        loss_picture(finished_run, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_missing_folder_is_rejected(finished_run, tmp_path):
    with pytest.raises(UserError, match=r"missing/loss\.svg' cannot be written: No such file or directory"):
        loss_picture(finished_run, tmp_path / "missing" / "loss.svg")
