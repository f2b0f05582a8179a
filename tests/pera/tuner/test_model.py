"""PERA in whole models: targets, several adapters, saving and loading, merging, training."""

import pytest
import torch
from accelerate import cpu_offload
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
)

from pera import PeraConfig, PeraModel, UserError
from pera.polynomial import num_coefficients
from reference import relative_error
from tiny import VOCABULARY, adapt, gpt2, layers, linear, llama, logits, reference_delta, reference_output, tokens

LLAMA_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
GPT2_LINEAR = {"c_attn", "c_proj", "c_fc"}
MODELS = {"llama": (llama, LLAMA_LINEAR), "gpt2": (gpt2, GPT2_LINEAR)}


@pytest.fixture(params=MODELS)
def base(request):
    """A function that makes the base model, and the names of its linear layers."""
    return MODELS[request.param]


def short_names(model):
    return {name.rpartition(".")[2] for name in layers(model)}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# Start


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization": "rms", "init_coefficients": 0.3},
        {"coefficients": "fixed"},
        {"terms": "none"},
    ],
)
def test_training_starts_at_the_base_model_exactly(base, options):
    make, _ = base
    model = get_peft_model(make(), PeraConfig(target_modules="all-linear", **options))
    expected = logits(make())
    assert torch.equal(logits(model.eval()), expected)
    assert torch.equal(model(tokens()).logits, expected)


def test_only_the_adapter_is_trained(base):
    make, names = base
    model = get_peft_model(make(), PeraConfig(r=3, target_modules=sorted(names)))
    assert isinstance(model.base_model, PeraModel)
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".pera_" in name}
    sides = sum(layer.in_features + layer.out_features for layer in layers(model).values())
    assert model.get_nb_trainable_parameters()[0] == 3 * sides + len(layers(model)) * num_coefficients(3, "all")


def test_a_refused_adapter_leaves_nothing_behind(tmp_path):
    """The embedding is refused after q_proj is adapted. The next adapter of that name has v_proj only."""
    model = adapt(llama(), target_modules=["q_proj"])
    before = [name for name, _ in model.named_modules()]
    targets = ["q_proj", "o_proj", "embed_tokens"]
    with pytest.raises(UserError, match="normalization='centred' is not for embeddings"):
        model.add_adapter("b", PeraConfig(r=2, normalization="centred", target_modules=targets))
    assert [name for name, _ in model.named_modules()] == before
    model.add_adapter("b", PeraConfig(r=2, target_modules=["v_proj"]))
    assert {name.split(".")[-3] for name in model.state_dict() if name.endswith("pera_A.b")} == {"v_proj"}


def test_a_refused_first_adapter_leaves_the_base_model():
    base = llama()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(UserError, match="normalization='centred' is not for embeddings"):
        get_peft_model(base, PeraConfig(normalization="centred", target_modules=["q_proj", "embed_tokens"]))
    assert [name for name, _ in base.named_modules()] == before


# Targets


def test_all_linear_excludes_the_head(base):
    make, names = base
    model = adapt(make(), target_modules="all-linear")
    assert short_names(model) == names
    assert len(layers(model)) == {"llama": 14, "gpt2": 8}[model.config.model_type]


@pytest.mark.parametrize(("make", "names"), [(llama, {"q_proj", "v_proj"}), (gpt2, {"c_attn"})])
def test_default_targets_are_the_choice_of_peft(make, names):
    assert short_names(adapt(make())) == names


def test_a_regular_expression_matches_full_names():
    model = adapt(llama(), target_modules=r".*layers\.1\..*(q|v)_proj")
    assert set(layers(model)) == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize("exclusions", [["layers.0.self_attn.q_proj"], r".*layers\.0\..*q_proj"])
def test_excluded_modules_are_not_adapted(exclusions):
    model = adapt(llama(), target_modules=["q_proj"], exclude_modules=exclusions)
    assert set(layers(model)) == {"model.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize(("indices", "pattern"), [(1, None), ([1], None), ([1], "layers"), (1, ["layers"])])
def test_layers_to_transform_selects_layers(indices, pattern):
    targets = ["q_proj", "down_proj"]
    model = adapt(llama(), target_modules=targets, layers_to_transform=indices, layers_pattern=pattern)
    assert set(layers(model)) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}


