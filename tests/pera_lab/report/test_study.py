"""The page of a study, from run folders with made-up figures."""

import csv
import json
import math
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import false_discovery_control
from test_run import adapters, check, write  # noqa: F401

from pera.errors import UserError
from pera_lab.report.formatting import ABSENT, points
from pera_lab.report.study import runs_csv, study_sections, write_study_report
from pera_lab.report.study_scores import verdict
from pera_lab.runs import Run
from pera_lab.scorers import Score
from pera_lab.study import load_study
from pera_lab.study.folder import StudyFolder
from pera_lab.study.plan import known_trials
from pera_lab.study.results import Comparison, Results
from pera_lab.study.runner import run_study
from pera_lab.study.statistics import Difference
from pera_lab.training import TrainingSummary

STUDY = """
base: quickstart
settings: {model: tiny-llama}
grid:
  method: [lora, {name: lora, label: lora-again, seeds: [45, 46, 47]}, pera-rms-0.3]
  task: [{name: family_relationships, label: sst2}, {name: leg_counting, label: mrpc}]
  r: RANKS
choose: {learning_rate: [1e-3, 2e-3, 4e-3], rows: 20}
"""
GAIN = {"pera-rms-0.3": 0.12}
COST = {"pera-rms-0.3": (125, 90.0)}
"""Parameters and seconds of a method; the LoRAs have 100 and 60."""


def made_up(folder, study, adapters, stop=None):  # noqa: F811
    """Write every run of a study: PERA is right 12 points more often, the LoRAs differ by chance."""
    study_folder, rng = StudyFolder(folder), np.random.default_rng(0)
    study_folder.prepare(study)
    difficulty = {task.label: rng.beta(4, 1, size=400) for task in study.grid.task}
    while left := study_folder.remaining(study):
        for trial in left[: stop or None]:
            method, task = trial.cell.method, trial.cell.task.label
            run = Run.create(trial.recipe(), folder / "runs" / trial.name)
            loss = 0.5 + abs(np.log(trial.learning_rate / 2e-3)) / 10
            parameters, seconds = COST.get(method.label, (100, 60.0))
            outcome = {"status": "finished", "loss": loss, "seconds": seconds, "parameters": parameters}
            (run.path / "outcome.json").write_text(json.dumps(outcome))
            if trial.phase == "choose":
                continue
            kind = "pera" if method.name.startswith("pera") else "lora"
            (run.path / "adapter").symlink_to(adapters / kind)
            chance = np.clip(difficulty[task] + GAIN.get(method.label, 0.0) + rng.normal(scale=0.005), 0, 1)
            right = rng.random(400) < chance
            rows = [{"prompt": str(i), "expected": "a", "output": "b", "correct": bool(x)} for i, x in enumerate(right)]
            write(run.predictions / "adapter.jsonl", rows)
            write_score(run, "accuracy", right.mean())
            write(
                run.metrics_file, [{"step": s, "loss": 1 / s, "high_order_ratio": {"q_proj": 0.1 * s}} for s in (1, 2)]
            )
            write(run.cost_file, TrainingSummary(seconds, 100, 2**30, 0.5, 0, steps=2)._asdict())
            write(run.interaction_file, {"examples": 8, "layer": 1, "strength": [[2.0, 0.5], [0.5, 0.0]]})
            if kind == "pera":
                without = {"square": 0.01, "cross": 0.02, "high_order": 0.03}
                groups = {"q_proj": 0.02, "v_proj": 0.01}
                effect = {"tokens": 400, "loss": 0.4, "without": without, "without_high_order": groups}
                write(run.effect_file, {**effect, "at_rank_r": 0.04})
        if stop:
            break
    return study_folder


def write_score(run, metric, value):
    """Write the score of 400 answers."""
    write(
        run.scores_file, {"adapter": asdict(Score(400, round(400 * value), metric, value, value, value, seconds=1.0))}
    )


@pytest.fixture(scope="module")
def study_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("made") / "made-up.yaml"
    file.write_text(STUDY.replace("RANKS", "[3]"))
    return file


