"""Reading a study: its trials, their recipes, and mistakes in it."""

from dataclasses import asdict
from pathlib import Path

import pytest

from pera.errors import UserError
from pera.polynomial import expanded_rank
from pera_lab.files import write_json
from pera_lab.recipe import write_value
from pera_lab.shipped import shipped_files
from pera_lab.study import load_study
from pera_lab.study.folder import StudyFolder
from pera_lab.study.plan import Outcome, known_trials
from pera_lab.study.spec import Trial


@pytest.mark.parametrize("name", shipped_files("studies"))
def test_every_shipped_study_can_be_read(name):
    study = load_study(name)
    assert study.name == name
    assert len({trial.name for trial in known_trials(study, {})}) == len(known_trials(study, {}))


def test_glue_screen_compares_methods_at_rank_4_on_four_tasks():
    study = load_study("glue-screen", ["data=hub"])
    assert {task.name for task in study.grid.task} == {"sst2", "qnli", "mrpc", "stsb"}
    assert len(study.choose.learning_rate) == 5
    assert len(study.report.seeds) == 3
    assert study.reference == "lora"
    recipes = {
        c.method.label: Trial(study, c, "report", 1e-3, 42).recipe() for c in study.cells() if c.task.name == "sst2"
    }
    assert {recipe.task.choose_size for recipe in recipes.values()} == {0}
    assert recipes["lora"].peft_config().r == 4
    assert recipes["lora-K"].peft_config().r == expanded_rank(4) == 14
    assert recipes["pera-rms-0.3"].peft_config().init_coefficients == 0.3


def test_recipes_differ_only_in_the_method(study_file):
    study = load_study(str(study_file))
    contents = [
        Trial(study, c, "report", 1e-3, 42).recipe().model_dump(exclude={"name", "method"}) for c in study.cells()
    ]
    assert contents[0] == contents[1]


def test_names_of_runs_stay_when_the_grid_grows(study_file):
    names = {trial.name for trial in known_trials(load_study(str(study_file)), {})}
    grown = load_study(str(study_file), ["grid.method=[dora,lora,pera-rms-0.3]", "grid.r=[2,4]"])
    assert "family_relationships-lora-r2-choose-lr0.001-seed1" in names
    assert names < {trial.name for trial in known_trials(grown, {})}


def test_shares_that_differ_in_late_digits_have_different_names(study_file):
    study = load_study(str(study_file), ["grid.train_share=[0.5,0.12345678,0.12345679]", "grid.method=[lora]"])
    shares = [cell.label.rpartition("-")[2] for cell in study.cells()]
    assert shares == ["share0.5", "share0.12345678", "share0.12345679"]


def test_a_method_without_a_rank_has_one_cell_for_all_ranks(study_file):
    study = load_study(str(study_file), ["grid.method=[lora,full]", "grid.r=[2,4]"])
    assert [cell.label for cell in study.cells()] == [
        "family_relationships-lora-r2",
        "family_relationships-full",
        "family_relationships-lora-r4",
    ]


def test_axes_become_recipes(study_file):
    study = load_study(
        str(study_file),
        ["grid.placement={Q: [q_proj], all: all-linear}", "grid.train_share=[0.5]",
         "grid.method=[{name: pera, label: slow-h, terms: square, lr_ratio: {h: 0.1}}]"],
    )  # fmt: skip
    first, second = (Trial(study, cell, "choose", 1e-3, 1).recipe() for cell in study.cells())
    assert first.name == "family_relationships-slow-h-r2-Q-share0.5-choose-lr0.001-seed1"
    assert (first.method["target_modules"], second.method["target_modules"]) == (["q_proj"], "all-linear")
    assert (first.method["terms"], first.training.lr_ratio) == ("square", {"h": 0.1})
    assert (first.training.train_share, first.training.held_out) == (0.5, 16)


def test_an_override_may_belong_to_the_study_or_to_its_recipes(study_file):
    study = load_study(str(study_file), ["report.seeds=[7]", "training.batch_size=2"])
    assert study.report.seeds == [7]
    assert Trial(study, study.cells()[0], "report", 1e-3, 7).recipe().training.batch_size == 2


def test_the_resolved_study_reads_back_the_same(study_file, tmp_path):
    study = load_study(str(study_file))
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    assert load_study(str(tmp_path / "study.yaml")) == study


