"""A merged model is a plain model with the outputs of base and adapter."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Lfm2Config,
    MambaConfig,
)

from pera import PeraConfig
from pera.errors import UserError
from pera_lab.convert.export import export
from pera_lab.convert.merge import merge
from pera_lab.opening import locate_adapter
from reference import relative_error


def test_a_trained_run_is_merged_and_checked_on_its_own_task(
    finished_run, tiny_llama, tmp_path, unmerged, logits, stored
):
    agreement = merge(locate_adapter(str(finished_run.path)), tmp_path / "merged")
    assert agreement.agree
    adapted = logits(unmerged(tiny_llama, finished_run.adapter.path))
    assert (adapted - logits(tiny_llama)).abs().max() > 0.1
    assert (adapted - logits(tmp_path / "merged")).abs().max() < 1e-5
    record = json.loads((tmp_path / "merged" / "verification.json").read_text())
    assert record == stored(agreement, "merged model", finished_run.path)


def test_the_merged_model_has_the_files_and_configuration_of_the_base(finished_run, tiny_llama, tmp_path):
    merge(locate_adapter(str(finished_run.path)), tmp_path / "merged")
    merged, base = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", tiny_llama))
    assert {key: (w.shape, w.dtype) for key, w in merged.items()} == {
        key: (w.shape, w.dtype) for key, w in base.items()
    }
    changed = {key.split(".")[-2] for key, w in merged.items() if not torch.equal(w, base[key])}
    assert changed == {"q_proj", "v_proj", "up_proj", "down_proj"}
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "merged", tiny_llama)]
    assert configs[0] == {**configs[1], "rope_theta": configs[1]["rope_parameters"]["rope_theta"]}
    text = "How is Liam related to Zoe?"
    tokens = [AutoTokenizer.from_pretrained(path)(text).input_ids for path in (tmp_path / "merged", tiny_llama)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("tiny_llama", {"normalization": "rms", "rank_pattern": {"v_proj": 2}, "pera_alpha": 5, "use_rslora": True}),
        ("tiny_llama", {"target_modules": ["lm_head"], "terms": "square"}),
        ("tiny_llama", {"target_modules": ["embed_tokens", "q_proj"], "terms": "none", "anchors": 3}),
        ("tiny_llama", {"modules_to_save": ["lm_head"], "coefficients": "fixed"}),
        ("biased_llama", {"bias": "all"}),
        ("tiny_gpt2", {"target_modules": ["c_attn", "c_fc"], "normalization": "rms"}),
        ("tied_llama", {"normalization": "rms"}),
    ],
)
def test_the_merged_model_gives_the_logits_of_the_adapter(
    base, options, request, save_adapter, merge_adapter, tmp_path, logits
):
    base = request.getfixturevalue(base)
    adapted = logits(save_adapter(tmp_path / "adapter", base, **options))
    agreement = merge_adapter()
    effect = (adapted - logits(base)).abs().max()
    assert agreement.agree
    assert effect > 0.1
    assert (adapted - logits(tmp_path / "merged")).abs().max() < 1e-5 * max(1, effect)


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [("bfloat16", "stored", "bfloat16"), ("bfloat16", "float32", "float32")],
)
def test_the_dtype_is_that_of_the_base_unless_one_is_given(
    stored, dtype, expected, save_llama, save_adapter, merge_adapter, tmp_path
):
    base = save_llama(tmp_path / "base", dtype=getattr(torch, stored), tie_word_embeddings=False)
    save_adapter(tmp_path / "adapter", base)
    agreement = merge_adapter(dtype=dtype)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {getattr(torch, expected)}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == expected
    assert agreement.dtype == expected


def test_a_sum_in_bfloat16_is_rounded_once(save_llama, save_adapter, merge_adapter, tmp_path):
    base = save_llama(tmp_path / "base", dtype=torch.bfloat16, tie_word_embeddings=False)
    adapted = save_adapter(tmp_path / "adapter", base)
    merge_adapter()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    key = "model.layers.0.self_attn.q_proj"
    delta = adapted.get_submodule(f"base_model.model.{key}").get_delta_weight("default").detach().float()
    assert torch.equal(after[f"{key}.weight"], (before[f"{key}.weight"].float() + delta).bfloat16())


def test_a_base_in_float64_is_merged_too(save_llama, save_adapter, merge_adapter, tmp_path):
    base = save_llama(tmp_path / "base", dtype=torch.float64, tie_word_embeddings=False)
    save_adapter(tmp_path / "adapter", base)
    assert merge_adapter().agree


def test_an_adapter_that_does_not_change_weights_is_rejected(tiny_llama, merge_adapter, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is a PROMPT_TUNING adapter, which does not change weights to merge"):
        merge_adapter()
    assert not (tmp_path / "merged").exists()


def test_weights_that_are_not_finite_are_rejected(save_adapter, tiny_llama, merge_adapter, tmp_path, change_weights):
    save_adapter(tmp_path / "adapter", tiny_llama)

    def spoil(weights):
        next(w for name, w in weights.items() if "pera_h" in name)[0] = float("nan")
        return weights

    change_weights(tmp_path / "adapter" / "adapter_model.safetensors", spoil)
    with pytest.raises(UserError, match=r"adapter.*NaNs detected"):
        merge_adapter()
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_that_differs_is_kept_and_recorded(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("pera.tuner.PeraLayer.merge", lambda layer, safe_merge: None)
    agreement = merge(locate_adapter(str(adapter)), tmp_path / "merged")
    assert not agreement.agree
    record = json.loads((tmp_path / "merged" / "verification.json").read_text())
    assert record["agree"] is False
    assert record["max_difference"] == agreement.max_difference > 0.1


@pytest.fixture
def sharded(tiny_llama, tmp_path):
    """The tiny LLaMA in several files."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