@pytest.fixture(scope="module")
def folder(study_file, adapters, tmp_path_factory):  # noqa: F811
    return made_up(tmp_path_factory.mktemp("made") / "study", load_study(str(study_file)), adapters)


def items(folder, section, kind):
    found = {s.id: s.items for s in study_sections(Results(folder))}
    return [item.content for item in found.get(section, []) if item.kind == kind]


def test_planted_difference_is_found_and_lora_does_not_differ_from_itself(folder):
    first, second, *_ = items(folder, "summary", "text")
    assert first.startswith("pera-rms-0.3 is better than lora by +")
    assert second.startswith("lora-again against lora:")
    assert "no difference shown" in second
    assert "n = 3 pairs of seeds, 800 examples of sst2, mrpc" in first
    assert first.endswith("Cost: 1.25 times the parameters, 1.5 times the training time.")
    assert second.endswith("Cost: 1 times the parameters, 1 times the training time.")


def test_the_page_begins_with_the_method_that_wins(folder):
    first = next(s for s in study_sections(Results(folder)) if s.id == "summary").items[0]
    ours = next(c for c in Results(folder).comparisons if c.method == "pera-rms-0.3")
    assert first.kind == "verdict"
    assert first.content == (
        f"pera-rms-0.3 is better than lora by {100 * ours.gain.mean:.2f} points "
        f"(95 % interval {points(ours.gain.low)} to {points(ours.gain.high)})."
    )


def verdict_of(*gains):
    """The verdict on made-up methods "a", "b", …, each with its mean gain and adjusted p."""
    compared = [
        Comparison(
            method, (3, None, 1.0), {"sst2": (gain := Difference(mean, mean - 0.01, mean + 0.01, p, 3, 9))}, gain, p
        )
        for method, (mean, p) in zip("abc", gains, strict=False)
    ]
    settings = [(3, None, 1.0)]
    return verdict(SimpleNamespace(study=SimpleNamespace(reference="lora"), comparisons=compared, settings=settings))


@pytest.mark.parametrize(
    ("gains", "sentence"),
    [
        ([], "Nothing is decided against lora yet, because reported runs are missing."),
        ([(0.1, math.nan)], "Nothing is decided against lora yet: no comparison has 3 pairs of seeds."),
        ([(0.1, 0.5), (-0.1, 0.06)], "No method is shown to differ from lora."),
        ([(0.1, 0.5), (0.1, math.nan)], "No method is shown to differ from lora; not decided yet: b."),
        (
            [(0.02, 0.01), (0.05, 0.001), (-0.04, 0.04)],
            "b is better than lora by 5.00 points (95 % interval +4.00 to +6.00); "
            "a is better by 2.00 points (95 % interval +1.00 to +3.00); "
            "c is worse by 4.00 points (95 % interval −5.00 to −3.00).",
        ),
    ],
)
def test_the_verdict_follows_from_the_comparisons(gains, sentence):
    assert verdict_of(*gains) == sentence


def rescore(folder, method, **more):
    """Give the runs of a method on sst2 these values, with intervals of ± 2 points."""
    for seed, value in zip((42, 43, 44), more.pop("values"), strict=True):
        run = Run(folder.runs / f"sst2-{method}-r3-report-lr0.002-seed{seed}")
        score = Score(400, round(400 * value), "accuracy", value, value - 0.02, value + 0.02, seconds=1.0, **more)
        write(run.scores_file, {"adapter": asdict(score)})