@pytest.mark.parametrize("text", ["1e-4", "a\u2028b", "my #1 set", "\x7f", "\N{GRINNING FACE}", "2024-01-01", "no"])
def test_text_reaches_the_recipes_as_it_is(study_file, text, tmp_path):
    study = load_study(str(study_file), [f"model.name={write_value(text)}"])
    (tmp_path / "study.yaml").write_text(study.to_yaml(), encoding="utf-8")
    for read in (study, load_study(str(tmp_path / "study.yaml"))):
        assert Trial(read, read.cells()[0], "report", 1e-3, 42).recipe().model.name == text


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("grid.placement={a: 5}", "grid.placement.a=5: input should be a list of names, or all-linear"),
        ("grid.r=[true]", "grid.r=[True]: input should be a number"),
        ("choose.learning_rate=[1e308]", "choose.learning_rate.0=1e+308: input should be a finite number"),
        ("grid.r=[1" + "0" * 400 + "]", "grid.r.0=1000"),
        ("grid.metod=[lora]", "grid.metod is not a key of a study; did you mean 'method'?"),
        ("choose.learning_rate=[]", "choose.learning_rate=[]: list should have at least 1 item"),
        ("choose.learning_rate=[-1]", "choose.learning_rate.0=-1: input should be greater than 0"),
        ("grid.method=[lora,lora]", "method 'lora' occurs twice; give each occurrence its own label"),
        ("grid.method=[lore]", "method.name='lore' is not known; did you mean 'lora'?"),
        ("grid.method=[mora]", "'mora' is not available: MoRA is not in PEFT"),
        ("grid.method=[{name: lora, label: a/b}]", "label='a/b' is part of folder names"),
        ("grid.method=[{name: lora, ranks: 3}]", "method.ranks is not an option of lora"),
        ("grid.method=[{name: lora, seeds: [1]}]", "seeds=[1] should be 2 seeds, as in report.seeds"),
        ("grid.method=[{name: lora, r: 4}]", "grid.method.0.r=4: input should be a valid list"),
        ("grid.method=[{name: lora, r: [0]}]", "grid.method.0.r.0=0: input should be greater than or equal to 1"),
        ("grid.method=[{name: lora, r: [2, 2]}]", "grid.method lora: r=[2, 2] should be distinct"),
        ("grid.method=[{name: full, r: [2]}]", "grid.method full: r=[2] has no effect, because the method has no rank"),
        ("against=dora", "against='dora' is not a method of the grid"),
        ("report.seeds=[1,1]", "report: seeds=[1, 1] should be distinct"),
        ("report.seeds=[-1]", "report.seeds.0=-1: input should be greater than or equal to 0"),
        ("choose.seeds=[1,1]", "choose.seeds=[1, 1] should be distinct"),
        ("grid.method=[{name: lora, seeds: [1, 1]}]", "grid.method lora: seeds=[1, 1] should be distinct"),
        ("task=leg_counting", "settings.task='leg_counting' cannot be set here; set tasks in grid.task"),
        ("task.name=leg_counting", "settings.task.name cannot be set here; set tasks in grid.task"),
        ("method.r=16", "settings.method.r cannot be set here; set options of a method in grid.method"),
        ("training.learning_rate=1e-3", "training.learning_rate cannot be set here; set rates in choose.learning_rate"),
        ("training.seed=1", "settings.training.seed cannot be set here; set seeds in choose.seeds and report.seeds"),
        ("training.train_share=0.5", "cannot be set here; set shares of the data in grid.train_share"),
        ("grid.task=[{name: leg_counting, training: {held_out: 3}}]", "grid.task leg_counting.training.held_out"),
        ("report.seeds=[4294967296]", "report.seeds.0=4294967296: input should be less than 4294967296"),
        ("choose={learning_rate: [1e-3], extend: 2}", "choose.extend=2 needs the ratio of two rates"),
        ("grid.method=[{name: lora, alpha: 2024-01-01}]", "2024-01-01"),
        (f"base={'x' * 300}", "is neither a file nor a recipe that ships with pera"),
        ("training.batch_sise=3", "training.batch_sise is not a key of a recipe; did you mean 'batch_size'?"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override, sentence, study_file):
    with pytest.raises(UserError) as caught:
        load_study(str(study_file), [override])
    assert sentence in str(caught.value)


