"""PeraConfig: defaults, refused values, the way from LoRA, saving and loading."""

import inspect
import json
import re
from dataclasses import fields

import pytest
from peft import LoraConfig, PeftConfig, TaskType

from pera import PeraConfig, UserError
from pera.tuner.config import LAYOUT_VERSION

PUBLISHED = {
    "pera_alpha": None,
    "use_rslora": False,
    "terms": "all",
    "coefficients": "learned",
    "init_coefficients": 0.0,
    "normalization": "none",
    "anchors": 0,
    "anchor_seed": 0,
}


def method(config):
    return {key: getattr(config, key) for key in PUBLISHED}


# The method


def test_the_defaults_are_the_published_method():
    config = PeraConfig()
    assert method(config) == PUBLISHED
    assert (config.r, config.pera_dropout, config.bias, config.init_weights) == (8, 0.0, "none", True)
    assert config.pera_version == 1
    assert config.peft_type == "PERA"


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("normalisation", "normalization"),
        ("lora_alpha", "pera_alpha"),
        ("alpha", "pera_alpha"),
        ("rank", "r"),
        ("lora_dropout", "pera_dropout"),
        ("init_lora_weights", "init_weights"),
        ("target_module", "target_modules"),
    ],
)
def test_an_unknown_option_is_a_type_error_that_names_the_right_one(option, meant):
    message = rf"^PeraConfig\.__init__\(\) got an unexpected keyword argument '{option}'; did you mean '{meant}'\?$"
    with pytest.raises(TypeError, match=message):
        PeraConfig(**{option: 1})


def test_an_unknown_option_of_a_saved_adapter_is_left_out_with_a_warning(tmp_path):
    PeraConfig(r=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha": 5}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['alpha'\]"):
        assert PeraConfig.from_pretrained(tmp_path).r == 3


def test_published_is_the_method_of_the_paper():
    config = PeraConfig.published(r=16, target_modules=["q_proj"], pera_dropout=0.05)
    assert method(config) == PUBLISHED
    assert (config.r, config.target_modules, config.pera_dropout) == (16, {"q_proj"}, 0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": "square"}, r"terms='square' is not for published\(\), which sets it to 'all'"),
        ({"anchors": 4}, r"anchors=4 is not for published\(\), which sets it to 0"),
        ({"anchor_seed": 4}, r"anchor_seed=4 has no effect without anchors"),
    ],
)
def test_published_refuses_to_change_the_method(options, message):
    with pytest.raises(UserError, match=message):
        PeraConfig.published(**options)


def test_every_option_is_documented_in_order():
    arguments = inspect.getdoc(PeraConfig).partition("Args:")[2].partition("Raises:")[0]
    documented = re.findall(r"^    (\w+): ", arguments, re.MULTILINE)
    inherited = {f.name for f in fields(PeftConfig)}
    assert documented == [f.name for f in fields(PeraConfig) if f.name not in inherited]


@pytest.mark.parametrize(
    ("alpha", "use_rslora", "scaling"), [(None, False, 1.0), (16, False, 4.0), (None, True, 2.0), (6, True, 3.0)]
)
def test_the_scale_is_alpha_over_r_or_its_root(alpha, use_rslora, scaling):
    assert PeraConfig(use_rslora=use_rslora).scaling(4, alpha) == scaling


