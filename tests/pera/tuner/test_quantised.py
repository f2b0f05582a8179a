"""Quantised bases on the CPU: what is trained, saved and merged, and what merging costs.

``pytest -rP`` shows the figures of the tests that measure.
"""

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from pera import PeraConfig, UserError
from pera.tuner import PeraLinear
from pera.tuner.layers import keep_unpacked
from pera_lab.models import load_tokenizer, resolve
from reference import relative_error
from tiny import adapt, layers, reference_delta
from tiny import llama as plain_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*inputs will be cast:UserWarning"),  # to float16, by bitsandbytes' int8
    # an evaluation before the training must not leave the base with a forward that has no gradient
    pytest.mark.filterwarnings("error:.*an autograd kernel was not registered:UserWarning"),
]

TOKENS = torch.arange(3, 63).reshape(2, 30) * 5 % 300
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER = {"r": 4, "normalization": "rms", "target_modules": TARGETS}


# Kinds


def quantised(folder, config, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def bnb_4bit(folder, dtype=torch.float32, double=False):
    pytest.importorskip("bitsandbytes")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": dtype}
    return quantised(folder, BitsAndBytesConfig(load_in_4bit=True, **options), dtype)


def bnb_4bit_double(folder, dtype=torch.float32):
    return bnb_4bit(folder, dtype, double=True)


def bnb_8bit(folder, dtype=torch.float32):
    pytest.importorskip("bitsandbytes")
    return quantised(folder, BitsAndBytesConfig(load_in_8bit=True), dtype)


def torchao_8bit(folder, dtype=torch.float32):
    torchao = pytest.importorskip("torchao.quantization")
    return quantised(folder, TorchAoConfig(torchao.Int8WeightOnlyConfig()), dtype)


def torchao_4bit(folder, dtype=torch.float32):
    torchao = pytest.importorskip("torchao.quantization")
    return quantised(folder, TorchAoConfig(torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32))), dtype)


def hqq_4bit(folder, dtype=torch.float32):
    """By HQQ's own layer: transformers 5.23 answers an ``HqqConfig`` with "QuantizationMethod.HQQ is not available
    yet and will be supported soon"."""
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.model.set_submodule(name, hqq.HQQLinear(layer, config, compute_dtype=dtype, device="cpu"))
    model.hqq_quantized = True  # as HQQ's quantize_model does
    return model


class Kind(NamedTuple):
    """A quantised base: how it is loaded, PEFT's name for it, and how it rounds.

    An entry of a weight is rounded by at most ``rounding`` times the largest of its group (of its row, where
    ``group`` is None), plus, where the scales of the groups are rounded too, ``scales`` times the largest of all.
    """

    load: Callable[..., PreTrainedModel]
    backend: str
    group: int | None
    rounding: float
    scales: float = 0


NF4 = 0.152  # half of the widest gap between two of its sixteen values, -1 and -0.696
DYNAMIC = 0.0071  # half of the widest gap between two values of bitsandbytes' 8-bit floats

KINDS = {
    "bitsandbytes nf4": Kind(bnb_4bit, "bnb 4bit", 64, NF4),
    "bitsandbytes nf4, double": Kind(bnb_4bit_double, "bnb 4bit", 64, NF4, (1 + NF4) * DYNAMIC),
    "bitsandbytes int8": Kind(bnb_8bit, "bnb 8bit", None, 0.5 / 127 + 2**-11),  # a cast to float16 comes first
    "torchao int8": Kind(torchao_8bit, "torchao", None, 0.5 / 127),
    "torchao int4": Kind(torchao_4bit, "torchao", 32, 0.5 / 7.5),
    "hqq int4": Kind(hqq_4bit, "hqq", 64, 1 / 7.5),  # a whole step, for it moves the zero to where most gain
}


