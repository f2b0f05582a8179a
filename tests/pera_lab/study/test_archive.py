"""The archive of a study, and the tables of its scores."""

import json
import shutil
import tarfile

from pera_lab.study import load_study
from pera_lab.study.archive import write_archive
from pera_lab.study.folder import StudyFolder
from pera_lab.study.results import Results
from pera_lab.study.scores import score_tables


def test_an_archived_study_has_the_same_scores_and_no_adapters_prompts_or_paths(finished, study_file, tmp_path):
    shutil.copytree(finished.path, tmp_path / "studies" / "small")
    write_archive(tmp_path / "studies" / "small", tmp_path / "small.tar.xz")
    with tarfile.open(tmp_path / "small.tar.xz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    folder = StudyFolder(tmp_path / "unpacked" / "small")
    study, results, expected = load_study(str(study_file)), Results(folder), Results(finished)
    assert folder.outcomes(study) == finished.outcomes(study)
    assert [results.mean(cell) for cell in results.cells] == [expected.mean(cell) for cell in expected.cells]
    files = [file for file in folder.path.rglob("*") if file.is_file()]
    assert {"adapter", "checkpoints", "locks"}.isdisjoint({part for file in files for part in file.parts})
    assert str(tmp_path) not in "".join(file.read_text() for file in files)
    answers = [json.loads(line) for file in folder.path.rglob("adapter.jsonl") for line in file.open()]
    assert {(row["prompt"], row["scores"]) for row in answers} == {("", None)}


def test_scores_are_shown_in_a_table_for_each_scorer(finished):
    runs = [Results(finished).scored(cell)[0].run for cell in Results(finished).cells]
    scorer, _, head, _, *rows = score_tables(runs).strip().split("\n")
    assert scorer == "Scorer: exact_match"
    assert head.startswith("| task | model | metric | n |")
    assert [row.split(" | ")[0] for row in rows] == ["| family_relationships"] * 2