def test_tasks_whose_reference_is_unstable_are_flagged(folder, tmp_path):
    copy = damaged(folder, tmp_path)
    rescore(copy, "lora", values=(0.80, 0.81, 0.82))
    shutil.rmtree(copy.runs / "mrpc-lora-r3-report-lr0.002-seed43")
    shutil.rmtree(copy.runs / "mrpc-lora-r3-report-lr0.002-seed44")
    assert items(copy, "summary", "warning") == []
    rescore(copy, "pera-rms-0.3", values=(0.50, 0.81, 0.82))
    assert items(copy, "summary", "warning") == []
    rescore(copy, "lora", values=(0.75, 0.81, 0.82))
    (warning,) = items(copy, "summary", "warning")
    assert warning.startswith(
        "Unstable task sst2: the seeds of lora score 75.0\N{NO-BREAK SPACE}% to 82.0\N{NO-BREAK SPACE}%"
    )
    rescore(copy, "lora", values=(0.80, 0.81, 0.82), majority=0.785)
    (warning,) = items(copy, "summary", "warning")
    assert warning.startswith(
        "Unstable task sst2: 1 of 3 runs of lora not shown to be better than the most frequent answer"
    )


def test_difference_tables_show_every_comparison(folder):
    by_task, by_example = items(folder, "differences", "table")
    assert {(row[0], row[1]) for row in by_task.rows} == {
        (method, task) for method in ("lora-again", "pera-rms-0.3") for task in ("sst2", "mrpc")
    }
    results = Results(folder)
    cell = next(c for c in results.cells if c.label == "sst2-pera-rms-0.3-r3")
    ours, lora = (np.mean([s.value for s in results.scored(c)]) for c in (cell, results.cells[0]))
    assert float(by_task.rows[1][2]) == pytest.approx(100 * (ours - lora), abs=0.01)
    assert len(by_example.rows) == 4 * 3
    assert [row[2] for row in by_example.rows[::3]] == ["45 against 42", "42", "45 against 42", "42"]


def damaged(folder, tmp_path):
    """A copy of a study folder, for the test to change."""
    shutil.copytree(folder.path, tmp_path / "copy", symlinks=True)
    return StudyFolder(tmp_path / "copy")


def test_diverged_method_is_not_compared(folder, tmp_path):
    copy = damaged(folder, tmp_path)
    write(copy.runs / "sst2-pera-rms-0.3-r3-report-lr0.002-seed43" / "outcome.json", {"status": "diverged"})
    _, second, third = items(copy, "summary", "text")
    assert "pera-rms-0.3 is better than lora" in second
    assert "400 examples of mrpc)" in second
    assert third == "pera-rms-0.3, sst2: not compared, because 1 of its reported runs diverged."
    (table,) = items(copy, "scores", "table")
    assert "(n = 2, 1 diverged)" in table.rows[2][2]
    assert [row[-1] == ABSENT for row in table.rows[:3]] == [False, False, True]
    for picture in items(copy, "costs", "picture"):
        assert [row[0] for row in picture.table.rows] == ["lora", "lora-again"]


def test_diverged_method_is_absent_from_sweeps(study_file, adapters, tmp_path):  # noqa: F811
    copy = made_up(tmp_path / "sweep", load_study(str(study_file), ["grid.r=[2,3]"]), adapters)
    write(copy.runs / "sst2-pera-rms-0.3-r3-report-lr0.002-seed43" / "outcome.json", {"status": "diverged"})
    (picture,) = items(copy, "sweeps", "picture")
    assert [[cell == ABSENT for cell in row[1:]] for row in picture.table.rows] == [
        [False] * 2,
        [False] * 2,
        [False, True],
    ]


def test_sweep_fixes_the_other_axes(study_file, adapters, tmp_path):  # noqa: F811
    grid = ["grid.r=[2,3]", "grid.placement={Q: [q_proj], V: [v_proj]}", "grid.task=[family_relationships]"]
    copy = made_up(tmp_path / "sweep", load_study(str(study_file), grid), adapters)
    results, pictures = Results(copy), items(copy, "sweeps", "picture")
    assert [p.finding.partition(": ")[0] for p in pictures] == [
        "Mean score in % by rank r (2, 3), Q",
        "Mean score in % by rank r (2, 3), V",
        "Mean score in % by placement (Q, V), r = 2",
        "Mean score in % by placement (Q, V), r = 3",
    ]
    lora = {cell.setting[1:3]: results.mean(cell).mean for cell in results.cells if cell.method.label == "lora"}
    assert pictures[1].table.rows[0] == ["lora", *(f"{100 * lora[r, 'V']:.1f}" for r in (2, 3))]


