"""GLUE: rows, the division of the validation set, metrics, and what is refused."""

import json

import pytest

from pera.errors import UserError
from pera_lab.tasks import LabelledText, Splits, glue
from pera_lab.tasks.glue import GlueTask
from shared import DATA, needs_data

ROWS = {"sst2": 10_000, "mrpc": 3668, "cola": 8551, "qnli": 9833, "stsb": 5749}
VALIDATION = {"sst2": (436, 436), "mrpc": (204, 204), "cola": (521, 522), "qnli": (1000, 4463), "stsb": (750, 750)}
LABELS = {
    "sst2": {0: 4362, 1: 5638},
    "mrpc": {0: 1194, 1: 2474},
    "cola": {0: 2528, 1: 6023},
    "qnli": {0: 4920, 1: 4913},
}
FIRST = {
    "sst2": LabelledText(("on the worst revenge-of-the-nerds clichés the filmmakers could dredge up ",), 0),
    "mrpc": LabelledText(
        (
            'Amrozi accused his brother , whom he called " the witness " , of deliberately distorting his evidence .',
            'Referring to him as only " the witness " , Amrozi accused his brother of deliberately distorting his '
            "evidence .",
        ),
        1,
    ),
    "cola": LabelledText(("Our friends won't buy this analysis, let alone the next one we propose.",), 1),
    "qnli": LabelledText(
        (
            "What is the name of the village 9 miles north of Calafat where the Ottoman forces attacked the Russians?",
            "On 31 December 1853, the Ottoman forces at Calafat moved against the Russian force at Chetatea or Cetate, "
            "a small village nine miles north of Calafat, and engaged them on 6 January 1854.",
        ),
        0,
    ),
    "stsb": LabelledText(("A plane is taking off.", "An air plane is taking off."), 5.0),
}


@needs_data
@pytest.mark.parametrize("name", ROWS)
def test_all_rows_of_the_shared_files_are_read_and_divided(name):
    task = GlueTask(name=name, data=str(DATA / "glue"))
    splits = task.build()
    assert len(splits.train) == ROWS[name]
    assert (len(splits.validation), len(splits.test)) == VALIDATION[name]
    assert splits.train[0] == FIRST[name]
    if name in LABELS:
        labels = [row.label for row in splits.train]
        assert {label: labels.count(label) for label in (0, 1)} == LABELS[name]
        assert task.labels == 2
    else:
        assert task.labels == 1
        assert all(0 <= row.label <= 5 for row in splits.train)


@needs_data
def test_repeated_rows_are_counted():
    assert GlueTask(name="sst2", data=str(DATA / "glue")).build().notes == []
    (note,) = GlueTask(name="cola", data=str(DATA / "glue"), choose_size=0).build().notes
    assert note == "16 of 1043 test rows also occur in the training data."


def sizes(splits: Splits):
    return len(splits.train), len(splits.validation), len(splits.test)


@pytest.fixture
def folder(tmp_path):
    """A folder with a task of some rows."""

    def make(name, rows=20, train=None):
        fields = glue.GLUE[name].fields
        labels = len(glue.GLUE[name].names)
        made = [
            {f: f"{f} {i}" for f in fields} | {"label": i % labels if labels else i % 6, "idx": i} for i in range(rows)
        ]
        (tmp_path / name).mkdir()
        for split, content in (("train", train or made), (glue.GLUE[name].validation, made)):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(tmp_path)

    return make


@pytest.mark.parametrize("name", glue.GLUE)
def test_every_task_is_read(name, folder):
    task = GlueTask(name=name, data=folder(name))
    splits = task.build()
    assert sizes(splits) == (20, 10, 10)
    assert len(splits.train[0].texts) == len(glue.GLUE[name].fields)
    assert {row.texts for row in splits.validation}.isdisjoint(row.texts for row in splits.test)
    assert next(iter(task.measure([1, 0, 1], [1, 0, 0]))) == task.metric


def test_the_seed_decides_the_division_of_the_validation_set(folder):
    data = folder("rte")
    one, again, other = (GlueTask(name="rte", data=data, seed=seed).build().test for seed in (42, 42, 43))
    assert one == again != other


