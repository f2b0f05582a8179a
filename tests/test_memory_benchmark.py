"""The statistics of benchmarks/memory_report.py, and its tables."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ARCHIVE = BENCHMARKS.parent / "docs/results/memory/runs.jsonl.xz"
sys.path.insert(0, str(BENCHMARKS))
pytest.importorskip("scipy")

import memory_report as report  # noqa: E402


def line(method: str, r: int, seed: int, bits: float, rate: float = 0.1, **changes):
    setting = {"facts": "codes", "count": 512, "site": "down", "steps": 1600, "batch": None}
    setting |= {"vocabulary": "answers", "dtype": "float32", "weight_decay": 0.0}
    scores = {"parameters": 100 * r, "bits": bits, "bits_per_parameter": bits / (100 * r)}
    return {**setting, "method": method, "r": r, "seed": seed, "rate": rate, **scores, **changes}


def runs(*lines):
    return report.Runs(lines)


def test_reported_seeds_take_the_rate_that_was_chosen_on_other_facts():
    found = runs(
        line("lora", 1, 1000, 50, rate=0.1),
        line("lora", 1, 1000, 80, rate=0.3),
        line("lora", 1, 1, 99, rate=0.1),
        line("lora", 1, 1, 70, rate=0.3),
    )
    (setting,) = found.settings()
    assert found.rate(setting, "lora", 1) == (0.3, 80)
    assert [x["bits"] for x in found.reported(setting, "lora", 1).values()] == [70]


def test_ratio_is_paired_by_seed_and_its_interval_is_students():
    mine, theirs = [120, 150, 110], [60, 50, 55]
    found = runs(
        *(line("anchors-16", 1, seed, bits) for seed, bits in enumerate([90, *mine])),
        line("anchors-16", 1, 1000, 90),
        line("lora", 1, 1000, 40),
        *(line("lora", 1, seed + 1, bits) for seed, bits in enumerate(theirs)),
    )
    (x,) = report.comparisons(found, found.settings()[0], ["anchors-16"], ["lora"])
    logs = [math.log(a / b) for a, b in zip(mine, theirs, strict=True)]
    mean = sum(logs) / 3
    half = 4.302653 * math.sqrt(sum((v - mean) ** 2 for v in logs) / 2 / 3)  # t of 2 degrees of freedom
    assert x.ratio.n == 3
    assert x.ratio[:3] == pytest.approx([math.exp(mean), math.exp(mean - half), math.exp(mean + half)], rel=1e-5)


def test_p_is_adjusted_by_holm():
    assert report.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])


def test_lora_is_the_better_start_on_the_facts_for_choosing():
    found = runs(
        line("lora", 1, 1000, 40),
        line("lora-gaussian", 1, 1000, 60),
        line("lora", 1, 1, 99),
        line("lora-gaussian", 1, 1, 10),
    )
    assert found.lora(found.settings()[0], 1) == "lora-gaussian"


def test_equivalent_rank_interpolates_the_bits_of_lora():
    found = runs(
        *(line("lora", r, seed, 100 * r) for r in (1, 2, 4) for seed in (1, 2, 3, 1000)),
        *(line("anchors-16", 1, seed, bits) for seed, bits in ((1, 250), (2, 300), (3, 350), (1000, 300))),
        *(line("hira", 1, seed, 401) for seed in (1, 2, 3, 1000)),
    )
    (setting,) = found.settings()
    assert report.equivalent_rank(found, setting, "anchors-16", 1).mean == pytest.approx(3)
    assert report.equivalent_rank(found, setting, "hira", 1) == "above 4"


def test_law_recovers_its_own_parameters():
    points = [(r, n, 2 * r**0.7 * (n / 1000) ** -0.4 + 0.3) for r in (1, 2, 4, 8) for n in (250, 500, 1000, 4000)]
    found = report.law(points)
    assert found[:5] == pytest.approx([2, 0.7, 0.4, 0.3, 1], rel=1e-4)


@pytest.mark.skipif(not ARCHIVE.exists(), reason="no archive of runs")
def test_tables_are_those_of_the_archive():
    assert (ARCHIVE.parent / "tables.md").read_text() == report.page(report.Runs(report.load([ARCHIVE])))


@pytest.mark.slow
@pytest.mark.parametrize("site", ["down", "down-28", "mlp", "mlp-15", "mlp-last-4", "all"])
def test_cached_hidden_states_give_the_logits_of_the_whole_model(site):
    import torch

    import memory

    facts = memory.FACTS["generated"](6, seed=3)
    subject = memory.Subject(facts, memory.SITES[site], memory.base("float32"))
    subject.remember()
    for i, (question, answer) in enumerate(zip(facts.questions, facts.answers, strict=True)):
        with torch.no_grad():
            whole = subject.model(torch.tensor([question + answer[:-1]])).logits[0, len(question) - 1 :]
            torch.testing.assert_close(subject.logits(torch.tensor([i]), whole=True)[0], whole, rtol=1e-4, atol=1e-3)
            part = whole[:, facts.candidates]
            torch.testing.assert_close(subject.logits(torch.tensor([i]))[0], part, rtol=1e-4, atol=1e-3)
