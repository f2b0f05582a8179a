"""Splits of a task: held-out rows, shares of the training rows, and what is noted about them."""

from collections import Counter
from dataclasses import replace

import pytest

from pera.errors import UserError
from pera_lab.recipe import load_recipe
from pera_lab.tasks import Example, Splits, subsample


def numbered(size=100):
    """Splits of numbered examples."""
    train = [Example(f"question {i}", str(i)) for i in range(size)]
    test = [Example(f"test {i}", str(i)) for i in range(10)]
    manifest = {"train": {"rows": 120, "used": size}, "test": {"rows": 10, "used": 10}, "seed": 42}
    return Splits(train, test, manifest=manifest)


def test_held_out_rows_replace_the_test_rows_and_are_not_trained_on():
    splits = numbered()
    found = subsample(splits, held_out=20)
    assert (len(found.train), len(found.test)) == (80, 20)
    assert sorted(found.train + found.test, key=splits.train.index) == splits.train
    assert found.test != splits.train[:20]
    assert (len(splits.train), len(splits.test)) == (100, 10)


def test_held_out_rows_do_not_depend_on_the_share():
    assert subsample(numbered(), held_out=20).test == subsample(numbered(), held_out=20, share=0.1).test


def test_a_smaller_share_is_a_subset_of_a_larger_one_in_the_order_of_the_data():
    splits = numbered()
    shares = [subsample(splits, share=share).train for share in (0.1, 0.5, 1.0)]
    assert [len(s) for s in shares] == [10, 50, 100]
    assert {s.answer for s in shares[0]} < {s.answer for s in shares[1]}
    assert shares[2] == splits.train
    assert [int(e.answer) for e in shares[1]] == sorted(int(e.answer) for e in shares[1])
    assert subsample(splits, share=0.5).test == splits.test


def test_missing_parts_and_repeated_rows_are_noted():
    splits = numbered()
    assert splits.notes == []
    repeated = replace(splits, test=[*splits.train[:2], *splits.test[2:]])
    assert repeated.notes == ["2 of 10 test rows also occur in the training data."]
    grouped = [replace(example, group="boolq") for example in repeated.test]
    mix = replace(repeated, test=grouped, missing=["piqa is missing."])
    assert mix.notes == ["piqa is missing.", "boolq: 2 of 10 test rows also occur in the training data."]


def test_repeated_rows_are_counted_among_held_out_rows():
    splits = numbered()
    assert subsample(splits, held_out=20).notes == []
    found = subsample(replace(splits, train=[*splits.train, *splits.train]), held_out=20)
    twins = sum(example in found.train for example in found.test)
    assert 0 < twins <= 20
    assert found.notes == [f"{twins} of 20 test rows also occur in the training data."]


def test_the_manifest_counts_the_remaining_rows():
    splits = numbered()
    assert subsample(splits, share=0.5).manifest == {**splits.manifest, "train": {"rows": 120, "used": 50}}
    assert subsample(splits, share=0.5, held_out=20).manifest == {
        "train": {"rows": 120, "used": 40},
        "test": {"rows": 10, "used": 0},
        "seed": 42,
        "held_out": {"rows": 20, "of": "train"},
    }


def test_the_manifest_of_a_mix_counts_by_member():
    train = [replace(e, group="boolq" if i < 60 else "piqa") for i, e in enumerate(numbered().train)]
    mix = Splits(train, [], manifest={"train": {"boolq": {"used": 63}, "piqa": {"used": 40}}})  # 3 of them validate
    found = subsample(mix, share=0.5)
    of = Counter(example.group for example in found.train)
    assert found.manifest == {"train": {"boolq": {"used": 3 + of["boolq"]}, "piqa": {"used": of["piqa"]}}}
    mixed_file = replace(mix, manifest={"train": {"mix": {"used": 103}}})
    assert subsample(mixed_file, share=0.5).manifest == {"train": {"mix": {"used": 53}}}


def test_holding_out_all_rows_is_an_error():
    with pytest.raises(UserError, match=r"training\.held_out=100 leaves none of the 100 training rows"):
        subsample(numbered(), held_out=100)


def test_a_recipe_holds_out_rows(recipe_file):
    whole = load_recipe(str(recipe_file)).build_splits()
    found = load_recipe(str(recipe_file), ["training.held_out=16", "training.train_share=0.5"]).build_splits()
    assert (len(whole.train), len(found.train), len(found.test)) == (64, 24, 16)
    assert not {e.prompt for e in found.train} & {e.prompt for e in found.test}
