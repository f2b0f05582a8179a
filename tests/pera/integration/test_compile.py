"""torch.compile: the same outputs as eager, in one graph, compiled once, and always with the current adapter."""

import shutil

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

from pera import PeraConfig
from reference import relative_error
from tiny import VOCABULARY, adapt, gpt2, layers, linear, llama, logits, needs_whole_graphs, tokens

pytestmark = needs_whole_graphs

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="the default backend needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh():
    """Remove the graphs of other tests."""
    torch._dynamo.reset()
    counters.clear()


def graphs():
    """Number of graphs compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def compiled(model, backend="aot_eager"):
    """The model compiled as one graph. A graph break is an error."""
    return torch.compile(model, backend=backend, fullgraph=True)


def network(**options):
    """Two adapted layers, which compile quickly."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 7))
    return adapt(base, **{"r": 2, "target_modules": ["0", "2"], "normalization": "rms", **options})


def language_model(make=llama, **options):
    targets = {llama: ["q_proj", "down_proj"], gpt2: ["c_fc"]}[make]
    model = adapt(make(), **{"r": 2, "target_modules": targets, "normalization": "rms", **options})
    model.base_model.model.loss_type = "ForCausalLM"  # GPT-2 would warn that it has none, which breaks the graph
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # compiled dropout draws other numbers
            module.p = 0.0
    return model


def evaluate(model, x):
    with torch.no_grad():
        return model.eval()(x)


def gradients(model, loss):
    """The gradients of the loss by name."""
    loss.backward()
    found = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def check_equal(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert relative_error(found[name], gradient) <= tolerance, name


def check_language_model(model, compiled):
    """Check that loss and gradients in training and logits in evaluation are the same."""
    losses = [m.train()(input_ids=tokens(), labels=tokens()).loss for m in (model, compiled)]
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=1e-4)
    expected, found = (gradients(model, loss) for loss in losses)
    check_equal(found, expected)
    assert relative_error(logits(compiled.eval()), logits(model)) <= 1e-5


# The default backend


@needs_compiler
def test_a_compiled_layer_gives_the_same_gradients():
    layer, x = linear(normalization="rms").train(), torch.randn(4, 9)
    expected, found = (gradients(layer, f(x).square().sum()) for f in (layer, torch.compile(layer)))
    check_equal(found, expected, 1e-5)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_compiled_model_gives_the_same_logits(make):
    model = language_model(make, target_modules="all-linear")
    check_language_model(model, torch.compile(model))
    assert graphs() == 2


# One graph


@needs_compiler
@pytest.mark.slow
def test_a_compiled_model_gives_the_same_gradients():
    """All layers at once: only a whole model makes the compiler reuse buffers between layers."""
    model = language_model(target_modules="all-linear").train()
    batch = {"input_ids": tokens(), "labels": tokens()}
    expected = gradients(model, model(**batch).loss)
    check_equal(gradients(model, torch.compile(model)(**batch).loss), expected)


@pytest.mark.parametrize("make", [llama, pytest.param(gpt2, marks=pytest.mark.slow)])
def test_a_model_is_one_graph_in_training_and_one_in_evaluation(make):
    model = language_model(make)
    check_language_model(model, compiled(model))
    assert graphs() == 2


def test_dropout_does_not_break_the_graph():
    layer = linear(pera_dropout=0.1)
    for training in (True, False):
        found = torch._dynamo.explain(layer.train(training))(torch.randn(4, 9))
        assert found.graph_count == 1
        assert found.break_reasons == []


@pytest.mark.parametrize(
    ("terms", "coefficients", "normalization"),
    [
        ("all", "learned", "none"),
        ("all", "learned", "centred"),
        ("all", "fixed", "rms"),
        ("square", "learned", "rms"),
        ("cross", "fixed", "none"),
        ("none", "learned", "none"),
    ],
)
@pytest.mark.parametrize("anchors", [0, 2])
def test_a_layer_is_one_graph_with_every_option(anchors, terms, coefficients, normalization):
    options = {"terms": terms, "coefficients": coefficients, "normalization": normalization, "anchors": anchors}
    layer, x = linear(r=2, **options), torch.randn(4, 9)
    functions = (layer, compiled(layer, backend="eager"))
    expected, found = (gradients(layer, f(x).square().sum()) for f in functions)
    check_equal(found, expected, 1e-5)