def test_p_is_adjusted_for_all_settings_together(study_file, adapters, tmp_path):  # noqa: F811
    """Each of four settings has one comparison, so no table could adjust by itself."""
    grid = ["grid.r=[2,3,4,5]", "grid.method=[lora,dora]", "grid.task=[family_relationships]"]
    copy = made_up(tmp_path / "ranks", load_study(str(study_file), grid), adapters)
    tables = [table for table in items(copy, "differences", "table") if "verdict" in table.head]
    plain, adjusted = zip(*((float(row[7]), float(row[8])) for table in tables for row in table.rows), strict=True)
    assert len(plain) == 4
    assert adjusted == pytest.approx(false_discovery_control(plain), abs=0.02)
    assert min(adjusted) > min(plain)


def test_cost_figures_need_all_runs_of_a_method(folder, tmp_path):
    copy = damaged(folder, tmp_path)
    shutil.rmtree(copy.runs / "mrpc-lora-again-r3-report-lr0.002-seed46")
    for picture in items(copy, "costs", "picture"):
        assert [row[0] for row in picture.table.rows] == ["lora", "pera-rms-0.3"]


def test_methods_scored_on_more_tasks_come_first(folder, tmp_path):
    copy = damaged(folder, tmp_path)
    for seed in (42, 43, 44):
        shutil.rmtree(copy.runs / f"mrpc-pera-rms-0.3-r3-report-lr0.002-seed{seed}")
    first, second, *_ = items(copy, "summary", "text")
    assert first.startswith("lora-again against lora")
    assert "examples of sst2." in second.replace(")", "")
    assert items(copy, "summary", "heading") == ["On sst2, mrpc", "On sst2"]
    pictures = items(copy, "summary", "picture")
    assert [[row[0] for row in picture.table.rows] for picture in pictures] == [["lora-again"], ["pera-rms-0.3"]]
    assert "mean over sst2, mrpc: " in pictures[0].finding


def expect_another_answer(run):
    file = run.predictions / "adapter.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write(file, [{**row, "expected": "b"} if i == 3 else row for i, row in enumerate(rows)])


def record(run, digest="1", fingerprint="1"):
    write(run.data_file, {"train": {"sha256": digest, "rows": 9}, "notes": []})
    write(run.environment_file, {"base_model": {"name": "tiny", "dtype": "float32", "fingerprint": fingerprint}})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (expect_another_answer, "rows that were scored"),
        (lambda run: record(run, digest="2"), "file of 'train' in data.json"),
        (lambda run: record(run, fingerprint="2"), "fingerprint of the base model"),
    ],
)
def test_runs_with_other_rows_data_or_models_are_rejected(folder, tmp_path, change, what):
    copy = damaged(folder, tmp_path)

    def gain():
        results = Results(copy)
        cell = next(c for c in results.cells if c.label == "mrpc-lora-again-r3")
        return results.difference(cell, results.settings[0])

    record(Run(copy.runs / "mrpc-lora-r3-report-lr0.002-seed42"))
    assert gain() is not None  # the other runs record no data and no model
    change(Run(copy.runs / "mrpc-lora-again-r3-report-lr0.002-seed46"))
    with pytest.raises(UserError, match=rf"-seed4\d' and .*-again-.*-seed46' cannot .* differ in the {what};"):
        gain()


