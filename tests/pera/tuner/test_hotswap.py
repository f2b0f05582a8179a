"""hotswap_adapter: a saved adapter's values replace the values of a loaded adapter."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from pera import PeraConfig, UserError, hotswap_adapter
from tiny import RMS, layers, llama, logits, tokens

EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
TIED = {**EMBEDDING, "ensure_weight_tying": True, **RMS}


def base(**options):
    """A LLaMA whose embeddings are tied if the adapter ties them."""
    return llama(tie_word_embeddings="ensure_weight_tying" in options, initializer_range=0.2)


def adapt(model, seed=0, name="default", **options):
    """The model with an adapter whose trained values are all random."""
    torch.manual_seed(seed)
    options = {"r": 3, "target_modules": ["q_proj", "v_proj"], "init_weights": False, **options}
    model = get_peft_model(model, PeraConfig(**options), adapter_name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture
def save(tmp_path):
    """Saves another adapter for the same base model and returns its folder."""

    def save_as(name="other", save_embedding_layers="auto", **options):
        model = adapt(base(**options), seed=1, **options)
        model.save_pretrained(tmp_path / name, save_embedding_layers=save_embedding_layers)
        return str(tmp_path / name)

    return save_as


def state(model, name="default"):
    """Everything that a swap may change."""
    scales = {key: (layer.r[name], layer.pera_alpha[name], layer.scaling[name]) for key, layer in layers(model).items()}
    return copy.deepcopy(model.state_dict()), model.peft_config[name].to_dict(), scales


def unchanged(model, before, name="default"):
    values, config, scales = state(model, name)
    return (
        (config, scales) == before[1:]
        and values.keys() == before[0].keys()
        and all(torch.equal(value, before[0][key]) for key, value in values.items())
    )


SAME = {
    "values": ({}, {}),
    "alpha": ({}, {"pera_alpha": 7}),
    "rslora": ({"pera_alpha": 5}, {"pera_alpha": 5, "use_rslora": True}),
    "alpha_pattern": ({}, {"alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 9}}),
    "no alpha_pattern": ({"alpha_pattern": {"v_proj": 9}}, {"pera_alpha": 2}),
    "the same rank by a pattern": ({}, {"r": 2, "rank_pattern": {"q_proj": 3, "v_proj": 3}}),
    "the same layers by an expression": ({}, {"target_modules": r".*\.[qv]_proj"}),
    "fixed squares": (
        {"terms": "square", "coefficients": "fixed", **RMS},
        {"terms": "square", "coefficients": "fixed", **RMS},
    ),
    "anchors": ({"anchors": 3, "anchor_seed": 7}, {"anchors": 3, "anchor_seed": 7}),
    "modules_to_save": ({"modules_to_save": ["lm_head", "norm"]}, {"modules_to_save": ["lm_head", "norm"]}),
    "token rows": ({"trainable_token_indices": [0, 5, 11]}, {"trainable_token_indices": [0, 5, 11]}),
    "token rows, tied": (
        {"trainable_token_indices": [0, 5, 11], "ensure_weight_tying": True},
        {"trainable_token_indices": [0, 5, 11], "ensure_weight_tying": True},
    ),
    "tied layers": (TIED, TIED),
    "tied layers, alpha": (TIED, {**TIED, "alpha_pattern": {"embed_tokens": 6}}),
    "tied head": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize(("here", "there"), SAME.values(), ids=SAME.keys())
def test_the_model_gives_the_outputs_of_the_other_adapter(save, tmp_path, here, there):
    folder = save(**there)
    model = adapt(base(**here), **here)
    before = logits(model)
    parameters = {name: (p, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    hotswap_adapter(model, folder)

    loaded = PeftModel.from_pretrained(base(**there), folder).eval()
    assert torch.equal(logits(model), logits(loaded))
    assert not torch.allclose(logits(model), before, atol=1e-3)
    values = loaded.state_dict()
    assert values.keys() == model.state_dict().keys()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert state(model)[2] == state(loaded)[2]

    assert parameters.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert p is parameters[name][0]
        assert (p.data_ptr(), p.requires_grad) == parameters[name][1:]

    model.save_pretrained(tmp_path / "again", save_embedding_layers="auto")
    first, again = (load_file(f"{path}/adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    loaded = PeftModel.from_pretrained(base(**there), tmp_path / "again").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_the_configuration_is_replaced_except_inference_mode(save):
    model = adapt(base())
    hotswap_adapter(model, save(pera_alpha=7))
    config = model.peft_config["default"]
    assert (config.pera_alpha, config.inference_mode) == (7, False)
    assert all(p.requires_grad for name, p in model.named_parameters() if "pera_" in name)


def test_only_the_named_adapter_changes(save):
    model = adapt(base())
    model.add_adapter("second", PeraConfig(r=2, pera_alpha=4, target_modules=["q_proj", "v_proj"], init_weights=False))
    folder, before = save(pera_alpha=7), state(model, "second")
    expected = {}
    for name, p in model.named_parameters():
        if ".second" in name:
            expected[name] = p.detach().clone()
    hotswap_adapter(model, folder, "default")
    assert expected
    assert all(torch.equal(model.get_parameter(name), value) for name, value in expected.items())
    assert state(model, "second")[1:] == before[1:]
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(base(), folder).eval()))


def test_the_saved_adapter_may_have_another_name(tmp_path):
    adapt(base(), seed=1, name="second").save_pretrained(tmp_path)
    model = adapt(base(), name="first")
    hotswap_adapter(model, str(tmp_path / "second"), adapter_name="first")
    assert list(model.peft_config) == ["first"]
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(base(), tmp_path / "second").eval()))


def test_a_scale_that_was_set_is_replaced(save):
    model, folder = adapt(base()), save(pera_alpha=7)
    q_proj = layers(model)["model.layers.0.self_attn.q_proj"]
    q_proj.set_scale("default", 5)
    hotswap_adapter(model, folder)
    assert q_proj.scaling["default"] == pytest.approx(7 / 3)
    q_proj.set_scale("default", 2)
    q_proj.unscale_layer()
    assert q_proj.scaling["default"] == pytest.approx(7 / 3)


def test_an_optimizer_keeps_training_the_swapped_adapter(save):
    model, folder = adapt(base()), save()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hotswap_adapter(model, folder)
    before = copy.deepcopy(model.state_dict())
    loaded = PeftModel.from_pretrained(base(), folder, is_trainable=True).eval()
    theirs = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
    for each, steps in ((model, optimizer), (loaded, theirs)):
        each(tokens(), labels=tokens()).loss.backward()
        steps.step()
    after = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name])
        assert ("pera_" in name) is not torch.equal(value, before[name])


def test_a_compiled_model_is_not_compiled_again(tmp_path):
    def make(seed, **options):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
        return adapt(model, seed, target_modules=["0", "2"], **options)

    for seed in (1, 2):
        make(seed).save_pretrained(tmp_path / str(seed))
    make(3, pera_alpha=7).save_pretrained(tmp_path / "scaled")
    x, model = torch.randn(4, 6), make(0)
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            compiled = torch.compile(model, backend="aot_eager")
            torch.testing.assert_close(compiled(x), model(x))
            graphs = counters["stats"]["unique_graphs"]
            assert graphs > 0
            for seed in (1, 2):
                hotswap_adapter(model, str(tmp_path / str(seed)))
                torch.testing.assert_close(compiled(x), make(seed)(x))
                assert counters["stats"]["unique_graphs"] == graphs
            hotswap_adapter(model, str(tmp_path / "scaled"))
            torch.testing.assert_close(compiled(x), make(3, pera_alpha=7)(x))
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("options", [EMBEDDING, TIED], ids=["", "tied"])
@pytest.mark.parametrize("saved", [True, False])
def test_a_folder_may_include_the_base_weights_of_an_adapted_embedding(save, options, saved):
    folder = save(save_embedding_layers=saved, **options)
    keys = load_file(f"{folder}/adapter_model.safetensors").keys()
    assert any("embed_tokens.base_layer.weight" in key for key in keys) is saved
    model = adapt(base(**options), **options)
    hotswap_adapter(model, folder)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(base(**options), folder).eval()))


@pytest.mark.parametrize("options", [{}, EMBEDDING], ids=["", "adapted"])
def test_a_folder_with_the_embedding_of_another_base_model_is_refused(save, tmp_path, change_weights, options):
    """Loading such a folder would change the base model."""
    folder = save(save_embedding_layers=True, **options)
    key = f"base_model.model.model.embed_tokens.{'base_layer.' if options else ''}weight"
    change_weights(tmp_path / "other" / "adapter_model.safetensors", lambda weights: {**weights, key: -weights[key]})
    refused(adapt(base(), **options), folder, rf"other' has {key}, .*; use load_adapter instead\.")


def test_a_folder_may_include_the_base_weights_of_other_embeddings(save):
    model = adapt(base())
    hotswap_adapter(model, save(save_embedding_layers=True))
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(base(), save()).eval()))


@pytest.mark.parametrize(("here", "there"), [(0.0, 0.5), (0.5, 0.0)])
def test_dropout_is_not_replaced(save, here, there):
    model = adapt(base(), pera_dropout=here)
    hotswap_adapter(model, save(pera_dropout=there))
    dropout = {getattr(layer.pera_dropout["default"], "p", 0.0) for layer in layers(model).values()}
    assert dropout == {model.peft_config["default"].pera_dropout}


QV = {"target_modules": ["q_proj", "v_proj"]}
DIFFERENT = {
    "rank": ({"r": 2}, r"does not have .*q_proj.*pera_A.* of shape \(3, 32\)"),
    "one rank": ({"rank_pattern": {"v_proj": 4}}, r"does not have .*v_proj.*pera_. of shape"),
    "a missing layer": ({"target_modules": ["q_proj"]}, "does not have .*v_proj"),
    "an extra layer": (
        {"target_modules": ["k_proj", "q_proj", "v_proj"]},
        ".*k_proj.*, which the loaded adapter lacks",
    ),
    "other layers": ({"layers_to_transform": [1]}, r"does not have .*layers\.0"),
    "terms": ({"terms": "square"}, "has terms='square', the loaded adapter 'all'"),
    "coefficients": ({"coefficients": "fixed"}, "has coefficients='fixed', the loaded adapter 'learned'"),
    "normalization": ({"normalization": "rms"}, "has normalization='rms', the loaded adapter 'none'"),
    "anchors": ({"anchors": 2}, "has anchors=2, the loaded adapter 0"),
    "an extra module": (
        {"modules_to_save": ["lm_head"]},
        "has .*lm_head.weight, which .*; use load_adapter instead",
    ),
    "token rows": ({"trainable_token_indices": [1]}, r"has trainable_token_indices=\[1\], the loaded adapter None"),
}


def refused(model, folder, message, name="default"):
    """Check that a swap is refused and that nothing has changed."""
    before, expected, config = state(model), logits(model), model.peft_config["default"]
    with pytest.raises(UserError, match=message) as error:
        hotswap_adapter(model, str(folder), name)
    assert "\n" not in str(error.value)
    assert unchanged(model, before)
    assert model.peft_config["default"] is config
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("there", "message"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_a_different_adapter_is_refused(save, there, message):
    refused(adapt(base()), save(**there), message)


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"does not have .*lm_head.weight of shape \(64, 32\)"),
        ({"trainable_token_indices": [1, 2]}, r"has trainable_token_indices=None, the loaded adapter \[1, 2\]"),
        ({"ensure_weight_tying": True}, "has ensure_weight_tying=False, the loaded adapter True"),
    ],
)
def test_an_adapter_that_lacks_something_is_refused(save, here, message):
    refused(adapt(base(**here), **here), save(), message)


def test_other_tokens_are_refused(save):
    model = adapt(base(), trainable_token_indices=[1, 2])
    refused(model, save(trainable_token_indices=[1, 3]), r"has trainable_token_indices=\[1, 3\], .* \[1, 2\]")


def test_other_frozen_rows_are_refused(save):
    """The weights would fit."""
    model = adapt(base(), anchors=2)
    refused(model, save(anchors=2, anchor_seed=1), "has anchor_seed=1, the loaded adapter 0; use load_adapter instead")


def test_a_lora_folder_is_refused(tmp_path):
    get_peft_model(base(), LoraConfig(r=3, **QV)).save_pretrained(tmp_path)
    refused(adapt(base()), tmp_path, "is a LoraConfig, not a PERA adapter")


def test_a_loaded_lora_adapter_is_refused(save):
    model = get_peft_model(base(), LoraConfig(r=3, init_lora_weights=False, **QV)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="adapter 'default' is a LoraConfig, not a PERA adapter"):
        hotswap_adapter(model, save())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_missing_folder_is_refused(tmp_path):
    refused(adapt(base()), tmp_path / "nowhere", "nowhere' cannot be read as an adapter: ")


def cut_off(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def without_config(folder):
    (folder / "adapter_config.json").unlink()


def config_cut_off(folder):
    file = folder / "adapter_config.json"
    file.write_text(file.read_text()[:50])


def unknown_method(folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "PERRA"}))


def pickled_cut_off(folder):
    without_weights(folder)
    torch.save({f"{i}": torch.ones(9) for i in range(9)}, folder / "adapter_model.bin")
    file = folder / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "spoil", [cut_off, without_weights, without_config, config_cut_off, unknown_method, pickled_cut_off]
)
def test_a_folder_that_cannot_be_read_is_refused(save, tmp_path, spoil):
    folder = save()
    spoil(tmp_path / "other")
    refused(adapt(base()), folder, "other' cannot be read as an adapter: ")


@pytest.mark.parametrize(
    ("key", "value"), [("model.layers.1.self_attn.v_proj.pera_h", float("nan")), ("lm_head.weight", float("inf"))]
)
def test_weights_that_are_not_finite_are_refused(save, tmp_path, change_weights, key, value):
    options = {"modules_to_save": ["lm_head"]}
    folder = save(**options)

    def spoil(weights):
        weights[f"base_model.model.{key}"].view(-1)[-1] = value
        return weights

    change_weights(tmp_path / "other" / "adapter_model.safetensors", spoil)
    refused(
        adapt(base(), **options), folder, f"NaNs detected in the weights of .*{key}. The adapter seems to be broken"
    )


def test_a_merged_adapter_is_refused(save):
    model = adapt(base())
    model.merge_adapter()
    refused(model, save(), "adapter 'default' is merged; call unmerge_adapter first")


def test_an_unknown_name_is_refused(save):
    refused(adapt(base()), save(), "adapter 'defualt' is not in the model", name="defualt")


def test_a_model_without_adapters_is_refused(save):
    with pytest.raises(UserError, match="adapter 'default' is not in the model"):
        hotswap_adapter(base(), save())
