"""What is kept while a model is called: enough for generation, nothing beyond the call."""

import copy
import gc
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from pera import PeraConfig, hotswap_adapter
from pera.tuner.call import one_call
from pera.tuner.layers import base as layers_base
from reference import relative_error
from tiny import KINDS, RMS, adapt, evaluate, gpt2, layers, linear, llama, logits, reference_model, reference_output
from tiny import tokens as prompt

TARGETS = ["embedding", "convolution", "conv1d", "linear"]
TOKENS = torch.tensor([[2, 5, 2, 9], [0, 7, 1, 3]])
STEPS = 3


class Steps(nn.Module):
    """One layer of each kind, called in several steps, as in generation."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.convolution = nn.Conv1d(6, 6, 3, padding=1)
        self.conv1d = Conv1D(6, 6)
        self.linear = nn.Linear(6, 6)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for _ in range(STEPS):
            x = x + self.convolution(x.mT).mT.tanh()
            x = x + self.linear(self.conv1d(x)).tanh()
        return x


def steps(seed=0, **options):
    """Adapted :class:`Steps`; the adapter follows the seed, the base does not."""
    torch.manual_seed(0)
    base = Steps()
    torch.manual_seed(seed)
    return adapt(base, target_modules=TARGETS, **{**RMS, **options})


def adapter_parameters(model):
    return {name: p for name, p in model.named_parameters() if ".pera_" in name}


def new_values(model):
    """Random values for the parameters of all adapters."""
    return {name: torch.randn_like(p) for name, p in adapter_parameters(model).items()}


def expected(model):
    return evaluate(reference_model(model), TOKENS)


class Computed(NamedTuple):
    """One computed expansion: of which A, and whether it is still there."""

    A: int
    alive: weakref.ref


@pytest.fixture
def computed(monkeypatch):
    """The expansions that may have been kept, one entry for each time one was computed."""
    made = []
    compute = layers_base.expansions

    def recorded(A, *args, **kwargs):
        result = compute(A, *args, **kwargs)
        made.append(Computed(id(A), weakref.ref(result[0])))
        return result

    monkeypatch.setattr(layers_base, "expansions", recorded)
    return made


def kept(computed):
    """How many of the computed expansions are still there."""
    return sum(entry.alive() is not None for entry in computed)


# What is kept, and how long


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"embedding"}))
def test_outside_of_a_call_nothing_is_kept(kind, computed):
    layer, x = KINDS[kind].layer(**RMS), KINDS[kind].input()
    for count in (1, 2, 3):
        evaluate(layer, x)
        assert len(computed) == count
    assert kept(computed) == 0


@pytest.mark.parametrize("make", [llama, gpt2])
def test_one_forward_keeps_nothing(make, computed):
    model = adapt(make(), target_modules="all-linear")
    during = []
    model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: during.append(kept(computed)))
    for count in (1, 2):
        logits(model)
        assert len(computed) == count * len(layers(model))
    assert during == [0, 0]


def test_from_the_second_use_in_a_call_on_an_expansion_is_kept_until_its_end(computed):
    model = steps()
    during = []
    model.get_base_model().linear.register_forward_hook(lambda *_: during.append((len(computed), kept(computed))))
    evaluate(model, TOKENS)
    assert during == [(3, 0), (6, 3), (6, 3)]
    assert kept(computed) == 0


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_generation_computes_each_expansion_at_most_twice(make, use_cache, computed):
    model = adapt(make(), target_modules="all-linear", **RMS)
    reference = reference_model(model)
    for tokens, times in ((1, 1), (2, 2), (9, 2)):
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        options = {"do_sample": False, "use_cache": use_cache, "pad_token_id": 0, **length}
        computed.clear()
        generated = model.generate(input_ids=prompt(), **options)
        assert generated.shape[1] == prompt().shape[1] + tokens
        assert torch.equal(generated, reference.generate(input_ids=prompt(), **options))
        counts = Counter(entry.A for entry in computed)
        assert (len(counts), set(counts.values())) == (len(layers(model)), {times})
        assert kept(computed) == 0


def test_a_call_within_a_call_shares_with_it(computed):
    model = steps()
    with one_call():
        for _ in range(2):
            assert relative_error(evaluate(model, TOKENS), expected(model)) <= 1e-6
            assert (len(computed), kept(computed)) == (6, 3), "kept beyond the inner call"
    assert kept(computed) == 0


def test_a_failed_call_leaves_nothing_behind(computed):
    model = steps()

    def fail(*_):
        if len(computed) == 6 and kept(computed) == 3:
            raise RuntimeError("as by hand")

    hook = model.get_base_model().linear.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="as by hand"):
        evaluate(model, TOKENS)
    hook.remove()
    assert kept(computed) == 0
    layer, x = layers(model)["linear"], torch.randn(4, 6)
    for count in (7, 8, 9):
        evaluate(layer, x)
        assert len(computed) == count, "no call is open"


def test_what_a_call_keeps_is_not_for_another_thread(computed):
    layer, x = linear(**RMS), torch.randn(4, 9)

    def elsewhere():
        return [evaluate(layer, x) for _ in range(3)]

    with one_call(), ThreadPoolExecutor(1) as pool:
        outputs = [evaluate(layer, x) for _ in range(3)]
        assert len(computed) == 2
        outputs += pool.submit(elsewhere).result()
        assert len(computed) == 5
        outputs.append(evaluate(layer, x))
        assert len(computed) == 5, "ours is still kept"
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert kept(computed) == 0


def test_calls_in_several_threads_at_once_keep_for_themselves(computed):
    model = steps()
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: evaluate(model, TOKENS), range(8)))
    assert all(relative_error(output, expected(model)) <= 1e-6 for output in outputs)
    assert len(computed) == 8 * 6
    assert kept(computed) == 0


def test_a_layer_made_within_a_call_has_nothing_of_one_that_is_gone():
    """Whose address it may have."""
    x = torch.randn(4, 9)
    with one_call():
        for seed in range(30):
            layer = linear(**RMS)
            torch.manual_seed(seed)
            for p in layer.parameters():
                nn.init.normal_(p)
            for _ in range(3):
                assert relative_error(evaluate(layer, x), reference_output(layer, x)) <= 1e-6
            del layer
            gc.collect(1)  # the young, among which it is


# Changes within a call


@pytest.fixture(params=sorted(KINDS))
def in_call(request):
    """A layer, with an input, within a call in which it has been used and its expansions are kept."""
    layer, x = KINDS[request.param].layer(**RMS), KINDS[request.param].input()
    layer.update_layer("second", 2, None, config=PeraConfig(r=2, init_weights=False, **RMS))
    with one_call():
        for _ in range(3):
            evaluate(layer, x)
        yield layer, x


def test_the_scale_and_the_active_adapters_are_followed_within_a_call(in_call):
    layer, x = in_call
    for scale in (3.0, 5.0, 1.0):
        layer.set_scale("default", scale)
        for names in (["second"], ["default", "second"], ["default"]):
            layer.set_adapter(names)
            assert relative_error(evaluate(layer, x), reference_output(layer, x, names)) <= 1e-6


def test_the_dtype_of_autocast_is_followed_within_a_call(in_call):
    layer, x = in_call
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = evaluate(layer, x)
    assert relative_error(low, reference_output(layer, x)) <= 4 * torch.finfo(torch.bfloat16).eps
    assert relative_error(evaluate(layer, x), reference_output(layer, x)) <= 1e-6


def test_what_is_kept_takes_no_part_in_gradients_or_in_training(in_call):
    layer, x = in_call
    with torch.no_grad():
        layer.pera_A["default"].mul_(2)
    assert relative_error(layer(x), reference_output(layer, x)) <= 1e-6
    layer(x).square().sum().backward()
    assert all(layer.get_parameter(f"pera_{name}.default").grad.any() for name in "ABh")
    assert relative_error(evaluate(layer.train(), x), reference_output(layer, x)) <= 1e-6


# Changes between two calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Another adapter of the same shape, with another scale."""
    path = tmp_path_factory.mktemp("adapter")
    steps(seed=1, pera_alpha=6).save_pretrained(path)
    return path


