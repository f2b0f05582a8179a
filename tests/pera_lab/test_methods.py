"""Every method under the same words."""

import math
import re

import pytest
import torch
from peft import DeloraConfig, HiraConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from pera import PeraConfig
from pera.errors import UserError
from pera.polynomial import expanded_rank
from pera_lab.methods import METHODS, fit_to, peft_config


@pytest.fixture
def adapted(tiny_llama):
    """The tiny LLaMA with the adapter of a method."""
    return lambda name, **options: get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), peft_config(name, target_modules=["q_proj"], **options)
    )


def layer(model):
    return next(module for module in model.modules() if isinstance(module, BaseTunerLayer))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.has_rank])
def test_every_method_trains_on_a_model(name, adapted, logits, tiny_llama):
    model = adapted(name, r=4)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trainable) < 2000
    assert torch.allclose(logits(model), logits(tiny_llama), atol=1e-5)
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    for _ in range(2):
        model(torch.arange(10)[None]).logits.square().mean().backward()
        optimizer.step()
    assert not torch.allclose(logits(model), logits(tiny_llama), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("pera", PeraConfig, {"peft_type": "PERA"}),
        ("lora", LoraConfig, {"use_rslora": False, "use_dora": False}),
        ("rslora", LoraConfig, {"use_rslora": True, "use_dora": False}),
        ("dora", LoraConfig, {"use_rslora": False, "use_dora": True}),
        ("hira", HiraConfig, {}),
        ("delora", DeloraConfig, {}),
    ],
)
def test_a_name_stands_for_a_configuration(name, config, options):
    found = peft_config(name)
    assert type(found) is config
    assert {key: getattr(found, key) for key in options} == options
    assert found.task_type == TaskType.CAUSAL_LM


@pytest.mark.parametrize("r", [2, 8])
@pytest.mark.parametrize(("name", "scale"), [("pera", 1), ("lora", 1), ("dora", 1), ("rslora", None)])
def test_the_scale_is_1_unless_alpha_is_given(name, scale, r, adapted):
    assert layer(adapted(name, r=r)).scaling["default"] == pytest.approx(scale or math.sqrt(r))
    with_alpha = layer(adapted(name, r=r, alpha=3 * r)).scaling["default"]
    assert with_alpha == pytest.approx(3 * (scale or math.sqrt(r)))


@pytest.mark.parametrize("name", ["pera", "lora", "lora-K", "rslora", "dora"])
def test_without_alpha_the_scale_is_by_each_layers_own_rank(name, tiny_llama):
    config = peft_config(name, r=4, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    rank = METHODS[name].rank
    assert {module.r["default"] for module in layers} == {rank(4), rank(2)}
    for module in layers:
        own = math.sqrt(module.r["default"]) if name == "rslora" else 1
        assert module.scaling["default"] == pytest.approx(own)


def test_an_alpha_that_is_given_for_some_layers_is_kept():
    ranks, alphas = {"v_proj": 2, "k_proj": 2}, {r"1\..*_proj": 8, "v_proj": 6}
    config = peft_config("lora", r=4, rank_pattern=ranks, alpha_pattern=alphas)
    assert list(config.alpha_pattern.items()) == [(r"1\..*_proj", 8), ("v_proj", 6), ("k_proj", 2)]
    assert peft_config("lora", alpha=4, rank_pattern={"v_proj": 2}).alpha_pattern == {}


@pytest.mark.parametrize("name", ["lora", "lora-K"])
def test_ranks_that_are_no_mapping_are_refused(name):
    with pytest.raises(UserError, match=r"^method: "):
        peft_config(name, rank_pattern=3)
    assert peft_config(name, rank_pattern=None).r == METHODS[name].rank(8)


def test_without_r_the_scale_is_1_too(adapted):
    assert layer(adapted("lora")).scaling["default"] == 1


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("pera", "pera_dropout"),
        ("lora", "lora_dropout"),
        ("rslora", "lora_dropout"),
        ("dora", "lora_dropout"),
        ("hira", "hira_dropout"),
        ("delora", "module_dropout"),
    ],
)
def test_dropout_is_one_word_for_all(name, word):
    assert getattr(peft_config(name, dropout=0.25), word) == 0.25


@pytest.mark.parametrize("word", ["alpha", "pera_alpha"])
def test_the_own_words_of_a_method_are_known_too(word):
    assert peft_config("pera", **{word: 6}).pera_alpha == 6


def test_one_option_under_two_names_is_refused():
    with pytest.raises(UserError, match=r"method\.(pera_)?alpha"):
        peft_config("pera", alpha=4, pera_alpha=8)