def test_a_method_may_set_its_targets_unless_the_grid_has_placements(study_file):
    method = "grid.method=[{name: lora, target_modules: [q_proj]}]"
    study = load_study(str(study_file), [method])
    assert Trial(study, study.cells()[0], "report", 1e-3, 1).recipe().method["target_modules"] == ["q_proj"]
    with pytest.raises(UserError, match=r"lora\.target_modules cannot be set with grid\.placement"):
        load_study(str(study_file), [method, "grid.placement={V: [v_proj]}"])


def test_two_cells_with_one_name_are_rejected(study_file):
    tasks = "grid.task=[family_relationships,{name: leg_counting, label: family_relationships-pera}]"
    methods = "grid.method=[pera-rms,{name: lora, label: rms}]"
    with pytest.raises(UserError, match="are both named 'family_relationships-pera-rms-r2'; change a label"):
        load_study(str(study_file), [tasks, methods])


def test_a_base_file_is_found_from_every_working_directory(study_file, recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(recipe_file.parent)
    folder = StudyFolder(tmp_path / "study")
    folder.prepare(load_study(str(study_file), [f"base={recipe_file.name}"]))
    monkeypatch.chdir(tmp_path)
    assert folder.study.base == str(recipe_file)
    assert load_study("glue-screen").base == "glue-minilm"


def test_options_by_task_in_the_base_recipe_reach_the_methods():
    """The dropout of glue-roberta-base depends on the task."""
    study = {"base": "glue-roberta-base", "grid.method": "[lora,pera,hira]", "grid.task": "[mrpc,sst2]"}
    found = load_study("glue-confirm", [f"{key}={value}" for key, value in study.items()])
    dropouts = {
        (cell.task.label, cell.method.label): Trial(found, cell, "report", 1e-3, 42).recipe().method["dropout"]
        for cell in found.cells()
    }
    assert dropouts == {
        (task, method): dropout
        for task, dropout in (("mrpc", 0.25), ("sst2", 0.0))
        for method in ("lora", "pera", "hira")
    }


def test_methods_take_dropout_that_the_base_recipe_calls_by_its_own_name(study_file, tmp_path):
    (tmp_path / "own.yaml").write_text("model: x\nmethod: {name: lora, lora_dropout: 0.1, target_modules: [q_proj]}\n")
    study = load_study(str(study_file), [f"base={tmp_path / 'own.yaml'}"])
    recipes = [Trial(study, cell, "report", 1e-3, 1).recipe().method for cell in study.cells()]
    assert [(method["dropout"], method["target_modules"]) for method in recipes] == [(0.1, ["q_proj"])] * 2


def test_an_unknown_study_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"'glue-scren' is neither a file nor a study .*; did you mean 'glue-screen'"):
        load_study("glue-scren")


def test_the_command_plans_runs_and_reports(pera, study_file, tmp_path):
    small = ["training.max_steps=1", "grid.method=[lora]", "report.seeds=[42]", "choose.learning_rate=[1e-3]"]
    planned = pera("study", "run", study_file, *small, "--plan")
    assert planned.code == 0
    assert planned.out.splitlines()[:2] == [
        "to do     family_relationships-lora-r2-choose-lr0.001-seed1",
        "runs      1 to do",
    ]
    assert not (tmp_path / "studies").exists()
    done = pera("study", "run", study_file, *small)
    assert done.code == 0
    assert "2 finished" in done.out
    assert pera("study", "report", "studies/small").code == 0
    assert (tmp_path / "studies" / "small" / "report.md").is_file()


def test_a_plan_ends_with_counts_hours_and_what_comes_after(pera, study_file):
    """Eight runs of half an hour: two have ended, two are known, and four follow from their results."""
    plan = ["study", "run", study_file, "--output", "study", "choose.extend=3", "--plan"]
    assert pera(*plan).out.splitlines()[4:] == [
        "runs      4 to do",
        "after     4 reported runs, when the learning rates are chosen",
        "          up to 6 runs at further rates, if the best rate lies at an edge",
        "expected  unknown until the first run has finished",
        "Next: this command without --plan, then pera study report study",
    ]
    for trial in known_trials(load_study(str(study_file)), {})[:2]:
        run = Path("study", "runs", trial.name)
        run.mkdir(parents=True)
        write_json(run / "outcome.json", asdict(Outcome("finished", loss=1.0, wall_seconds=1800.0)))
    lines = pera(*plan, "--workers", "2").out.splitlines()
    assert "runs      2 finished, 2 to do" in lines
    assert "expected  about 3.0 h for all, 1.5 h with 2 workers" in lines


