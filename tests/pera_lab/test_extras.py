"""What a user who lacks an optional package is told to install, and when."""

import json
from importlib.metadata import distribution
from types import SimpleNamespace

import pytest

from pera_lab import extras, training
from pera_lab.extras import install_command


@pytest.fixture
def installed(monkeypatch):
    """``installed(url, **more)`` makes pera one that pip installed from there."""

    def record(url=None, **more):
        text = None if url is None else json.dumps({"url": url, **more})
        monkeypatch.setattr(extras, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))

    return record


def test_from_the_index_the_package_is_named(installed):
    installed()
    assert install_command("lab") == "pip install 'pera[lab]'"


def test_in_a_checkout_the_folder_is_named(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    installed(tmp_path.as_uri(), dir_info={})
    assert install_command("lab") == "pip install '.[lab]'"
    installed(tmp_path.as_uri(), dir_info={"editable": True})
    assert install_command("lab") == "pip install -e '.[lab]'"


def test_elsewhere_the_path_of_the_checkout_is_one_word(installed, tmp_path):
    checkout = tmp_path / "my pera"
    checkout.mkdir()
    installed(checkout.as_uri(), dir_info={})
    assert install_command("data") == f"pip install '{checkout}[data]'"


def test_a_wheel_and_a_repository_are_named_by_their_address(installed, tmp_path):
    wheel = (tmp_path / "pera-0.1.0-py3-none-any.whl").as_uri()
    installed(wheel, archive_info={})
    assert install_command("lab") == f"pip install 'pera[lab] @ {wheel}'"
    installed("https://example.org/pera.git", vcs_info={"vcs": "git", "commit_id": "abc"})
    assert install_command("lab") == "pip install 'pera[lab] @ git+https://example.org/pera.git@abc'"


def test_the_record_of_the_installed_pera_is_found():
    recorded = json.loads(distribution("pera").read_text("direct_url.json") or '{"url": ""}')
    assert extras._origin()[0] == recorded["url"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.report_to=[wandb]", ["training.report_to='wandb'", "pip install wandb"]),
        ("training.report_to=[all]", ["training.report_to='all'", "tensorboard"]),
    ],
)
def test_a_missing_tracker_is_named_before_the_data_are_read(override, words, refused, recipe_file, monkeypatch):
    def read(self):
        raise AssertionError

    monkeypatch.setattr("pera_lab.recipe.Recipe.build_splits", read)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    refused("train", recipe_file, override, "--output", "run", words=words)


def test_a_study_names_a_missing_package_before_its_first_run(refused, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(training.quantization, "is_bitsandbytes_available", lambda: False)
    study = tmp_path / "study.yaml"
    study.write_text(
        f"base: {recipe_file}\nsettings: {{model: {{quantization: int8}}}}\n"
        "grid: {task: family_relationships, method: [lora, pera-rms], r: [2]}\nchoose: {learning_rate: [1e-3]}\n"
    )
    refused("study", "run", study, words=["model.quantization='int8'", install_command("quantized")])