def test_patterns_set_rank_and_scale_of_a_module():
    model = adapt(
        llama(),
        r=4,
        target_modules=["q_proj", "v_proj", "o_proj"],
        rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6},
        alpha_pattern={"o_proj": 2},
    )
    settings = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers(model).items()}
    attention = "model.layers.{}.self_attn.{}".format
    assert settings == {
        attention(0, "q_proj"): (2, 1.0),
        attention(1, "q_proj"): (2, 1.0),
        attention(0, "v_proj"): (4, 1.0),
        attention(1, "v_proj"): (6, 1.0),
        attention(0, "o_proj"): (4, 0.5),
        attention(1, "o_proj"): (4, 0.5),
    }
    for layer in layers(model).values():
        assert layer.pera_h["default"].shape == (num_coefficients(layer.r["default"], "all"),)


def test_one_alpha_is_divided_by_the_rank_of_each_layer():
    model = adapt(llama(), r=4, pera_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})
    assert {layer.scaling["default"] for name, layer in layers(model).items() if "q_proj" in name} == {4.0}
    assert {layer.scaling["default"] for name, layer in layers(model).items() if "v_proj" in name} == {2.0}


@pytest.mark.parametrize(
    ("module", "kind"),
    [(nn.GRU(4, 4), "GRU"), (nn.ConvTranspose2d(3, 4, 1), "ConvTranspose2d")],
)
def test_an_unsupported_layer_is_refused_with_the_supported_kinds(module, kind):
    with pytest.raises(UserError, match=rf"'1' is a {kind}, which PERA does not support; .*nn\.Linear.*Conv1D"):
        adapt(nn.Sequential(nn.Linear(4, 4), module), target_modules=["0", "1"])


@pytest.mark.parametrize(
    ("targets", "target"),
    [(["out_proj"], "out_proj"), (["in_proj", "conv1d"], "conv1d"), (r".*\.dt_proj", "dt_proj")],
)
def test_layers_that_mamba_reads_without_calling_are_refused(targets, target):
    base = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1))
    with pytest.raises(
        UserError, match=rf"a mamba model reads '{target}' without calling it.*would ignore an adapter; leave it out"
    ):
        adapt(base, target_modules=targets)


# Other trained parameters


@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        ("none", lambda name: False),
        ("pera_only", lambda name: "c_attn" in name),
        ("all", lambda name: True),
    ],
)
def test_biases_are_trained_and_saved(bias, trained, tmp_path):
    model = adapt(gpt2(), target_modules=["c_attn"], bias=bias)
    biases = {name: p for name, p in model.named_parameters() if name.endswith(".bias")}
    assert {name for name in trainable(model) if ".pera_" not in name} == {name for name in biases if trained(name)}
    with torch.no_grad():
        for p in biases.values():
            p.add_(0.1 * p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), logits(model))


def test_modules_to_save_are_trained_and_saved(tmp_path):
    model = adapt(llama(tie_word_embeddings=False), target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    with torch.no_grad():
        head.mul_(2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=False), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("indices", [[5, 11], {"embed_tokens": [5, 11]}])
def test_embeddings_of_tokens_are_trained_saved_and_merged(indices, tmp_path):
    def base():
        return llama(tie_word_embeddings=False)

    model = adapt(base(), target_modules=["q_proj"], trainable_token_indices=indices)
    others = {name for name in trainable(model) if ".pera_" not in name}
    assert others == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"}
    ids = torch.arange(VOCABULARY)[None]
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    rows = model.get_input_embeddings().weight.detach()
    before = base().get_input_embeddings().weight.detach()
    assert (rows != before).any(1).nonzero().flatten().tolist() == [5, 11]

    def outputs(model):
        with torch.no_grad():
            return model(ids).logits

    expected = outputs(model)
    model.save_pretrained(tmp_path)
    saved = [name for name in load_file(tmp_path / "adapter_model.safetensors") if ".pera_" not in name]
    assert saved == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert torch.equal(outputs(PeftModel.from_pretrained(base(), tmp_path)), expected)
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(base()))
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, rows)
    assert relative_error(outputs(merged), expected) <= 1e-5