@pytest.mark.parametrize("dtype", ["stored", "bfloat16"])
def test_a_sharded_base_is_merged_file_by_file(
    dtype, sharded, save_adapter, merge_adapter, tmp_path, logits, monkeypatch
):
    monkeypatch.setattr("pera_lab.convert.merge.open_model", None)  # never loaded as a whole
    expected = logits(save_adapter(tmp_path / "adapter", sharded, target_modules=["q_proj", "down_proj", "lm_head"]))
    assert merge_adapter(dtype=dtype).agree
    files = [{file.name for file in folder.glob("*.safetensors*")} for folder in (sharded, tmp_path / "merged")]
    assert files[0] == files[1]
    assert len(files[0]) > 3
    index = [
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (sharded, tmp_path / "merged")
    ]
    assert index[0]["weight_map"] == index[1]["weight_map"]
    found = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        found |= load_file(file)
    assert index[1]["metadata"]["total_size"] == sum(weight.nbytes for weight in found.values())
    stored = "float32" if dtype == "stored" else dtype
    assert {weight.dtype for weight in found.values()} == {getattr(torch, stored)}
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["max_new_tokens"] == 7
    if dtype == "stored":
        assert (logits(tmp_path / "merged") - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2, "pad_token_id": 2, "eos_token_id": 1}
READERS = {
    "Mamba": (MambaConfig(state_size=4, **SMALL), ["in_proj"]),
    "LFM2": (
        Lfm2Config(
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
            **SMALL,
        ),
        ["in_proj", "q_proj"],
    ),
}
"""Models in which a module reads the weights of a module inside it."""


@pytest.mark.parametrize("name", READERS)
def test_a_module_may_read_the_weights_of_an_inner_module(
    name, tokenizer, save_adapter, merge_adapter, tmp_path, logits, monkeypatch
):
    monkeypatch.setattr("pera_lab.convert.merge.open_model", None)  # never loaded as a whole
    config, targets = READERS[name]
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    expected = logits(save_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=targets))
    assert merge_adapter().agree
    assert relative_error(logits(tmp_path / "merged"), expected) <= 1e-5
    assert relative_error(logits(tmp_path / "base"), expected) > 1e-2


def test_a_sum_beyond_the_range_of_float16_is_rejected(
    tiny_llama, save_adapter, change_weights, merge_adapter, tmp_path
):
    save_adapter(tmp_path / "adapter", tiny_llama)

    def enlarge(weights):
        return {key: weight * 1e4 if "pera_B" in key else weight for key, weight in weights.items()}

    change_weights(tmp_path / "adapter" / "adapter_model.safetensors", enlarge)
    with pytest.raises(UserError, match=r"q_proj.weight is beyond the range of float16; try --dtype bfloat16"):
        merge_adapter(dtype="float16")
    assert not (tmp_path / "merged").exists()


KILLED = """
import os, signal, sys
import pera_lab.convert.merge as merging
from pera_lab.opening import locate_adapter
save, saved = merging.save_file, []
def save_or_die(*arguments, **options):
    if len(saved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    saved.append(save(*arguments, **options))
merging.save_file = save_or_die
merging.merge(locate_adapter(sys.argv[1]), merging.Path(sys.argv[2]))
"""


def test_a_killed_merge_leaves_no_folder_that_looks_complete(sharded, save_adapter, python, merge_adapter, tmp_path):
    save_adapter(tmp_path / "adapter", sharded)
    killed = python(KILLED, tmp_path / "adapter", tmp_path / "merged", check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "merged").exists()
    (left,) = tmp_path.glob("merged.partial-*")
    assert len(list(left.glob("*.safetensors"))) == 2
    assert not (left / "config.json").exists()
    assert not (left / "model.safetensors.index.json").exists()
    assert merge_adapter().agree


