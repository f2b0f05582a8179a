"""benchmarks/gpu.sh on tiny shapes: every section runs, and what is wrong is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Runs sections in this process. Returns the exit code and what gpu.json holds of each section."""

    def run(*sections):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--size", "tiny", "--output", str(tmp_path), "--only", *sections])
        code = gpu.main()
        return code, json.loads((tmp_path / "gpu.json").read_text())["sections"]

    return run


@pytest.mark.parametrize(("terms", "anchors"), [("all", 0), ("none", 2)])
def test_the_operator_is_compared_with_the_equation(monkeypatch, terms, anchors):
    right = gpu.operator_errors(torch.float64, terms, "rms", anchors)
    assert right.keys() == {"y", "∂x", "∂A", "∂B", "∂h"}
    assert all(0 < error < 1e-12 for error in right.values())
    true = gpu.pera_linear
    monkeypatch.setattr(gpu, "pera_linear", lambda x, A, B, h, **options: true(x, A, B, 1.01 * h, **options))
    assert all(error > 1e-4 for error in gpu.operator_errors(torch.float64, terms, "rms", anchors).values())


def test_a_wrong_row_is_an_exit_code(ran, monkeypatch):
    errors = {"y": 0.0}
    monkeypatch.setattr(gpu, "operator_errors", lambda *_: errors)
    code, sections = ran("operator")
    assert (code, len(sections["operator"]["rows"])) == (0, 21)
    errors["y"] = 1.0
    code, sections = ran("operator")
    assert code == 1
    assert not any(row["right"] for row in sections["operator"]["rows"])


def test_sections_after_one_that_fails_run(ran, monkeypatch, tmp_path):
    def fails(*_):
        yield {"row": 1}
        raise RuntimeError("out of memory")

    def skipped(*_):
        raise gpu.Skipped("there is none")
        yield

    def fine(*_):
        yield {"row": 2, "of": 0.5}
        yield {"row": 3}

    monkeypatch.setattr(gpu, "SECTIONS", {f.__name__: f for f in (fails, skipped, fine)})
    code, sections = ran("fails", "skipped", "fine")
    assert code == 1
    assert [sections[name]["failed"] for name in sections] == ["RuntimeError: out of memory", None, None]
    page = (tmp_path / "gpu.md").read_text()
    assert "| row |\n| --- |\n| 1 |\n\nFailed: `RuntimeError: out of memory`" in page
    assert "Skipped: there is none." in page
    assert "| row | of |\n| --- | --- |\n| 2 | 0.5 |\n| 3 | – |" in page


@pytest.mark.slow
def test_the_whole_script(tiny_llama, tmp_path):
    command = ["sh", BENCHMARKS / "gpu.sh", "--size", "tiny", "--model", tiny_llama, "--output", tmp_path]
    subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable}, cwd=tmp_path)
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert list(sections) == list(gpu.SECTIONS)
    for name, section in sections.items():
        assert section["failed"] is None
        assert section["rows"] or (name == "quantized" and section["skipped"] == "bitsandbytes is not installed"), name
    assert {row["graphs"] for row in sections["compiled"]["rows"]} == {2}
    for section, layers in (("eager", 2), ("quantized", 1)):
        for row in sections[section]["rows"]:
            if row["adapter"] == "pera r=8":
                assert row["by FLOPs"] == pytest.approx(flops(layers, 44) / flops(layers, 8))


def flops(layers, rank):
    """FLOPs of a training step of 32 tokens: seven matrices in a block, and the head without an adapter."""
    matrices = layers * [(64, 64)] * 4 + layers * [(96, 64)] * 3
    return 32 * (sum(4 * m * n + 6 * rank * (m + n) for m, n in matrices) + 4 * 96 * 64)