OTHER = r"is not a valid record \(.+\); restore"


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("outcome.json", "{}", OTHER),
        ("outcome.json", "[]", OTHER),
        ("scores.json", '{"adapter": {}}', OTHER),
        ("predictions/adapter.jsonl", '{"prompt": "0"}\n', OTHER),
        ("predictions/adapter.jsonl", '{"prompt"', r"cannot be read: .+\.$"),
        ("predictions/adapter.jsonl", "", "has 0 answers, but scores.json counts 400; restore one of the"),
        ("cost.json", "{}", OTHER),
        ("cost.json", "[]", OTHER),
        ("effect.json", "{}", OTHER),
        ("interaction.json", "{}", OTHER),
        ("environment.json", "[]", "should hold a JSON object"),
    ],
)
def test_damaged_files_are_rejected(folder, tmp_path, file, content, sentence):
    copy = damaged(folder, tmp_path)
    (copy.runs / "sst2-pera-rms-0.3-r3-report-lr0.002-seed42" / file).write_text(content)
    with pytest.raises(UserError, match=sentence) as error:
        study_sections(Results(copy))
    assert file.rpartition("/")[2] in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_that_are_not_runs_are_ignored(folder, tmp_path):
    copy = damaged(folder, tmp_path)
    (copy.runs / "sst2-lora-r3-choose-lr0.001-old-seed1").mkdir()
    (copy.runs / "sst2-lora-r3-report-lr0.002-seed42" / "environment.json").write_text("{}")
    copy.prepare(copy.study)
    assert study_sections(Results(copy))


def test_gain_on_a_mix_is_the_mean_over_its_members(folder, tmp_path):
    """LoRA has all of the 300 rows of one member right and none of the 100 of the other; PERA the other way round."""
    copy = damaged(folder, tmp_path)
    for trial in known_trials(copy.study, copy.outcomes(copy.study)):
        if trial.phase == "report" and trial.cell.task.label == "sst2":
            run, pera = copy.run(trial), trial.cell.method.name.startswith("pera")
            groups = ["large"] * 300 + ["small"] * 100
            rows = [
                {"prompt": "", "expected": "a", "output": "", "group": g, "correct": pera == (g == "small")}
                for g in groups
            ]
            write(run.predictions / "adapter.jsonl", rows)
            write_score(run, "mean accuracy", 0.5)
    results = Results(copy)
    (setting,) = results.settings
    cell = next(c for c in results.cells if c.label == "sst2-pera-rms-0.3-r3")
    assert results.difference(cell, setting).mean == pytest.approx(0)


def test_method_without_rank_is_compared_in_each_setting(study_file, adapters, tmp_path):  # noqa: F811
    overrides = ["grid.r=[2,3]", "grid.method=[full,lora]", "against=lora"]
    results = Results(made_up(tmp_path / "full", load_study(str(study_file), overrides), adapters))
    full = next(c for c in results.cells if c.label == "sst2-full")
    labels = [results.reference(full, setting).label for setting in results.settings]
    assert labels == ["sst2-lora-r2", "sst2-lora-r3"]
    against_full = Results(
        made_up(tmp_path / "full", load_study(str(study_file), [*overrides[:2], "against=full"]), adapters)
    )
    lora = next(c for c in against_full.cells if c.label == "sst2-lora-r3")
    assert against_full.difference(lora, against_full.settings[1]) is not None


def test_scores_have_a_row_per_method_and_a_column_per_task(folder):
    (table,) = items(folder, "scores", "table")
    assert table.head == ["method", "parameters", "sst2", "mrpc", "mean"]
    assert [row[0] for row in table.rows] == ["lora", "lora-again", "pera-rms-0.3"]
    assert "(n = 3)" in table.rows[0][2]


def test_interaction_strengths_of_all_methods(folder):
    sst2, _ = (item.table for item in items(folder, "interactions", "picture"))
    assert sst2.rows == [[method, "0.5", "0.5", "1"] for method in ("lora", "lora-again", "pera-rms-0.3")]


def test_page_and_markdown_hold_every_figure(folder, tmp_path):
    page, text, _ = write_study_report(Results(folder), tmp_path / "report.html")
    found = check(page.read_text())
    ids = {figure["id"].partition("-figure")[0] for figure in found.figures}
    assert ids == {"summary", "rates", "costs", "losses", "terms", "interactions"}
    assert "MoRA is not in PEFT" in found.text
    assert page.read_bytes() == write_study_report(Results(folder), tmp_path / "report.html")[0].read_bytes()
    pictures = {path.name for path in (tmp_path / "report-pictures").iterdir()}
    markdown = text.read_text()
    assert len(pictures) == len(found.figures)
    assert all(f"(report-pictures/{name})" in markdown for name in pictures)
    assert "| method | parameters | sst2 | mrpc | mean |" in markdown


