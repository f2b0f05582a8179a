"""Long data: rows that stay on the disk, and their token ids in the cache."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pera.errors import UserError
from pera_lab import progress
from pera_lab.recipe import load_recipe
from pera_lab.runs import Run
from pera_lab.tasks import cache, sources
from pera_lab.tasks.cache import encode_stored, lengths
from pera_lab.tasks.examples import StoredExamples, subsample
from pera_lab.tasks.glue import GlueTask
from pera_lab.tasks.own import OwnTask
from pera_lab.training import train

datasets = pytest.importorskip("datasets")
ipc = pytest.importorskip("pyarrow.ipc")


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    """The folder of the cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "datasets" / "pera"


@pytest.fixture
def long_data(monkeypatch):
    """Files of any size stay on the disk."""
    monkeypatch.setattr(sources, "LONG", 0)


@pytest.fixture
def file(tmp_path):
    """Rows with prompts and with messages, of which two occur twice, and a column that nothing uses."""
    rows = [{"prompt": f"question {i}", "completion": "yes " * (i % 5) + f"{i}", "more": ""} for i in range(60)]
    rows += [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "é"}]} for i in range(9)
    ]
    rows += [{**rows[3], "more": "x"}, rows[4]]
    (tmp_path / "rows.jsonl").write_text("\n \n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


def encode(task, tokenizer, max_length=64):
    """Token ids of the training rows, from the disk."""
    return encode_stored(task, tokenizer, task.build().train, max_length)


def content(encoded):
    return [dict(row) for row in encoded.rows], encoded.left_out, encoded.shortened


@pytest.mark.parametrize("missing", [True, False])
def test_a_cache_that_cannot_be_written_is_named(missing, file, long_data, tokenizer, monkeypatch, cached):
    if missing:
        cached.parent.touch()
    else:
        cached.mkdir(parents=True)
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != cached)
    words = r"the cache '.*pera' cannot be written: .*; set HF_DATASETS_CACHE to another folder"
    with pytest.raises(UserError, match=words):
        encode(OwnTask(data=str(file), test_size=10), tokenizer)


def test_long_data_give_the_same_splits_and_manifest(file, monkeypatch):
    task = OwnTask(data=str(file), train_size=30, test_size=20, validation_size=5)
    expected = task.build()
    monkeypatch.setattr(sources, "LONG", 0)
    found = task.build()
    assert isinstance(found.train, StoredExamples)
    for of in (lambda splits: splits, lambda splits: subsample(splits, share=0.5, held_out=7)):
        for name in ("train", "validation", "test"):
            assert list(getattr(of(found), name)) == list(getattr(of(expected), name))
            assert [x.place for x in getattr(of(found), name)] == [x.place for x in getattr(of(expected), name)]
        assert of(found).manifest == of(expected).manifest
        assert of(found).notes == of(expected).notes
    assert "columns that are not used: more." in expected.notes


def test_token_ids_of_long_data_equal_those_in_memory(file, tokenizer, long_data):
    task = OwnTask(data=str(file), test_size=5)
    expected = task.encode(tokenizer, list(task.build().train), 34)
    assert 0 < expected.left_out < len(expected.rows)
    for _ in range(2):  # the second time from the cache
        found = encode(task, tokenizer, 34)
        assert content(found) == content(expected)
        assert lengths(found.rows) == lengths(expected.rows)
        assert found.largest == max(max(row["input_ids"]) for row in expected.rows)