def test_patterns_set_the_rank_and_alpha_of_a_module():
    config = PeraConfig(r=8, pera_alpha=2, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\..*": 5})
    assert config.layer_settings("model.layers.0.self_attn.q_proj") == (4, 2)
    assert config.layer_settings("model.layers.1.self_attn.v_proj") == (8, 5)


def test_expressions_that_match_one_module_and_differ_are_refused():
    config = PeraConfig(rank_pattern={".*q_proj": 4, r"layers\.0\..*": 5})
    assert config.layer_settings("layers.1.q_proj") == (4, None)
    with pytest.raises(UserError, match=r"rank_pattern: '\.\*q_proj' and .* both match 'layers\.0\.q_proj' and differ"):
        config.layer_settings("layers.0.q_proj")


# Refused values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": "squares"}, r"terms='squares' is not known; did you mean 'square'\?"),
        ({"coefficients": "fix"}, r"coefficients='fix' is not known; did you mean 'fixed'\?"),
        ({"normalization": "rsm"}, r"normalization='rsm' is not known; did you mean 'rms'\?"),
        ({"bias": "lora_only"}, r"bias='lora_only' is not known; did you mean 'pera_only'\?"),
        ({"bias": 7}, r"bias=7 is not known; known: all, none, pera_only"),
        ({"r": 0}, "r=0 should be a whole number of at least 1"),
        ({"r": 4.0}, r"r=4\.0 should be a whole number of at least 1"),
        ({"r": True}, "r=True should be a whole number of at least 1"),
        ({"r": "8"}, "r='8' should be a whole number of at least 1"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0 should be a whole number of at least 1"),
        ({"terms": "cross", "r": 1}, "r=1 with terms='cross' leaves no products"),
        ({"terms": "cross", "rank_pattern": {"q_proj": 1}}, r"rank_pattern\['q_proj'\]=1 with terms='cross'"),
        ({"pera_alpha": "16"}, "pera_alpha='16' should be a finite number other than 0"),
        ({"pera_alpha": 0}, "pera_alpha=0 should be a finite number other than 0, .*; leave it out to use the rank"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern\['q_proj'\]=nan should be a finite number"),
        ({"pera_dropout": 1.0}, r"pera_dropout=1\.0 should be at least 0 and less than 1"),
        ({"pera_dropout": None}, "pera_dropout=None should be at least 0 and less than 1"),
        ({"init_coefficients": float("nan")}, "init_coefficients=nan should be a finite number"),
        ({"init_coefficients": "0.3"}, r"init_coefficients='0\.3' should be a finite number"),
        ({"init_coefficients": 0.3, "terms": "none"}, r"init_coefficients=0\.3 needs terms other than 'none'"),
        ({"init_coefficients": 0.3, "coefficients": "fixed"}, r"init_coefficients=0\.3 has no effect with coeff"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' should be a list of names"),
        ({"target_parameters": [1]}, r"target_parameters=\[1\] should be a list of names"),
        ({"target_modules": 5}, "target_modules=5 should be a list of names or a regular expression"),
        ({"target_modules": ["q_proj", 5]}, r"target_modules=\['q_proj', 5\] should be a list of names"),
        ({"exclude_modules": {"q_proj": 1}}, r"exclude_modules=\{'q_proj': 1\} should be a list of names"),
        ({"layers_pattern": [1], "layers_to_transform": 0}, r"layers_pattern=\[1\] should be a list of names"),
        ({"trainable_token_indices": ["a"]}, r"trainable_token_indices=\['a'\] should be a list of token ids"),
        ({"layers_to_transform": []}, r"layers_to_transform=\[\] names no layer, but PEFT would adapt all"),
        ({"trainable_token_indices": 3}, "trainable_token_indices=3 should be a list of token ids"),
        ({"trainable_token_indices": {"wte": 3}}, r"trainable_token_indices=\{'wte': 3\} should be .* map names"),
        ({"layers_to_transform": "0"}, "layers_to_transform='0' should be a whole number or a list"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\] should map names"),
        ({"alpha_pattern": {1: 2}}, r"alpha_pattern=\{1: 2\} should map names"),
        ({"init_weights": "pissa"}, "init_weights='pissa' should be True, False or 'gaussian'"),
        ({"target_modules": "q.*", "layers_to_transform": [0]}, r"layers_to_transform needs a list .* not 'q\.\*'"),
        ({"target_modules": "q.*", "layers_pattern": "layers"}, r"layers_pattern needs a list .* not 'q\.\*'"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers' has no effect without layers_to_transform"),
        (
            {"pera_version": LAYOUT_VERSION + 1},
            "pera_version=3 is newer than the layout that this pera reads, 2",
        ),
        ({"pera_version": "1"}, "pera_version='1' should be a whole number"),
        ({"use_rslora": "no"}, "use_rslora='no' should be True or False"),
        ({"ensure_weight_tying": "no"}, "ensure_weight_tying='no' should be True or False"),
        ({"target_modules": "["}, r"target_modules: '\[' is not a regular expression"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is not a regular expression"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters='experts.down_proj' should be a list of names"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform needs a list of names"),
    ],
)
def test_a_value_that_cannot_work_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        PeraConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"terms": "cross", "r": 2},
        {"r": 1},
        {"pera_alpha": None},
        {"alpha_pattern": {"q_proj": None}},
        {"pera_dropout": 0},
        {"init_coefficients": -0.3},
        {"rank_pattern": None, "alpha_pattern": None},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ],
)
def test_a_value_at_the_edge_is_accepted(options):
    PeraConfig(**options)


# From LoRA


def test_from_lora_keeps_every_shared_option():
    shared = {
        "r": 4,
        "use_rslora": True,
        "target_modules": {"q_proj", "v_proj"},
        "exclude_modules": {"k_proj"},
        "target_parameters": ["experts.down_proj"],
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [1, 2],
        "ensure_weight_tying": True,
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "task_type": TaskType.CAUSAL_LM,
        "base_model_name_or_path": "base",
        "revision": "main",
        "inference_mode": True,
    }
    lora = LoraConfig(lora_alpha=16, lora_dropout=0.1, bias="lora_only", init_lora_weights=False, **shared)
    config = PeraConfig.from_lora(lora)
    assert {key: getattr(config, key) for key in shared} == shared
    assert (config.pera_alpha, config.pera_dropout) == (16, 0.1)
    assert (config.bias, config.init_weights) == ("pera_only", False)
    assert config.peft_type == "PERA"
    assert config.pera_version == 1


@pytest.mark.parametrize(("lora_bias", "bias"), [("none", "none"), ("all", "all"), ("lora_only", "pera_only")])
def test_from_lora_translates_bias(lora_bias, bias):
    assert PeraConfig.from_lora(LoraConfig(bias=lora_bias)).bias == bias


def test_from_lora_keeps_a_gaussian_start():
    assert PeraConfig.from_lora(LoraConfig(init_lora_weights="gaussian")).init_weights == "gaussian"


def test_from_lora_accepts_options_of_pera():
    config = PeraConfig.from_lora(LoraConfig(r=4, lora_alpha=8), terms="square", normalization="rms", pera_alpha=None)
    assert (config.r, config.pera_alpha, config.terms, config.normalization) == (4, None, "square", "rms")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
        ({"lora_bias": True, "bias": "none"}, "lora_bias=True"),
        ({"layer_replication": [(0, 2)]}, "layer_replication="),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"use_qalora": True}, "use_qalora=True"),
    ],
)
def test_from_lora_refuses_what_pera_does_not_have(options, name):
    with pytest.raises(UserError, match=f"{name}.* has no counterpart in PERA"):
        PeraConfig.from_lora(LoraConfig(**options))