@pytest.mark.parametrize(("rows", "choose"), [(2000, 1000), (2600, 1000), (1000, 500)])
def test_more_than_two_thousand_rows_give_a_thousand_to_choose_by(rows, choose, folder):
    assert sizes(GlueTask(name="sst2", data=folder("sst2", rows)).build()) == (rows, choose, rows - choose)


def test_sizes_can_be_given(folder):
    data = folder("sst2", 30)
    splits = GlueTask(name="sst2", data=data, train_size=7, test_size=5, choose_size=4).build()
    assert sizes(splits) == (7, 4, 5)
    assert splits.manifest["train"]["used"] == 7
    with pytest.raises(UserError, match=r"^task\.choose_size=30 leaves no test row"):
        GlueTask(name="sst2", data=data, choose_size=30).build()


def test_metrics_are_those_of_the_libraries():
    gold, predicted = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    assert glue.METRICS["accuracy"](gold, predicted) == 0.6
    assert glue.METRICS["f1"](gold, predicted) == pytest.approx(2 / 3)
    assert glue.METRICS["matthews"](gold, predicted) == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)
    assert glue.METRICS["pearson"]([1, 2, 3], [1, 2, 5]) == pytest.approx(0.9608, abs=1e-4)
    assert glue.METRICS["spearman"]([1, 2, 3], [1, 2, 5]) == 1.0
    assert glue.METRICS["pearson"]([1, 2, 3], [2, 2, 2]) == 0.0


def test_the_majority_is_that_of_the_training_rows(folder):
    train = [{"sentence": f"t{i}", "label": int(i > 3), "idx": i} for i in range(20)]
    task = GlueTask(name="sst2", data=folder("sst2", 20, train))
    splits = task.build()
    assert task.majority(splits) == sum(row.label for row in splits.test) / 10


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"sentence": "x", "label": 2, "idx": 0},
            r"field 'label'=2 should be one of 0 \(negative\), 1 \(positive\)\.$",
        ),
        ({"sentence": "x", "label": -1, "idx": 0}, r"field 'label'=-1 should be one of 0 \(negative\)"),
        ({"sentence": "x", "idx": 0}, r"field 'label' is missing; the fields are sentence, idx\.$"),
        ({"text": "x", "label": 0}, r"field 'sentence' is missing"),
        ({"sentence": "", "label": 0}, r"field 'sentence'='' should be a text"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_field(row, sentence, folder):
    train = [{"sentence": "fine", "label": 0, "idx": 0}, row]
    with pytest.raises(UserError, match=rf"sst2/train\.jsonl, line 2: {sentence}"):
        GlueTask(name="sst2", data=folder("sst2", 4, train)).build()


def test_a_score_beyond_five_is_refused(folder):
    train = [{"sentence1": "a", "sentence2": "b", "label": 5.5}]
    with pytest.raises(
        UserError, match=r"stsb/train\.jsonl, line 1: field 'label'=5\.5 should be a number from 0 to 5"
    ):
        GlueTask(name="stsb", data=folder("stsb", 4, train)).build()


def test_a_missing_split_and_a_missing_folder_are_named(folder, tmp_path):
    data = folder("sst2")
    (tmp_path / "sst2" / "validation.jsonl").unlink()
    with pytest.raises(UserError, match=r"'.*sst2/validation' is missing; .* \(found train\.jsonl\)"):
        GlueTask(name="sst2", data=data).build()
    with pytest.raises(UserError, match=r"^task\.data: the split '.*cola/train' is missing; .*no such folder"):
        GlueTask(name="cola", data=data).build()
    with pytest.raises(UserError, match=r"^task\.data='nowhere' does not exist; give a folder, or 'hub'"):
        GlueTask(name="sst2", data="nowhere").build()


def test_the_hub_is_asked_for_its_data_set(folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    data = folder("rte")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: rte\n  data_files:\n  - {split: train, path: rte/train.jsonl}\n"
        "  - {split: validation, path: rte/validation.jsonl}\n---\n"
    )
    monkeypatch.setattr(glue, "REPOSITORY", data)
    online, offline = GlueTask(name="rte").build(), GlueTask(name="rte", data=data).build()
    assert (online.train, online.test) == (offline.train, offline.test)
