"""What a command may be pointed at, and the model that it opens."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import pera_lab
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


COMMANDS = {
    "evaluate": ("evaluate", "run"),
    "evaluate --base": ("evaluate", "run", "--base"),
    "predict": ("predict", "run", "--input", "rows.jsonl", "--output", "answers.jsonl"),
    "inspect --effect": ("inspect", "run", "--effect"),
    "merge": ("merge", "run", "--output", "merged"),
    "merge an adapter": ("merge", "run/adapter", "--output", "merged"),
    "export": ("export", "run", "--to", "lora", "--output", "exported"),
    "import": ("import", "lora", "--from", "lora", "--output", "imported"),
    "verify": ("verify", "run", "run/adapter"),
    "chat": ("chat", "run"),
    "chat with an adapter": ("chat", "run/adapter"),
    "train --resume": ("train", "unfinished", "--resume"),
}
"""Commands that open the base model of a run or of an adapter."""


@pytest.fixture
def workplace(tmp_path, tiny_llama, finished_run, monkeypatch, capsys):
    """A working folder with a base, and a finished run, an unfinished run and a LoRA on it."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    shutil.copytree(finished_run.path, tmp_path / "run")
    shutil.copytree(finished_run.path, tmp_path / "unfinished", ignore=shutil.ignore_patterns("adapter", "checkpoints"))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "lora")
    for file in ("run/recipe.yaml", "unfinished/recipe.yaml", "run/adapter/adapter_config.json"):
        (tmp_path / file).write_text((tmp_path / file).read_text().replace(str(tiny_llama), str(base)))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Who is Mary?"}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO())
    capsys.readouterr()  # the progress bars of transformers
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_base_that_was_moved_is_found_again_after_the_edit_that_the_message_names(command, pera, refused, workplace):
    base = workplace / "base"
    base.rename(workplace / "moved")
    line = refused(*command, words=[f"folder {str(base)!r} does not exist; set "])
    for key, file in re.findall(r"set (\S+) in '(.+?)' to a folder", line):
        assert f"{key.removeprefix('model.')}" in Path(file).read_text()
        Path(file).write_text(Path(file).read_text().replace(str(base), str(workplace / "moved")))
    if command[0] == "verify":  # the second model names its base in its own file
        file = workplace / "run" / "adapter" / "adapter_config.json"
        file.write_text(file.read_text().replace(str(base), str(workplace / "moved")))
    outcome = pera(*command)
    assert outcome.code == 0, outcome.err
    written = [file.read_text() for file in workplace.glob("*ported/adapter_config.json")]
    assert [text for text in written if str(workplace / "moved") not in text] == []


def test_a_moved_base_of_a_recipe_is_named_by_its_key(refused, workplace):
    content = (workplace / "run" / "recipe.yaml").read_text()
    (workplace / "recipe.yaml").write_text(content)
    shutil.rmtree(workplace / "base")
    refused("train", "recipe.yaml", "--output", "new", words=["model: folder", "does not exist; give a folder"])


def test_a_new_run_on_a_misspelled_model_is_told_the_name_that_was_meant(refused, workplace):
    shutil.copy(workplace / "run" / "recipe.yaml", workplace)
    mistake = ("model.name=smollm2-135", "--output", "new")
    refused("train", "recipe.yaml", *mistake, words=["model: 'smollm2-135' is not", "did you mean 'smollm2-135m'?"])


@pytest.fixture
def strange(workplace, monkeypatch):
    """The base of ``workplace`` comes with code, and the recipes of its runs say that the code may run.

    Returns a function that tells whether the code ran.
    """
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(workplace / "modules"))
    monkeypatch.syspath_prepend(str(workplace / "modules"))
    mark = workplace / "executed"
    (workplace / "base" / "strange.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig):\n    model_type = 'strange'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )
    for file in ("run/recipe.yaml", "unfinished/recipe.yaml"):
        text = (workplace / file).read_text()
        (workplace / file).write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    for file in workplace.glob("*/environment.json"):
        file.unlink()
    return mark.exists


def give_code_to_the_model(base):
    auto_map = {"AutoConfig": "strange.C", "AutoModelForCausalLM": "strange.M"}
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "model_type": "strange", "auto_map": auto_map}))


def give_code_to_the_tokenizer(base):
    auto_map = {"AutoTokenizer": [None, "strange.T"]}
    content = json.loads((base / "tokenizer_config.json").read_text())
    strange = {**content, "tokenizer_class": "T", "auto_map": auto_map}
    (base / "tokenizer_config.json").write_text(json.dumps(strange))