@pytest.mark.parametrize("other", [{"r": 8}, PeraConfig(), None])
def test_from_lora_refuses_anything_else(other):
    with pytest.raises(UserError, match=rf"^from_lora takes a LoraConfig of PEFT, not a {type(other).__name__}\.$"):
        PeraConfig.from_lora(other)


def test_from_lora_refuses_an_expression_before_a_name():
    """LoRA would give layer 0 rank 16, PERA would give it 4."""
    with pytest.raises(UserError, match=r"rank_pattern: LoRA takes .* before 'q_proj', .* put the name first"):
        PeraConfig.from_lora(LoraConfig(rank_pattern={r".*layers\.0\..*": 16, "q_proj": 4}))


def test_from_lora_refuses_names_that_match_one_module_and_differ():
    with pytest.raises(UserError, match=r"rank_pattern: 'q_proj' and 'attn\.q_proj' match the same modules and differ"):
        PeraConfig.from_lora(LoraConfig(rank_pattern={"q_proj": 4, "attn.q_proj": 8}))


@pytest.mark.parametrize("patterns", [{"q_proj": 4, r".*layers\.0\..*": 16}, {r".*layers\.0\..*": 4, "q_proj": 4}])
def test_from_lora_accepts_a_name_before_an_expression(patterns):
    config = PeraConfig.from_lora(LoraConfig(alpha_pattern=patterns))
    assert config.layer_settings("layers.0.q_proj") == (8, 4)


