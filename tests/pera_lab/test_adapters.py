"""The adapter folder: read once, checked, and loaded on a base model as PEFT does."""

import json
from pathlib import Path

import pytest
import safetensors
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from pera import PeraConfig
from pera.errors import UserError
from pera_lab.adapters import Adapter
from pera_lab.models import load_model

Q = ["q_proj", "v_proj"]
METHODS = {
    "pera": lambda: PeraConfig(r=2, target_modules=Q, init_weights=False),
    "lora": lambda: LoraConfig(r=2, target_modules=Q, init_lora_weights=False),
    "modules to save": lambda: LoraConfig(r=2, target_modules=Q, modules_to_save=["lm_head"]),
    "tokens": lambda: LoraConfig(r=2, target_modules=Q, trainable_token_indices=[3, 4]),
    "embeddings": lambda: LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
    "biases": lambda: LoraConfig(r=2, target_modules=Q, bias="all"),
    "tokens alone": lambda: TrainableTokensConfig(token_indices=[1, 5], target_modules=["embed_tokens"]),
    "adalora": lambda: AdaLoraConfig(target_modules=Q, total_step=10, init_r=4),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "shared vectors": lambda: VBLoRAConfig(r=2, target_modules=["q_proj"], vector_length=4, num_vectors=8),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.fixture
def save(tiny_llama, tmp_path):
    """Saves an adapter with random weights."""

    def save_adapter(config):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn_like(weight))
        model.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return save_adapter


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_loaded_as_by_peft(method, save, tiny_llama):
    folder = save(METHODS[method]())

    def base():
        return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)

    expected = PeftModel.from_pretrained(base(), folder)
    adapter = Adapter(folder)
    for found in (adapter.load_on(base()), adapter.load_on(base())):  # the second comes from the cache
        assert type(found) is type(expected)
        assert not found.training
        assert [w.requires_grad for w in found.parameters()] == [w.requires_grad for w in expected.parameters()]
        assert found.peft_config == expected.peft_config
        assert found.state_dict().keys() == expected.state_dict().keys()
        for key, weight in expected.state_dict().items():
            assert found.state_dict()[key].dtype == weight.dtype
            assert torch.equal(found.state_dict()[key], weight)


@pytest.fixture
def opened(monkeypatch):
    """Lists the files that are opened, each as often as it is."""
    files = []

    def record(function):
        def recorded(file, *arguments, **options):
            files.append(Path(str(file)))
            return function(file, *arguments, **options)

        return recorded

    opening = record(open)
    for name in ("builtins.open", "io.open"):
        monkeypatch.setattr(name, opening)
    for name in ("pera_lab.adapters.safe_open", "safetensors.torch.safe_open", "safetensors.safe_open"):
        monkeypatch.setattr(name, record(safetensors.safe_open))
    return files


def test_an_export_opens_each_file_of_the_adapter_once(run, pera, opened):
    assert pera("export", run.path, "--to", "lora", "--output", "lora").code == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert opened.count(run.adapter.path / name) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: [c], "adapter_config.json has no peft_type; add it"),
        (lambda c: {k: v for k, v in c.items() if k != "peft_type"}, "adapter_config.json has no peft_type"),
        (lambda c: {**c, "peft_type": "NOTHING"}, "peft_type='NOTHING' is unknown to PEFT"),
        (lambda c: {**c, "r": 0}, "adapter_config.json: r=0 should be"),
        (lambda c: {**c, "target_modules": [5]}, r"adapter_config.json: target_modules=\[5\] should be a list"),
        (lambda c: {**c, "modules_to_save": 3}, "adapter_config.json: modules_to_save=3 should be a list"),
        (
            lambda c: {**c, "trainable_token_indices": "ab"},
            "adapter_config.json: trainable_token_indices='ab' should",
        ),
        (lambda c: {**c, "base_model_name_or_path": 5}, "adapter_config.json: base_model_name_or_path=5 should be a"),
        (lambda c: {**c, "revision": ["main"]}, r"adapter_config.json: revision=\['main'\] should be a string"),
    ],
)
def test_an_invalid_configuration_is_rejected(change, sentence, run):
    file = run.adapter.path / "adapter_config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=f"^{str(run.adapter.path)!r}: {sentence}"):
        _ = run.adapter.config