@pytest.fixture(scope="module")
def folder(save_llama, tmp_path_factory):
    """A LLaMA wide enough for groups of 64, with biases that are not zero."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    shape = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_pretrained(save_llama(folder, initializer_range=0.1, **shape))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def base(kind, folder):
    return kind.load(folder)


def rounding(kind, weight):
    """The most by which each entry of ``weight`` may be rounded."""
    groups = weight.reshape(-1, kind.group or weight.shape[1])
    largest = groups.abs().amax(1, keepdim=True).expand_as(groups).reshape_as(weight)
    return (kind.rounding * largest + kind.scales * largest.max()) * 1.001 + 1e-7  # some room for float32


def weights(model):
    """The base weights of the adapted layers, dequantised."""
    return {name: layer.get_base_weight().detach().float().clone() for name, layer in layers(model).items()}


def stored(layer):
    """What a quantised layer keeps: codes, scales, zeros, biases."""
    tensors = {key: value for key, value in layer.state_dict().items() if isinstance(value, torch.Tensor)}
    for key, value in list(tensors.items()):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            tensors |= {f"{key}.{name}": getattr(value, name) for name in names}
            del tensors[key]
    return {key: value.detach().clone() for key, value in tensors.items()}


def with_adapter_of(model, base):
    """``base`` with the adapter of ``model``, value by value."""
    adapted = adapt(base, **ADAPTER)
    adapted.load_state_dict({name: p for name, p in model.named_parameters() if p.requires_grad}, strict=False)
    return adapted


def ratio(part, whole):
    return (part.norm() / whole.norm()).item()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def train(model, batch, steps, learning_rate):
    """Losses before each step of training the adapter, and after the last."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad.any() for p in trained)
    model.eval()
    with torch.no_grad():
        return [*losses, model(**batch).loss.item()]


# Adapting and training


def test_every_target_is_adapted_and_starts_as_the_base(kind, base, logits):
    keep_unpacked(base)
    before = logits(base)
    model = get_peft_model(base, PeraConfig(**ADAPTER))
    adapted = layers(model)
    assert len(adapted) == 2 * len(TARGETS)
    assert {type(layer) for layer in adapted.values()} == {PeraLinear}
    assert {layer.quantization_backend.backend_name for layer in adapted.values()} == {kind.backend}
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_and_leaves_the_base_alone(kind, dtype, folder, logits):
    base = kind.load(folder, dtype)
    logits(base)
    model = get_peft_model(prepare_model_for_kbit_training(base), PeraConfig(init_coefficients=0.3, **ADAPTER))
    before = {name: stored(layer.base_layer) for name, layer in layers(model).items()}
    losses = train(model, {"input_ids": TOKENS, "labels": TOKENS}, steps=10, learning_rate=3e-2)
    assert losses[-1] < 0.5 * losses[0]
    assert all(equal(stored(layer.base_layer), before[name]) for name, layer in layers(model).items())


def test_gradients_are_those_on_the_dequantised_base(base, folder, logits):
    """Also after evaluations, of the base and of the adapted model."""
    logits(base)
    model = adapt(base, **ADAPTER)
    logits(model)
    plain = with_adapter_of(model, AutoModelForCausalLM.from_pretrained(folder))
    for name, weight in weights(model).items():
        layers(plain)[name].base_layer.weight.data = weight
    for each in (model, plain):
        each.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    assert max(relative_error(gradients[name], expected[name]) for name in expected) <= 1e-4


# Several adapters, saving


def test_several_adapters_on_one_base(kind, base, logits):
    keep_unpacked(base)
    plain = logits(base)
    model = adapt(base, **ADAPTER)
    first = logits(model)
    model.add_adapter("second", PeraConfig(init_weights=False, **ADAPTER))
    model.set_adapter("second")
    second = logits(model)
    assert min(relative_error(second, first), relative_error(first, plain), relative_error(second, plain)) > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    before = weights(model)
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    for name, layer in layers(model).items():
        expected = before[name] + sum(reference_delta(layer, adapter).float() for adapter in ("default", "second"))
        assert ((weights(model)[name] - expected).abs() <= rounding(kind, expected)).all(), name


