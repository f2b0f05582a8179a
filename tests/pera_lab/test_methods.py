"""Every method under the same option names, and methods of other packages."""

import math
import re
import sys

import pytest
import torch
from peft import DeloraConfig, HiraConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from pera import PeraConfig
from pera.errors import UserError
from pera.polynomial import expanded_rank
from pera_lab.methods import BUILT_IN, known_methods, peft_config, resolve_targets

RANKED = [name for name, method in BUILT_IN.items() if method.has_rank]


@pytest.fixture
def adapted(tiny_llama):
    """The tiny LLaMA with the adapter of a method."""
    return lambda name, **options: get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), peft_config(name, **{"target_modules": ["q_proj"], **options})
    )


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package that registers its table of methods."""

    def install(name, source):
        (tmp_path / f"{name}.py").write_text(f"from pera_lab.methods import Method\n{source}\n")
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[pera.methods]\n{name} = {name}:METHODS\n")
        monkeypatch.delitem(sys.modules, name, raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    known_methods.cache_clear()
    yield install
    known_methods.cache_clear()


def layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@pytest.mark.parametrize("name", RANKED)
def test_every_method_starts_as_the_base_model_and_trains(name, adapted, logits, tiny_llama):
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
    ("name", "config", "fields"),
    [
        ("pera", PeraConfig, {"pera_dropout": 0.25}),
        ("lora", LoraConfig, {"lora_dropout": 0.25, "use_rslora": False, "use_dora": False}),
        ("rslora", LoraConfig, {"lora_dropout": 0.25, "use_rslora": True, "use_dora": False}),
        ("dora", LoraConfig, {"lora_dropout": 0.25, "use_rslora": False, "use_dora": True}),
        ("hira", HiraConfig, {"hira_dropout": 0.25}),
        ("delora", DeloraConfig, {"module_dropout": 0.25}),
    ],
)
def test_a_name_stands_for_a_configuration_and_dropout_is_one_name_for_all(name, config, fields):
    found = peft_config(name, dropout=0.25)
    assert type(found) is config
    assert {key: getattr(found, key) for key in fields} == fields
    assert found.task_type == TaskType.CAUSAL_LM


@pytest.mark.parametrize(("name", "scale"), [("pera", 1), ("lora", 1), ("lora-K", 1), ("dora", 1), ("rslora", None)])
def test_without_alpha_the_scale_follows_each_layers_own_rank(name, scale, adapted):
    rank = BUILT_IN[name].rank
    found = layers(adapted(name, r=4, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"]))
    assert {layer.r["default"] for layer in found} == {rank(4), rank(2)}
    for layer in found:
        assert layer.scaling["default"] == pytest.approx(scale or math.sqrt(layer.r["default"]))


@pytest.mark.parametrize(("name", "scale"), [("pera", 3), ("lora", 3), ("dora", 3), ("rslora", 3 * 2)])
def test_alpha_sets_the_scale(name, scale, adapted):
    assert layers(adapted(name, r=4, alpha=12))[0].scaling["default"] == pytest.approx(scale)


def test_without_r_the_scale_is_1(adapted):
    assert layers(adapted("lora"))[0].scaling["default"] == 1


def test_an_alpha_pattern_is_kept():
    ranks, alphas = {"v_proj": 2, "k_proj": 2}, {r"1\..*_proj": 8, "v_proj": 6}
    config = peft_config("lora", r=4, rank_pattern=ranks, alpha_pattern=alphas)
    assert list(config.alpha_pattern.items()) == [(r"1\..*_proj", 8), ("v_proj", 6), ("k_proj", 2)]
    assert peft_config("lora", alpha=4, rank_pattern={"v_proj": 2}).alpha_pattern == {}


@pytest.mark.parametrize("name", ["lora", "lora-K"])
def test_a_rank_pattern_of_none_is_the_default(name):
    assert peft_config(name, rank_pattern=None).r == BUILT_IN[name].rank(8)


@pytest.mark.parametrize("word", ["alpha", "pera_alpha"])
def test_the_configurations_own_option_names_work_too(word):
    assert peft_config("pera", **{word: 6}).pera_alpha == 6


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("peera", {}, "method.name='peera' is not known; did you mean 'pera'?"),
        ("mora", {}, "method.name='mora' is not available: MoRA is not in PEFT"),
        ("pera", {"alpha": 4, "pera_alpha": 8}, "method.alpha and method.pera_alpha are the same option of pera"),
        (
            "pera",
            {"normalisation": "x"},
            "method.normalisation is not an option of pera; did you mean 'method.normalization'",
        ),
        ("lora", {"base_model_name_or_path": "x"}, "method.base_model_name_or_path is not an option of lora; known: "),
        ("pera", {"peft_type": "x"}, "method.peft_type is not an option of pera; "),
        (
            "lora",
            {"normalization": "rms"},
            "method.normalization is an option of pera, not of lora; give the whole method, such as "
            "'method={name: lora, …}'.",
        ),
        ("rslora", {"use_rslora": False}, "method.use_rslora is an option of pera, not of rslora; "),
        ("pera-rms", {"terms": "all"}, "method.terms is an option of pera, not of pera-rms; "),
        ("lora", {"init_lora_weights": "pissa_niter_4"}, "method.init_lora_weights='pissa_niter_4' changes the base"),
        ("full", {"r": 8}, "method.r is not an option of full, which has none; give the whole method, "),
        ("pera", {"terms": "cubes"}, "method: terms='cubes'"),
        ("pera", {"dropout": 1}, "method: pera_dropout=1"),
        ("pera", {"rank_pattern": 3}, "method: rank_pattern=3"),
        ("lora-K", {"rank_pattern": 3}, "method: PEFT cannot use {'name': 'lora-K', 'rank_pattern': 3}: TypeError"),
        ("lora", {"alpha": 0}, "method: lora_alpha=0 should be a finite number"),
        ("pera", {"alpha": math.inf}, "method: pera_alpha=inf should be a finite number"),
        *((name, {"r": 0}, "method: r=0 should be a whole number of at least 1") for name in RANKED),
    ],
)
def test_a_mistake_is_named_with_its_remedy(name, options, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        peft_config(name, **options)


def test_full_trains_every_parameter_and_is_read_back_from_the_disk(tiny_llama, logits, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    size = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, resolve_targets(base, peft_config("full")))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == size
    model(torch.arange(10)[None]).logits.square().mean().backward()
    torch.optim.SGD(trainable, lr=0.1).step()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")
    assert not torch.allclose(logits(loaded), logits(tiny_llama), atol=1e-3)
    assert torch.equal(logits(loaded), logits(model))


def test_lora_k_has_the_expanded_rank_and_scale_1():
    config = peft_config("lora-K", r=4)
    assert config.r == config.lora_alpha == 4 + 4 * 5 // 2
    assert peft_config("lora-K").r == expanded_rank(peft_config("pera").r)


def test_the_published_variant_is_the_published_method():
    assert peft_config("pera-published", r=4) == PeraConfig.published(r=4, task_type=TaskType.CAUSAL_LM)


@pytest.mark.parametrize(
    ("name", "terms", "normalization", "h", "anchors"),
    [("pera-squares", "square", "none", 0.0, 0), ("pera-crosses", "cross", "none", 0.0, 0),
     ("pera-rms", "all", "rms", 0.0, 0), ("pera-rms-0.3", "all", "rms", 0.3, 0),
     ("pera-rms-squares", "square", "rms", 0.3, 0), ("pera-anchors-1", "none", "none", 0.0, 1),
     ("pera-anchors-4", "none", "none", 0.0, 4), ("pera-anchors-16", "none", "none", 0.0, 16),
     ("pera-anchors-64", "none", "none", 0.0, 64), ("pera-anchors-4-all", "all", "rms", 0.3, 4)],
)  # fmt: skip
def test_a_named_variant_fixes_its_options(name, terms, normalization, h, anchors):
    config = peft_config(name, r=4)
    assert (config.terms, config.normalization, config.init_coefficients) == (terms, normalization, h)
    assert (config.coefficients, config.anchors) == ("learned", anchors)
    if anchors:
        assert peft_config(name, anchor_seed=7).anchor_seed == 7
    else:
        with pytest.raises(UserError, match=r"method\.anchor_seed is an option of pera, not of"):
            peft_config(name, anchor_seed=7)
    with pytest.raises(UserError, match=r"method\.anchors is an option of pera, not of"):
        peft_config(name, anchors=7)
    with pytest.raises(UserError, match=r"method\.anchor_names is not an option of"):
        peft_config(name, anchor_names="7")
    with pytest.raises(UserError, match=r"method\.init_coefficients is an option of pera, not of"):
        peft_config(name, init_coefficients=0.1)


@pytest.mark.parametrize("name", ["pera", "lora", "dora", "hira", "delora"])
def test_all_linear_leaves_out_subclasses_that_compute_something_else(name):
    class Router(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1), x

    model = torch.nn.ModuleDict({"router": Router(4, 4), "up_proj": torch.nn.Linear(4, 4)})
    config = resolve_targets(model, peft_config(name, r=2, target_modules="all-linear"))
    assert config.target_modules == {"up_proj"}


def test_an_installed_package_adds_a_method(install):
    install("acme", "from peft import VeraConfig\nMETHODS = {'vera': Method(VeraConfig, {'dropout': 'vera_dropout'})}")
    config = peft_config("vera", r=16, dropout=0.5)
    assert (type(config).__name__, config.r, config.vera_dropout) == ("VeraConfig", 16, 0.5)
    with pytest.raises(UserError, match=r"method\.name='verra' is not known; did you mean 'vera'"):
        peft_config("verra")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import nowhere", "'acme:METHODS' of package 'acme' cannot be loaded (ModuleNotFoundError: No module named"),
        ("METHODS = 3", "'acme:METHODS' of package 'acme' should be a table of Method objects by name."),
        ("METHODS = {'vera': 3}", "'acme:METHODS' of package 'acme' should be a table of Method objects by name."),
        (
            "from pera_lab.methods import BUILT_IN as METHODS",
            "packages 'acme' and 'pera' both define 'pera'; uninstall one of them.",
        ),
    ],
)
def test_a_mistake_in_a_package_is_named_with_its_package(source, sentence, install):
    install("acme", source)
    with pytest.raises(UserError) as caught:
        known_methods()
    assert sentence in str(caught.value)


def test_without_an_installation_the_remedy_is_to_install(monkeypatch):
    monkeypatch.setattr("pera_lab.methods.GROUP", "pera.nothing")
    known_methods.cache_clear()
    with pytest.raises(UserError, match="own entry points are not registered; reinstall pera"):
        known_methods()  # an error is not cached


@pytest.mark.parametrize("value", [-0.1, 1, True, "x", None])
@pytest.mark.parametrize("name", ["pera", "lora", "dora", "hira", "delora"])
def test_a_dropout_outside_its_range_is_rejected(name, value):
    with pytest.raises(UserError, match=rf"^method: \w+_dropout={value!r} should be at least 0 and less than 1"):
        peft_config(name, dropout=value)


def test_hira_has_no_ranks_by_layer():
    with pytest.raises(UserError, match=r"^method\.rank_pattern is an option of pera, not of hira"):
        peft_config("hira", rank_pattern={"q_proj": 4})


@pytest.mark.parametrize(("name", "key"), [("lora", "use_rslora"), ("lora", "use_dora"), ("lora", "fan_in_fan_out")])
def test_text_is_no_boolean(name, key):
    assert getattr(peft_config(name, **{key: True}), key) is True
    with pytest.raises(UserError, match=f"^method: {key}='no' should be true or false"):
        peft_config(name, **{key: "no"})