def optimizer_step(model, _):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(TOKENS).square().sum().backward()
    optimizer.step()


def load_state_dict(model, _):
    model.load_state_dict(new_values(model), strict=False)


def load_state_dict_assigned(model, _):
    model.load_state_dict(new_values(model), strict=False, assign=True)


def load_adapter(model, folder):
    model.load_adapter(folder, "default")


def hotswap(model, folder):
    hotswap_adapter(model, str(folder))


def write_through_data(model, _):
    for name, value in new_values(model).items():
        model.get_parameter(name).data.copy_(value)


@torch.no_grad()
def write_in_place(model, _):
    for p in adapter_parameters(model).values():
        p.mul_(-2)


@torch.inference_mode()
def write_in_inference_mode(model, folder):
    write_in_place(model, folder)


def replace_parameters(model, _):
    for layer in layers(model).values():
        layer.pera_B["default"] = nn.Parameter(torch.randn(6, 3))


def set_scale(model, _):
    for layer in layers(model).values():
        layer.set_scale("default", 3.0)


def scale_layer(model, _):
    for layer in layers(model).values():
        layer.scale_layer(3.0)


def write_scaling(model, _):
    """As users of PEFT do."""
    for layer in layers(model).values():
        layer.scaling["default"] = 5.0


def add_adapter(model, _):
    model.add_adapter("second", PeraConfig(r=2, target_modules=TARGETS, init_weights=False))
    model.set_adapter("second")