def test_the_hub_data_of_a_classifier_stay_on_the_disk(glue_folder, tokenizer, monkeypatch, tmp_path):
    read = sources.read_hub
    for name in ("sst2", "stsb"):
        task, folder = GlueTask(name=name, data="hub"), str(glue_folder / name)
        monkeypatch.setattr(
            "pera_lab.tasks.glue.read_hub", lambda _, __, split, folder=folder: read(folder, None, split)
        )
        expected = task.encode(tokenizer, task.build().train, 8)
        monkeypatch.setattr(sources, "LONG", 0)
        assert content(encode(task, tokenizer, 8)) == content(expected)
        monkeypatch.undo()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_parquet_stays_on_the_disk(file, tmp_path, long_data):
    path, lines = tmp_path / "a[1].parquet", file.with_name("lines.jsonl")
    lines.write_text(file.read_text().partition('{"messages')[0])
    datasets.Dataset.from_list(
        [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
    ).to_parquet(path)
    for _ in range(2):
        found, expected = (OwnTask(data=str(data), test_size=3).build() for data in (path, lines))
        assert isinstance(found.train, StoredExamples)
        assert list(found.train) == list(expected.train)
        digest = sources.read_file(path).sha256
        assert found.manifest["train"] == {**expected.manifest["train"], "source": str(path), "sha256": digest}


def test_token_ids_are_made_once_for_the_same_rows_and_settings(file, tokenizer, long_data, own_tokenizer, monkeypatch):
    made = []
    original = OwnTask.encode
    monkeypatch.setattr(OwnTask, "encode", lambda *arguments: made.append(1) or original(*arguments))

    def number(task=None, tokenizer=tokenizer, max_length=64):
        made.clear()
        encode(task or OwnTask(data=str(file), test_size=5), tokenizer, max_length)
        return len(made)

    assert [number(), number()] == [1, 0]
    others = {"template": {"template": "plain"}, "seed": {"seed": 1}, "size": {"train_size": 9}}
    for other in others.values():
        (data := file.with_name("prompts.jsonl")).write_text(file.read_text().partition('{"messages')[0])
        task = OwnTask(**{"data": str(data), "test_size": 5, **other})
        assert [number(task), number(task)] == [1, 0]
    assert [number(max_length=9), number(max_length=9)] == [1, 0]
    assert [number(tokenizer=own_tokenizer), number(tokenizer=own_tokenizer)] == [1, 0]
    half = subsample(OwnTask(data=str(file), test_size=5).build(), share=0.5).train
    made.clear()
    assert len(encode_stored(OwnTask(data=str(file), test_size=5), tokenizer, half, 64).rows) == len(half)
    assert made == [1]
    monkeypatch.setattr(cache, "_code", lambda task: ["another version"])
    assert number() == 1
    file.write_text(file.read_text().replace("question 7", "question 8"))
    assert number() == 1
    assert number(OwnTask(data=str(file.rename(file.with_name("renamed.jsonl"))), test_size=5)) == 0


def test_a_killed_process_leaves_nothing_that_is_read(file, tokenizer, long_data, cached, monkeypatch):
    task, original = OwnTask(data=str(file), test_size=5), OwnTask.encode
    expected = task.encode(tokenizer, list(task.build().train), 64)
    assert len(expected.rows) > 30
    monkeypatch.setattr(cache, "_CHUNK", 4)
    monkeypatch.setattr(OwnTask, "encode", lambda *arguments: time.sleep(0.05) or original(*arguments))
    process = multiprocessing.get_context("fork").Process(target=encode, args=(task, tokenizer))
    process.start()
    while not any(part.stat().st_size for part in cached.glob("*/rows.arrow")):
        assert process.is_alive()
    process.kill()
    process.join()
    assert any(cached.iterdir())
    assert content(encode(task, tokenizer)) == content(expected)
    assert [path.suffix for path in cached.iterdir()] == [""]  # nothing else is left


def test_a_damaged_cache_is_one_sentence(file, tokenizer, long_data, cached):
    task = OwnTask(data=str(file), test_size=5)
    encode(task, tokenizer)
    (folder,) = cached.iterdir()
    few = ipc.open_stream((folder / "rows.arrow").read_bytes()).read_all().slice(0, 3)
    with ipc.new_stream(folder / "few.arrow", few.schema) as writer:
        writer.write_table(few)
    for damage in (b"", (folder / "rows.arrow").read_bytes()[:400], (folder / "few.arrow").read_bytes()):
        (folder / "rows.arrow").write_bytes(damage)
        with pytest.raises(UserError, match=rf"{folder.name}' is damaged.*; remove this folder\.$"):
            encode(task, tokenizer)


def test_a_file_that_changes_in_place_is_refused(file, long_data):
    splits = OwnTask(data=str(file), test_size=5).build()
    file.with_name("other").write_text("")
    file.with_name("other").rename(file)
    assert splits.train[0].prompt == "question 0"  # the file that was opened
    splits = OwnTask(data=str(file.with_name("again.jsonl")), test_size=5)
    Path(splits.data).write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    train = splits.build().train
    Path(splits.data).write_text('{"prompt": "c", "completion": "d"}\n' * 8)
    with pytest.raises(UserError, match=r"again\.jsonl changed while it was read"):
        list(train)


OPTIONS = ["task.test_size=5", "task.validation_size=4", "training.eval_steps=4", "training.group_by_length=true"]


def test_training_on_long_data_gives_the_same_bits(file, recipe_file, tmp_path, monkeypatch, cached):
    recipe = load_recipe(str(recipe_file), ["task=own", f"task.data={file}", *OPTIONS])
    runs = {}
    for name, limit in (("memory", 2**24), ("disk", 0), ("cache", 0)):
        monkeypatch.setattr(sources, "LONG", limit)
        runs[name] = Run.create(recipe, tmp_path / name)
        train(recipe, runs[name])
        assert len(list(cached.glob("*"))) == (0 if name == "memory" else 1)
    expected = load_file(runs["memory"].adapter.path / "adapter_model.safetensors")
    for name in ("disk", "cache"):
        found = load_file(runs[name].adapter.path / "adapter_model.safetensors")
        assert all(found[key].equal(tensor) for key, tensor in expected.items())
        assert runs[name].data_file.read_text() == runs["memory"].data_file.read_text()
        assert runs[name].validation() == runs["memory"].validation()


def test_our_progress_is_shown_alone(file, pera, recipe_file, tmp_path, long_data, monkeypatch):
    monkeypatch.setattr(progress, "SLOW", 0)
    arguments = ["task=own", f"task.data={file}", "task.test_size=5", "training.max_steps=2"]
    outcome = pera("train", recipe_file, *arguments, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    known = ("tokenizing ", "training ", "run folder ", "about ", "warning: ")
    assert all(line.startswith(known) or line.endswith(" …") for line in outcome.err.splitlines()), outcome.err
    assert "tokenizing 64 of 64\n" in outcome.err
    again = pera("train", recipe_file, *arguments, "--output", tmp_path / "again")
    assert "tokenizing" not in again.err