@pytest.mark.parametrize(
    ("name", "option", "near"),
    [
        ("pera", "normalisation", "did you mean 'normalization'?"),
        ("pera", "lora_alpha", "did you mean 'pera_alpha'?"),
        ("lora", "target_module", "did you mean 'target_modules'?"),
        ("lora", "pera_dropout", "did you mean 'lora_dropout'?"),
        ("pera", "peft_type", ""),
        ("lora", "base_model_name_or_path", "known: "),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_known(name, option, near):
    with pytest.raises(UserError) as caught:
        peft_config(name, **{option: "x"})
    assert str(caught.value).startswith(f"method.{option} is not an option of {name}; ")
    assert near in str(caught.value)


@pytest.mark.parametrize(
    ("name", "option", "other"),
    [
        ("lora", "normalization", "pera"),
        ("hira", "alpha", "pera"),
        ("pera-rms", "terms", "pera"),
        ("rslora", "use_rslora", "pera"),
        ("pera", "use_dora", "lora"),
    ],
)
def test_an_option_of_another_method_says_whose_it_is(name, option, other):
    sentence = f"but of {other}; give the whole method, such as 'method={{name: {name}, …}}'."
    with pytest.raises(UserError, match=f"^method.{option} is not an option of {name}, {re.escape(sentence)}$"):
        peft_config(name, **{option: "x"})


def test_an_unknown_method_is_refused_with_the_nearest_known():
    with pytest.raises(UserError, match=r"method\.name='peera' is not known; did you mean 'pera'\?"):
        peft_config("peera")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"terms": "cubes"}, "terms='cubes'"),
        ({"dropout": 1}, "dropout=1"),
        ({"rank_pattern": 3}, "rank_pattern=3"),
    ],
)
def test_a_value_that_the_method_refuses_is_named(options, words):
    with pytest.raises(UserError, match=f"^method: .*{words}"):
        peft_config("pera", **options)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.has_rank])
@pytest.mark.parametrize("r", ["abc", None, True, 0])
def test_a_rank_that_is_none_is_named(name, r):
    with pytest.raises(UserError, match=rf"^method: r={r!r} should be a whole number of at least 1\.$"):
        peft_config(name, r=r)


@pytest.mark.parametrize("name", ["lora", "dora", "pera"])
@pytest.mark.parametrize("alpha", ["abc", 0, math.inf])
def test_an_alpha_that_is_none_is_named(name, alpha):
    with pytest.raises(UserError, match=rf"^method: (lora|pera)_alpha={alpha!r} should be a finite number, not 0"):
        peft_config(name, alpha=alpha)


def test_full_trains_every_parameter_and_comes_back_from_the_disk(tiny_llama, logits, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    sizes = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, fit_to(base, peft_config("full")))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == sizes
    model(torch.arange(10)[None]).logits.square().mean().backward()
    torch.optim.SGD(trainable, lr=0.1).step()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")
    assert not torch.allclose(logits(loaded), logits(tiny_llama), atol=1e-3)
    assert torch.equal(logits(loaded), logits(model))


def test_full_has_no_options():
    with pytest.raises(
        UserError, match=r"^method\.r is not an option of full, which has none; .* 'method=\{name: full\}'\.$"
    ):
        peft_config("full", r=8)


@pytest.mark.parametrize("r", [2, 4, 8])
def test_lora_k_has_the_expanded_rank_and_scale_1(r):
    config = peft_config("lora-K", r=r)
    assert config.r == config.lora_alpha == expanded_rank(r) == r + r * (r + 1) // 2


def test_lora_k_of_the_default_rank_is_that_of_the_default_pera():
    assert peft_config("lora-K").r == expanded_rank(peft_config("pera").r)


def test_the_published_variant_is_the_published_method():
    assert peft_config("pera-published", r=4) == PeraConfig.published(r=4, task_type=TaskType.CAUSAL_LM)


@pytest.mark.parametrize(
    ("name", "terms", "normalization", "h"),
    [("pera-squares", "square", "none", 0.0), ("pera-crosses", "cross", "none", 0.0), ("pera-rms", "all", "rms", 0.0),
     ("pera-rms-0.3", "all", "rms", 0.3), ("pera-rms-squares", "square", "rms", 0.3)],
)  # fmt: skip
def test_a_named_variant_fixes_what_makes_it(name, terms, normalization, h):
    config = peft_config(name, r=4)
    assert (config.terms, config.normalization, config.init_coefficients) == (terms, normalization, h)
    assert config.coefficients == "learned"
    with pytest.raises(UserError, match="is not an option of"):
        peft_config(name, init_coefficients=0.1)


def test_a_method_that_cannot_be_had_is_refused_with_the_reason():
    with pytest.raises(UserError, match="'mora' cannot be had: MoRA is not in PEFT"):
        peft_config("mora")