def test_csv_has_one_row_for_each_run(folder):
    results = Results(folder)
    rows = list(csv.DictReader(runs_csv(results).splitlines()))
    assert {row["run"] for row in rows} == set(results.outcomes)
    assert len(rows) == len(results.outcomes)
    for cell in results.cells:
        for scored in results.scored(cell):
            (row,) = (row for row in rows if row["run"] == scored.trial.name)
            assert (row["method"], row["task"], row["r"]) == (cell.method.label, cell.task.label, str(cell.r))
            assert (float(row["learning_rate"]), int(row["seed"])) == (scored.trial.learning_rate, scored.trial.seed)
            assert (float(row["score"]), row["metric"], row["n"]) == (scored.value, "accuracy", "400")
    assert {row["score"] for row in rows if row["phase"] == "choose"} == {""}


def test_csv_names_runs_that_failed(folder, tmp_path):
    copy = damaged(folder, tmp_path)
    name = "sst2-pera-rms-0.3-r3-report-lr0.002-seed43"
    write(copy.runs / name / "outcome.json", {"status": "diverged"})
    (row,) = (row for row in csv.DictReader(runs_csv(Results(copy)).splitlines()) if row["run"] == name)
    assert (row["status"], row["score"], row["seconds"]) == ("diverged", "", "")