def test_shares_of_a_gpu_are_checked(refused, study_file):
    refused("study", "run", study_file, "resources.gpus=2", words=["resources.gpus", "less than or equal to 1"])
    refused("study", "run", study_file, "resources.gpus=1e-9", words=["gpus=1e-09 should be 0 or at least 0.01"])


def test_the_command_names_a_mistake_in_one_sentence(refused, study_file):
    refused("study", "run", study_file, "against=dora", words=["against='dora'", "lora"])
    refused("study", "report", "nowhere", "--output", "a.md", words=["--output='a.md' should end in .html"])
    refused("study", "report", "nowhere", words=["'nowhere' is not the folder of a study"])


def test_a_method_can_have_ranks_of_its_own(study_file):
    study = load_study(str(study_file), ["grid.method=[{name: lora, r: [1, 2, 8]},dora]", "grid.r=[2,4]"])
    assert {(cell.method.label, cell.r) for cell in study.cells()} == {
        *(("lora", r) for r in (1, 2, 8)),
        *(("dora", r) for r in (2, 4)),
    }
    assert {Trial(study, cell, "report", 1e-3, 42).recipe().peft_config().r for cell in study.cells()} == {1, 2, 4, 8}


MEMORY = """
base: phonebook-smollm2
settings: {task: {size: 4}, training: {max_steps: 2}}
grid: {task: [phonebook], method: [lora, pera-published], r: [2]}
choose: {learning_rate: [1.0e-2], seeds: [1]}
report: {seeds: [42, 43]}
"""


@pytest.fixture
def memory_file(tmp_path):
    (tmp_path / "memory.yaml").write_text(MEMORY)
    return tmp_path / "memory.yaml"


def test_rates_are_chosen_on_other_facts_and_each_reported_seed_has_its_own(memory_file):
    study = load_study(str(memory_file))
    cell, other = study.cells()

    def facts(cell, phase, seed):
        splits = Trial(study, cell, phase, 1e-2, seed).recipe().build_splits()
        assert splits.test == splits.train
        return set(splits.train)

    drawn = [facts(cell, "choose", 1), facts(cell, "report", 42), facts(cell, "report", 43)]
    assert len(set().union(*drawn)) == 12
    assert facts(other, "report", 42) == drawn[1]


def test_facts_and_other_tasks_share_a_study(memory_file, tmp_path):
    method = "method: {name: lora, target_modules: [q_proj]}"
    (tmp_path / "base.yaml").write_text(f"model: tiny\n{method}\ntask: phonebook\ntraining: {{max_steps: 1}}\n")
    mixed = [f"base={tmp_path / 'base.yaml'}", "grid.task=[phonebook,leg_counting]", "settings={}", "choose.rows=7"]
    study = load_study(str(memory_file), mixed)
    held_out = {c.task.label: Trial(study, c, "choose", 1e-2, 1).recipe().training.held_out for c in study.cells()}
    assert held_out == {"phonebook": 0, "leg_counting": 7}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("choose.rows=5", "choose.rows=5 has no effect, because every task is tested on its training rows; leave it"),
        ("choose.seeds=[1,43]", "choose.seeds and report.seeds share 43, so a rate would be chosen on reported facts"),
        ("task.seed=3", "grid.task phonebook: task.seed cannot be set; each run draws its facts from its own seed"),
        ("task.data=DATA", "grid.task phonebook: its rows come from data, so rates would be chosen on the reported"),
        ("grid.method=[lora,{name: lora, label: b, seeds: [7, 8]}]", "grid.method b: seeds=[7, 8] would compare other"),
    ],
)
def test_studies_that_would_choose_on_reported_facts_are_refused(memory_file, override, sentence):
    with pytest.raises(UserError) as error:
        load_study(str(memory_file), [override.replace("DATA", str(memory_file))])
    assert sentence in str(error.value)
