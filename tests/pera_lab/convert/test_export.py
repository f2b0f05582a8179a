"""A PERA adapter is exported to a LoRA with the same outputs."""

import ctypes
import json
import os
import struct
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pera import PeraConfig
from pera.errors import UserError
from pera.folding import folded_layers
from pera.lora import lora_of
from pera_lab.convert.export import _write_lora
from pera_lab.convert.export import export as export_adapter
from pera_lab.opening import locate_adapter
from reference import NORMALIZATIONS
from tiny import llama, tokens

TOKENS = tokens()
CONV1D = {"target_modules": ["c_attn", "c_fc", "c_proj"]}

VARIANTS = {
    # name: base, options of the adapter, K of the export
    "published": ("tiny_llama", {}, 9),
    "anchors": ("tiny_llama", {"terms": "none", "anchors": 4, "anchor_seed": 3}, 15),
    "anchors and products, tied": (
        "tied_llama",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "anchors": 2},
        15,
    ),
    "K above both sides": ("tiny_llama", {"r": 8, "normalization": "rms"}, 44),
    "alpha of each": ("tiny_llama", {"pera_alpha": 2, "alpha_pattern": {"v_proj": 7}}, 9),
    "rank of each, fixed, rslora": (
        "tiny_llama",
        {"rank_pattern": {"v_proj": 2}, "pera_alpha": 4, "use_rslora": True, "coefficients": "fixed"},
        9,
    ),
    "rank of one by an expression": ("tiny_llama", {"rank_pattern": {r"^model\.layers\.1\..*v_proj": 4}}, 14),
    "all linear": ("tiny_llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}, 9),
    "expression": ("tiny_llama", {"target_modules": r".*layers\.1.*\.(q|up)_proj"}, 9),
    "one layer": ("tiny_llama", {"layers_to_transform": [1], "layers_pattern": "layers"}, 9),
    "head of tied embeddings": ("tied_llama", {"target_modules": ["lm_head", "q_proj"]}, 9),
    "embedding": ("tiny_llama", {"target_modules": ["embed_tokens", "q_proj"], "normalization": "rms"}, 9),
    "embedding of tied embeddings": ("tied_llama", {"target_modules": ["embed_tokens", "q_proj"]}, 9),
    "tied": ("tied_llama", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, 9),
    "tied, by the head": ("tiny_gpt2", {"target_modules": ["c_attn", "lm_head"], "ensure_weight_tying": True}, 9),
    "tied by an expression": ("tied_llama", {"target_modules": "lm_head|.*q_proj", "ensure_weight_tying": True}, 9),
    "head saved whole, tied": ("tied_llama", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, 9),
    "head saved whole": ("tiny_llama", {"modules_to_save": ["lm_head"]}, 9),
    "tokens": ("tied_llama", {"trainable_token_indices": [8, 13]}, 9),
    "biases of adapted layers": ("biased_llama", {"bias": "pera_only"}, 9),
    "all biases": ("biased_llama", {"bias": "all"}, 9),
    "Conv1D, rank of each": ("tiny_gpt2", {**CONV1D, "rank_pattern": {"c_fc": 2}, "bias": "pera_only"}, 9),
}


@pytest.fixture(scope="module")
def exports(request, tmp_path_factory, save_adapter, logits, fresh_logits):
    """Each variant exported: folder, agreement, and logits of the PERA model, its base and plain PEFT with the export.

    For an export that was rejected, the error."""
    root = tmp_path_factory.mktemp("exports")
    found, jobs = {}, {}
    for name, (base, options, _) in VARIANTS.items():
        base = request.getfixturevalue(base)
        adapted = logits(save_adapter(root / name / "pera", base, **options))
        try:
            agreement = export_adapter(locate_adapter(str(root / name / "pera")), root / name / "lora").agreement
        except UserError as error:
            found[name] = error
            continue
        found[name] = {"folder": root / name / "lora", "pera": adapted, "base": logits(base), "agreement": agreement}
        jobs[name] = (base, root / name / "lora")
    for name, plain in fresh_logits(jobs).items():
        found[name]["plain"] = plain
    return found