def test_report_prints_files_and_comparisons_as_json(folder, tmp_path, pera):
    done = pera("study", "report", folder.path, "--output", "page.html", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert [found.pop(key) for key in ("html", "markdown", "csv")] == ["page.html", "page.md", "page.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page-pictures", "page.csv", "page.html", "page.md"]
    assert (tmp_path / "page.csv").read_text() == runs_csv(Results(folder))
    assert found["verdict"].startswith("pera-rms-0.3 is better than lora by ")
    ours, again = found["comparisons"]
    (by_summary, *_) = items(folder, "summary", "text")
    assert by_summary.startswith(f"{ours['method']} is {ours['verdict']} than lora by +{100 * ours['gain']:.2f} points")
    assert (ours["r"], ours["tasks"], ours["seeds"], ours["examples"]) == (3, ["sst2", "mrpc"], 3, 800)
    assert ours["low"] < ours["gain"] < ours["high"]
    assert (again["method"], again["verdict"]) == ("lora-again", "no difference shown")


def test_sweep_over_ranks(study_file, adapters, tmp_path):  # noqa: F811
    study = load_study(str(study_file), ["grid.r=[2,3]"])
    folder = made_up(tmp_path / "sweep", study, adapters)
    (picture,) = items(folder, "sweeps", "picture")
    assert picture.table.head == ["method", "2", "3"]


def test_sweep_over_terms_uses_plain_methods(study_file, adapters, tmp_path):  # noqa: F811
    """A method with its own options, seeds or label is not used: it would replace the plain method of that name."""
    methods = "{name: lora, label: lora-again, bias: lora_only},{name: lora, label: lora-more, seeds: [1,2,3]}"
    study = load_study(str(study_file), [f"grid.method=[pera-published,lora,{methods}]"])
    results = Results(made_up(tmp_path / "terms", study, adapters))
    (picture,) = items(results.folder, "sweeps", "picture")
    lora = [results.mean(cell).mean for cell in results.cells if cell.method.label == "lora"]
    assert picture.table.head == ["method", "all (PERA)", "none (LoRA)"]
    assert picture.table.rows[0][2] == f"{100 * np.mean(lora):.1f}"


def test_deleted_adapters_hide_only_their_own_figures(folder, tmp_path):
    copy = StudyFolder(shutil.copytree(folder.path, tmp_path / "copy", symlinks=True))
    for adapter in copy.runs.glob("*/adapter"):
        adapter.unlink()
    scores, costs = ([table.rows for table in items(folder, name, "table")] for name in ("scores", "costs"))
    assert [[table.rows for table in items(copy, name, "table")] for name in ("scores", "costs")] == [scores, costs]
    (effects,) = items(copy, "terms", "table")
    assert [row[-3] for row in effects.rows] == [ABSENT, ABSENT]
    assert [row[-4] for row in effects.rows] == ["+0.04", "+0.04"]
    assert not items(copy, "terms", "picture")


def test_effects_show_where_seeds_differ(folder, tmp_path):
    copy = damaged(folder, tmp_path)
    effect = Run(copy.runs / "sst2-pera-rms-0.3-r3-report-lr0.002-seed43").effect_file
    write(effect, {**json.loads(effect.read_text()), "tokens": 390, "at_rank_r": None})
    (table,) = items(copy, "terms", "table")
    assert [row[table.head.index("truncated to rank r")] for row in table.rows] == [ABSENT, "+0.04"]
    assert [row[-1] for row in table.rows] == ["390 to 400", "400"]


def test_started_study_lists_the_remaining_runs(study_file, adapters, tmp_path):  # noqa: F811
    folder = made_up(tmp_path / "begun", load_study(str(study_file)), adapters, stop=4)
    assert items(folder, "scores", "table") == []
    assert items(folder, "summary", "text") == [
        "No method can be compared with lora yet, because reported runs are missing."
    ]
    assert any("14 known runs remain" in text for text in items(folder, "gaps", "text"))
    write_study_report(Results(folder), tmp_path / "report.html")


def test_two_pairs_of_seeds_have_no_interval_and_no_p(study_file, adapters, tmp_path):  # noqa: F811
    overrides = ["grid.method=[lora,pera-rms-0.3]", "report.seeds=[42,43]"]
    folder = made_up(tmp_path / "two", load_study(str(study_file), overrides), adapters)
    by_task, _ = items(folder, "differences", "table")
    (picture,) = items(folder, "summary", "picture")
    assert {cell for row in by_task.rows for cell in (*row[3:5], *row[7:9])} == {ABSENT}
    assert [*picture.table.rows[0][2:4], picture.table.rows[0][6]] == [ABSENT] * 3


def test_protocol_lists_seeds_and_versions(folder, tmp_path):
    copy = damaged(folder, tmp_path)
    machine = {"processor": "x", "threads": 1, "accelerator": "cpu"}
    for seed, torch in ((42, "2.0"), (43, "2.1")):
        run = Run(copy.runs / f"sst2-lora-r3-report-lr0.002-seed{seed}")
        write(run.environment_file, {**machine, "versions": {"python": "3.11", "torch": torch, "gguf": None}})
    method, machines = items(copy, "protocol", "text")
    assert "with each report seed (42, 43, 44; lora-again: 45, 46, 47) and" in method
    assert machines == "Machine: x, 1 threads, cpu. Versions: python 3.11, torch 2.0 and 2.1."


def test_folder_without_runs_is_rejected(study_file, tmp_path):
    folder = StudyFolder(tmp_path / "empty")
    with pytest.raises(UserError, match="is not the folder of a study"):
        Results(folder)
    folder.prepare(load_study(str(study_file)))
    with pytest.raises(UserError, match="has no run that has ended"):
        write_study_report(Results(folder), tmp_path / "report.html")


MEMORY = """
base: RECIPE
settings:
  task: {size: 4}
  training: {max_steps: 2}
  evaluation: {max_new_tokens: 10}
grid:
  task: [phonebook]
  method: [{name: lora, r: [1, 2]}, pera-published]
  r: [1]
choose: {learning_rate: [1e-3], seeds: [1]}
report: {seeds: [42, 43]}
"""


@pytest.fixture(scope="module")
def memory_study(recipe_file, tmp_path_factory):
    """The folder of a study of facts, run on the tiny LLaMA. Bits are replaced by round numbers."""
    folder = tmp_path_factory.mktemp("memory")
    lines = recipe_file.read_text().splitlines()
    base = "\n".join("task: phonebook" if line.startswith("task:") else line for line in lines)
    (folder / "base.yaml").write_text(base)
    (folder / "memory.yaml").write_text(MEMORY.replace("RECIPE", str(folder / "base.yaml")))
    study, done = load_study(str(folder / "memory.yaml")), StudyFolder(folder / "study")
    run_study(study, done)
    stored = {("lora", 1): 100.0, ("lora", 2): 300.0, ("pera-published", 1): 150.0}
    for trial in known_trials(study, done.outcomes(study)):
        if trial.phase == "report":
            set_bits(done.run(trial), stored[trial.cell.method.label, trial.cell.r] + 20 * (trial.seed == 43))
    return done


def set_bits(run, bits):
    scores = run.scores()
    scores["adapter"]["memory"] |= {"bits": bits, "bits_per_parameter": bits / 1000}
    write(run.scores_file, scores)


def test_bits_and_equivalent_rank_of_each_method_are_shown(memory_study):
    (table,) = items(memory_study, "memory", "table")
    columns = ["method", "r", "bits stored", "of", "bits per parameter", "equivalent rank of lora / r", "n seeds"]
    assert [[row[table.head.index(name)] for name in columns] for row in table.rows] == [
        ["lora", "1", "110 ± 14", "133", "0.110 ± 0.014", ABSENT, "2"],
        ["lora", "2", "310 ± 14", "133", "0.310 ± 0.014", ABSENT, "2"],
        ["pera-published", "1", "160 ± 14", "133", "0.160 ± 0.014", "1.25", "2"],
    ]
    (picture,) = items(memory_study, "memory", "picture")
    assert picture.table.rows == [["lora", "0.11", "0.31"], ["pera-published", "0.16", ABSENT]]
    assert items(memory_study, "memory", "note")[0].startswith(
        "Every model is tested on the facts that it was trained on."
    )


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (400.0, "beyond the measured ranks in 1 of 2 seeds"),
        (10.0, "below the measured ranks in 1 of 2 seeds"),
    ],
)
def test_equivalent_rank_is_not_extrapolated(memory_study, tmp_path, bits, said):
    copy = damaged(memory_study, tmp_path)
    set_bits(Run(copy.runs / "phonebook-pera-published-r1-report-lr0.001-seed42"), bits)
    (table,) = items(copy, "memory", "table")
    assert table.rows[2][table.head.index("equivalent rank of lora / r")] == said


