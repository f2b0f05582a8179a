"""Adapters on compiled and wrapped bases: saved under the names of the plain base, or refused."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from pera import PeraConfig, UserError, hotswap_adapter, to_lora
from pera.tuner.names import plain_name
from reference import sign_row
from tiny import adapt, layers, llama, logits


@pytest.fixture(autouse=True)
def run_compiled_models_without_compiling():
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_layers(wrap=compiled):
    """A LLaMA whose layers are wrapped one by one."""
    model = llama()
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = wrap(layer)
    return model


def compiled_in_place():
    model = llama()
    model.compile(backend="eager")
    return model


OPTIONS = {
    "names": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"model.layers.1.self_attn.q_proj": 2}},
    "expression": {"target_modules": r"model\.layers\.\d\.mlp\.up_proj"},
    "layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "all-linear": {"target_modules": "all-linear"},
    "anchors": {"target_modules": ["q_proj", "down_proj"], "terms": "none", "anchors": 3},
}


@pytest.mark.parametrize(
    ("wrapped", "options"),
    [
        (lambda: compiled(compiled_layers()), "all-linear"),
        (compiled_layers, "names"),
        (compiled_layers, "anchors"),
        (lambda: compiled(compiled_layers()), "anchors"),
        (lambda: compiled_layers(checkpoint_wrapper), "anchors"),
        (compiled_layers, "expression"),
        (compiled_layers, "layer"),
        (compiled_in_place, "names"),
        (lambda: compiled_layers(checkpoint_wrapper), "names"),
        (lambda: compiled_layers(checkpoint_wrapper), "all-linear"),
    ],
)
def test_an_adapter_of_a_wrapped_base_loads_on_the_plain_base_and_the_other_way_round(wrapped, options, tmp_path):
    made = adapt(wrapped(), **OPTIONS[options])
    expected = logits(made)
    made.save_pretrained(tmp_path / "made")
    plain = PeftModel.from_pretrained(llama(), tmp_path / "made")
    torch.testing.assert_close(logits(plain), expected)
    assert layers(plain).keys() == layers(adapt(llama(), **OPTIONS[options])).keys()
    plain.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(wrapped(), tmp_path / "plain")), expected)


def test_a_file_with_the_names_of_a_compiled_base_loads(tmp_path):
    model = adapt(llama(), target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k.replace("model.model.", "model._orig_mod.model."): w for k, w in load_file(file).items()}, file)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    hotswap_adapter(loaded, str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


def test_the_state_of_a_compiled_peft_model_has_plain_names_and_loads():
    model = adapt(llama(), target_modules=["q_proj"])
    state = get_peft_model_state_dict(compiled(model))
    assert state.keys() == get_peft_model_state_dict(model).keys()
    other = compiled(get_peft_model(llama(), PeraConfig(r=3, target_modules=["q_proj"])))
    set_peft_model_state_dict(other, state)
    torch.testing.assert_close(logits(other), logits(model))


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"ensure_weight_tying": True},
        {"target_parameters": ["k_proj.weight"]},
    ],
)
def test_an_option_that_needs_the_names_of_the_plain_base_is_refused(options):
    refusal = rf"^{next(iter(options))}=.* needs a base model that is not compiled or wrapped"
    with pytest.raises(UserError, match=refusal):
        adapt(compiled(llama()), target_modules=["q_proj"], **options)


def test_a_layer_that_is_compiled_on_its_own_is_refused():
    model = nn.ModuleDict({"q_proj": compiled(nn.Linear(4, 4))})
    with pytest.raises(
        UserError, match=r"'q_proj' is in a OptimizedModule, .* before you compile or wrap the layer\.$"
    ):
        adapt(model, target_modules=["q_proj"])


def test_a_base_in_data_parallel_is_refused():
    with pytest.raises(
        UserError, match=r"^the base model is in a DataParallel, .* wrap what get_peft_model returns\.$"
    ):
        adapt(nn.DataParallel(llama()), target_modules=["q_proj"])


def test_conversion_on_a_compiled_base_is_refused():
    model = adapt(compiled(llama()), target_modules=["q_proj"])
    with pytest.raises(UserError, match="the base model is compiled or wrapped; load the adapter on the plain base"):
        to_lora(model)


def test_layers_with_other_names_are_refused_if_they_have_anchors(tmp_path):
    """PEFT can rename saved weights while it loads them. The frozen rows would then be others."""
    layer = nn.Linear(4, 4)
    adapt(nn.ModuleDict({"old": layer}), target_modules="old|new", anchors=2).save_pretrained(tmp_path)
    adapt(nn.ModuleDict({"old": layer}), target_modules="old|new").save_pretrained(tmp_path / "without")

    def load(folder):
        return PeftModel.from_pretrained(nn.ModuleDict({"new": layer}), folder, key_mapping={"old": "new"})

    assert layers(load(tmp_path / "without")).keys() == {"new"}
    refusal = r"^anchors=2: frozen rows follow from the names of the layers, such as 'new', but .* trained under other"
    with pytest.raises(UserError, match=refusal):
        load(tmp_path)


def test_one_configuration_with_anchors_serves_models_with_other_names():
    config = PeraConfig(target_modules="a|b", anchors=2)
    digests = []
    for name in ("a", "b", "a"):
        model = get_peft_model(nn.ModuleDict({name: nn.Linear(8, 8)}), config)
        assert layers(model)[name].expansion["default"].anchors.V[0].tolist() == sign_row(0, name, "in", 8, 0)
        digests.append(config.anchor_names)
    assert digests[0] == digests[2] != digests[1]


def test_a_name_that_looks_like_a_wrapper_stays():
    assert plain_name("my_orig_mod.layers._orig_mod_2.module.weight") == "my_orig_mod.layers._orig_mod_2.module.weight"
