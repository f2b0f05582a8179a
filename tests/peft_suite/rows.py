"""A pytest plugin that runs PEFT's own tests with PERA in place of LoRA.

Before collection it rewrites the parameter lists of PEFT's test files in place. Rows of LoRA become rows of PERA
through ``PeraConfig.from_lora``. Rows of other methods, or of features that only LoRA has, are removed. Rows of
features that only PERA has are added. Tests without a PERA configuration are deselected.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig

from pera import PeraConfig, UserError

OPTIONS = {
    "rms": {"normalization": "rms"},
    "rms from 0.3": {"normalization": "rms", "init_coefficients": 0.3},
    "square": {"terms": "square"},
    "cross rms": {"terms": "cross", "normalization": "rms"},
    "fixed": {"coefficients": "fixed"},
    "fixed rms": {"coefficients": "fixed", "normalization": "rms"},
    "none": {"terms": "none"},
}
"""Combinations of terms, coefficients and normalization that use different code."""

KINDS = {
    "Linear": ("MLP", {"target_modules": ["lin0", "lin1"]}),
    "Embedding": ("EmbConv1D", {"target_modules": ["emb"]}),
    "transformers Conv1D": ("EmbConv1D", {"target_modules": ["conv1d"]}),
    "Conv1d": ("Conv1d", {"target_modules": ["conv1d"]}),
    "Conv1d groups": ("Conv1dGroups", {"target_modules": ["conv1d"]}),
    "Conv2d": ("Conv2d", {"target_modules": ["conv2d"]}),
    "Conv2d groups": ("Conv2dGroups", {"target_modules": ["conv2d"]}),
    "Conv3d": ("Conv3d", {"target_modules": ["conv3d"]}),
    "Parameter": ("MlpUsingParameters", {"target_modules": [], "target_parameters": ["lin0.weight"]}),
}
"""A model of PEFT's tests and its targets, for each kind of layer."""

ADDED = {
    "TEST_CASES": [
        (f"{kind} PERA {name}", model, PeraConfig, {**targets, **options})
        for kind, (model, targets) in KINDS.items()
        for name, options in OPTIONS.items()
    ],
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
        (
            f"PERA {name} {'same' if targets == ['lin0'] else 'different'}",
            "pera",
            PeraConfig,
            {"target_modules": ["lin0"], "init_weights": False, **options},
            {"target_modules": targets, "init_weights": False, "r": 4},
        )
        for name, options in OPTIONS.items()
        for targets in (["lin0"], ["lin1"])
    ],
    "ALL_CONFIGS": [
        (PeraConfig, {"task_type": "CAUSAL_LM", "r": 4, "target_modules": None, **options})
        for options in OPTIONS.values()
    ],
}

REFUSED = {"MHA": "PERA refuses torch.nn.MultiheadAttention"}
"""Models of PEFT's tests that PERA refuses, with the reason."""