@pytest.fixture(params=VARIANTS)
def export(request, exports):
    found = exports[request.param]
    if isinstance(found, UserError):
        pytest.fail(f"the export was rejected: {found}")
    return {**found, "rank": VARIANTS[request.param][2]}


def test_plain_peft_without_pera_gives_the_logits_of_the_adapter(export):
    effect = (export["pera"] - export["base"]).abs().max()
    assert effect > 0.1
    assert (export["plain"] - export["pera"]).abs().max() < 1e-5 * max(1, effect)


def test_the_check_of_the_export_agrees(export):
    agreement = export["agreement"]
    assert agreement.agree
    effect = (export["pera"] - export["base"]).abs().max()
    assert agreement.max_difference < 1e-4 * max(1, effect / 100), "with tied embeddings the logits are in the hundreds"
    assert json.loads((export["folder"] / "verification.json").read_text())["agree"] is True


def test_the_configuration_has_one_rank_and_no_patterns(export):
    """r = lora_alpha = K in whole numbers, and nothing that a server would ignore."""
    config = json.loads((export["folder"] / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == export["rank"]
    assert type(config["lora_alpha"]) is int
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    weights = load_file(export["folder"] / "adapter_model.safetensors")
    A = [w for key, w in weights.items() if "lora_A." in key or "lora_embedding_A" in key]
    B = [w for key, w in weights.items() if "lora_B." in key or "lora_embedding_B" in key]
    assert len(A) == len(B) > 0
    assert {w.shape[0] for w in A} == {w.shape[1] for w in B} == {export["rank"]}
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert [key for key in weights if "pera" in key] == []


def test_a_trained_run_is_exported_and_checked_on_its_own_task(
    finished_run, tiny_llama, tmp_path, unmerged, logits, stored
):
    agreement = export_adapter(locate_adapter(str(finished_run.path)), tmp_path / "lora").agreement
    assert agreement.agree
    record = json.loads((tmp_path / "lora" / "verification.json").read_text())
    assert record == stored(agreement, "LoRA export", finished_run.path)
    adapted, exported = (unmerged(tiny_llama, path) for path in (finished_run.adapter.path, tmp_path / "lora"))
    assert (logits(adapted) - logits(tiny_llama)).abs().max() > 0.1
    assert (logits(adapted) - logits(exported)).abs().max() < 1e-5


def test_the_configuration_is_written_in_the_same_order_every_time(exports):
    names = json.loads((exports["all linear"]["folder"] / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)
    assert len(names) == 12  # k_proj is excluded


def test_an_export_that_differs_is_kept_and_recorded(adapter, tmp_path, monkeypatch):
    def wrong(*arguments):
        config, weights = lora_of(*arguments)
        return config, {key: 2 * w for key, w in weights.items()}

    monkeypatch.setattr("pera_lab.convert.export.lora_of", wrong)
    agreement = export_adapter(locate_adapter(str(adapter)), tmp_path / "lora").agreement
    assert not agreement.agree
    record = json.loads((tmp_path / "lora" / "verification.json").read_text())
    assert record["agree"] is False
    assert record["max_difference"] == agreement.max_difference > 0.01


@pytest.mark.parametrize(("key", "value"), [("pera_h", float("nan")), ("lm_head", float("inf"))])
def test_weights_that_are_not_finite_are_rejected(key, value, save_adapter, tiny_llama, tmp_path, change_weights):
    save_adapter(tmp_path / "adapter", tiny_llama, modules_to_save=["lm_head"])

    def spoil(weights):
        next(w for name, w in weights.items() if key in name).view(-1)[0] = value
        return weights

    change_weights(tmp_path / "adapter" / "adapter_model.safetensors", spoil)
    with pytest.raises(UserError, match=f"NaNs detected in the weights of .*{'q_proj' if 'pera' in key else key}"):
        export_adapter(locate_adapter(str(tmp_path / "adapter")), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 5, r"size mismatch for .*layers\.0\.self_attn\.q_proj\.pera_A"),
        ("target_modules", ["q_proj"], r"no place for .*layers\.0\.self_attn\.v_proj\.pera_A"),
        ("target_modules", ["q_proj", "v_proj", "k_proj"], r"lacks .*layers\.0\.self_attn\.k_proj\.pera_A"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_rejected(key, value, message, adapter, tmp_path):
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(UserError, match=message):
        export_adapter(locate_adapter(str(adapter)), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_the_export_has_the_tokenizer_and_the_tokens_of_the_adapter(
    save_adapter, own_tokenizer, tiny_llama, tmp_path, logits
):
    adapted = save_adapter(tmp_path / "adapter", tiny_llama, own_tokenizer)
    adapter, out = locate_adapter(str(tmp_path / "adapter")), tmp_path / "out"
    assert export_adapter(adapter, out, server="peft").agreement.agree
    exported = AutoPeftModelForCausalLM.from_pretrained(out)
    assert (logits(exported) - logits(adapted)).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(out).chat_template == own_tokenizer.chat_template


@pytest.mark.skipif(sys.platform != "linux", reason="counts with inotify")
def test_an_export_opens_each_file_of_the_adapter_once(adapter, pera):
    libc = ctypes.CDLL(None)
    watch, opened, closed = libc.inotify_init1(os.O_NONBLOCK), 0x20, 0x10
    libc.inotify_add_watch(watch, bytes(adapter), opened | closed)
    assert pera("export", adapter, "--to", "lora", "--output", "out").code == 0
    events = os.read(watch, 1 << 16)
    os.close(watch)
    counts = Counter()
    while events:
        _, mask, _, length = struct.unpack_from("iIII", events)
        counts[events[16 : 16 + length].rstrip(b"\0").decode()] += bool(mask & opened)
        events = events[16 + length :]
    assert (counts["adapter_config.json"], counts["adapter_model.safetensors"]) == (1, 1)


@given(
    r=st.integers(1, 5),
    terms=st.sampled_from(["all", "square", "cross", "none"]),
    coefficients=st.sampled_from(["learned", "fixed"]),
    normalization=st.sampled_from(NORMALIZATIONS),
    alpha=st.none() | st.floats(0.1, 8),
    use_rslora=st.booleans(),
    rank_pattern=st.dictionaries(st.sampled_from(["v_proj", "layers.1.self_attn.q_proj"]), st.integers(2, 5)),
    alpha_pattern=st.dictionaries(st.sampled_from(["k_proj", "layers.0.self_attn.v_proj"]), st.floats(0.1, 8)),
    seed=st.integers(0, 99),
)
def test_an_export_of_any_configuration_loads_and_gives_the_same_logits(seed, alpha, **options):
    assume(options["terms"] != "cross" or options["r"] > 1)
    idle = {"coefficients": "learned", "normalization": "none"}
    assume(options["terms"] != "none" or idle.items() <= options.items())
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj"], "init_weights": False}
    torch.manual_seed(seed)
    adapted = get_peft_model(llama(), PeraConfig(pera_alpha=alpha, **targets, **options)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "pera_" in name:
                parameter.normal_(std=0.3)
        expected, base = (model(input_ids=TOKENS).logits for model in (adapted, llama()))
        with TemporaryDirectory() as folder:
            _write_lora(Path(folder), *lora_of(adapted, folded_layers(adapted, {"default": 1.0}), "default"))
            found = PeftModel.from_pretrained(llama(), folder).eval()(input_ids=TOKENS).logits
    assert (expected - base).abs().max() > 1e-4
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