@pytest.mark.parametrize("give_code", [give_code_to_the_model, give_code_to_the_tokenizer])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_code_of_a_base_is_not_run_because_a_run_folder_says_so(command, give_code, refused, workplace, strange):
    give_code(workplace / "base")
    refused(*command, words=["needs its own code to load; if you trust that code, add --trust-remote-code"])
    assert not strange()


@pytest.mark.parametrize("name", ["evaluate", "predict", "inspect --effect", "merge an adapter", "train --resume"])
def test_the_users_flag_lets_the_code_of_a_base_run(name, pera, workplace, strange):
    give_code_to_the_model(workplace / "base")
    assert pera(*COMMANDS[name], "--trust-remote-code").code == 0
    assert strange()


def test_a_recipe_that_the_user_trains_lets_the_code_of_its_base_run(pera, workplace, strange):
    give_code_to_the_model(workplace / "base")
    (workplace / "recipe.yaml").write_text((workplace / "run" / "recipe.yaml").read_text())
    assert pera("train", "recipe.yaml", "training.max_steps=1", "--output", "new").code == 0
    assert strange()


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_base_that_also_holds_an_adapter_is_rejected_by_every_command(command, refused, workplace):
    for file in (workplace / "lora").iterdir():
        shutil.copy(file, workplace / "base")
    refused(*command, words=["base' also holds an adapter (adapter_config.json), which would change the base model"])


def test_a_folder_that_holds_an_adapter_and_a_model_is_rejected(refused, workplace):
    shutil.copy(workplace / "base" / "config.json", workplace / "lora")
    assert locate("lora").adapter is not None  # some trainers save the configuration of the base with the adapter
    shutil.copy(workplace / "base" / "model.safetensors", workplace / "lora")
    held = "'lora' holds more than one of a run, an adapter and a model: adapter (adapter_config.json) and model"
    for command in (("chat", "lora"), ("merge", "lora", "--output", "new"), ("verify", "base", "lora")):
        refused(*command, words=[held])
    shutil.copy(workplace / "base" / "config.json", workplace / "run")
    refused("evaluate", "run", words=["holds more than one of a run, an adapter and a model: run (recipe.yaml) and"])


def test_a_base_that_is_an_adapter_is_rejected(refused, workplace):
    (workplace / "base" / "config.json").unlink()
    shutil.copy(workplace / "lora" / "adapter_config.json", workplace / "base")
    refused("evaluate", "run", words=["base' is an adapter, not a base model; set model.name in 'run/recipe.yaml' to"])
    refused("chat", "run/adapter", words=["set base_model_name_or_path in 'run/adapter/adapter_config.json' to"])
    refused("train", "run/recipe.yaml", f"model.name={workplace}/base", words=["merge it with: pera merge"])


NAMES = ["a" * 300, "a/" * 300, "x\0y", "x\ny", "\udc80", "", "~nobody/x", "~\0", "https://a.b/c", "../../..", "a--b/c"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_model_can_have_is_rejected_wherever_it_is_given(name, refused, workplace):
    commands = [("chat", name), ("inspect", name), ("verify", name, "run"), ("report", name)]
    for command in [] if "\0" in name else commands:
        refused(*command, words=[])
    (workplace / "recipe.yaml").write_text((workplace / "run" / "recipe.yaml").read_text())
    refused("train", "recipe.yaml", f"model.name={json.dumps(name)}", "--output", "new", words=["model"])
    file = workplace / "lora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    refused("merge", "lora", "--output", "new", words=["base_model_name_or_path"])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_base_without_a_tokenizer_is_named_only_where_one_is_needed(name, pera, refused, workplace):
    for file in (*(workplace / "base").glob("*token*"), *(workplace / "base").glob("*.jinja")):
        file.unlink()
    if name.split()[0] in ("merge", "export", "import", "verify"):
        outcome = pera(*COMMANDS[name])
        assert outcome.code == 0, outcome.err
    else:
        refused(*COMMANDS[name], words=["base' has no tokenizer; copy its files, such as tokenizer.json and"])


def test_models_of_which_one_has_a_tokenizer_are_not_compared(refused, workplace):
    shutil.copytree(workplace / "base", workplace / "bare", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    refused("verify", "base", "bare", words=["only one of 'base' and 'bare' has a tokenizer"])
    (workplace / "prompts.txt").write_text("Hello\n")
    refused("verify", "bare", "bare", "--prompts", "prompts.txt", words=["--prompts='prompts.txt' needs a tokenizer"])


def test_a_model_and_its_tokenizer_load_in_one_call(tiny_llama, adapter):
    model, tokenizer = pera_lab.load(str(tiny_llama), "float32")
    assert model(**tokenizer("a", return_tensors="pt")).logits.dtype == torch.float32
    adapted, _ = pera_lab.load(str(adapter))
    assert isinstance(adapted, PeftModel)