def test_a_base_other_than_the_one_of_the_run_is_rejected_with_both_names(run, tmp_path, change_weights, tiny_llama):
    """The folder that the run names holds another model now."""
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    change_weights(other / "model.safetensors", lambda w: {key: weight + 0.5 for key, weight in w.items()})
    run.recipe_file.write_text(run.recipe_file.read_text().replace(str(tiny_llama), str(other)))
    words = rf"was trained on '{tiny_llama}' with fingerprint \w+, but the base model '{other}' has fingerprint \w+"
    for attempt in (merge, export):
        with pytest.raises(UserError, match=words):
            attempt(locate_adapter(str(run.path)), tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("template", "streamed"),
    [("{{ messages[0]['content'] }}", True), ("{{ messages[0]['content'] }}", False), (None, True)],
)
def test_the_merged_model_has_the_tokenizer_of_the_adapter(
    template, streamed, adapter, tiny_llama, tmp_path, monkeypatch
):
    own = AutoTokenizer.from_pretrained(tiny_llama)
    own.chat_template, own.model_max_length = template, 77
    own.save_pretrained(adapter)
    if not streamed:
        monkeypatch.setattr("pera_lab.convert.merge._stream", lambda *_: None)
    assert merge(locate_adapter(str(adapter)), tmp_path / "merged").agree
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (merged.chat_template, merged.model_max_length) == (template, 77)
    assert (tmp_path / "merged" / "generation_config.json").is_file()


LARGE = """
import re, sys, json
from pathlib import Path
from pera_lab.convert.merge import merge
from pera_lab.opening import locate_adapter
agreement = merge(locate_adapter(sys.argv[1]), Path(sys.argv[2]))
status = Path("/proc/self/status").read_text()  # ru_maxrss includes the parent process
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
print(json.dumps({"agree": agreement.agree, "difference": agreement.max_difference, "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak memory from Linux")
def test_a_large_model_is_merged_in_less_memory_than_three_shards(save_llama, python, tmp_path):
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 4}
    shape = {**sizes, "num_hidden_layers": 16, "tie_word_embeddings": False, "initializer_range": 0.02}
    config = PeraConfig(r=8, target_modules="all-linear", normalization="rms", init_weights=False)
    base = save_llama(tmp_path / "base", **shape)  # in files of transformers' choice
    model = AutoModelForCausalLM.from_pretrained(base)
    shutil.rmtree(base)
    model.save_pretrained(base, max_shard_size="1GB")
    save_llama(tmp_path / "tokenizer")
    AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(base)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "pera_B" in name:
                parameter.mul_(0.01)
    adapted.save_pretrained(tmp_path / "adapter")
    del model, adapted
    shards = [file.stat().st_size for file in base.glob("*.safetensors")]
    done = json.loads(python(LARGE, tmp_path / "adapter", tmp_path / "merged").stdout.splitlines()[-1])
    print(f"\n{sum(shards) / 1e9:.1f} GB in {len(shards)} shards of at most {max(shards) / 1e9:.2f} GB: {done}")
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "merged")
    assert done["agree"]
    assert sum(shards) > 3e9
    assert done["peak"] < 3 * max(shards)


@pytest.fixture
def base_with_other_end(tiny_llama, tmp_path):
    """A base whose generation settings name another end than its tokenizer, which training teaches."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": 20, "temperature": 0.5}))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "eos_token_id": 20}))
    return tmp_path / "base"


@pytest.mark.parametrize("path", ["by files", "in memory"])
def test_the_merged_model_stops_at_the_taught_end(path, base_with_other_end, save_adapter, tmp_path, pera):
    if path == "in memory":
        model = AutoModelForCausalLM.from_pretrained(base_with_other_end)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[5])
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    else:
        save_adapter(tmp_path / "adapter", base_with_other_end)
    assert merge(locate_adapter(str(tmp_path / "adapter")), tmp_path / "merged").agree
    file = tmp_path / "merged" / "generation_config.json"
    assert json.loads(file.read_text()) == {"eos_token_id": [20, 1], "temperature": 0.5}
    assert pera("verify", "adapter", "merged").code == 0
    file.write_text(json.dumps({"eos_token_id": 20}))
    found = pera("verify", "adapter", "merged")
    assert found.code == 1
    assert "eos_token_id in generation_config.json lacks '</s>' (1)" in found.out


def test_a_base_without_generation_settings_gets_the_ends(base_with_other_end, save_adapter, tmp_path):
    (base_with_other_end / "generation_config.json").unlink()
    save_adapter(tmp_path / "adapter", base_with_other_end)
    merge(locate_adapter(str(tmp_path / "adapter")), tmp_path / "merged")
    found = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert found.items() >= {"bos_token_id": 0, "eos_token_id": [20, 1], "pad_token_id": 2}.items()
