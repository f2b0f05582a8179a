"""parameter_groups: A, B and h have their own rates, and no trained parameter is missing."""

from collections import Counter

import pytest
import torch
from peft import DeloraConfig, HiraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from pera import PeraConfig, UserError, parameter_groups
from tiny import gpt2, llama, tokens

RATIOS = {"B": 16, "h": 10, "other": 0.5}
RATES = {"A": 0.01, "B": 0.16, "h": 0.1, "other": 0.005}


def pera(make=llama, **options):
    """A model with a random adapter."""
    return get_peft_model(make(), PeraConfig(**{"r": 3, "init_weights": False, **options}))


def whole(make=gpt2):
    """A model that also trains biases and whole norms."""
    names = {gpt2: (["c_attn"], ["ln_f"]), llama: (["q_proj"], ["norm"])}
    targets, saved = names[make]
    return pera(make, target_modules=targets, modules_to_save=[*saved, "mlp"], bias="all")


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def group_of(groups):
    """The group of each parameter."""
    return {p: group["name"] for group in groups for p in group["params"]}


def gradients(model):
    """Set the gradient of every trained parameter to ones."""
    for p in trained(model).values():
        p.grad = torch.ones_like(p)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (PeraConfig(), "ABh"),
        (PeraConfig(terms="none"), "AB"),
        (PeraConfig(coefficients="fixed"), "AB"),
        (LoraConfig(), "AB"),
        (LoraConfig(use_rslora=True), "AB"),
        (LoraConfig(use_dora=True), ["A", "B", "other"]),
        (HiraConfig(), "AB"),
        (DeloraConfig(target_modules=["q_proj"]), ["A", "B", "other"]),
        (PeraConfig(modules_to_save=["lm_head"]), ["A", "B", "h", "other"]),
        (PeraConfig(modules_to_save=["mlp", "norm"]), ["A", "B", "h", "other", "other"]),
    ],
)
def test_every_trained_parameter_is_in_one_group(config, names):
    model = get_peft_model(llama(), config)
    groups = parameter_groups(model, 0.01)
    assert [group["name"] for group in groups] == list(names)
    count = Counter(p for group in groups for p in group["params"])
    assert count == Counter(trained(model).values())
    assert {group["lr"] for group in groups} == {0.01}


def test_groups_contain_the_factors_they_are_named_after():
    model = whole()
    groups = group_of(parameter_groups(model, 0.01))
    for name, p in trained(model).items():
        letter = name.partition(".pera_")[2][:1]
        assert groups[p] == (letter or "other"), name
    assert set(groups.values()) == {"A", "B", "h", "other"}


def test_a_model_without_an_adapter_is_one_group():
    model = nn.Linear(3, 3, bias=False)
    assert parameter_groups(model, 1, weight_decay=0.1) == [
        {"name": "other", "params": [model.weight], "lr": 1.0, "weight_decay": 0.1}
    ]


def test_one_step_moves_each_group_by_its_rate():
    model = whole()
    groups = parameter_groups(model, 0.01, lr_ratio=RATIOS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients(model)
    torch.optim.SGD(groups).step()
    names = group_of(groups)
    for name, p in model.named_parameters():
        expected = torch.full_like(p, RATES[names[p]] if p.requires_grad else 0)
        torch.testing.assert_close(before[name] - p, expected, rtol=0, atol=1e-6, msg=name)


def test_a_ratio_of_zero_does_not_change_a_group():
    model = pera()
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    gradients(model)
    torch.optim.AdamW(parameter_groups(model, 0.01, lr_ratio={"h": 0}, weight_decay=0.1)).step()
    assert {name.split(".")[-2] for name, p in trained(model).items() if torch.equal(p, before[name])} == {"pera_h"}


def test_without_ratios_all_groups_have_the_same_rate():
    model = pera()
    assert parameter_groups(model, 0.01, lr_ratio={"B": 1.0, "h": 1}) == parameter_groups(model, 0.01)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(
    ("weight_decay", "expected"),
    [
        (0.0, {}),
        (0.2, {"A": 0.2, "B": 0.2, "h": 0.2, "other": 0.2}),
        ({"B": 0.2}, {"B": 0.2}),
        ({"A": 0.1, "h": 0.3, "other": 0.4}, {"A": 0.1, "h": 0.3, "other": 0.4}),
    ],
)
def test_without_a_gradient_weights_shrink_by_rate_times_decay(optimizer, weight_decay, expected):
    model = whole()
    groups = parameter_groups(model, 0.01, lr_ratio=RATIOS, weight_decay=weight_decay)
    before = {p: p.detach().clone() for p in trained(model).values()}
    for p in before:
        p.grad = torch.zeros_like(p)
    optimizer(groups).step()
    names = group_of(groups)
    for name, p in trained(model).items():
        bias_or_norm = name.endswith(".bias") or ".ln_f." in name
        decay = 0 if bias_or_norm else expected.get(names[p], 0)
        torch.testing.assert_close(p.detach(), before[p] * (1 - RATES[names[p]] * decay), msg=name)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_same_parameters_decay_as_in_the_trainer(make, tmp_path):
    model = whole(make)
    model.requires_grad_(True)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), weight_decay=0.1, report_to="none"))

    def decaying(groups):
        return {p: group["weight_decay"] for group in groups for p in group["params"]}

    found = decaying(parameter_groups(model, 0.01, weight_decay=0.1))
    assert found == decaying(trainer.create_optimizer().param_groups)
    assert set(found.values()) == {0, 0.1}


