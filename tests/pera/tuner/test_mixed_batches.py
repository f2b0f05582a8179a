"""Batches that mix adapters: ``adapter_names`` names one adapter for each sample."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

import tiny
from pera import PeraConfig, UserError
from tiny import RMS, VOCABULARY, logits

NAMES = ["second", "__base__", "first", "second"]
INPUTS = torch.arange(20).reshape(4, 5) * 7 % (VOCABULARY - 3) + 3
LENGTH = {"max_new_tokens": 4, "min_new_tokens": 4}
UP = {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1]}


def llama():
    """A LLaMA with weights so large that adapters change the generated tokens."""
    return tiny.llama(initializer_range=0.3)


def tied_llama():
    return tiny.llama(initializer_range=0.3, tie_word_embeddings=True)


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    special = {"decoder_start_token_id": 0, "initializer_factor": 3.0}
    return T5ForConditionalGeneration(T5Config(**sizes, **special)).eval()


class Audio(nn.Module):
    """A convolution in front of a head, for sequences of 6 channels."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(6, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.convolution(x).mean(-1))


def two(model, first, second):
    """The model with two adapters whose updates are not zero; the first is active."""
    common = {"init_weights": False, "pera_alpha": 12}
    model = get_peft_model(model, PeraConfig(**{"r": 3, **common, **first}), adapter_name="first")
    model.add_adapter("second", PeraConfig(**{"r": 2, **common, **RMS, **second}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def attention():
    """A LLaMA with both adapters on the same layers."""
    return two(llama(), {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_proj"]})


def alone(model, call, name):
    """``call(model)`` with one adapter for the whole batch; the first is active afterwards."""
    torch.manual_seed(0)
    if name == "__base__":
        with model.disable_adapter():
            return call(model)
    model.set_adapter(name)
    result = call(model)
    model.set_adapter("first")
    return result


def each_alone(model, call, names=NAMES):
    """The samples of ``call(model)``, each from a run with its adapter only. Every adapter changes the result."""
    results = {name: alone(model, call, name) for name in ("__base__", "first", "second")}
    parts = {name: result.chunk(len(names)) for name, result in results.items()}
    for i, name in enumerate(names):
        assert not any(torch.allclose(parts[name][i], parts[other][i]) for other in results.keys() - {name})
    return torch.cat([parts[name][i] for i, name in enumerate(names)])


def hooks(model):
    return [name for name, module in model.named_modules() if module._forward_pre_hooks]


def forward(**options):
    """A call: the logits of the inputs."""

    @torch.no_grad()
    def call(model, **names):
        return model(INPUTS, **options, **names).logits

    return call


def generate(seed=0, **options):
    """A call: the generated tokens."""

    def call(model, **names):
        torch.manual_seed(seed)
        return model.generate(input_ids=INPUTS, attention_mask=torch.ones_like(INPUTS), **LENGTH, **options, **names)

    return call


TIED_TOKENS = {"trainable_token_indices": INPUTS[:, 2].tolist(), "ensure_weight_tying": True}
PAIRS = {
    "the same layers": (llama, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "different layers": (llama, {"target_modules": ["q_proj", "v_proj"]}, UP),
    "different expansions": (llama, {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "terms": "square"}),
    "embedding": (llama, {"target_modules": ["embed_tokens"]}, {"target_modules": ["embed_tokens", "o_proj"]}),
    "head saved by the first": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, UP),
    "head saved by the second": (llama, UP, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "token rows of the first": (llama, {**UP, "trainable_token_indices": INPUTS[:, 2].tolist()}, UP),
    "tied token rows": (tied_llama, {**TIED_TOKENS, "target_modules": ["q_proj"]}, UP),
    "tied layers": (tied_llama, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, UP),
    "GPT-2": (tiny.gpt2, {"target_modules": ["c_attn", "wte"]}, {"target_modules": ["c_attn", "c_fc"]}),
}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS.keys())
def pair(request):
    make, first, second = request.param
    return two(make(), first, second)


@pytest.mark.parametrize("active", ["first", "second"])
def test_each_sample_gets_the_logits_of_its_adapter(pair, active):
    expected = each_alone(pair.double(), forward())
    pair.set_adapter(active)
    torch.testing.assert_close(forward()(pair, adapter_names=NAMES), expected, rtol=1e-5, atol=1e-5)
    assert hooks(pair) == []


def test_mixed_logits_equal_explicit_updates():
    model = two(llama(), *PAIRS["different layers"][1:])
    mixed = forward()(model, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        if name != "__base__":
            model.set_adapter(name)
        explicit = llama().double() if name == "__base__" else tiny.reference_model(model)
        expected = forward()(explicit)[i]
        torch.testing.assert_close(mixed[i].double(), expected, rtol=1e-4, atol=1e-4)


def test_convolutions_mix_adapters():
    x = torch.randn(4, 6, 9)
    names = ["first", "second", "__base__", "first"]
    model = two(Audio(), {"target_modules": ["convolution"]}, {"target_modules": ["convolution", "head"]})
    expected = each_alone(model, lambda m: tiny.evaluate(m, x), names)
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=names), expected, rtol=1e-5, atol=1e-5)


def test_names_may_be_a_tuple_of_the_base_only():
    model = attention()
    assert torch.equal(forward()(model, adapter_names=("__base__",) * 4), alone(model, forward(), "__base__"))


def test_padded_samples_mix_adapters():
    call = forward(attention_mask=torch.tensor([[1] * 5, [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1] * 5]))
    model = attention()
    torch.testing.assert_close(call(model, adapter_names=NAMES), each_alone(model, call), rtol=1e-5, atol=1e-5)


SAMPLING = {"do_sample": True, "num_return_sequences": 2}
GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "two of three beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": SAMPLING,
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "sampling, in a config": {"generation_config": GenerationConfig(**SAMPLING)},
    "beams, in a config": {"generation_config": GenerationConfig(num_beams=3)},
    "more beams than in the config": {"generation_config": GenerationConfig(num_beams=2), "num_beams": 3},
    "without cache": {"num_beams": 2, "use_cache": False},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
def test_each_sample_gets_the_tokens_of_its_adapter(options):
    model, call = attention(), generate(**options)
    expected = each_alone(model, call)
    assert torch.equal(call(model, adapter_names=NAMES), expected)
    assert hooks(model) == []


def test_generation_mixes_saved_heads():
    model, call = two(llama(), *PAIRS["head saved by the second"][1:]), generate(num_beams=3)
    assert torch.equal(call(model, adapter_names=NAMES), each_alone(model, call))


@pytest.mark.parametrize("config", [None, GenerationConfig(do_sample=False)], ids=["", "and a config without them"])
def test_beams_may_be_a_default_of_the_model(config):
    model, call = attention(), generate(generation_config=config)
    model.get_base_model().generation_config.num_beams = 3
    expected = each_alone(model, call)
    assert torch.equal(expected, each_alone(model, generate(num_beams=3)))
    assert torch.equal(call(model, adapter_names=NAMES), expected)


def test_a_generation_config_may_be_positional():
    model, config = attention(), GenerationConfig(num_beams=3, **LENGTH)

    def call(model, **names):
        return model.generate(INPUTS, config, attention_mask=torch.ones_like(INPUTS), **names)

    assert torch.equal(call(model, adapter_names=NAMES), each_alone(model, call))


def test_inputs_may_be_embeddings():
    def call(model, **names):
        embeds = model.get_input_embeddings()(INPUTS)
        mask = torch.ones_like(INPUTS)
        return model.generate(inputs_embeds=embeds, attention_mask=mask, num_beams=3, **LENGTH, **names)

    model = attention()
    assert torch.equal(call(model, adapter_names=NAMES), each_alone(model, call))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, SAMPLING], ids=["greedy", "beams", "sampling"])
def test_encoder_decoder_models_mix_adapters(options):
    """The encoder runs once for each sample, the decoder once for each beam."""
    first, second = {"target_modules": ["q", "v"]}, {"target_modules": ["v", "wi", "wo"]}
    model, call = two(t5(), {**first, "task_type": "SEQ_2_SEQ_LM"}, second), generate(**options)
    logits_of = forward(decoder_input_ids=INPUTS.flip(1))
    torch.testing.assert_close(
        logits_of(model, adapter_names=NAMES), each_alone(model, logits_of), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(call(model, adapter_names=NAMES), each_alone(model, call))
    assert hooks(model) == []


@pytest.mark.parametrize("call", [forward(), generate(num_beams=3)], ids=["forward", "generate"])
def test_disabled_adapters_ignore_the_names(call):
    model = attention()
    base = alone(model, call, "__base__")
    with model.disable_adapter():
        assert torch.equal(call(model, adapter_names=NAMES), base)
    assert not torch.equal(call(model, adapter_names=NAMES), base)


def train(model):
    model.train()


def merge(model):
    model.merge_adapter(["first"])


REFUSED = {
    "too few": (["first"] * 3, None, "same as the number of inputs, but got 3 and 4 respectively"),
    "too many": (["first"] * 5, None, "same as the number of inputs, but got 5 and 4 respectively"),
    "none": ([], None, "same as the number of inputs, but got 0 and 4 respectively"),
    "unknown": (["first", "thrid", "__base__", "fourth"], None, "non-existing adapter.*: fourth, thrid"),
    "training": (NAMES, train, "when the model is in training mode"),
    "merged": (NAMES, merge, "when there are merged adapters, please call `unmerge_adapter`"),
    "a string": ("first", None, "adapter_names='first' should be a list with the name of an adapter for each"),
    "not a string": (["first", None, "first", 1], None, "adapter_names=.*None.* should be a list with the name"),
    "not a list": ({"first": 4}, None, "adapter_names=.* should be a list with the name"),
}


@pytest.mark.parametrize("call", [forward(), generate()], ids=["forward", "generate"])
@pytest.mark.parametrize(("names", "prepare", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_names_are_refused_and_leave_no_hooks(call, names, prepare, message):
    model = attention()
    expected = call(model)
    if prepare is not None:
        prepare(model)
    with pytest.raises(UserError, match=message) as error:
        call(model, adapter_names=names)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)
    assert hooks(model) == []
    if prepare is merge:
        model.unmerge_adapter()
    torch.testing.assert_close(call(model.eval()), expected)


def test_a_name_for_each_beam_is_refused():
    model = attention()
    with pytest.raises(UserError, match="same as the number of inputs, but got 12 and 4 respectively"):
        generate(num_beams=3)(model, adapter_names=NAMES * 3)
    assert hooks(model) == []


def test_a_wrong_number_of_names_is_refused_by_the_first_layer():
    model = two(llama(), {**UP, "modules_to_save": ["embed_tokens"]}, UP)
    with pytest.raises(UserError, match="same as the number of inputs, but got 3 and 4 respectively"):
        model(INPUTS, adapter_names=NAMES[:3])
    assert hooks(model) == []


def test_a_saved_module_of_another_kind_is_refused_by_peft():
    model = two(llama(), UP, {**UP, "modules_to_save": ["norm"]})
    with pytest.raises(TypeError, match="Mixed batching is only supported for"):
        model(INPUTS, adapter_names=NAMES)
    assert hooks(model) == []


def test_an_error_in_the_model_leaves_no_hooks():
    model = attention()
    expected = logits(model)
    with pytest.raises(IndexError):
        model(INPUTS + VOCABULARY, adapter_names=NAMES)
    assert hooks(model) == []
    assert torch.equal(logits(model), expected)


def test_the_next_call_uses_the_active_adapter():
    model = attention()
    model.set_adapter("second")
    expected = forward()(model)
    forward()(model, adapter_names=NAMES)
    assert torch.equal(forward()(model), expected)
    assert model.active_adapters == ["second"]