HOSTILE = {
    "rank as text": ("r", "x", "r='x' should be"),
    "huge rank": ("r", 10**9, "r=1000000000 does not fit the weights, whose largest side is 32"),
    "alpha as text": ("lora_alpha", "x", "lora_alpha='x' should be a number"),
    "alpha as list": ("lora_alpha", [1], r"lora_alpha=\[1\] should be a number"),
    "targets": ("target_modules", 5, "target_modules=5 should be"),
    "no targets": ("target_modules", {}, "target_modules"),
    "huge pattern": ("rank_pattern", {"q_proj": 10**9}, "r=1000000000 does not fit the weights"),
    "pattern as list": ("rank_pattern", [1], "rank_pattern|list"),
    "method": ("peft_type", ["LORA"], "adapter_config.json"),
    "module to import": ("megatron_config", {"x": 1}, "megatron_config names code or models outside the adapter"),
    "unknown key": ("quux", 1, "quux|peft_type"),
}


@pytest.mark.parametrize(("key", "value", "sentence"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_configuration_is_rejected_in_one_sentence(key, value, sentence, save, tiny_llama):
    folder = save(METHODS["lora"]())
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    if key == "quux":  # PEFT ignores it, as it does for adapters of a later version
        Adapter(folder).load_on(load_model(str(tiny_llama)))
        return
    with pytest.raises(UserError, match=f"^{str(folder)!r}.*({sentence})") as caught:
        Adapter(folder).load_on(load_model(str(tiny_llama)))
    assert "\n" not in str(caught.value)


def test_a_module_that_an_adapter_names_is_not_imported(save, tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('the module was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = save(METHODS["lora"]())
    file = folder / "adapter_config.json"
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "stranger"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_mapping": mapping, "megatron_core": "stranger"}))
    Adapter(folder).load_on(load_model(str(tiny_llama)))


@pytest.mark.parametrize("content", [b"", b"\xff" * 99, b"\x08" + bytes(7) + b"[1, 2]  ", b"\x02" + bytes(7) + b"{}"])
def test_broken_weights_are_rejected_in_one_sentence(content, save, tiny_llama):
    folder = save(METHODS["lora"]())
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=str(folder)) as caught:
        Adapter(folder).load_on(load_model(str(tiny_llama)))
    assert "\n" not in str(caught.value)


def test_a_saved_runtime_config_is_ignored(save):
    folder = save(METHODS["lora"]())
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, "runtime_config": {"x": 1}}))
    assert Adapter(folder).method == "LORA"


def test_weights_in_pickle_format_are_rejected_with_the_command_that_converts_them(run):
    torch.save({}, run.adapter.path / "adapter_model.bin")
    (run.adapter.path / "adapter_model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"weights in adapter_model\.bin, but only safetensors is read; .*save_pretrained"
    ):
        _ = run.adapter.weights


def test_float8_weights_are_loaded(run, tiny_llama, change_weights):
    file = run.adapter.path / "adapter_model.safetensors"
    change_weights(file, lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()})
    run.adapter.load_on(load_model(str(tiny_llama)))


def test_untrained_token_weights_are_reported_as_missing(run, tiny_llama):
    file = run.adapter.path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": [0]}))
    with pytest.raises(UserError, match=r"does not fit its own configuration: the weights file lacks '.*tokens_delta'"):
        run.adapter.load_on(load_model(str(tiny_llama)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: dict(list(w.items())[1:]), "the weights file lacks 'base_model.*'"),
        (lambda w: {**w, "base_model.model.new.pera_A": torch.zeros(1)}, "the base model has no place for '.*new"),
    ],
)
def test_weights_that_do_not_match_the_base_model_by_name_are_rejected(
    change, sentence, run, tiny_llama, change_weights
):
    change_weights(run.adapter.path / "adapter_model.safetensors", change)
    with pytest.raises(UserError, match=f"^{str(run.adapter.path)!r} does not fit its base model .*: {sentence}"):
        run.adapter.load_on(load_model(str(tiny_llama)))


def test_a_classification_adapter_without_a_head_is_rejected(glue_run, change_weights):
    assert Adapter(glue_run.adapter.path).labels == 2
    file = glue_run.adapter.path / "adapter_model.safetensors"
    change_weights(file, lambda w: {k: v for k, v in w.items() if "classifier" not in k})
    with pytest.raises(UserError, match="is an adapter for classification, but its weights lack the head"):
        _ = glue_run.adapter.labels