def test_the_bias_of_a_factor_has_its_rate_but_no_decay():
    model = get_peft_model(gpt2(), LoraConfig(lora_bias=True, fan_in_fan_out=True))
    groups = parameter_groups(model, 0.01, lr_ratio={"B": 4}, weight_decay=0.1)
    found = [(group["name"], group["params"][0].ndim, group["lr"], group["weight_decay"]) for group in groups]
    assert found == [("A", 2, 0.01, 0.1), ("B", 2, 0.04, 0.1), ("B", 1, 0.04, 0.0)]


def test_only_active_adapters_are_trained():
    model = pera(target_modules=["q_proj"])
    model.add_adapter("second", PeraConfig(r=2, target_modules=["q_proj", "v_proj"], coefficients="fixed"))

    def found():
        return {group["name"]: len(group["params"]) for group in parameter_groups(model, 0.01)}

    assert found() == {"A": 2, "B": 2, "h": 2}
    model.set_adapter("second")
    assert found() == {"A": 4, "B": 4}
    with pytest.raises(UserError, match=r"lr_ratio\['h'\] applies to no trained parameter"):
        parameter_groups(model, 0.01, lr_ratio={"h": 2})
    model.base_model.set_adapter(["default", "second"])
    assert found() == {"A": 6, "B": 6, "h": 2}


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
def test_a_scheduler_multiplies_the_rate_of_each_group(scheduler):
    model = whole()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01, lr_ratio=RATIOS))
    schedule = get_scheduler(scheduler, optimizer, num_warmup_steps=2, num_training_steps=10)
    factors = []
    for _ in range(8):
        optimizer.step()
        schedule.step()
        factors.append({group["name"]: group["lr"] / RATES[group["name"]] for group in optimizer.param_groups})
        assert schedule.get_last_lr()[0] == pytest.approx(0.01 * factors[-1]["A"])  # what the Trainer logs
        assert factors[-1] == pytest.approx(dict.fromkeys(RATES, factors[-1]["A"]))
    assert [factor["A"] for factor in factors[:2]] == pytest.approx([0.5, 1])


def test_the_trainer_accepts_an_optimizer_with_groups(tmp_path):
    model = pera()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01, lr_ratio={"B": 16, "h": 10}))
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, report_to="none", dataloader_pin_memory=False
    )
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    assert [line["learning_rate"] for line in trainer.state.log_history[:2]] == pytest.approx([0.01, 0.005])
    assert [group["initial_lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.16, 0.1])


# Mistakes


@pytest.mark.parametrize("value", [-0.1, float("inf"), "1e-3", True])
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("lr", lambda value: {"lr": value}),
        ("lr_ratio['B']", lambda value: {"lr_ratio": {"B": value}}),
        ("weight_decay", lambda value: {"weight_decay": value}),
        ("weight_decay['h']", lambda value: {"weight_decay": {"A": 0.1, "h": value}}),
    ],
)
def test_a_value_that_is_not_a_rate_is_refused(value, key, options):
    with pytest.raises(UserError) as caught:
        parameter_groups(pera(), **{"lr": 0.01, **options(value)})
    assert str(caught.value) == f"{key}={value!r} should be a finite number of at least 0."


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr_ratio": {"A": 2}}, "lr_ratio['A'] cannot be set; known: B, h, other."),
        ({"lr_ratio": {"othr": 2}}, "lr_ratio['othr'] cannot be set; did you mean 'other'?"),
        ({"lr_ratio": {1: 2}}, "lr_ratio[1] cannot be set; known: B, h, other."),
        ({"weight_decay": {"b": 2}}, "weight_decay['b'] cannot be set; known: A, B, h, other."),
        ({"lr_ratio": 16}, "lr_ratio=16 should map groups to ratios, such as {'B': 16}."),
    ],
)
def test_an_unknown_group_is_refused(options, sentence):
    with pytest.raises(UserError) as caught:
        parameter_groups(pera(), 0.01, **options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (
            llama,
            {"lr_ratio": {"B": 2}},
            "lr_ratio['B'] applies to no trained parameter; this model has",
        ),
        (
            pera,
            {"lr_ratio": {"other": 2}},
            "lr_ratio['other'] applies to no trained parameter",
        ),
        (lambda: pera(terms="none"), {"lr_ratio": {"h": 1}}, "lr_ratio['h'] applies to no trained parameter; "),
        (lambda: pera(coefficients="fixed"), {"lr_ratio": {"h": 1}}, "this model has the groups A, B."),
        (lambda: pera(terms="none"), {"weight_decay": {"h": 0.1}}, "weight_decay['h'] applies to no trained"),
        (lambda: pera(gpt2, bias="all"), {"weight_decay": {"other": 0.1}}, "this model has the groups A, B, h."),
    ],
)
def test_an_option_for_a_group_without_parameters_is_refused(make, options, sentence):
    with pytest.raises(UserError) as caught:
        parameter_groups(make(), 0.01, **options)
    assert sentence in str(caught.value)


def test_an_adapter_loaded_for_inference_is_refused(tmp_path):
    pera().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"nothing to train; load an adapter with is_trainable=True"):
        parameter_groups(PeftModel.from_pretrained(llama(), tmp_path), 0.01)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert [group["name"] for group in parameter_groups(loaded, 0.01)] == ["A", "B", "h"]
