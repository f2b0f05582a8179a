"""transformers' ``Trainer``: checkpoints, resuming, evaluation, gradient checkpointing and accumulation, autocast."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from pera import PeraConfig
from reference import relative_error
from tiny import VOCABULARY, gpt2, llama, logits, needs_peft_of_transformers, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

DATA = [{"input_ids": row, "labels": row} for row in torch.arange(128).reshape(16, 8) * 7 % VOCABULARY]


QUERY = "base_model.model.model.layers.0.self_attn.q_proj.pera_A"


def config(**options):
    given = {"r": 4, "target_modules": "all-linear", "normalization": "rms", "task_type": "CAUSAL_LM"}
    return PeraConfig(**{**given, **options})


def adapted(make=llama, **options):
    """A model with an adapter, the same each time."""
    base = make()
    torch.manual_seed(1)
    return get_peft_model(base, config(**options))


def random(make=llama, **options):
    """A model with an adapter whose update is not zero, so that every factor has a gradient."""
    return adapted(make, init_weights=False, **options)


def trainer(model, folder, **options):
    given = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 3e-2, "logging_steps": 1}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(folder, **{**given, **quiet, **options})
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:4])


def train(model, folder, resume=None, **options):
    trained = trainer(model, folder, **options)
    trained.train(resume_from_checkpoint=resume)
    return trained


def losses(trained, key="loss"):
    return [line[key] for line in trained.state.log_history if key in line]


def weights(model):
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_training_lowers_the_loss_and_keeps_the_base(make, tmp_path):
    model = adapted(make)
    trained = train(model, tmp_path, max_steps=20)
    assert losses(trained)[-1] < losses(trained)[0] - 0.1
    assert equal(model.unload().state_dict(), make().state_dict())


def test_a_checkpoint_contains_only_the_adapter(tmp_path):
    model = adapted()
    train(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "checkpoint-2"
    assert [file.name for file in checkpoint.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert not list(checkpoint.glob("pytorch_model*"))
    assert equal(load_file(checkpoint / "adapter_model.safetensors"), weights(model))
    loaded = PeftModel.from_pretrained(llama(), checkpoint)
    assert torch.equal(logits(loaded), logits(model.eval()))
    first = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    assert not equal(first, weights(model))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_training_gives_the_same_adapter(dropout, tmp_path):
    whole, resumed = adapted(pera_dropout=dropout), adapted(pera_dropout=dropout)
    train(whole, tmp_path / "whole", save_strategy="steps", save_steps=5)
    train(resumed, tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-5"))
    assert equal(weights(resumed), weights(whole))
    assert not equal(weights(resumed), load_file(tmp_path / "whole" / "checkpoint-5" / "adapter_model.safetensors"))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    """If a greater loss counts as better, the first checkpoint is the best."""
    model = adapted()
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trained = train(model, tmp_path, **every, **best)
    evaluated = losses(trained, "eval_loss")
    assert evaluated[0] > evaluated[-1] + 0.05
    assert trained.state.best_model_checkpoint.endswith("checkpoint-2")
    assert equal(weights(model), load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors"))
    assert trained.evaluate()["eval_loss"] == pytest.approx(evaluated[0], abs=1e-6)


def test_every_evaluation_sees_the_last_step(tmp_path):
    """An evaluation does not use expansions from before the last training steps."""
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    found = losses(train(adapted(), tmp_path, max_steps=4, **every), "eval_loss")
    loaded = [PeftModel.from_pretrained(llama(), tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    assert found == pytest.approx([trainer(model, tmp_path).evaluate()["eval_loss"] for model in loaded], abs=1e-6)
    assert found == sorted(found, reverse=True)


def gradients(model):
    """Gradients of the loss, and the number of forward calls of a layer."""
    calls = []
    model.get_submodule(QUERY.removesuffix(".pera_A")).register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(2)
    model.train()(tokens(), labels=tokens()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, len(calls)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    expected, once = gradients(random(pera_dropout=0.3))
    base = llama()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found, twice = gradients(random(lambda: base, pera_dropout=0.3))
    assert (once, twice) == (1, 2)
    assert all(gradient.any() for gradient in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
    ids=["checkpointing", "reentrant checkpointing", "accumulation"],
)
def test_memory_saving_options_give_the_same_adapter(options, tmp_path):
    plain, saving, steps = random(), random(), {"max_steps": 3, "optim": "sgd", "learning_rate": 0.3}
    train(plain, tmp_path, **steps)
    train(saving, tmp_path, **steps, **options)
    assert relative_error(weights(plain)[QUERY], weights(random())[QUERY]) > 1e-3
    torch.testing.assert_close(weights(saving), weights(plain), rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_trains_a_float32_adapter(tmp_path):
    plain = losses(train(adapted(), tmp_path, max_steps=20))
    model = adapted()
    seen = set()
    model.get_submodule(QUERY.removesuffix(".pera_A")).register_forward_hook(
        lambda module, arguments, output: seen.add(output.dtype)
    )
    found = losses(train(model, tmp_path, max_steps=20, bf16=True))
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert found == pytest.approx(plain, abs=0.05)
    assert found != plain


@needs_peft_of_transformers
def test_an_adapter_added_by_transformers_is_trained_and_saved(tmp_path):
    model = llama()
    torch.manual_seed(1)
    model.add_adapter(config())
    trained = train(model, tmp_path, max_steps=20, save_strategy="steps", save_steps=20)
    assert losses(trained)[-1] < losses(trained)[0] - 0.2
    files = [file.name for file in (tmp_path / "checkpoint-20").glob("*.safetensors")]
    assert files == ["adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-20")
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_an_adapter_can_be_trained_next_to_a_frozen_one(tmp_path):
    model = random()
    frozen = weights(model)
    model.add_adapter("second", config(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    before = logits(model.eval())
    train(model, tmp_path, max_steps=4)
    assert equal(weights(model), frozen)
    assert relative_error(logits(model.eval()), before) > 1e-3
