"""The model card of an adapter, a merged model and an export."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from pera_lab.card import write_card
from pera_lab.convert.export import export
from pera_lab.convert.merge import merge
from pera_lab.files import write_json
from pera_lab.opening import locate


def test_an_adapters_card_has_its_scores_its_recipe_and_how_to_load_it(run):
    score = {
        "scorer": "exact_match",
        "n": 8,
        "metric": "accuracy",
        "correct": 4,
        "value": 0.5,
        "low": 0.2,
        "high": 0.8,
        "seconds": 1,
    }
    write_json(run.scores_file, {"base": {**score, "value": 0.0}, "adapter": score})
    write_card(run.adapter.path, "adapter", locate(str(run.path)))
    card = ModelCard.load(run.adapter.path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.tags == ["peft", "pera"]
    assert "import pera" in card.text
    assert "| adapter | 8 | 50.0 % | 20.0 to 80.0 % |" in card.text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("\n```")[0])
    recorded = yaml.safe_load(run.recipe_file.read_text())
    recorded["model"]["name"] = Path(recorded["model"]["name"]).name
    assert recipe == recorded


def test_training_writes_a_card(finished_run):
    card = (finished_run.adapter.path / "README.md").read_text()
    assert "# PERA adapter" in card
    assert "`KeyError: 'PERA'`" in card


@pytest.mark.parametrize("kind", ["finished_run", "finished_glue_run"])
def test_no_card_holds_a_path_of_this_machine(kind, request, tmp_path_factory):
    run = request.getfixturevalue(kind)
    card = (run.adapter.path / "README.md").read_text()
    assert f"name: {Path(run.recipe.model.name).name}" in card
    assert str(tmp_path_factory.getbasetemp()) in run.recipe.to_yaml()
    assert str(tmp_path_factory.getbasetemp()) not in card


def test_the_cards_of_merged_models_and_exports_have_the_verification(run, tmp_path):
    agreement = merge(locate(str(run.path)), tmp_path / "merged")
    merged = ModelCard.load(tmp_path / "merged" / "README.md")
    assert merged.data.library_name == "transformers"
    assert agreement.sentence() in merged.text
    export(locate(str(run.path)), tmp_path / "lora")
    lora = ModelCard.load(tmp_path / "lora" / "README.md")
    assert lora.data.tags == ["peft", "pera", "lora"]
    assert "import pera" not in lora.text
    assert "KeyError" not in lora.text


@pytest.mark.parametrize(
    ("base", "named"),
    [("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("some/model", "some/model"), ("/a/local/folder", None)],
)
def test_only_a_hub_id_is_the_base_model_in_the_metadata(run, base, named):
    write_card(run.adapter.path, "adapter", locate(str(run.path))._replace(run=None, base=base))
    assert ModelCard.load(run.adapter.path / "README.md").data.base_model == named


def test_markdown_in_names_is_shown_as_text(run):
    base = "folder`](b) <b>"
    write_card(run.adapter.path, "adapter", locate(str(run.path))._replace(run=None, base=base))
    assert f"Base model: ``{base}``" in (run.adapter.path / "README.md").read_text()


def test_the_card_of_another_method_does_not_mention_pera(train_run, tmp_path):
    run = train_run(tmp_path / "lora", "method={name: lora, r: 2, target_modules: [q_proj]}", "training.max_steps=1")
    card = (run.adapter.path / "README.md").read_text()
    assert "# LORA adapter" in card
    assert "import pera" not in card
