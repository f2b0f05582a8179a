"""An export for a server is one that it reads; what it would reject or ignore is rejected."""

import copy
import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
)

from pera import PeraConfig
from pera.errors import UserError
from pera_lab.convert.export import export
from pera_lab.convert.gguf import read_adapter
from pera_lab.convert.servers import SERVERS, Start
from pera_lab.opening import locate_adapter
from reference import relative_error
from tiny import evaluate


@pytest.fixture
def made(save_adapter, request, tmp_path):
    """Exports an adapter on a base, with options, for a server."""

    def make(server, base="tiny_llama", *, max_rank=None, to=None, **options):
        save_adapter(tmp_path / "adapter", request.getfixturevalue(base), **options)
        location = locate_adapter(str(tmp_path / "adapter"))
        return export(location, tmp_path / "out", server=server, max_rank=max_rank, to=to)

    return make


@pytest.mark.parametrize("server", SERVERS)
def test_every_server_gets_an_export_that_agrees_and_its_start_command(server, made, tmp_path, tiny_llama):
    done = made(server)
    assert done.agreement.agree
    assert str(tmp_path / "out") in done.start
    assert (tmp_path / "out" / "adapter.gguf").is_file() == (SERVERS[server].form == "gguf")
    assert shlex.split(done.start)
    if server in ("vllm", "sglang", "lorax"):
        assert str(tiny_llama) in done.start


def test_the_start_command_of_peft_loads_a_classifier_with_its_head(tiny_bert, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    config = PeraConfig(r=2, target_modules=["query"], init_weights=False, task_type="SEQ_CLS")
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    start = export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "out", server="peft").start
    program, option, code = shlex.split(start)
    assert (program, option) == ("python", "-c")
    found = {}
    exec(code, found)
    ids = torch.arange(3, 13).unsqueeze(0)
    assert relative_error(evaluate(found["model"].eval(), ids).logits, evaluate(adapted, ids).logits) <= 1e-5


def test_the_modelfile_of_ollama_has_unquoted_paths(tmp_path):
    """Its parser reads a path to the end of the line, including single quotes."""
    line = SERVERS["ollama"].start(Start("base", Path("50 % of 'mine'"), 8))
    subprocess.run(line.partition(" && ")[0], shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "Modelfile").read_text() == "FROM BASE.gguf\nADAPTER 50 % of 'mine'/adapter.gguf\n"


@pytest.mark.parametrize(
    ("server", "dtype", "options"),
    [
        ("vllm", "--dtype float32", "--tokenizer {out} --chat-template {out}/chat_template.jinja"),
        ("sglang", "--dtype float32", "--tokenizer-path {out} --chat-template {out}/chat_template.jinja"),
        ("lorax", "--dtype float32", ""),
        ("llama.cpp", "", "--jinja --chat-template-file {out}/chat_template.jinja"),
        ("mlx", "", '--chat-template "$(cat {out}/chat_template.jinja)"'),
        ("mistralrs", "dtype=ModelDType.F32", "{out}/tokenizer.json"),
    ],
)
def test_the_start_command_keeps_the_dtype_of_the_base_and_the_tokenizer_of_the_adapter(
    server, dtype, options, save_adapter, save_llama, tokenizer, tmp_path
):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    starts = {}
    for precision in ("float32", "bfloat16"):
        base = save_llama(tmp_path / precision, getattr(torch, precision))
        for own in (False, True):
            folder = tmp_path / f"adapter {precision} {own}"
            save_adapter(folder, base)
            if own:
                changed.save_pretrained(folder)
            output = tmp_path / f"out-{precision}-{own}"
            starts[precision, own] = export(locate_adapter(str(folder)), output, server=server).start
            expected = options.format(out=output)
            assert (expected in starts[precision, own]) == (own or not options)
    assert all((dtype in start) == (precision == "float32" or not dtype) for (precision, _), start in starts.items())


