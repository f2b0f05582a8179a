"""The adapter methods of transformers, without PeftModel: add, load, set, disable, delete, save."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pera import PeraConfig, UserError
from reference import NORMALIZATIONS, relative_error
from tiny import VOCABULARY, adapt, gpt2, layers, llama, logits, needs_peft_of_transformers, needs_transformers, tokens

pytestmark = needs_peft_of_transformers


def config(**options):
    return PeraConfig(**{"r": 3, "target_modules": "all-linear", "init_weights": False, **options})


def added(*configs, make=llama):
    """A model to which transformers added adapters "first", "second", … The last is active."""
    model = make()
    for seed, (name, options) in enumerate(zip(("first", "second"), configs, strict=False), start=1):
        torch.manual_seed(seed)
        model.add_adapter(config(**options), adapter_name=name)
    return model.eval()


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    """The folder of an adapter that PEFT saved, and the logits of its model."""
    folder = tmp_path_factory.mktemp("adapter")
    options = {"target_modules": "all-linear", "normalization": "rms", "anchors": 2}
    model = adapt(AutoModelForCausalLM.from_pretrained(base_folder), **options)
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_an_added_adapter_equals_that_of_get_peft_model(make, normalization):
    model = added({"normalization": normalization}, make=make)
    base = make()
    torch.manual_seed(1)
    same = get_peft_model(base, config(normalization=normalization), adapter_name="first").eval()
    assert set(layers(model)) == set(layers(same))
    assert relative_error(logits(model), logits(make())) > 1e-3
    assert torch.equal(logits(model), logits(same))


def test_only_the_added_adapter_is_trained():
    model = added({})
    assert trained_names(model) == {name for name, _ in model.named_parameters() if ".pera_" in name}
    model(tokens(), labels=tokens()).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained_names(model)


def test_adapters_are_set_disabled_enabled_and_deleted():
    model = added({}, {"r": 2, "target_modules": ["q_proj"], "normalization": "rms"})
    first, second, base = logits(added({})), logits(model), logits(llama())
    assert model.active_adapters() == ["second"]
    model.set_adapter("first")
    assert model.active_adapters() == ["first"]
    assert torch.equal(logits(model), first)
    assert all(".first" in name for name in trained_names(model))
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), first)
    model.set_adapter(["first", "second"])
    both = logits(model)
    assert min(relative_error(both, other) for other in (first, second, base)) > 1e-3
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    assert not [name for name in model.state_dict() if ".pera_" in name and name.endswith(".second")]
    model.delete_adapter("first")
    assert torch.equal(logits(model), base)
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.active_adapters()


@needs_transformers("5.10", "load_adapter does not report what it loaded")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_gives_the_outputs_it_was_saved_with(saved, low_cpu_mem_usage):
    folder, expected = saved
    model = llama()
    info = model.load_adapter(str(folder), adapter_name="learned", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert torch.equal(logits(model), expected)
    assert model.active_adapters() == ["learned"]
    assert not trained_names(model)


def test_a_loaded_adapter_can_be_trained(saved):
    folder, expected = saved
    model = llama()
    model.load_adapter(str(folder), is_trainable=True)
    assert torch.equal(logits(model.eval()), expected)
    assert trained_names(model) == {name for name, _ in model.named_parameters() if ".pera_" in name}


def test_an_adapter_can_be_loaded_next_to_another(saved):
    folder, expected = saved
    model = added({"target_modules": ["q_proj"]})
    alone = logits(model)
    model.load_adapter(str(folder), adapter_name="learned")
    model.set_adapter("learned")
    assert torch.equal(logits(model), expected)
    model.set_adapter("first")
    assert torch.equal(logits(model), alone)


def test_an_adapter_can_be_loaded_from_tensors(saved):
    folder, expected = saved
    model = llama()
    weights = load_file(folder / "adapter_model.safetensors")
    model.load_adapter(peft_config=PeraConfig.from_pretrained(folder), adapter_state_dict=weights)
    assert torch.equal(logits(model), expected)


def test_from_pretrained_of_an_adapter_folder_loads_base_and_adapter(saved):
    folder, expected = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)


def test_anchors_are_refused_on_a_model_that_names_its_layers_otherwise(tmp_path):
    """Without its head, the model has no prefix in the names of its layers."""
    adapt(llama(), target_modules=["q_proj"], anchors=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^anchors=2: frozen rows .* such as 'layers\.0\..* under other names"):
        llama().model.load_adapter(str(tmp_path))


def test_saving_writes_only_the_adapter_for_both_libraries(tmp_path):
    model = added({"normalization": "rms", "anchors": 2})
    expected = logits(model)
    model.save_pretrained(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PERA"
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    again = llama()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), expected)


def test_get_adapter_state_dict_returns_one_adapter():
    model = added({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"], "coefficients": "fixed"})
    names = [name.rpartition(".self_attn.")[2] for name in model.get_adapter_state_dict("second")]
    assert sorted(names) == ["v_proj.pera_A", "v_proj.pera_A", "v_proj.pera_B", "v_proj.pera_B"]
    assert {name.rpartition(".")[2] for name in model.get_adapter_state_dict("first")} == {"pera_A", "pera_B", "pera_h"}


@needs_transformers("5.23", "load_adapter leaves heads as they were in 5.0 to 5.17")
def test_a_head_is_saved_and_loaded_with_the_adapter(base_folder, tmp_path):
    def make():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3, pad_token_id=0).eval()

    model = make()
    model.add_adapter(config(modules_to_save=["score"], task_type="SEQ_CLS"))
    assert any("score.modules_to_save" in name for name in trained_names(model))
    with torch.no_grad():
        model.score.modules_to_save["default"].weight.mul_(-2)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = make()
    assert relative_error(logits(again), expected) > 1e-3
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), expected)


def test_hotswap_of_transformers_is_refused(saved):
    model = added({})
    with pytest.raises(ValueError, match=r"only supported for LoRA, please set `hotswap=False`"):
        model.load_adapter(str(saved[0]), adapter_name="first", hotswap=True)


def test_embeddings_can_be_resized_after_an_adapter_was_added():
    model = added({})
    before = logits(model)
    model.resize_token_embeddings(VOCABULARY + 8)
    torch.testing.assert_close(logits(model)[..., :VOCABULARY], before)
