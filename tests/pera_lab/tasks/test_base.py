"""Rows carved from the training set, and shares of it."""

from collections import Counter
from dataclasses import replace

import pytest

from pera.errors import UserError
from pera_lab.recipe import load_recipe
from pera_lab.tasks import Example, Task, divided


class Counting(Task):
    """A task of numbered examples."""

    name = "counting"

    def __init__(self, size=100):
        self.train = [Example(f"question {i}", str(i)) for i in range(size)]
        self.test = [Example(f"test {i}", str(i)) for i in range(10)]
        self.manifest = {"train": {"rows": 120, "used": size}, "test": {"rows": 10, "used": 10}, "seed": 42}


def test_held_out_rows_take_the_place_of_the_test_rows_and_are_not_trained_on():
    task = Counting()
    found = divided(task, held_out=20)
    assert (len(found.train), len(found.test)) == (80, 20)
    assert sorted(found.train + found.test, key=task.train.index) == task.train
    assert found.test != task.train[:20]
    assert (len(task.train), len(task.test)) == (100, 10)


def test_the_same_rows_every_time_and_whatever_the_share():
    assert divided(Counting(), held_out=20).test == divided(Counting(), held_out=20, share=0.1).test


def test_a_smaller_share_is_part_of_a_larger_one_in_the_order_of_the_data():
    task = Counting()
    shares = [divided(task, share=share).train for share in (0.1, 0.5, 1.0)]
    assert [len(s) for s in shares] == [10, 50, 100]
    assert {s.answer for s in shares[0]} < {s.answer for s in shares[1]}
    assert shares[2] == task.train
    assert [int(e.answer) for e in shares[1]] == sorted(int(e.answer) for e in shares[1])
    assert divided(task, share=0.5).test == task.test


def test_rows_of_the_test_that_are_in_training_are_counted():
    task = Counting()
    assert task.notes == []
    task.test[3:5] = task.train[:2]
    assert task.notes == ["counting: 2 of 10 test rows also occur in the training data."]
    task.missing = ["piqa is missing."]
    task.test = [replace(example, group="boolq") for example in task.test]
    assert task.notes == ["piqa is missing.", "boolq: 2 of 10 test rows also occur in the training data."]


def test_they_are_counted_in_the_rows_that_are_held_out():
    task = Counting()
    assert divided(task, held_out=20).notes == []
    task.train *= 2
    found = divided(task, held_out=20)
    twins = sum(example in found.train for example in found.test)
    assert 0 < twins <= 20
    assert found.notes == [f"counting: {twins} of 20 test rows also occur in the training data."]


def test_the_manifest_counts_the_rows_that_are_left():
    task = Counting()
    assert divided(task, share=0.5).manifest == {**task.manifest, "train": {"rows": 120, "used": 50}}
    assert divided(task, share=0.5, held_out=20).manifest == {
        "train": {"rows": 120, "used": 40},
        "test": {"rows": 10, "used": 0},
        "seed": 42,
        "held_out": {"rows": 20, "of": "train"},
    }


def test_the_manifest_of_a_mix_counts_by_member():
    task = Counting()
    for i, example in enumerate(task.train):
        task.train[i] = replace(example, group="boolq" if i < 60 else "piqa")
    task.manifest = {"train": {"boolq": {"used": 63}, "piqa": {"used": 40}}}  # 3 of them validate
    found = divided(task, share=0.5)
    of = Counter(example.group for example in found.train)
    assert found.manifest == {"train": {"boolq": {"used": 3 + of["boolq"]}, "piqa": {"used": of["piqa"]}}}
    task.manifest = {"train": {"mix": {"used": 103}}}
    assert divided(task, share=0.5).manifest == {"train": {"mix": {"used": 53}}}


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(UserError, match=r"training\.held_out=100 leaves nothing of the 100 rows of counting"):
        divided(Counting(), held_out=100)


def test_a_recipe_holds_out_rows(recipe_file):
    whole = load_recipe(str(recipe_file)).build_task()
    found = load_recipe(str(recipe_file), ["training.held_out=16", "training.train_share=0.5"]).build_task()
    assert (len(whole.train), len(found.train), len(found.test)) == (64, 24, 16)
    assert not {e.prompt for e in found.train} & {e.prompt for e in found.test}