LEFT_OUT = {
    "test_parameters_after_loading_model": "its learning rate suits methods that are linear in each factor",
    "test_only_params_are_updated[Embedding": (
        "A of an embedding starts at zero, so three steps move B by 9e-5, less than the tolerance of 1e-4; LoRA with "
        "the same B fails too"
    ),
    "PERA targeting nn.Parameter Different": "PERA refuses other target_parameters; skipped for LoRA too",
    "test_default_target_modules": "patches LoRA's table of default targets; PERA has its own copy",
    "TestDecoderModels::test_save_pretrained_targeting_lora_to_embedding_layer": "needs the hub",
    "test_mixed_adapter_batches_mha_raises": REFUSED["MHA"],
    "test_add_weighted_adapter_cat_with_rank_pattern": "tests LoRA for every parameter",
}
"""Parts of the names of tests that do not concern PERA or cannot pass, with the reason."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models", help="folder for tiny models that replace those on the hub")


def pytest_configure(config: pytest.Config) -> None:
    common = importlib.import_module("tests.testing_common")
    # PEFT runs some tests only for the methods that it names. PERA replaces one of them.
    common.RoadConfig = common.LoKrConfig = PeraConfig  # mixed batches; GPT-2's Conv1D
    common.PeftCommonTester.check_modelcard = check_modelcard
    models = tiny_models(Path(config.getoption("models")))
    for file in config.args:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        for name in {"PEFT_DECODER_MODELS_TO_TEST", "SMALL_GRID_MODELS"} & vars(module).keys():
            vars(module)[name][:] = models
        for rows in parameter_lists(module):
            rows[:] = [carried for row in rows if (carried := carried_over(row)) is not None]
        if module.__name__.endswith("test_decoder_models"):
            module.LoraConfig = PeraConfig  # mixed batches
        for name in ADDED.keys() & vars(module).keys():
            vars(module)[name].extend(ADDED[name])


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    kept = [item for item in items if has_pera(item) and not any(name in item.nodeid for name in LEFT_OUT)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_report_header() -> list[str]:
    return [f"left out: {name}: {reason}" for name, reason in {**REFUSED, **LEFT_OUT}.items()]


def has_pera(item: Any) -> bool:
    """Whether PERA is among the parameters of a test."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(value is PeraConfig or isinstance(value, PeraConfig) for value in parameters)


def parameter_lists(module: Any) -> list[list[Any]]:
    """The parameter lists of the tests of a module, each once."""
    lists = {}
    for _, holder in inspect.getmembers(module, inspect.isclass):
        for _, test in inspect.getmembers(holder, inspect.isfunction):
            for mark in getattr(test, "pytestmark", ()):
                if mark.name == "parametrize" and isinstance(mark.args[1], list):
                    lists[id(mark.args[1])] = mark.args[1]
    return list(lists.values())


def carried_over(row: Any) -> Any:
    """The row with PERA in place of LoRA. None for another method or for options that only LoRA has."""
    values = row if isinstance(row, tuple) else (row,)
    methods = [v for v in values if isinstance(v, PeftConfig) or (inspect.isclass(v) and issubclass(v, PeftConfig))]
    if not methods:
        return row
    if any(method is not LoraConfig and type(method) is not LoraConfig for method in methods):
        return None
    if any(isinstance(value, str) and value in REFUSED for value in values):
        return None
    try:
        carried = tuple(map(as_pera, values))
    except UserError:
        return None
    return carried if isinstance(row, tuple) else carried[0]


def as_pera(value: Any) -> Any:
    """The PERA counterpart of a LoRA configuration, its class, its arguments or the name of a test."""
    if value is LoraConfig:
        return PeraConfig
    if isinstance(value, LoraConfig):
        return PeraConfig.from_lora(value)
    if isinstance(value, dict):
        carried = PeraConfig.from_lora(LoraConfig(**value))
        renamed = {key.replace("init_lora", "init").replace("lora_", "pera_") for key in value}
        return {key: getattr(carried, key) for key in sorted(renamed)}
    if value == "lora":  # PEFT then tests add_weighted_adapter, which only LoRA has
        return "pera"
    return value.replace("LoRA", "PERA") if isinstance(value, str) else value


def check_modelcard(self: Any, folder: str, model: Any) -> None:
    """As PEFT's check, for bases in folders of this machine, whose paths PERA leaves out of a card."""
    card = ModelCard.load(Path(folder) / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    assert "pera" in card.data.tags


def tiny_models(folder: Path) -> list[str]:
    """Folders with a tiny random LLaMA, GPT-2 and OPT."""
    sizes: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    configs = {
        "tiny-llama": transformers.LlamaConfig(**sizes, intermediate_size=32),
        "tiny-gpt2": transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1),
        "tiny-opt": transformers.OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=16),
    }
    torch.manual_seed(0)
    for name, config in configs.items():
        if not (folder / name).exists():
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return [str(folder / name) for name in configs]