def test_autocast_compiles():
    layer, x = linear(64, 64, normalization="rms"), torch.randn(4, 64)
    fast = compiled(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fast(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close(evaluate(fast, x), evaluate(layer, x))


def test_the_compiled_graph_does_not_grow_with_the_rank():
    """Otherwise compiling takes seconds for a layer and minutes for a model."""
    sizes = []

    def count(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph

    for r in (4, 16):
        torch._dynamo.reset()
        torch.compile(linear(32, 32, r=r, normalization="rms", anchors=r), backend=count)(torch.randn(2, 32))
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_gradient_checkpointing_compiles():
    model, saving = language_model(), language_model()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fast = torch.compile(saving, backend="aot_eager")
    expected, found = (gradients(m, m.train()(tokens(), labels=tokens()).loss) for m in (model, fast))
    check_equal(found, expected)


# Compiled once, and up to date


def test_training_compiles_once_and_follows_the_optimizer():
    model, x = network(), torch.randn(4, 9)
    fast = compiled(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trained, evaluated = [], []
    for _ in range(4):
        y = fast.train()(x)
        trained.append(y.detach())
        assert relative_error(y, model(x)) <= 1e-5
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        evaluated.append(evaluate(fast, x))
        assert relative_error(evaluated[-1], evaluate(model, x)) <= 1e-5
    assert relative_error(evaluated[-1], trained[-1]) > 1e-3
    assert relative_error(evaluated[-2], trained[-1]) <= 1e-5
    assert graphs() == 2


def test_other_input_lengths_compile_at_most_once_more():
    model = network()
    fast = compiled(model)
    for length in (5, 6, 7, 9, 12):
        x = torch.randn(2, length, 9)
        assert relative_error(evaluate(fast, x), evaluate(model, x)) <= 1e-5
    assert graphs() <= 2


def test_changes_of_the_adapter_reach_the_compiled_model():
    model, x = network(), torch.randn(4, 9)
    fast = compiled(model)
    model.add_adapter("second", PeraConfig(r=2, target_modules=["0"], init_weights=False))
    seen = []

    def follows():
        y = evaluate(fast, x)
        assert relative_error(y, evaluate(model, x)) <= 1e-5
        assert all(relative_error(y, other) > 1e-3 for other in seen)
        seen.append(y)

    follows()
    model.set_adapter("second")
    follows()
    model.base_model.set_adapter(["default", "second"])
    follows()
    with model.disable_adapter():
        follows()
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
    follows()
    with torch.no_grad():
        for layer in layers(model).values():
            layer.pera_h["default"].mul_(3)
    follows()


def test_setting_an_adapter_again_compiles_nothing():
    model, x = network(), torch.randn(4, 9)
    fast = compiled(model)
    model.add_adapter("second", PeraConfig(r=3, target_modules=["0"], init_weights=False))
    for name in ("default", "second", "default", "second"):
        model.set_adapter(name)
        assert relative_error(evaluate(fast, x), evaluate(model, x)) <= 1e-5
    assert graphs() == 2


def test_a_compiled_model_can_be_merged():
    model, x = network(), torch.randn(4, 9)
    fast, expected = compiled(model), evaluate(model, x)
    assert relative_error(evaluate(fast, x), expected) <= 1e-5
    model.merge_adapter()
    assert relative_error(evaluate(fast, x), expected) <= 1e-5
    model.unmerge_adapter()
    assert relative_error(evaluate(fast, x), expected) <= 1e-5


# Around it


def test_a_compiled_model_can_be_saved(tmp_path):
    model, x = network(), torch.randn(4, 9)
    fast = compiled(model)
    expected = evaluate(fast, x)
    fast.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network().unload(), tmp_path)
    assert relative_error(evaluate(loaded, x), expected) <= 1e-5


@pytest.mark.slow
def test_the_trainer_can_compile_the_model(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in torch.arange(64).reshape(8, 8) * 7 % VOCABULARY]
    options = {"max_steps": 3, "logging_steps": 1, "report_to": [], "use_cpu": True, "learning_rate": 1e-2}

    def losses(**more):
        trainer = Trainer(language_model(), TrainingArguments(tmp_path, **options, **more), train_dataset=data)
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    expected = losses()
    assert losses(torch_compile=True, torch_compile_backend="aot_eager") == pytest.approx(expected, abs=1e-4)
    assert graphs() > 0


def test_an_exported_program_gives_the_same_output():
    model = language_model()
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False})
        found = program.module()(input_ids=tokens(), use_cache=False).logits
    assert relative_error(found, logits(model)) <= 1e-5
