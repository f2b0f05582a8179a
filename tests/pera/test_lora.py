"""Conversions in memory: to_lora, combine and from_lora."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from pera import PeraConfig, UserError, combine, to_lora
from pera.tuner import PeraLayer
from reference import relative_error
from tiny import KINDS, adapt, evaluate, gpt2, layers, llama, logits, reference_delta, reference_output

CONV1D = {"target_modules": ["c_attn", "c_fc", "c_proj"]}
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
TIED = {"ensure_weight_tying": True}
CONVERTIBLE = [name for name in KINDS if name != "grouped"]

VARIANTS = {
    # name: base, options of the adapter, K
    "published": ("tiny_llama", {}, 9),
    "square": ("tiny_llama", {"terms": "square", "normalization": "rms"}, 6),
    "cross, fixed": ("tiny_llama", {"terms": "cross", "coefficients": "fixed"}, 6),
    "none": ("tiny_llama", {"terms": "none"}, 3),
    "anchors": ("tiny_llama", {"terms": "none", "anchors": 4, "anchor_seed": 3}, 15),
    "anchors and products": ("tiny_llama", {"target_modules": "all-linear", "normalization": "rms", "anchors": 2}, 15),
    "anchors, fixed": ("tiny_llama", {"terms": "none", "anchors": 4, "coefficients": "fixed"}, 15),
    "anchors, Conv1D": ("tiny_gpt2", {**CONV1D, "anchors": 1, "rank_pattern": {"c_fc": 2}}, 12),
    "anchors, embedding": ("tiny_llama", {**EMBEDDING, "anchors": 2}, 15),
    "anchors, tied": ("tied_llama", {**EMBEDDING, **TIED, "anchors": 2}, 15),
    "K above both sides": ("tiny_llama", {"r": 8}, 44),
    "rslora": ("tiny_llama", {"pera_alpha": 5, "use_rslora": True}, 9),
    "alpha of each": ("tiny_llama", {"pera_alpha": 2, "alpha_pattern": {"v_proj": 7}}, 9),
    "rank of each": ("tiny_llama", {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 4}}, 14),
    "all linear": ("tiny_llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}, 9),
    "expression": ("tiny_llama", {"target_modules": r".*layers\.1.*\.(q|up)_proj"}, 9),
    "one layer": ("tiny_llama", {"layers_to_transform": [1], "layers_pattern": "layers"}, 9),
    "Conv1D": ("tiny_gpt2", {**CONV1D, "normalization": "rms", "rank_pattern": {"c_fc": 2}}, 9),
    "embedding": ("tiny_llama", EMBEDDING, 9),
    "embedding and head": ("tiny_llama", {"target_modules": ["embed_tokens", "lm_head"]}, 9),
    "head of tied embeddings": ("tied_llama", {"target_modules": ["lm_head", "q_proj"]}, 9),
    "embedding of tied embeddings": ("tied_llama", EMBEDDING, 9),
    "tied": ("tied_llama", {**EMBEDDING, **TIED}, 9),
    "tied by an expression": ("tied_llama", {"target_modules": r".*\.(embed_tokens|q_proj)", **TIED}, 9),
    "tied, Conv1D": ("tiny_gpt2", {"target_modules": ["c_attn", "lm_head"], **TIED}, 9),
    "head saved whole": ("tiny_llama", {"modules_to_save": ["lm_head"]}, 9),
    "embedding saved whole": ("tiny_llama", {"modules_to_save": ["embed_tokens"]}, 9),
    "head saved whole, tied": ("tied_llama", {"modules_to_save": ["lm_head"], **TIED}, 9),
    "biases of adapted layers": ("biased_llama", {"bias": "pera_only"}, 9),
    "all biases": ("biased_llama", {"bias": "all"}, 9),
    "biases, Conv1D": ("tiny_gpt2", {**CONV1D, "bias": "pera_only"}, 9),
    "tokens": ("tiny_llama", {"trainable_token_indices": [8, 13]}, 9),
    "tokens, tied": ("tied_llama", {"trainable_token_indices": [8, 13]}, 9),
    "tokens by name": ("tiny_gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [8, 13]}}, 9),
}


@pytest.fixture(scope="module")
def conversions(request, tmp_path_factory, save_adapter, logits, fresh_logits):
    """Each variant converted: logits of the base, of the PERA model, of the LoRA model and of the saved LoRA in plain
    PEFT, and the folder of the saved LoRA."""
    root = tmp_path_factory.mktemp("conversions")
    found, jobs = {}, {}
    for name, (base, options, _) in VARIANTS.items():
        base, folder = request.getfixturevalue(base), root / name / "lora"
        model = save_adapter(root / name / "pera", base, **options)
        before = logits(model)
        lora = to_lora(model)
        lora.save_pretrained(folder)
        found[name] = {"base": logits(base), "pera": before, "lora": logits(lora), "model": lora, "folder": folder}
        jobs[name] = (base, folder)
    for name, plain in fresh_logits(jobs).items():
        found[name]["plain"] = plain
    return found


@pytest.fixture(params=VARIANTS)
def conversion(request, conversions):
    return {**conversions[request.param], "rank": VARIANTS[request.param][2]}


def test_the_lora_gives_the_logits_of_the_adapter(conversion):
    assert relative_error(conversion["pera"], conversion["base"]) > 0.01
    assert relative_error(conversion["lora"], conversion["pera"]) <= 2e-5


def test_plain_peft_without_pera_gives_the_logits_of_the_adapter(conversion):
    assert relative_error(conversion["plain"], conversion["pera"]) <= 2e-5


def test_model_and_file_contain_nothing_of_pera(conversion):
    model = conversion["model"]
    assert [module for module in model.modules() if isinstance(module, PeraLayer)] == []
    assert [name for name in model.state_dict() if "pera" in name] == []
    config = json.loads((conversion["folder"] / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == conversion["rank"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert "pera" not in json.dumps(config)
    weights = load_file(conversion["folder"] / "adapter_model.safetensors")
    assert [name for name in weights if "pera" in name] == []
    assert {w.shape[0] for name, w in weights.items() if "lora_A" in name or "embedding_A" in name} == {
        conversion["rank"]
    }


def test_the_lora_can_be_trained_further(conversion):
    model = copy.deepcopy(conversion["model"]).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name or "lora_embedding_A" in name for name in trained)
    ids = torch.arange(3, 43).reshape(2, 20)
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-4)
    model(input_ids=ids, labels=ids).loss.backward()
    assert [name for name, p in trained.items() if p.grad is None] == []
    optimizer.step()
    assert [name for name, p in trained.items() if "lora_B" in name and torch.equal(p, before[name])] == []


@pytest.mark.parametrize("kind", CONVERTIBLE)
def test_to_lora_converts_each_kind_of_layer(kind, tmp_path):
    kind = KINDS[kind]
    base = kind.base()
    model = adapt(nn.Sequential(copy.deepcopy(base)), target_modules=["0"], normalization="rms", pera_alpha=2)
    x = kind.input()
    expected = reference_output(model.base_model.model[0], x)
    lora = to_lora(model)
    assert type(lora.peft_config["default"]) is LoraConfig
    assert relative_error(evaluate(lora, x), expected) <= 1e-5
    assert relative_error(evaluate(base, x), expected) > 0.1
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(base)), tmp_path).eval()
    assert torch.equal(evaluate(loaded, x), evaluate(lora, x))
    assert relative_error(evaluate(lora.merge_and_unload(), x), expected) <= 1e-5


SECOND = {"r": 2, "normalization": "rms", "target_modules": ["up_proj", "v_proj"], "init_weights": False}


def three_adapters():
    """A LLaMA with adapters "default", "second", on other layers, and "third"."""
    model = adapt(llama(tie_word_embeddings=False), target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", PeraConfig(**SECOND))
    model.add_adapter("third", PeraConfig(r=1, target_modules=["lm_head", "embed_tokens"], init_weights=False))
    return model.eval()


def logits_with(model, names):
    model.base_model.set_adapter(names)
    return logits(model)


@pytest.mark.parametrize("active", [["default"], ["second"], ["third", "second"], ["default", "second", "third"]])
def test_active_adapters_stay_active(active):
    model = three_adapters()
    alone = {name: logits_with(model, [name]) for name in model.peft_config}
    expected = logits_with(model, active)
    lora = to_lora(model)
    assert lora.active_adapters == active
    assert lora.active_adapter == active[0]
    assert relative_error(logits(lora), expected) <= 1e-5
    trained = {
        name.rpartition(".")[2] for name, p in lora.named_parameters() if p.requires_grad and "embedding" in name
    }
    assert trained == {"third"} & set(active)
    assert {name: lora.peft_config[name].r for name in lora.peft_config} == {"default": 9, "second": 5, "third": 2}
    for name, one in alone.items():
        assert relative_error(logits_with(lora, [name]), one) <= 1e-5, name


def test_to_lora_drops_adapters_that_are_not_named():
    model = three_adapters()
    expected = {name: logits_with(model, [name]) for name in model.peft_config}
    model.base_model.set_adapter(["default", "third"])
    lora = to_lora(model, ["third", "second"])
    assert list(lora.peft_config) == ["third", "second"]
    assert lora.active_adapters == ["third"]
    assert [name for name, _ in lora.named_parameters() if "default" in name] == []
    for name in lora.peft_config:
        assert relative_error(logits_with(lora, [name]), expected[name]) <= 1e-5, name


def test_the_first_adapter_becomes_active_if_no_active_one_is_converted():
    lora = to_lora(three_adapters(), ["second", "third"])
    assert lora.active_adapters == ["second"]


@pytest.mark.parametrize("training", [True, False])
def test_to_lora_keeps_the_training_mode(training):
    lora = to_lora(adapt(gpt2(), **CONV1D).train(training))
    assert {module.training for module in lora.modules()} == {training}


def test_to_lora_keeps_the_saved_modules_of_each_adapter():
    model = adapt(llama(tie_word_embeddings=False), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("second", PeraConfig(**{**SECOND, "modules_to_save": ["lm_head"]}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model)
    base = logits(llama(tie_word_embeddings=False))
    lora = to_lora(model)
    for name in expected:
        lora.set_adapter(name)
        assert relative_error(logits(lora), expected[name]) <= 1e-5
    with lora.disable_adapter():
        assert torch.equal(logits(lora), base)


def test_to_lora_keeps_a_scale_that_was_set():
    model = adapt(gpt2(), **CONV1D)
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
    expected = logits(model)
    assert relative_error(logits(to_lora(model)), expected) <= 1e-5


def merged():
    model = adapt(gpt2(), **CONV1D)
    model.merge_adapter()
    return model


def merged_beside_another():
    model = adapt(gpt2(), **CONV1D)
    model.add_adapter("second", PeraConfig(r=2, init_weights=False, **CONV1D))
    model.merge_adapter(["default"])
    return model


def prompt_model():
    return get_peft_model(gpt2(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).eval()


REFUSED = {
    "merged": (merged, None, "adapter 'default' is merged; call unmerge_adapter first"),
    "another merged": (merged_beside_another, ["second"], "adapter 'default' is merged; call unmerge_adapter first"),
    "prompts": (prompt_model, None, "model is a PeftModelForCausalLM; give a PeftModel whose adapters change weights"),
    "base model": (gpt2, None, "model is a GPT2LMHeadModel; give a PeftModel"),
    "unknown": (three_adapters, ["default", "secnd"], "adapter 'secnd' is not in the model; .*second"),
    "empty": (three_adapters, [], r"adapter_names=\[\] names no adapter"),
    "str": (three_adapters, "default", "adapter_names='default' should be a list of names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_to_lora_refuses_and_leaves_the_model_unchanged(case):
    make, names, message = REFUSED[case]
    model = make()
    before = logits(model)
    with pytest.raises(UserError, match=message) as error:
        to_lora(model, names)
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("convert", [to_lora, lambda model: combine(model, {"default": 1})], ids=["to_lora", "combine"])
@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular", "padding": 1}])
def test_convolutions_that_lora_computes_differently_are_refused(options, convert):
    model = adapt(nn.Sequential(nn.Conv2d(4, 6, 3, **options)), target_modules=["0"])
    x = torch.randn(2, 4, 9, 9)
    before = evaluate(model, x)
    with pytest.raises(UserError, match=f"'0' is a convolution with {next(iter(options))}=.*merge the adapter"):
        convert(model)
    assert torch.equal(evaluate(model, x), before)


WEIGHTS = {
    "all": {"default": 0.7, "second": -1.3, "third": 2},
    "weights of 0": {"default": 0, "second": 0.5, "third": 0.0},
    "two of three": {"third": -1, "default": 0.25},
}


def explicit_sum(base, model, weights):
    """The base model in float64 with Σ w ΔW added."""
    base = base.double()
    for name, layer in layers(model).items():
        weight = base.get_submodule(name).weight
        for adapter, factor in weights.items():
            if layer.has(adapter):
                delta = factor * reference_delta(layer, adapter)
                weight.data += (delta.T if delta.shape != weight.shape else delta).reshape(weight.shape)
    return base


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_combine_is_the_weighted_sum(weights):
    model = three_adapters()
    expected = logits(explicit_sum(llama(tie_word_embeddings=False), model, weights))
    lora = combine(model, weights)
    assert list(lora.peft_config) == lora.active_adapters == ["combined"]
    assert relative_error(logits(lora), expected) <= 1e-5
    assert [name for name in lora.state_dict() if "pera" in name] == []
    base = logits(llama(tie_word_embeddings=False))
    assert relative_error(logits(lora.unload()), base) <= 1e-6


def test_a_combined_adapter_can_be_saved_and_loaded(tmp_path):
    lora = combine(three_adapters(), {"default": 0.5, "second": -2, "third": 1}, adapter_name="mixture")
    config = lora.peft_config["mixture"]
    assert config.r == config.lora_alpha == 14  # v_proj: 9 + 5
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=False), tmp_path / "mixture").eval()
    assert torch.equal(logits(loaded), logits(lora))


def test_combine_adapters_on_different_layers():
    """PEFT shortens the names of more than twenty modules to endings."""
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"], "layers_pattern": "layers"}
    model = adapt(llama(num_hidden_layers=4), layers_to_transform=[0, 1], **targets)
    model.add_adapter("second", PeraConfig(r=2, init_weights=False, layers_to_transform=[2, 3], **targets))
    weights = {"default": 0.5, "second": -2}
    expected = logits(explicit_sum(llama(num_hidden_layers=4), model, weights))
    assert relative_error(logits(combine(model, weights)), expected) <= 1e-5


@pytest.mark.parametrize("kind", CONVERTIBLE)
def test_combine_adds_each_kind_of_layer(kind):
    kind = KINDS[kind]
    base = kind.base()
    model = adapt(nn.Sequential(copy.deepcopy(base)), target_modules=["0"])
    model.add_adapter("second", PeraConfig(r=2, target_modules=["0"], init_weights=False, normalization="rms"))
    weights = {"default": 0.5, "second": -2}
    layer, double = model.base_model.model[0], base.double()
    delta = sum(factor * reference_delta(layer, name) for name, factor in weights.items())
    delta = layer._to_base_layout(delta)
    double.weight.data += delta
    x = kind.input()
    expected = evaluate(double, x if not x.is_floating_point() else x.double())
    assert relative_error(evaluate(combine(model, weights), x), expected) <= 1e-5


def test_combine_adds_tied_embeddings():
    tied = llama(tie_word_embeddings=True)
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    model = adapt(copy.deepcopy(tied), **options)
    model.add_adapter("second", PeraConfig(r=2, init_weights=False, **options))
    embedding = layers(model)["model.embed_tokens"]
    weights = {"default": 0.5, "second": -2}
    tied = tied.double()
    for name, factor in weights.items():
        tied.get_input_embeddings().weight.data += factor * reference_delta(embedding, name).T
    assert relative_error(logits(combine(model, weights)), logits(tied)) <= 1e-5


WRONG = {
    "no names": ({}, r"weights=\{\} names no adapter"),
    "a list": (["default"], r"weights=\['default'\] names no adapter"),
    "unknown": ({"default": 1, "secnd": 1}, "adapter 'secnd' is not in the model; .*second"),
    "NaN": ({"default": 1, "second": float("nan")}, r"weights\['second'\]=nan should be a finite number"),
    "bool": ({"default": True}, r"weights\['default'\]=True should be a finite number"),
    "str": ({"default": "1"}, r"weights\['default'\]='1' should be a finite number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_combine_refuses_wrong_weights(case):
    weights, message = WRONG[case]
    model = three_adapters()
    before = logits(model)
    with pytest.raises(UserError, match=message) as error:
        combine(model, weights)
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model), before)


def test_combine_refuses_a_name_with_a_dot():
    model = three_adapters()
    before = logits(model)
    with pytest.raises(UserError, match=r"adapter_name='first\.second' becomes .* leave out the dot"):
        combine(model, {"default": 1}, adapter_name="first.second")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"bias": "pera_only"},
        {"trainable_token_indices": [3]},
    ],
    ids=str,
)
def test_combine_refuses_other_trained_parameters(options):
    model = adapt(llama(tie_word_embeddings=False, attention_bias=True), target_modules=["q_proj"], **options)
    model.add_adapter("second", PeraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    before = logits(model)
    key = next(iter(options))
    with pytest.raises(UserError, match=rf"^{key}=.* of adapter 'default' has no weighted sum\.$"):
        combine(model, {"second": 1, "default": 1})
    assert torch.equal(logits(model), before)
    expected = logits_with(model, ["second"])
    if key != "bias":  # trained biases are part of the base model
        assert relative_error(logits(combine(model, {"second": 1})), expected) <= 1e-5


@pytest.mark.parametrize("make", [merged, prompt_model, gpt2])
def test_combine_refuses_what_to_lora_refuses(make):
    model = make()
    before = logits(model)
    with pytest.raises(UserError, match=r"is merged|give a PeftModel"):
        combine(model, {"default": 1})
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("again", [to_lora, lambda model: combine(model, {"default": 1})])
def test_a_model_that_was_converted_before_is_refused(again):
    model = three_adapters()
    lora = to_lora(model)
    before = logits(lora)
    with pytest.raises(UserError, match="adapter 'default' is in no layer of the model; use the model"):
        again(model)
    assert torch.equal(logits(lora), before)


@pytest.mark.parametrize(("make", "targets"), [(llama, ["q_proj", "up_proj"]), (gpt2, CONV1D["target_modules"])])
def test_to_lora_agrees_with_convert_to_lora_of_peft(make, targets):
    model = adapt(make(), target_modules=targets)
    base = make()
    config, weights = convert_to_lora(model, rank=9)
    approximated = get_peft_model(base, config).eval()
    set_peft_model_state_dict(approximated, weights)
    expected = logits(to_lora(model))
    assert relative_error(logits(approximated), expected) <= 1e-5
    assert relative_error(logits(make()), expected) > 0.01


@pytest.mark.parametrize("kind", [name for name in KINDS if name not in ("linear", "conv1d")])
def test_convert_to_lora_of_peft_refuses_other_layers(kind):
    model = adapt(nn.Sequential(KINDS[kind].base(), nn.Linear(5, 7)), target_modules=["0", "1"])
    supported = [module.supports_lora_conversion("default") for module in layers(model).values()]
    assert supported == [False, True]
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=3)