# Saving and loading


def full_config(**changes):
    options = {
        "r": 4,
        "pera_alpha": 6.0,
        "pera_dropout": 0.1,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj", "layers.1.self_attn.k_proj"],
        "terms": "square",
        "init_coefficients": 0.3,
        "normalization": "rms",
        "bias": "pera_only",
        "modules_to_save": ["lm_head"],
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "rank_pattern": {"q_proj": 2, "k_proj": 3},
        "alpha_pattern": {"q_proj": 3.0, "k_proj": 1.0},
        "task_type": "CAUSAL_LM",
    }
    return PeraConfig(**{**options, **changes})


@pytest.mark.parametrize("config", [PeraConfig(), full_config()], ids=["defaults", "everything"])
def test_saved_and_loaded_it_is_equal(config, tmp_path):
    config.save_pretrained(tmp_path)
    for loaded in (PeraConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, PeraConfig)
        assert loaded == config


def test_the_file_names_the_method_and_its_layout(tmp_path):
    full_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "PERA"
    assert saved["pera_version"] == 1
    assert saved["target_modules"] == ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"]


def test_equal_configurations_are_equal_files(tmp_path):
    targets = ["v_proj", "down_proj", "up_proj", "q_proj", "k_proj"]
    exclusions = ["layers.1.self_attn.k_proj", "layers.0.self_attn.q_proj"]
    variants = [
        full_config(),
        full_config(target_modules=targets, exclude_modules=exclusions),
        full_config(target_modules=set(targets), exclude_modules=tuple(exclusions)),
        full_config(rank_pattern={"k_proj": 3, "q_proj": 2}, alpha_pattern={"k_proj": 1.0, "q_proj": 3.0}),
    ]
    files = []
    for number, config in enumerate(variants):
        config.save_pretrained(tmp_path / str(number))
        files.append((tmp_path / str(number) / "adapter_config.json").read_bytes())
        PeraConfig.from_pretrained(tmp_path / str(number)).save_pretrained(tmp_path / "again")
        files.append((tmp_path / "again" / "adapter_config.json").read_bytes())
    assert set(files) == {files[0]}


def test_overlapping_patterns_mean_the_same_after_loading(tmp_path):
    config = PeraConfig(alpha_pattern={"q_proj": 3.0, ".*_proj": 1.0})
    config.save_pretrained(tmp_path)
    loaded = PeraConfig.from_pretrained(tmp_path)
    assert loaded.layer_settings("layers.0.q_proj") == config.layer_settings("layers.0.q_proj")


@pytest.mark.parametrize(("anchors", "version"), [(0, 1), (4, 2)])
def test_only_anchors_need_the_second_layout(anchors, version, tmp_path):
    """pera 0.1.0 would ignore the anchors of a configuration. It refuses layouts above 1."""
    PeraConfig(anchors=anchors).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["pera_version"] == version


def test_a_newer_layout_is_refused(tmp_path):
    PeraConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pera_version": 3}))
    with pytest.raises(UserError, match=r"pera_version=3 is newer than the layout.*install a newer pera"):
        PeraConfig.from_pretrained(tmp_path)


# Options of earlier versions


def rewrite(folder, **changes):
    """Save an adapter's configuration with these keys in it."""
    PeraConfig(r=2).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("load", [PeftConfig.from_pretrained, PeraConfig.from_pretrained])
def test_retired_options_at_their_defaults_are_ignored(load, tmp_path, recwarn):
    rewrite(tmp_path, random_signs=False, recompute=None)
    config = load(tmp_path)
    assert config == PeraConfig(r=2)
    assert not {"random_signs", "recompute"} & config.to_dict().keys()
    assert not recwarn