def test_a_saved_adapter_gives_equal_logits_on_a_base_quantised_anew(kind, base, folder, logits, tmp_path):
    model = adapt(base, **ADAPTER)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    fresh = kind.load(folder)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(loaded), expected)
    with loaded.disable_adapter():
        assert relative_error(logits(loaded), expected) > 0.1


# Merging


def test_what_merging_costs(kind, base, logits, request):
    """ΔW is added, the sum is rounded once; each entry by no more than the quantisation rounds it."""
    model = adapt(base, **ADAPTER)
    with model.disable_adapter():
        plain = logits(model)
    expected, before = logits(model), weights(model)
    kinds = {name: type(layer.base_layer) for name, layer in layers(model).items()}
    biases = {name: layer.base_layer.bias for name, layer in layers(model).items()}
    model.merge_adapter(safe_merge=True)
    of_weight, of_update = [], []
    for name, layer in layers(model).items():
        update = reference_delta(layer).float()
        error = weights(model)[name] - (before[name] + update)
        assert (error.abs() <= rounding(kind, before[name] + update)).all(), name
        of_weight.append(ratio(error, before[name] + update))
        of_update.append(ratio(error, update))
        assert of_update[-1] < 0.25  # 1, were ΔW not added
        assert type(layer.base_layer) is kinds[name]
        assert layer.base_layer.bias is biases[name] is None or torch.equal(layer.base_layer.bias, biases[name])
    merged = logits(model)
    of_effect = ratio(merged - expected, expected - plain)
    assert of_effect < 0.5  # 1, were ΔW not added
    same = (merged.argmax(-1) == expected.argmax(-1)).float().mean().item()
    print(
        f"{request.node.callspec.id}: a merge rounds a weight by {max(of_weight):.1%} of its norm, by "
        f"{max(of_update):.1%} of ΔW's; the logits by {of_effect:.1%} of what the adapter changes, at most "
        f"{(merged - expected).abs().max().item():.2g}; {same:.0%} of top-1 tokens equal"
    )


def test_unmerging_returns_near_to_the_base(kind, base, request):
    model = adapt(base, **ADAPTER)
    before = weights(model)
    model.merge_adapter()
    merged = weights(model)
    model.unmerge_adapter()
    moved = []
    for name, layer in layers(model).items():
        update, difference = reference_delta(layer).float(), weights(model)[name] - before[name]
        once, twice = rounding(kind, before[name] + update), rounding(kind, merged[name] - update)
        assert (difference.abs() <= once + twice).all(), name
        assert ratio(difference, update) < 0.25  # 1, were ΔW not subtracted
        moved.append(ratio(difference, before[name]))
    print(f"{request.node.callspec.id}: merged and unmerged, a weight has moved by {max(moved):.1%} of its norm")


def test_merge_and_unload_gives_a_quantised_model(kind, base, folder, logits):
    modules = {name: type(module) for name, module in base.named_modules()}
    model = adapt(base, **ADAPTER)
    unloaded = with_adapter_of(model, kind.load(folder)).merge_and_unload(safe_merge=True)
    model.merge_adapter()
    assert {name: type(module) for name, module in unloaded.named_modules()} == modules
    assert torch.equal(logits(unloaded), logits(model))


@pytest.mark.parametrize("library", ["gptq", "awq", "aqlm", "eetq"])
def test_a_base_that_cannot_be_dequantised_runs_but_refuses_a_merge(library):
    """The libraries need a GPU; what PEFT makes of their layers stands in for them."""
    model = adapt(plain_llama(), target_modules=TARGETS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = model(TOKENS % 64).logits
    list(layers(model).values())[-1].quantization_backend = ForwardOnlyQuantizationBackend(library)
    assert torch.equal(model(TOKENS % 64).logits, expected)
    sentence = f"'model.layers.1.mlp.down_proj' is a {library} layer, which PEFT cannot merge into; load the adapter"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UserError, match=sentence):
            merge()
    assert equal(dict(model.named_parameters()), before)


