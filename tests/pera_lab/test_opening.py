"""What a command may be pointed at, and the model that it opens."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from pera.errors import UserError
from pera_lab.opening import Location, locate, locate_adapter, locate_run, open_model


def test_a_run_folder_gives_its_adapter_and_base_model(finished_run, tiny_llama):
    location = locate(str(finished_run.path))
    assert location.run.path == finished_run.path
    assert (location.adapter.path, location.base) == (finished_run.adapter.path, str(tiny_llama))


def test_an_adapter_folder_gives_its_base_model(finished_run, tiny_llama):
    location = locate(str(finished_run.adapter.path))
    assert location.adapter.path == finished_run.adapter.path
    assert location == Location(None, location.adapter, str(tiny_llama))


def test_any_other_name_is_a_model(tiny_llama):
    for name in (str(tiny_llama), "smollm2-135m", "a/b"):
        assert locate(name) == Location(None, None, name)
        with pytest.raises(UserError, match="has no adapter; give a run folder or an adapter folder"):
            locate_adapter(name)


def test_an_adapter_that_does_not_name_its_base_model_is_rejected(run):
    config = json.loads((run.adapter.path / "adapter_config.json").read_text())
    (run.adapter.path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="has no base_model_name_or_path; add it"):
        locate(str(run.adapter.path))


@pytest.mark.parametrize("base", [["x"], {"dtype": ["float32"]}])
def test_an_invalid_record_of_the_base_model_is_rejected(base, run):
    run.environment_file.write_text(json.dumps({"base_model": base}))
    with pytest.raises(UserError, match=r"environment.json': base_model=.* should hold name, dtype and fingerprint"):
        open_model(locate_run(run))


def test_a_tokenizer_saved_with_the_adapter_replaces_the_base_models(run, tiny_llama):
    own = AutoTokenizer.from_pretrained(tiny_llama)
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(run.adapter.path)
    for name in (run.path, run.adapter.path):
        assert open_model(locate(str(name)))[1].chat_template == own.chat_template


def test_a_run_is_opened_with_its_adapter(finished_run, tiny_llama, logits):
    model, tokenizer = open_model(locate(str(finished_run.path)), "float32")
    assert isinstance(model, PeftModel)
    assert not model.training
    assert tokenizer.padding_side == "left"
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama))
    assert (logits(model) - logits(tiny_llama)).abs().max() > 0.1


def test_peft_gives_the_same_logits_in_a_fresh_process(finished_run, tiny_llama, logits, fresh_logits):
    model, _ = open_model(locate(str(finished_run.path)), "float32")
    fresh = fresh_logits({"run": (tiny_llama, finished_run.adapter.path)}, import_pera=True)
    assert torch.equal(fresh["run"], logits(model))


def test_a_run_can_be_moved(run, tmp_path, logits):
    before = logits(open_model(locate(str(run.path)), "float32")[0])
    moved = shutil.move(run.path, tmp_path / "elsewhere")
    assert torch.equal(logits(open_model(locate(str(moved)), "float32")[0]), before)
