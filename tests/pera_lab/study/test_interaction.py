"""Interaction strength against a full double backward."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel

import tiny
from pera.errors import UserError
from pera_lab.study.interaction import hidden_blocks, interaction_strength, run_interaction


def models():
    targets = ["q_proj", "down_proj"]
    yield "base", tiny.llama()
    yield "lora", get_peft_model(tiny.llama(), LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    yield "pera", tiny.adapt(tiny.llama(), target_modules=targets, normalization="rms")


@pytest.mark.parametrize(("name", "model"), list(models()), ids=lambda value: value if isinstance(value, str) else "")
def test_equals_a_full_double_backward(name, model):
    model = model.double().eval()
    ids, width, layer = tiny.tokens(), 5, 0
    found = interaction_strength(model, {"input_ids": ids}, layer=layer, features=slice(0, width))

    def top_logit(sample):
        def f(shift):
            def move(module, arguments, hidden):
                hidden = hidden.clone()
                hidden[:, -1, :width] = hidden[:, -1, :width] + shift
                return hidden

            handle = hidden_blocks(model)[layer].register_forward_hook(move)
            with sdpa_kernel(SDPBackend.MATH):
                logit = model(input_ids=ids[sample : sample + 1]).logits[0, -1].max()
            handle.remove()
            return logit

        return f

    zero = torch.zeros(width, dtype=torch.float64)
    explicit = [torch.autograd.functional.hessian(top_logit(sample), zero).abs() for sample in range(len(ids))]
    expected = torch.stack(explicit).mean(0)
    assert expected.max() > 1e-6
    assert (found - expected).abs().max() <= 1e-6 * expected.max()


def test_the_model_is_not_changed():
    model = tiny.adapt(tiny.llama(), target_modules=["q_proj"])
    before = tiny.logits(model)
    interaction_strength(model, {"input_ids": tiny.tokens()}, layer=-1, features=[0, 3])
    assert torch.equal(tiny.logits(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_linear_output_has_no_interactions():
    model = tiny.llama()
    seen = {}
    model.model.norm.register_forward_pre_hook(lambda module, arguments: seen.update(hidden=arguments[0]))
    batch = {"input_ids": tiny.tokens()}
    found = interaction_strength(
        model, batch, layer=1, features=[0, 1, 2], output=lambda _: seen["hidden"][:, -1, :3].sum(-1)
    )
    assert torch.equal(found, torch.zeros(3, 3))


@pytest.mark.parametrize("kind", ["run", "glue_run"])
def test_a_run_is_measured_on_its_first_test_rows(kind, request):
    trained_run = request.getfixturevalue(kind)
    strength = run_interaction(trained_run, examples=3, features=4)
    kept = json.loads(trained_run.interaction_file.read_text())
    assert torch.equal(torch.tensor(kept["strength"]), strength)
    assert (kept["examples"], kept["layer"], strength.shape) == (3, 1, (4, 4))
    assert strength.max() > 0


def test_an_unknown_block_is_rejected():
    with pytest.raises(UserError, match="layer=7"):
        interaction_strength(tiny.llama(), {"input_ids": tiny.tokens()}, layer=7, features=[0])
