"""The statistics and tables of benchmarks/memory_report.py and ordinary_report.py, and their cached hidden states."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from peft import VeraConfig, get_peft_model

from shared import DATA, needs_data

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS.parent / "docs/results/memory"
ARCHIVE = RESULTS / "runs.jsonl.xz"
sys.path.insert(0, str(BENCHMARKS))
pytest.importorskip("scipy")

import memory_law as law  # noqa: E402
import memory_report as report  # noqa: E402
import ordinary_report as ordinary  # noqa: E402
from memory_methods import METHODS  # noqa: E402


def line(method: str, r: int, seed: int, bits: float, rate: float = 0.1, **changes):
    setting = {"facts": "codes", "count": 512, "site": "down", "steps": 1600, "batch": None}
    setting |= {"vocabulary": "answers", "dtype": "float32", "weight_decay": 0.0}
    scores = {"parameters": 100 * r, "bits": bits, "bits_per_parameter": bits / (100 * r)}
    return {**setting, "method": method, "r": r, "seed": seed, "rate": rate, **scores, **changes}


def runs(*lines):
    return report.Runs(lines)


def test_the_second_test_takes_fresh_seeds_where_earlier_ones_suggested_it():
    def of(facts, r, count, seed, bits, method):
        return line(method, r, seed, bits, facts=facts, count=count)

    found = runs(
        *(of("phonebook", 2, 200, seed, bits, report.BOTH) for seed, bits in [(1000, 9), (1, 90), (6, 20), (7, 20)]),
        *(of("phonebook", 2, 200, seed, 10, "hira") for seed in (1000, 1, 6, 7)),
        *(of("codes", 1, 512, seed, bits, report.BOTH) for seed, bits in [(1000, 9), (1, 30), (2, 30), (6, 99)]),
        *(of("codes", 1, 512, seed, 10, "hira") for seed in (1000, 1, 2, 6)),
    )
    second = {(x.setting[0], x.r, x.against): (x.ratio.n, round(x.ratio.mean, 6)) for x in report.second_test(found)}
    assert second == {("phonebook", 2, "hira"): (2, 2.0), ("codes", 1, "hira"): (2, 3.0)}
    [(_, first)] = [
        (x.setting, x.ratio)
        for setting in report.tested_settings(found)
        for x in report.comparisons(found.only(report.SEEDS), setting, [report.BOTH], ["hira"])
        if x.r == 2
    ]
    assert (first.n, round(first.mean, 6)) == (1, 9.0)


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


def test_equivalent_rank_is_not_measured_by_ranks_of_other_seeds():
    found = runs(
        *(line("lora", 2, seed, 200) for seed in (1, 2, 1000)),
        *(line("lora", 4, seed, 400) for seed in (1, 1000)),
        *(line("anchors-16", 2, seed, 300) for seed in (1, 2, 1000)),
    )
    (setting,) = found.settings()
    assert report.equivalent_rank(found, setting, "anchors-16", 2) == "above 1 in 1 of 2 seeds"


def test_law_recovers_its_own_parameters():
    points = [(r, n, 2 * r**0.7 * (n / 1000) ** -0.4 + 0.3) for r in (1, 2, 4, 8) for n in (250, 500, 1000, 4000)]
    found = law.law(points)
    assert found[:5] == pytest.approx([2, 0.7, 0.4, 0.3, 1], rel=1e-4)


def test_rank_by_the_laws_is_the_rank_at_which_they_predict_as_much():
    cells = [(r, n) for r in (1, 2, 4, 8) for n in (250, 500, 1000, 4000)]
    of_lora = law.law([(r, n, 2 * r**0.7 * (n / 1000) ** -0.4 + 0.3) for r, n in cells])
    larger = law.law([(r, n, 2 * (1.5 * r) ** 0.7 * (n / 1000) ** -0.4 + 0.3) for r, n in cells])
    best, low, high = law.law_rank(of_lora, larger, 2, 1000)
    assert best == pytest.approx(1.5, rel=1e-3)
    assert low <= best <= high


def test_law_leaves_out_what_is_nearly_all_stored():
    cells = [(256, 1, 0.97), (1024, 1, 0.5)]
    lines = [line("lora", r, 1, 6 * n * share, count=n, offered=6 * n) for n, r, share in cells]
    assert law.law_points(runs(*lines), "codes", "lora") == [(1, 1024, pytest.approx(0.5 * math.log(64)))]


def test_vera_with_a_kept_projection_is_vera():
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(5, 4)), VeraConfig(r=6, target_modules=["0"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        torch.nn.init.normal_(p)

    def results(x):
        y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), trained)]

    inputs = torch.randn(3, 5), torch.randn(2, 5)
    expected = [results(x) for x in inputs]
    METHODS["vera"].prepare(model)
    for x, wanted in [*zip(inputs, expected, strict=True)] * 2:
        torch.testing.assert_close(results(x), wanted)
    model.merge_adapter()
    torch.testing.assert_close(model(inputs[0]), expected[0][0])


def ordinary_line(task: str, method: str, seed: int, loss: float, rate: float = 0.1):
    return {"task": task, "method": method, "r": 1, "seed": seed, "rate": rate, "loss": loss}


def test_loss_ratio_is_the_mean_over_tasks_then_over_paired_seeds():
    losses = {"sst2": ([0.2, 0.3, 0.4], [0.4, 0.3, 0.5]), "cola": ([0.6, 0.5, 0.7], [0.5, 0.5, 0.6])}
    found = ordinary.Runs(
        ordinary_line(task, method, seed, value)
        for task, pair in losses.items()
        for method, values in zip(("hira", "lora"), pair, strict=True)
        for seed, value in [*enumerate(values, 1), (1000, 0.5)]
    )
    x = ordinary.loss_ratio(found, ["sst2", "cola"], "hira", "lora", 1)
    by_seed = [sum(math.log(a[i] / b[i]) for a, b in losses.values()) / 2 for i in range(3)]
    assert x.n == 3
    assert math.log(x.mean) == pytest.approx(sum(by_seed) / 3)


def test_rate_of_an_ordinary_task_has_the_smallest_held_out_loss():
    found = ordinary.Runs(
        [
            ordinary_line("sst2", "lora", 1000, 0.4, rate=0.1),
            ordinary_line("sst2", "lora", 1000, math.nan, rate=1.0),
            ordinary_line("sst2", "lora", 1000, 0.3, rate=0.01),
            ordinary_line("sst2", "lora", 1, 0.9, rate=0.01),
            ordinary_line("sst2", "lora", 1, 0.1, rate=0.1),
        ]
    )
    assert [x["loss"] for x in found.reported("sst2", "lora", 1)] == [0.9]


def test_runs_at_several_matrices_are_apart_from_those_at_one():
    def of(method, r, seed, loss, **site):
        line = ordinary_line("gsm8k", method, seed, loss) | {"r": r, "accuracy": 0.5}
        return line | site

    at_one = [of("lora", 1, seed, 0.9) for seed in (1, 2, 3, 1000)]  # early runs do not state their site
    mlp = [
        of(method, r, seed, loss + seed / 1000, site="mlp")
        for method, r, loss in [("lora", 1, 0.8), ("lora", 2, 0.7), ("hira", 1, 0.6), ("pera-rms", 1, 0.4)]
        for seed in (1, 2, 3, 1000)
    ]
    found = ordinary.Runs([*at_one, *mlp])
    assert len(found.all) == 4
    assert [x["loss"] for x in found.at("mlp").reported("gsm8k", "lora", 1)] == [0.801, 0.802, 0.803]
    assert ordinary.three_matrices(found.at("mlp")) == []  # not complete
    anchors = [of("anchors-16", 1, seed, 0.2 + seed / 1000, site="mlp") for seed in (1, 2, 3, 1000)]
    page = "\n".join(ordinary.three_matrices(ordinary.Runs([*mlp, *anchors]).at("mlp")))
    assert "| gsm8k | PERA | LoRA | 3 | 0.501 (0.500 to 0.503) |" in page


@pytest.mark.skipif(not ARCHIVE.exists(), reason="no archive of runs")
@pytest.mark.parametrize(
    ("module", "page", "runs"),
    [(report, "tables.md", "runs"), (law, "law.md", "runs"), (ordinary, "ordinary.md", "ordinary")],
)
def test_tables_are_those_of_the_archive(module, page, runs):
    found = report.load([RESULTS / f"{runs}.jsonl.xz"])
    assert (RESULTS / page).read_text() == module.page((ordinary if runs == "ordinary" else report).Runs(found))


@pytest.mark.slow
@pytest.mark.parametrize("site", ["down", "down-28", "mlp", "mlp-15", "mlp-last-4", "all"])
def test_cached_hidden_states_give_the_logits_of_the_whole_model(site):
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


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("task", ["cola", "gsm8k"])
def test_kept_inputs_of_a_task_give_the_logits_of_the_whole_model(task, monkeypatch):
    import memory
    import ordinary as benchmark

    model = memory.base("float32")
    monkeypatch.setattr(benchmark, "base", lambda dtype: model)
    monkeypatch.setattr(benchmark, "LIMIT", {"train": slice(5)})
    monkeypatch.setitem(benchmark.USED, "gsm8k", {"train": slice(3)})
    found = benchmark.inputs(task, "train", DATA, "float32")
    subject = object.__new__(benchmark.Subject)
    subject.model = model
    rows = list(benchmark.texts(task, "train", DATA))
    benchmark.random.Random(0).shuffle(rows)
    first = 0
    for prompt, answer in rows[: 3 if task == "gsm8k" else 5]:
        p, a = (benchmark.tokenizer()(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        a = a if task == "gsm8k" else a[:1]
        with torch.no_grad():
            whole = model(torch.tensor([p + a[:-1]])).logits[0, len(p) - 1 :]
            mine = found.rows(torch.arange(first, first + len(a)))
            for site in ("down", "mlp"):
                subject.site = memory.SITES[site]
                torch.testing.assert_close(model.lm_head(subject.states(mine)), whole, rtol=1e-4, atol=1e-3)
        assert mine.labels.tolist() == a
        first += len(a)
