"""A regular expression in a stranger's adapter cannot stop a command."""

import signal
import threading
import time

import pytest
from peft import LoraConfig, get_peft_model

from pera import PeraConfig, UserError
from pera.tuner import expressions
from pera.tuner.expressions import check_speed
from tiny import llama

SLOW = "(.*)*(.*)*(.*)*x"


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 0.1)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("target_modules", {"target_modules": SLOW}),
        ("target_modules", {"target_modules": r"((a|[a-z._0-9]+)+)+[$]"}),
        ("exclude_modules", {"target_modules": "all-linear", "exclude_modules": SLOW}),
        ("rank_pattern", {"target_modules": ["q_proj"], "rank_pattern": {SLOW: 2}}),
        ("alpha_pattern", {"target_modules": ["q_proj"], "alpha_pattern": {SLOW: 2}}),
    ],
)
def test_an_expression_that_does_not_end_is_refused(key, options):
    start, names = time.monotonic(), [name for name, _ in llama().named_modules()]
    for config in (PeraConfig(**options), LoraConfig(**options)):
        with pytest.raises(UserError, match=rf"^{key}: the regular expression .* takes more than 0.1 s"):
            check_speed(names, config)
    with pytest.raises(UserError, match=key):
        get_peft_model(llama(), PeraConfig(**options))
    assert time.monotonic() - start < 5


def test_usual_expressions_pass_and_leave_the_timer_alone():
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        options = {"target_modules": r".*\.(q|k)_proj", "rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2}}
        get_peft_model(llama(), PeraConfig(**options))
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_nothing_is_checked_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(check_speed(["a"], PeraConfig(target_modules=SLOW))))
    thread.start()
    thread.join()
    assert found == [None]