def test_the_configuration_of_an_export_has_no_key_that_an_older_peft_lacks(made, tmp_path):
    made("peft", target_modules=["q_proj"])
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["target_modules"] == ["q_proj"]
    of_peft_0_11 = {
        *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r"),
        *("target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
        *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
        *("megatron_config", "megatron_core", "loftq_config", "use_dora", "layer_replication"),
    }
    assert content.keys() <= of_peft_0_11


@pytest.mark.parametrize(("r", "terms", "rank", "option"), [(3, "all", 9, 16), (4, "square", 8, 8)])
def test_vllm_gets_the_smallest_of_its_ranks_that_fits(r, terms, rank, option, made, tmp_path):
    assert f"--max-lora-rank {option} " in made("vllm", r=r, terms=terms).start
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == rank


def test_a_rank_above_the_limit_of_a_server_needs_max_rank(made, tmp_path):
    with pytest.raises(UserError, match="LoRA of rank K = 560, but vllm accepts at most 512; add --max-rank 512"):
        made("vllm", r=32)
    assert not (tmp_path / "out").exists()
    done = made("vllm", r=32, max_rank=512)
    assert done.truncation.lossless
    assert done.truncation.rank == 32
    assert "--max-lora-rank 32 " in done.start
    SERVERS["vllm"].check_rank(512, chosen=True)
    with pytest.raises(UserError, match="--max-rank: 513 is above 512"):
        SERVERS["vllm"].check_rank(513, chosen=True)


def test_an_expression_is_replaced_by_short_names(made, tmp_path):
    made("sglang", target_modules=r".*\.(q|v)_proj")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_targets_are_kept_if_short_names_would_match_other_layers(made, tmp_path):
    made("vllm", target_modules=["q_proj"], layers_to_transform=[1])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    assert config["layers_to_transform"] == [1]


def test_an_expression_is_replaced_by_full_names_if_short_ones_match_other_layers(made, tmp_path):
    made("sglang", target_modules=r".*layers\.1\..*\.(q|v)_proj")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_target_modules_and_target_parameters_stay_separate(tokenizer, save_adapter, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    save_adapter(tmp_path / "adapter", tmp_path / "base", **targets)
    assert export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "out", server="peft").agreement.agree
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {key: config[key] for key in targets} == targets


@pytest.mark.parametrize(
    ("server", "base", "options", "words"),
    [
        ("sglang", "biased_llama", {"bias": "pera_only"}, "bias='pera_only', which sglang cannot hold"),
        ("llama.cpp", "biased_llama", {"bias": "all"}, "bias='all', which llama.cpp cannot hold"),
        ("ollama", "tiny_gpt2", {"target_modules": ["c_attn"]}, "is a Conv1D, on which ollama accepts no adapter"),
    ],
)
def test_what_a_server_cannot_hold_is_rejected(server, base, options, words, made, tmp_path):
    with pytest.raises(UserError, match=words):
        made(server, base, **options)
    assert not (tmp_path / "out").exists()


def test_the_refusal_names_the_value_of_the_adapter_s_own_method(biased_llama, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(biased_llama), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="bias='lora_only', which vllm cannot hold"):
        export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "out", server="vllm")


@pytest.mark.parametrize(
    ("server", "options", "words"),
    [
        ("sglang", {"target_modules": ["embed_tokens", "q_proj"]}, "'model.embed_tokens' is an embedding"),
        ("lorax", {"layers_to_transform": [1]}, "adapted in 1 of 2 blocks, but lorax ignores"),
        ("llama.cpp", {"to": "lora"}, "--to lora does not fit --for llama.cpp, which reads gguf; use --to gguf"),
        ("vlm", {}, "--for: 'vlm' is not a known server; did you mean 'vllm'"),
    ],
)
def test_the_limits_of_a_server_are_kept(server, options, words, made, tmp_path):
    with pytest.raises(UserError, match=words):
        made(server, **options)
    assert not (tmp_path / "out").exists()


