"""Regular expressions that would hang a match are refused, and ordinary ones are not."""

import json
import threading
import time

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from pera import PeraConfig, UserError
from pera.tuner.expressions import check_cost, check_speed
from tiny import adapt, llama

HANGS = "(.*)*(.*)*(.*)*x"
NAME = "model.language_model.layers.31.self_attn.rotary_embedding.q_proj"
SLOW = [
    r"(\w+\.?)+!",
    r"([a-z0-9_.]+)+$!",
    r"(.|\w)*!",
    r".*.*.*.*.*.*.*.*!",
    r"(?=(\w+\.?)+!).*",
    r"((a?)*)*",
    r"(?i:([A-Z0-9_.]+)+)!",
    r"(.*)\1!",
    r"(((.?){99}){99}){99}",
]
FAST = [
    r".*\.(q|k|v)_proj",
    r"(.*\.)?(q_proj|v_proj)",
    r"^(?!.*lm_head).*proj$",
    r"(\w+\.)*q_proj",
    r"([^.]*\.)*q_proj",
    r".*layers\.(1[0-9]|2[0-3]|31)\..*attn.*_proj.*",
    r"(?:.*?(?:vision|image|patch_embed).*?(?:self_attn|attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.q)",
    r"(?<=x)q|model\.[a-zA-Z_]+\..*",
]


@pytest.mark.parametrize("pattern", SLOW)
def test_an_expression_that_could_hang_is_refused(pattern):
    with pytest.raises(UserError, match=r"^target_modules: the regular expression .* takes too long to match"):
        check_cost("target_modules", pattern, NAME)


@pytest.mark.parametrize("pattern", FAST)
def test_an_ordinary_expression_is_accepted(pattern):
    check_cost("target_modules", pattern, NAME)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("target_modules", {"target_modules": HANGS}),
        ("target_modules", {"target_modules": r"((a|[a-z._0-9]+)+)+[$]"}),
        ("exclude_modules", {"target_modules": "all-linear", "exclude_modules": HANGS}),
        ("rank_pattern", {"target_modules": ["q_proj"], "rank_pattern": {HANGS: 2}}),
        ("alpha_pattern", {"target_modules": ["q_proj"], "alpha_pattern": {HANGS: 2}}),
    ],
)
def test_an_expression_that_does_not_end_is_refused(key, options):
    start, names = time.monotonic(), [name for name, _ in llama().named_modules()]
    for config in (PeraConfig(**options), LoraConfig(**options)):
        with pytest.raises(UserError, match=rf"^{key}: the regular expression .* takes too long"):
            check_speed(names, config)
    with pytest.raises(UserError, match=key):
        get_peft_model(llama(), PeraConfig(**options))
    assert time.monotonic() - start < 5


def test_an_expression_is_refused_in_a_thread_too():
    found = []

    def check():
        with pytest.raises(UserError):
            check_speed(["model.layers.0.self_attn.q_proj"], PeraConfig(target_modules=HANGS))
        found.append(True)

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
def test_a_saved_adapter_cannot_hang_a_load(key, tmp_path):
    adapt(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    slow = r"([a-z0-9_.]+)+!"
    more = {key: {slow: 2} if key.endswith("_pattern") and key != "layers_pattern" else slow}
    more |= {"layers_to_transform": [0]} if key == "layers_pattern" else {}
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    with pytest.raises(UserError, match=f"^{key}: the regular expression .* takes too long"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "a{99999999999999999999}"])
def test_an_expression_that_cannot_be_compiled_is_refused(pattern):
    with pytest.raises(UserError, match=r"target_modules: .* is not a regular expression"):
        PeraConfig(target_modules=pattern)