# bitsandbytes on CPUs with avx512_bf16


@pytest.mark.parametrize("double", [False, True])
def test_a_base_evaluated_before_it_is_adapted_is_the_same_base(double, folder, logits, tmp_path):
    """Its evaluation packs the 4-bit weights, which PEFT would then dequantise to noise."""
    fresh, evaluated = adapt(bnb_4bit(folder, double=double), **ADAPTER), bnb_4bit(folder, double=double)
    before = logits(evaluated)
    evaluated = adapt(evaluated, **ADAPTER)
    for name, weight in weights(evaluated).items():
        assert relative_error(weight, weights(fresh)[name]) <= 0.005  # scales in bfloat16, or quantised again
    with evaluated.disable_adapter():
        assert relative_error(logits(evaluated), before) <= 0.02
    evaluated.unload().save_pretrained(tmp_path)
    assert relative_error(logits(tmp_path), before) <= 0.02


# A real model


SENTENCES = [
    "The lighthouse keeper counted eleven ships before the fog came in from the west.",
    "Bread rises because yeast turns sugar into carbon dioxide, which the gluten holds.",
    "On the third day the river was so low that we could walk across it.",
    "A triangle with sides of three, four and five has a right angle.",
]


@pytest.mark.slow
def test_a_real_model_in_4_bits_learns_is_saved_and_says_what_merging_costs(tmp_path):
    folder, tokenizer = resolve("smollm2-135m"), load_tokenizer("smollm2-135m")
    batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    @torch.no_grad()
    def evaluate(model):
        output = model.eval()(**batch)
        return output.loss.item(), output.logits

    base = prepare_model_for_kbit_training(bnb_4bit_double(folder), use_gradient_checkpointing=False)
    model = get_peft_model(base, PeraConfig(r=8, normalization="rms", target_modules="all-linear"))
    sizes = [(layer.in_features * layer.out_features, stored(layer.base_layer)) for layer in layers(model).values()]
    taken = sum(tensor.nbytes for _, tensors in sizes for tensor in tensors.values())
    bfloat16 = 2 * sum(count for count, _ in sizes)
    losses = train(model, batch, steps=10, learning_rate=3e-3)
    _, logits = evaluate(model)
    model.save_pretrained(tmp_path)
    updates = {name: layer.get_delta_weight("default").detach() for name, layer in layers(model).items()}
    before = weights(model)
    model.merge_adapter()
    after, lost = weights(model), []
    for name, update in updates.items():
        exact = before[name] + update
        assert ((after[name] - exact).abs() <= rounding(KINDS["bitsandbytes nf4, double"], exact)).all(), name
        lost.append(ratio(after[name] - exact, update))
    merged, _ = evaluate(model)
    del model, base, before, after

    loaded = PeftModel.from_pretrained(bnb_4bit_double(folder), tmp_path)
    assert torch.equal(evaluate(loaded)[1], logits)
    del loaded

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path).merge_and_unload()
    merged_plain, _ = evaluate(plain)
    print(
        f"SmolLM2-135M in nf4: quantised layers take {taken / 1e6:.1f} MB, {taken / bfloat16:.1%} of bfloat16; "
        f"loss {losses[0]:.2f} → {losses[-1]:.2f} in 10 steps; merged into the float32 base {merged_plain:.2f}, into "
        f"nf4 {merged:.2f}, where a merge rounds a weight by {median(lost):.0%} of ΔW's norm (median)"
    )
    assert 0.25 <= taken / bfloat16 <= 1 / 3
    assert losses[-1] < 0.3 * losses[0]
    assert losses[0] - merged_plain > 0.9 * (losses[0] - losses[-1])  # the way to merge without losing what was learnt
    assert merged_plain < merged
