"""PERA as a method that PEFT and transformers know."""

import copy
import importlib
import json
import pickle

import pytest
import torch
from peft import PeftType, get_layer_status, get_model_status, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import pera
from pera import PeraConfig, PeraModel
from tiny import adapt, layers, llama, logits, needs_peft_of_transformers


def test_the_method_is_a_member_like_any_other():
    member = PeftType.PERA
    assert (member, member.name, member.value) == ("PERA", "PERA", "PERA")
    assert PeftType("PERA") is PeftType["PERA"] is member
    assert member in list(PeftType)
    assert json.dumps({"peft_type": member}) == '{"peft_type": "PERA"}'
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


def test_peft_finds_configuration_model_and_prefix():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PERA] is PeraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PERA] is PeraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.PERA] == "pera_"
    assert get_peft_config({"peft_type": "PERA", "r": 4}) == PeraConfig(r=4)


def test_registering_again_changes_nothing():
    members = list(PeftType)
    pera.register()
    importlib.reload(pera)
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PERA] is PeraConfig


def test_the_status_of_a_model_names_the_method():
    model = adapt(llama(), target_modules=["q_proj"])
    status = get_model_status(model)
    assert status.peft_types == {"default": "PERA"}
    assert status.num_adapter_layers == 2
    assert status.available_adapters == ["default"]
    assert [layer.module_type for layer in get_layer_status(model)] == ["pera.PeraLinear"] * 2


@needs_peft_of_transformers
def test_transformers_loads_and_deletes_an_adapter(tmp_path):
    model = adapt(llama(), target_modules=["q_proj", "v_proj"], normalization="rms")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = llama()
    loaded.load_adapter(str(tmp_path), adapter_name="learned")
    assert torch.equal(logits(loaded.eval()), expected)
    loaded.delete_adapter("learned")
    assert all(not layer.pera_A for layer in layers(loaded).values())


def test_without_importing_pera_an_adapter_is_not_known(python, tmp_path):
    PeraConfig().save_pretrained(tmp_path)
    result = python("import sys, peft; peft.PeftConfig.from_pretrained(sys.argv[1])", tmp_path, check=False)
    assert result.returncode != 0
    assert result.stderr.strip().endswith("KeyError: 'PERA'")


@pytest.mark.parametrize("name", pera.__all__)
def test_public_names_exist(name):
    assert getattr(pera, name) is not None