WHOLE = {
    # what an adapter trains as a whole: server, base, options of the adapter
    "head": ("vllm", "tiny_llama", {"modules_to_save": ["lm_head"]}),
    "embedding of tied embeddings": ("vllm", "tied_llama", {"modules_to_save": ["embed_tokens"]}),
    "both, tied": ("sglang", "tied_llama", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "tokens": ("mistralrs", "tiny_llama", {"trainable_token_indices": [8, 13]}),
    "tokens, tied": ("llama.cpp", "tied_llama", {"trainable_token_indices": [8, 13]}),
    "adapted head": (
        "vllm",
        "tiny_llama",
        {"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_trained_as_a_whole_goes_into_a_base_beside_the_lora(case, save_adapter, request, tmp_path, logits):
    server, base, options = WHOLE[case]
    base = request.getfixturevalue(base)
    adapted = save_adapter(tmp_path / "adapter", base, **options)
    done = export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "out", server=server)
    assert done.agreement.agree
    assert done.base == tmp_path / "out" / "base"
    assert str(done.base) in done.start
    served = AutoModelForCausalLM.from_pretrained(done.base)
    assert len(list((tmp_path / "out").glob("tokenizer*"))) == 0 < len(list(done.base.glob("tokenizer*")))
    assert served.config.tie_word_embeddings == (served.lm_head.weight is served.model.embed_tokens.weight)
    if SERVERS[server].form == "gguf":
        assert done.start.startswith(
            f"python convert_hf_to_gguf.py {done.base} --outfile {done.base}.gguf && llama-server"
        )
        served = read_adapter(tmp_path / "out" / "adapter.gguf", served)
    else:
        keys = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
        assert all(".lora_" in key for key in keys)
        served = PeftModel.from_pretrained(served, tmp_path / "out")
        assert served.peft_config["default"].base_model_name_or_path == str(done.base)
    expected = logits(adapted)
    assert (logits(served) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1


def test_new_tokens_go_into_a_base_with_the_tokenizer(save_adapter, own_tokenizer, tiny_llama, tmp_path, logits, pera):
    adapted = save_adapter(tmp_path / "adapter", tiny_llama, own_tokenizer)
    done = pera("export", "adapter", "--for", "vllm", "--output", "out")
    assert done.code == 0
    assert "base model with what was trained as a whole written to out/base" in done.out
    start = "start: vllm serve out/base --enable-lora --max-lora-rank 16 --lora-modules out=out --dtype float32"
    assert start in done.out
    base = tmp_path / "out" / "base"
    assert AutoTokenizer.from_pretrained(base).chat_template == own_tokenizer.chat_template
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert served.get_input_embeddings().weight.shape[0] == 402
    assert (logits(served) - logits(adapted)).abs().max() < 1e-4
    with pytest.raises(UserError, match="402 tokens, but its base has 400, which a GGUF adapter cannot hold"):
        export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "other", to="gguf")


def test_trained_weights_are_not_rounded_to_the_dtype_of_the_base(save_adapter, save_llama, tmp_path):
    base = save_llama(tmp_path / "half", dtype=torch.bfloat16, tie_word_embeddings=False)
    save_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = weights["base_model.model.lm_head.weight"].float() + 1e-4
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    done = export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "out", server="vllm")
    assert done.agreement.agree
    stored = load_file(done.base / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], weights["base_model.model.lm_head.weight"])
    assert {weight.dtype for key, weight in stored.items() if key != "lm_head.weight"} == {torch.bfloat16}
    assert json.loads((done.base / "config.json").read_text())["dtype"] == "bfloat16"
    assert "--dtype" not in done.start


def test_a_start_command_that_names_the_model_behind_an_embedded_copy_says_so():
    start = Start("smollm2-135m", Path("out"), 8)
    assert "'HuggingFaceTB/SmolLM2-135M-Instruct'" in SERVERS["vllm"].caution(start)
    assert "SmolLM2-135M-Instruct" in SERVERS["vllm"].start(start)
    assert SERVERS["llama.cpp"].caution(start) is None  # it serves the copy
    assert SERVERS["vllm"].caution(start._replace(base="some/model")) is None
