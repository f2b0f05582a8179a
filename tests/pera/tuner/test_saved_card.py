"""The model card that ``save_pretrained`` writes."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pera import PeraConfig
from pera.tuner.card import base_name, card_text, inline_code

OPTIONS = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"], "normalization": "rms"}
TOKENS = torch.arange(3, 9).reshape(1, 6)


@pytest.fixture
def model(tiny_llama):
    config = PeraConfig(**OPTIONS, init_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).eval()


def load(folder):
    return ModelCard.load(folder / "README.md")


def test_the_card_of_an_adapter_is_ours(model, tiny_llama, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    card = load(tmp_path / "adapter")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert {"peft", "pera"} <= set(card.data.tags)
    for part in (
        "# PERA adapter",
        "import pera",
        f"`{tiny_llama.name}`",
        "arxiv.org/abs/2604.11841",
        "`KeyError: 'PERA'`",
    ):
        assert part in card.text
    assert "More Information Needed" not in card.text
    assert str(tiny_llama.parent) not in card.content
    assert card.data.base_model is None


def test_the_settings_of_the_card_are_a_program(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    shown = load(tmp_path / "adapter").text.split("## Settings\n\n```python\n")[1].split("\n```")[0]
    config = eval(shown, {"PeraConfig": PeraConfig})
    assert config.to_dict() == PeraConfig(**{**OPTIONS, "task_type": None}, init_weights=False).to_dict()


def test_the_program_of_the_card_loads_the_adapter(model, tiny_llama, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    program = load(tmp_path / "adapter").text.split("```python\n")[1].split("\n```")[0]
    program = program.replace(f"path/to/{tiny_llama.name}", str(tiny_llama))
    found = {}
    exec(program.replace("path/to/this/folder", str(tmp_path / "adapter")), found)
    with torch.no_grad():
        torch.testing.assert_close(found["model"](input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_a_base_on_the_hub_is_named_in_the_metadata_and_loaded_with_its_adapter(model, tmp_path):
    base = "some/model"
    model.get_base_model().name_or_path = model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    card = load(tmp_path / "adapter")
    assert card.data.base_model == base
    assert f"base_model:adapter:{base}" in card.data.tags
    assert 'AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")' in card.text


def test_an_edited_card_keeps_its_text_and_loses_paths(model, tiny_llama, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    card = load(tmp_path / "adapter")
    card.text += "\nMine.\n"
    card.save(tmp_path / "adapter" / "README.md")
    model.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    assert again.text.strip() == card.text.strip()
    assert str(tiny_llama.parent) not in again.content
    assert {"peft", "pera"} <= set(again.data.tags)


def test_a_card_that_nobody_edited_follows_the_adapter(model, tiny_llama, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    config = PeraConfig(**{**OPTIONS, "r": 3})
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "adapter")
    assert "PeraConfig(r=3, " in load(tmp_path / "adapter").text


def test_the_card_above_an_adapter_with_a_name_is_ours(tiny_llama, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), PeraConfig(**OPTIONS), "mine")
    model.save_pretrained(tmp_path / "all")
    card = load(tmp_path / "all")
    assert 'PeftModel.from_pretrained(base, "path/to/this/folder/mine")' in card.text
    assert str(tiny_llama.parent) not in card.content
    assert not (tmp_path / "all" / "mine" / "README.md").exists()


def test_a_configuration_alone_has_no_card(tmp_path):
    (tmp_path / "README.md").write_text("Mine.")
    PeraConfig(**OPTIONS).save_pretrained(str(tmp_path / "config"))
    assert [file.name for file in (tmp_path / "config").iterdir()] == ["adapter_config.json"]
    PeraConfig(**OPTIONS).save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == "Mine."


def test_the_card_of_another_method_is_left_to_peft(tiny_llama, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path)
    assert "PERA" not in load(tmp_path).content


@pytest.mark.parametrize(
    ("base", "name", "hub_id"),
    [
        ("some/model", "some/model", "some/model"),
        ("/home/me/models/llama", "llama", None),
        ("../llama/", "llama", None),
        ("C:\\Users\\me\\llama", "llama", None),
        ("/root/.cache/huggingface/hub/models--org--a--b/snapshots/0123", "org/a--b", "org/a--b"),
        (None, "unknown", None),
        ("", "unknown", None),
    ],
)
def test_names_of_base_models_have_no_folders(base, name, hub_id):
    assert base_name(base) == (name, hub_id)


def test_a_local_folder_that_looks_like_a_hub_id_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_name("models/llama") == ("llama", None)


def test_text_in_names_is_text(tmp_path):
    hostile = 'a"); import os  # `x`\n```\n<b>'
    config = PeraConfig(**OPTIONS, base_model_name_or_path=str(Path("/models") / hostile))
    text = card_text(config)
    assert inline_code("` `") == "`` ` ` ``"
    assert "\n<b>" not in text.replace("\\n", "")