def test_methods_are_compared_on_the_facts_of_one_seed(memory_study, tmp_path):
    """Other seeds have other facts, so the variance over the seeds is all there is."""
    results = Results(memory_study)
    (cell,) = (cell for cell in results.cells if cell.method.label == "pera-published")
    lora = results.reference(cell, results.settings[0])
    ours, theirs = (np.array([s.value for s in results.scored(c)]) for c in (cell, lora))
    assert results.difference(cell, results.settings[0]).mean == pytest.approx((ours - theirs).mean())
    copy = damaged(memory_study, tmp_path)
    expect_another_answer(Run(copy.runs / "phonebook-pera-published-r1-report-lr0.001-seed42"))
    with pytest.raises(UserError, match="differ in the rows that were scored"):
        study_sections(Results(copy))


def test_page_of_a_study_of_facts_says_on_which_facts_rates_were_chosen(memory_study):
    assert items(memory_study, "summary", "text")[-1] == "Only lora has this setting."
    (note,) = items(memory_study, "rates", "note")
    assert note.startswith("Loss on the trained facts, which differ from the reported facts, n = 1 seed.")
    text = items(memory_study, "protocol", "text")[0]
    assert text.endswith("phonebook: the test rows are the training rows, and each seed draws its own.")
    assert "held" not in text


def test_study_without_facts_has_no_section_on_bits(folder):
    assert "memory" not in {section.id for section in study_sections(Results(folder))}
