"""Regular expressions that would hang a match are refused, and ordinary ones are not."""

import json

import pytest
from peft import PeftModel

from pera import PeraConfig, UserError
from pera.tuner.expressions import check_cost
from tiny import adapt, llama

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