def delete_and_add_again(model, _):
    model.delete_adapter("default")
    model.add_adapter("default", PeraConfig(r=3, target_modules=TARGETS, init_weights=False, **RMS))
    model.set_adapter("default")


def merge_write_unmerge(model, folder):
    model.merge_adapter()
    evaluate(model, TOKENS)
    model.unmerge_adapter()
    write_through_data(model, folder)


CHANGES = [
    optimizer_step,
    load_state_dict,
    load_state_dict_assigned,
    load_adapter,
    hotswap,
    write_through_data,
    write_in_place,
    write_in_inference_mode,
    replace_parameters,
    set_scale,
    scale_layer,
    write_scaling,
    add_adapter,
    delete_and_add_again,
    merge_write_unmerge,
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_output_follows_the_adapter_after(change, mode, folder):
    model = steps()
    for _ in range(2):
        with mode():
            before = model(TOKENS).clone()
        assert relative_error(before, expected(model)) <= 1e-5
    change(model, folder)
    assert not model.training
    right = expected(model)
    assert relative_error(before, right) > 1e-3, "the change is visible"
    with mode():
        after = model(TOKENS)
    assert relative_error(after.clone(), right) <= 1e-5


def test_merging_and_unmerging_changes_nothing():
    model = steps()
    right = expected(model)
    for change in (model.merge_adapter, model.unmerge_adapter, model.merge_adapter, model.unmerge_adapter):
        change()
        assert relative_error(evaluate(model, TOKENS), right) <= 1e-5


def test_output_follows_set_adapter_and_disabling():
    model = steps()
    model.add_adapter("second", PeraConfig(r=2, target_modules=TARGETS[1:], init_weights=False))
    for names in (["default"], ["second"], ["default", "second"], ["default"]):
        model.base_model.set_adapter(names)
        assert relative_error(evaluate(model, TOKENS), expected(model)) <= 1e-6
        with model.disable_adapter():
            assert torch.equal(evaluate(model, TOKENS), evaluate(model.get_base_model(), TOKENS))
            assert relative_error(evaluate(model, TOKENS), expected(model)) > 1e-3


def test_output_follows_the_dtype():
    model = steps()
    evaluate(model, TOKENS)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.05), (torch.float32, 1e-6)):
        model.to(dtype)
        write_in_place(model, None)
        y = evaluate(model, TOKENS)
        assert y.dtype == dtype
        assert relative_error(y, expected(model)) <= tolerance


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a second device")
def test_output_follows_the_device():
    model = steps()
    evaluate(model, TOKENS)
    for device in (torch.accelerator.current_accelerator(), torch.device("cpu")):
        model.to(device)
        write_through_data(model, None)
        y = evaluate(model, TOKENS.to(device))
        assert y.device.type == device.type
        assert relative_error(y.cpu(), expected(copy.deepcopy(model).cpu())) <= 1e-5


def test_output_follows_another_tensor_at_the_same_address():
    """As with ``functional_call`` in a loop: the memory of the last parameters is given to the next."""
    model = steps()
    name = "base_model.model.linear.pera_B.default"
    memory = np.ones((6, 3), dtype=np.float32)
    for value in (1.0, 0.0, 2.0):
        memory[:] = value
        with torch.no_grad():
            y = functional_call(model, {name: torch.from_numpy(memory)}, TOKENS)
        model.get_parameter(name).data.fill_(value)
        assert relative_error(y, expected(model)) <= 2e-6


def test_an_adapter_made_in_inference_mode_is_followed():
    """Inference tensors do not count their writes."""
    with torch.inference_mode():
        model = steps()
        model(TOKENS)
        for p in adapter_parameters(model).values():
            p.mul_(2)
        assert relative_error(model(TOKENS), expected(model)) <= 1e-6


def test_inference_mode_does_not_spoil_training(folder):
    model = steps()
    for _ in range(2):
        with torch.inference_mode():
            assert relative_error(model(TOKENS).clone(), expected(model)) <= 1e-6
        optimizer_step(model, folder)
    assert relative_error(evaluate(model, TOKENS), expected(model)) <= 1e-5


def test_a_deep_copy_goes_its_own_way():
    model = steps().double()  # in float32 rounding alone comes to some 1e-6 for this draw
    before = evaluate(model, TOKENS)
    twin = copy.deepcopy(model)
    assert torch.equal(evaluate(twin, TOKENS), before)
    write_through_data(twin, None)
    assert relative_error(evaluate(twin, TOKENS), expected(twin)) <= 1e-12
    assert torch.equal(evaluate(model, TOKENS), before)
    write_through_data(model, None)
    assert relative_error(evaluate(model, TOKENS), expected(model)) <= 1e-12