def test_merging_below_trainable_token_rows_is_refused():
    """PEFT replaces rows of a tied head, so that an update of the weight below would have no effect."""
    model = adapt(llama(tie_word_embeddings=True), target_modules=["lm_head"], trainable_token_indices=[5, 11])
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UserError, match=r"lm_head' cannot be merged: trainable_token_indices replaces rows"):
            merge()
    assert torch.equal(logits(model), before)


# Several adapters


def test_adapters_are_added_set_and_deleted(base):
    make, names = base
    first, second = {"target_modules": sorted(names), "r": 3}, {"target_modules": sorted(names)[:1], "r": 2}
    model = adapt(make(), **first)
    alone = logits(model)
    model.add_adapter("second", PeraConfig(**second, init_weights=False, normalization="rms"))
    assert torch.equal(logits(model), alone)
    model.set_adapter("second")
    other = logits(model)
    assert relative_error(other, alone) > 1e-3
    assert all(".second" in name for name in trainable(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make()))
    assert torch.equal(logits(model), other)
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    model.delete_adapter("second")
    assert torch.equal(logits(model), alone)
    assert not any("second" in name for name in model.state_dict())


def test_two_active_adapters_add_their_updates():
    model = adapt(llama(), target_modules=["q_proj"])
    model.add_adapter("second", PeraConfig(r=2, target_modules=["q_proj"], init_weights=False, normalization="rms"))
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(2, 3, 32)
    for layer in layers(model).values():
        assert relative_error(layer(x), reference_output(layer, x, ("default", "second"))) <= 1e-6
    expected = logits(model)
    assert relative_error(logits(model.merge_and_unload()), expected) <= 1e-5


def test_a_second_adapter_may_target_other_modules():
    model = adapt(llama(), target_modules=["q_proj"])
    alone = logits(model)
    model.add_adapter("second", PeraConfig(target_modules=["v_proj"], init_weights=False))
    assert torch.equal(logits(model), alone)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    assert relative_error(expected, alone) > 1e-3
    assert relative_error(logits(model.merge_and_unload()), expected) <= 1e-5


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_second_adapter_on_all_linear_layers_adapts_the_same_layers(make):
    model = adapt(make(), target_modules="all-linear")
    model.add_adapter("second", PeraConfig(target_modules="all-linear"))
    assert all(set(layer.pera_A) == {"default", "second"} for layer in layers(model).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["c_attn"], "bias": "pera_only"}, "supports only 1 adapter with bias"),
        ({"target_modules": ["c_atn"]}, "'c_atn' not found in the base model"),
        ({"target_modules": ["ln_f"]}, "'transformer.ln_f' is a LayerNorm, which PERA does not support"),
    ],
)
def test_a_second_adapter_that_is_refused_leaves_the_first(options, message, tmp_path):
    model = adapt(gpt2(), target_modules=["c_attn"], bias="all")
    expected, names = logits(model), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", PeraConfig(**options))
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), expected)
    model.add_adapter("second", PeraConfig(target_modules=["c_fc"]))
    model.delete_adapter("second")
    assert relative_error(logits(model.merge_and_unload()), expected) <= 1e-5


# Merging


