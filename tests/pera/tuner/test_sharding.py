"""What FSDP, DeepSpeed ZeRO-3 and tensor parallelism ask of the layers, without other processes."""

import pytest
import torch
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn

import tiny
from pera import PeraConfig, UserError, to_lora
from pera.tuner import hotswap_adapter


def left_by_zero3(parameter):
    """Leave what DeepSpeed ZeRO-3 leaves of a parameter outside of a forward pass."""
    parameter.ds_id, parameter.ds_shape = 0, parameter.shape
    parameter.data = torch.empty(0)
    return parameter


def test_the_wrap_policy_of_peft_finds_the_trainable_factors():
    model = tiny.adapt(tiny.llama(), target_modules=["q_proj", "embed_tokens"])
    model.add_adapter("second", PeraConfig(r=2, target_modules=["v_proj"]))
    policy = fsdp_auto_wrap_policy(model)
    found = {name for name, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)}
    factors = {name for name, _ in model.named_modules() if name.endswith((".pera_A", ".pera_B", ".pera_h"))}
    assert found & factors == {name for name in factors if "v_proj" not in name}
    assert len(found & factors) == 9


@pytest.mark.parametrize("name", ["weight", "keys"])
def test_an_adapter_cannot_have_the_name_of_an_attribute(name):
    with pytest.raises(UserError, match=f"adapter_name='{name}' is reserved"):
        get_peft_model(tiny.llama(), PeraConfig(target_modules=["q_proj"]), adapter_name=name)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_shapes_do_not_come_from_a_weight_that_zero3_has_emptied(kind):
    base = tiny.KINDS[kind].base()
    left_by_zero3(base.weight)
    layer = tiny.adapted(base)
    rows, columns = tiny.KINDS[kind].shape
    assert layer.pera_A["default"].shape == (3, columns)
    assert layer.pera_B["default"].shape == (rows, 3)
    assert layer.get_delta_weight("default").shape == base.weight.ds_shape


@pytest.mark.parametrize("shape", [(6, 8), (2, 6, 8)])
def test_the_shape_of_a_single_parameter_is_that_before_zero3(shape):
    module = nn.Module()
    module.weight = left_by_zero3(nn.Parameter(torch.randn(shape)))
    model = tiny.adapt(nn.ModuleDict({"experts": module}), target_modules=[], target_parameters=["experts.weight"])
    layer = tiny.layers(model)["experts"]
    assert layer.get_delta_weight("default").shape == shape


@pytest.mark.parametrize("mark", ["ds_id", "_fsdp_flattened"])
def test_a_weight_that_an_engine_divides_is_not_merged_into(mark):
    model = tiny.adapt(tiny.llama(), target_modules=["q_proj", "v_proj"])
    before = tiny.logits(model)
    setattr(tiny.layers(model)["model.layers.1.self_attn.v_proj"].base_layer.weight, mark, True)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UserError, match="cannot be merged or replaced while FSDP1 or DeepSpeed ZeRO-3"):
            merge()
    assert not any(layer.merged for layer in tiny.layers(model).values())
    assert torch.equal(tiny.logits(model), before)


def test_a_divided_adapter_is_not_read_swapped_or_converted(tmp_path):
    model = tiny.adapt(tiny.llama(), target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    layer = tiny.layers(model)["model.layers.0.self_attn.q_proj"]
    left_by_zero3(layer.pera_B["default"])
    with pytest.raises(UserError, match="adapter 'default' is divided over processes and whole in a forward pass only"):
        layer.get_delta_weight("default")
    with pytest.raises(UserError, match="is divided over processes, and can be converted in one process only"):
        to_lora(model)
    left_by_zero3(layer.base_layer.weight)
    with pytest.raises(UserError, match="cannot be merged or replaced while FSDP1 or DeepSpeed ZeRO-3"):
        hotswap_adapter(model, tmp_path)


@pytest.mark.parametrize("mark", [{"_hf_tp_plan": "colwise"}, {"_is_hooked": True}])
def test_parts_of_weights_as_older_transformers_makes_them_are_refused(mark):
    base = tiny.llama()
    for key, value in mark.items():
        setattr(base.model.layers[0].self_attn.q_proj, key, value)
    message = r"'model\.layers\.0\.self_attn\.q_proj' has the tensor-parallel plan .* transformers 5\.17"
    with pytest.raises(UserError, match=message):
        tiny.adapt(base, target_modules=["q_proj"])
