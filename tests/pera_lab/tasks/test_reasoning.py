"""Problems of reasoning-gym: two splits without overlap, judged by the library."""

import re
import sys

import pytest

from pera.errors import UserError
from pera_lab.extras import install_command
from pera_lab.tasks.reasoning import ReasoningTask

FEW = {"min_animals": 1, "max_animals": 1, "max_instances": 2}
"""Options with which leg_counting has fewer than a hundred distinct problems."""


def questions(examples):
    return [example.prompt for example in examples]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "train_size", "test_size", "options"),
    [("family_relationships", 400, 200, {}), ("leg_counting", 40, 20, FEW), ("spell_backward", 100, 50, {})],
)
def test_no_problem_occurs_twice(name, train_size, test_size, options, seed):
    task = ReasoningTask(name=name, train_size=train_size, test_size=test_size, seed=seed, options=options)
    splits = task.build()
    train, test = questions(splits.train), questions(splits.test)
    assert (len(train), len(test)) == (train_size, test_size)
    assert len({*train, *test}) == train_size + test_size


def test_draws_repeat_if_problems_are_few():
    """Guards the test above: without the removal of duplicates it would fail."""
    drawn = ReasoningTask(name="leg_counting", train_size=1, test_size=1, options=FEW)._problems(0, 60)
    assert len({problem["question"] for problem in drawn}) < 60


def test_the_seed_decides_what_is_drawn():
    first, again, other = (
        ReasoningTask(name="family_relationships", train_size=20, test_size=10, seed=seed).build() for seed in (0, 0, 1)
    )
    assert (first.train, first.test) == (again.train, again.test)
    assert first.train != other.train
    assert first.test != other.test


def test_the_held_out_problems_do_not_depend_on_the_size_of_training():
    small, large = (ReasoningTask(name="family_relationships", train_size=n, test_size=10).build() for n in (5, 50))
    assert small.test == large.test
    assert small.train == large.train[:5]


@pytest.mark.parametrize("sizes", [{"train_size": 500, "test_size": 1}, {"train_size": 1, "test_size": 500}])
def test_more_problems_than_there_are_is_refused(sizes):
    key = max(sizes, key=sizes.get)
    with pytest.raises(UserError, match=rf"^task\.{key}=500 is too large: leg_counting has only \d+ distinct problems"):
        ReasoningTask(name="leg_counting", **sizes, options=FEW).build()


def test_an_unknown_data_set_is_refused_with_the_nearest_known():
    with pytest.raises(UserError, match=r"^task\.name='leg_count' is not known; did you mean 'leg_counting'\?$"):
        ReasoningTask(name="leg_count").build()


@pytest.mark.parametrize("options", [{"animals": 3}, {"min_animals": 3, "max_animals": 1}, {"size": 3}])
def test_options_that_do_not_fit_are_refused(options):
    with pytest.raises(UserError, match=rf"^task\.options={options!r} does not fit leg_counting: "):
        ReasoningTask(name="leg_counting", train_size=1, test_size=1, options=options).build()


def test_options_reach_the_data_set():
    task = ReasoningTask(name="leg_counting", train_size=20, test_size=1, options=FEW)
    assert {example.data["metadata"]["num_animals"] for example in task.build().train} == {1}


def test_an_answer_is_scored_by_the_library():
    task = ReasoningTask(name="family_relationships", train_size=1, test_size=4)
    for example in task.build().test:
        assert task.judge(example, example.answer).correct
        assert task.judge(example, f" {example.answer}\n").correct
        assert not task.judge(example, "neighbour").correct
        assert not task.judge(example, "").correct


def test_an_answer_that_the_library_cannot_read_is_wrong():
    task = ReasoningTask(name="prime_factorization", train_size=1, test_size=1)
    (example,) = task.build().test
    assert task.judge(example, example.answer).correct
    assert not task.judge(example, "no list of numbers").correct


def test_problems_without_answers_are_refused():
    with pytest.raises(UserError, match=r"task\.name='rubiks_cube' has problems without answers"):
        ReasoningTask(name="rubiks_cube").build()


def test_without_reasoning_gym_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=re.escape(f"'reasoning-gym'; install it with: {install_command('demo')}")):
        ReasoningTask(name="leg_counting").build()