@pytest.mark.parametrize("load", [PeftConfig.from_pretrained, PeraConfig.from_pretrained])
@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("random_signs", True, "it changed only the start of training, so remove it from the configuration"),
        ("recompute", True, "layers decide it themselves, so remove it from the configuration"),
        ("recompute", False, "layers decide it themselves, so remove it from the configuration"),
        ("normalization", "column", "use 'rms' and train again, or merge .* with the version of pera that trained it"),
    ],
)
def test_retired_options_in_use_are_refused_with_a_remedy(load, key, value, remedy, tmp_path):
    rewrite(tmp_path, **{key: value})
    with pytest.raises(UserError, match=rf"^{key}={value!r} is no longer supported; {remedy}\.$"):
        load(tmp_path)


# Numbers out of range and options without effect


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 10**18}, r"r=a whole number of about 19 digits is above every side of any layer"),
        ({"r": 10**5000}, r"r=a whole number of about 5001 digits is above"),
        ({"rank_pattern": {"q_proj": 2**21}}, r"rank_pattern\['q_proj'\]=2097152 is above every side"),
        ({"pera_alpha": 10**400}, r"pera_alpha=a whole number of about 401 digits should be a finite number"),
        ({"pera_alpha": 1e308}, r"pera_alpha=1e\+308 should be a finite number"),
        ({"pera_alpha": 1e-300}, r"pera_alpha=1e-300 should be a finite number"),
        ({"alpha_pattern": {"q_proj": 10**400}}, r"alpha_pattern\['q_proj'\]=a whole number of about 401 digits"),
        ({"init_coefficients": 1e308}, r"init_coefficients=1e\+308 should be a finite number of size at most 65504"),
        ({"init_coefficients": 10**400}, r"init_coefficients=a whole number of about 401 digits should be"),
        ({"init_coefficients": 70000}, r"init_coefficients=70000 should be"),
        ({"pera_dropout": 10**400}, r"pera_dropout=a whole number of about 401 digits should be"),
        ({"pera_dropout": float("nan")}, r"pera_dropout=nan should be"),
        ({"pera_version": True}, r"pera_version=True should be a whole number"),
        ({"anchors": -1}, r"anchors=-1 should be a whole number of at least 0"),
        ({"anchors": 2.0}, r"anchors=2\.0 should be a whole number of at least 0"),
        ({"anchors": True}, r"anchors=True should be a whole number of at least 0"),
        ({"anchors": 10**18}, r"anchors=a whole number of about 19 digits is above every side of any layer"),
        ({"anchors": 1, "anchor_seed": -1}, r"anchor_seed=-1 should be a whole number from 0 to 4294967295"),
        ({"anchors": 1, "anchor_seed": 2**32}, r"anchor_seed=4294967296 should be a whole number from 0"),
        ({"anchors": 1, "anchor_seed": "a"}, r"anchor_seed='a' should be a whole number from 0"),
        ({"anchor_seed": 1}, r"anchor_seed=1 has no effect without anchors; leave it at 0"),
        ({"anchors": 1, "anchor_names": 3}, r"anchor_names=3 should be a string"),
        (
            {"terms": "none", "anchors": 4, "normalization": "rms"},
            r"normalization='rms' has no effect with terms='none'",
        ),
        ({"inference_mode": "no"}, r"inference_mode='no' should be True or False"),
        ({"terms": "none", "normalization": "rms"}, r"normalization='rms' has no effect with terms='none'"),
        ({"terms": "none", "coefficients": "fixed"}, r"coefficients='fixed' has no effect with terms='none'"),
    ],
)
def test_a_number_out_of_range_or_an_option_without_effect_is_refused(options, message):
    with pytest.raises(UserError, match=f"^{message}") as refused:
        PeraConfig(**options)
    assert len(str(refused.value)) < 200


def test_a_saved_configuration_with_an_idle_option_loads(tmp_path):
    PeraConfig(terms="none").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalization": "rms"}))
    assert PeraConfig.from_pretrained(tmp_path).normalization == "rms"