def architecture(model):
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    weights = [(name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()]
    return type(model), kinds, weights


@pytest.mark.parametrize("normalization", ["none", "centred"])
def test_a_merged_model_is_a_base_model_with_equal_logits(base, normalization):
    make, _ = base
    model = adapt(make(), target_modules="all-linear", normalization=normalization)
    expected = logits(model)
    assert relative_error(logits(make()), expected) > 1e-3
    merged = model.merge_and_unload(safe_merge=True)
    assert architecture(merged) == architecture(make())
    assert not hasattr(merged, "peft_config")
    assert relative_error(logits(merged), expected) <= 1e-5


def test_merge_and_unmerge_in_place(base):
    make, _ = base
    model = adapt(make(), target_modules="all-linear")
    expected = logits(model)
    model.merge_adapter()
    assert relative_error(logits(model), expected) <= 1e-5
    model.unmerge_adapter()
    assert relative_error(logits(model), expected) <= 1e-5


def test_unload_returns_the_base_model(base):
    make, _ = base
    model = adapt(make(), target_modules="all-linear").unload()
    assert architecture(model) == architecture(make())
    assert torch.equal(logits(model), logits(make()))


def test_a_bfloat16_model_merges_in_bfloat16():
    model = adapt(llama().to(torch.bfloat16), target_modules="all-linear", normalization="rms")
    expected = {name: (layer.base_layer.weight, reference_delta(layer)) for name, layer in layers(model).items()}
    expected = {name: (weight.double() + delta).detach() for name, (weight, delta) in expected.items()}
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    for name, weight in expected.items():
        # one rounding to bfloat16, and the float32 sums before it
        bound = torch.finfo(torch.bfloat16).eps / 2 * weight.abs() + 1e-6
        assert ((merged.get_parameter(f"{name}.weight").double() - weight).abs() <= bound).all()


# LoRA


@pytest.mark.parametrize("make", [llama, gpt2])
def test_convert_to_lora_of_peft_is_exact_at_rank_K(make):
    model = adapt(make(), r=2, target_modules=["q_proj"] if make is llama else ["c_attn"], normalization="rms")
    expected = logits(model)
    config, weights = convert_to_lora(model, rank=5)
    converted = get_peft_model(make(), config).eval()
    set_peft_model_state_dict(converted, weights)
    assert relative_error(logits(converted), expected) <= 1e-5


def test_a_lora_configuration_with_terms_none_is_the_same_model():
    options = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    lora_config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, init_lora_weights=False, **options)
    lora = get_peft_model(llama(), lora_config).eval()
    base = llama()
    torch.manual_seed(1)
    model = get_peft_model(base, PeraConfig.from_lora(lora_config, terms="none")).eval()
    assert relative_error(logits(model), logits(lora)) > 1e-3
    modules = dict(lora.named_modules())
    for name, layer in layers(model).items():
        same = modules[f"base_model.model.{name}"]
        assert layer.scaling == same.scaling
        layer.pera_A["default"].data.copy_(same.lora_A["default"].weight)
        layer.pera_B["default"].data.copy_(same.lora_B["default"].weight)
    assert relative_error(logits(model), logits(lora)) <= 1e-6


def test_add_weighted_adapter_points_to_combine():
    model = adapt(llama(), target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"use pera\.combine"):
        model.add_weighted_adapter(["default"], [1.0], "mean")


# Training and running


@pytest.mark.parametrize(("normalization", "gradient_checkpointing"), [("none", False), ("rms", True)])
def test_training_lowers_the_loss_and_moves_every_parameter(normalization, gradient_checkpointing):
    model = get_peft_model(llama(), PeraConfig(r=4, target_modules="all-linear", normalization=normalization))
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    base_weights = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        if len(losses) < 20:
            optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.any(), name
            assert not torch.equal(p, start[name]), name
        else:
            assert torch.equal(p, base_weights[name]), name


def test_dropout_can_be_switched_on_in_evaluation():
    """As Monte Carlo dropout does."""
    layer, x = linear(pera_dropout=0.5), torch.randn(4, 9)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
        layer.pera_dropout.train()
        assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["c_attn"]], ids=str)
def test_a_model_that_accelerate_offloads_gives_the_same_logits(targets):
    model = adapt(llama() if "q_proj" in targets else gpt2(), target_modules=targets, normalization="rms")
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert {p.device.type for name, p in model.named_parameters() if ".pera_" in name} == {"meta"}
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert {p.device.type for name, p in model.named_parameters() if ".pera_" in name} == {"meta"}


def test_a_convolution_that_accelerate_offloads_gives_the_same_output():
    model = adapt(nn.Sequential(nn.Conv2d(2, 3, 3)), target_modules=["0"])
    x = torch.ones(1, 2, 5, 5)
    with torch.no_grad():
        expected = model(x)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model(x), expected)


def test_a_compiled_layer_follows_its_weights():
    layer = linear(normalization="rms")
    x = torch.randn(4, 9)
    compiled = torch.compile(layer, backend="aot_eager")
    assert relative_error(compiled(x), reference_output(layer, x)) <= 1e-6
    with torch.no_grad():
        assert relative_error(compiled(x), reference_output(layer, x)) <= 1e-6
        layer.pera_A["default"].mul_(2)
        assert relative_error(compiled(x), reference_output(layer, x)) <= 1e-6
