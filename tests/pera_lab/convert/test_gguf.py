"""A GGUF adapter has the names and the row order of the base model's GGUF file."""

import resource

import gguf
import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from pera import PeraConfig
from pera.errors import UserError
from pera.lora import fold
from pera_lab.convert.export import export
from pera_lab.convert.gguf import ADAPTER, ARCHITECTURES, check_base, read_adapter, tensor_names, write_adapter
from pera_lab.convert.verify import verify
from pera_lab.opening import locate_adapter

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
}
TOKENS = torch.arange(3, 33).reshape(2, 15)


def model_of(kind, **options):
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim" or kind != "qwen2"}
    if kind == "qwen3":
        sizes["head_dim"] = 128  # transformers assumes this whatever the GGUF file says
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIGS[kind](**{**sizes, **special, "initializer_range": 0.2, **options})
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(kind, **options):
    options = {"normalization": "rms", **options}
    config = PeraConfig(r=2, target_modules=LINEAR, init_weights=False, **options)
    return get_peft_model(model_of(kind), config).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def write(model, file):
    """Write the adapter of a model as a GGUF file."""
    config, state = fold(model)
    write_adapter(file, state, config.lora_alpha, model.get_base_model().config)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_zeros(file, shapes, architecture="llama", **options):
    """Write a GGUF file with tensors of these shapes."""
    writer = gguf.GGUFWriter(file, architecture, **options)
    for name in sorted(shapes):
        writer.add_tensor(name, np.zeros(shapes[name], np.float32))
    finish(writer)


def base_shapes(adapter):
    """The shapes of the base model's weights that an adapter is for, by name."""
    factors = tensors(adapter)
    names = {name.rpartition(".")[0] for name in factors}
    return {name: (len(factors[f"{name}.lora_b"]), factors[f"{name}.lora_a"].shape[1]) for name in names}


def tensors(file):
    return {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in gguf.GGUFReader(file).tensors
    }


ANCHORS = {"terms": "none", "normalization": "none", "anchors": 3}


@pytest.mark.parametrize(
    ("kind", "expansion"), [*((kind, {}) for kind in ARCHITECTURES), ("llama", ANCHORS), ("qwen3", ANCHORS)]
)
def test_an_adapter_read_back_gives_the_logits_of_the_pera_adapter(kind, expansion, tmp_path):
    model = adapted(kind, **expansion)
    write(model, tmp_path / ADAPTER)
    expected, base = logits(model), model_of(kind)
    assert (expected - logits(base)).abs().max() > 0.1
    assert (expected - logits(read_adapter(tmp_path / ADAPTER, base))).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_sum_of_base_and_adapter_as_the_merged_model(kind, tmp_path):
    """transformers has its own reader of GGUF, with its own names and permutations."""
    model = adapted(kind)
    expected = logits(model)
    write(model, tmp_path / ADAPTER)
    base = model_of(kind)
    factors = tensors(tmp_path / ADAPTER)
    alpha = gguf.GGUFReader(tmp_path / ADAPTER).fields["adapter.lora.alpha"].contents()
    writer = gguf.GGUFWriter(tmp_path / "merged.gguf", ARCHITECTURES[kind].name)
    c = base.config
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    if kind == "qwen3":
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[kind].name), 2
    )
    used = set()
    for key, weight in base.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        for part, heads in (("q_proj.weight", 4), ("k_proj.weight", 2)):
            if kind == "llama" and key.endswith(part):  # as llama.cpp's converter permutes
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        if f"{name}.lora_a" in factors:
            A, B = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
            weight = weight + alpha / len(A) * B @ A
            used |= {f"{name}.lora_a", f"{name}.lora_b"}
        writer.add_tensor(name, np.ascontiguousarray(weight.float().numpy()))
    finish(writer)
    assert used == factors.keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", dtype=torch.float32).eval()
    assert (logits(merged) - expected).abs().max() < 1e-4


def test_the_metadata_and_shapes_are_those_of_llama_cpp(tmp_path):
    write(adapted("mistral"), tmp_path / ADAPTER)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / ADAPTER).fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 5.0  # r = 2, so K = 5
    shapes = {name: tuple(weight.shape) for name, weight in tensors(tmp_path / ADAPTER).items()}
    assert shapes["blk.1.attn_k.weight.lora_a"] == (5, 32)
    assert shapes["blk.1.attn_k.weight.lora_b"] == (16, 5)
    assert len(shapes) == 2 * 2 * len(LINEAR)


def test_names_come_from_the_table_of_gguf():
    names = tensor_names(["model.layers.1.mlp.down_proj", "lm_head"], LlamaConfig(**SIZES))
    assert names == {"model.layers.1.mlp.down_proj": "blk.1.ffn_down.weight", "lm_head": "output.weight"}
    with pytest.raises(UserError, match=r"'model.layers.0.extra' has no name in GGUF files of architecture 'llama'"):
        tensor_names(["model.layers.0.extra"], LlamaConfig(**SIZES))


def test_an_adapter_for_another_architecture_is_rejected(tmp_path):
    write(adapted("qwen2"), tmp_path / ADAPTER)
    with pytest.raises(UserError, match="is an adapter for 'qwen2', but the base model is 'llama'"):
        read_adapter(tmp_path / ADAPTER, model_of("llama"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"intermediate_size": 64},
            r"blk\.0\.ffn_\w+\.weight\.lora_\w' has shape .* does not fit the base model's weight \(.*64.*\)",
        ),
        ({"num_hidden_layers": 1}, r"holds 'blk\.1\..*', which matches no layer of the base model"),
    ],
)
def test_an_adapter_of_other_shapes_is_rejected(options, words, tmp_path):
    write(adapted("llama"), tmp_path / ADAPTER)
    with pytest.raises(UserError, match=words):
        read_adapter(tmp_path / ADAPTER, model_of("llama", **options))


@pytest.mark.parametrize(
    ("architecture", "left_out", "shape", "words"),
    [
        ("qwen2", None, None, r"base.gguf' is a model of 'qwen2', but the adapter is for 'llama'"),
        ("llama", "blk.1.ffn_down.weight", None, r"base.gguf' has no blk.1.ffn_down.weight, but the adapter needs"),
        ("llama", "blk.1.ffn_down.weight", (3, 5), r"base.gguf' has blk.1.ffn_down.weight with shape \(3, 5\), but"),
    ],
)
def test_a_gguf_base_that_does_not_fit_is_rejected(architecture, left_out, shape, words, tmp_path):
    write(adapted("llama"), tmp_path / ADAPTER)
    shapes = base_shapes(tmp_path / ADAPTER)
    write_zeros(tmp_path / "base.gguf", shapes)
    check_base(tmp_path / "base.gguf", tmp_path / ADAPTER)
    if left_out:
        shapes.pop(left_out)
    if shape:
        shapes[left_out] = shape
    write_zeros(tmp_path / "base.gguf", shapes, architecture)
    with pytest.raises(UserError, match=words):
        check_base(tmp_path / "base.gguf", tmp_path / ADAPTER)


def test_a_split_base_is_checked_by_the_tensors_of_its_first_file(tmp_path):
    write(adapted("llama"), tmp_path / ADAPTER)
    shapes = {name: shape for name, shape in base_shapes(tmp_path / ADAPTER).items() if "ffn_down" in name}
    write_zeros(tmp_path / "base.gguf", shapes, split_max_tensors=1)
    check_base(tmp_path / "base-00001-of-00002.gguf", tmp_path / ADAPTER)


@pytest.mark.parametrize("shapes", [{}, {"a": (3, 8), "b": (8, 2)}, {"a": (2, 3, 8), "b": (8, 2)}, {"a": (2, 8)}])
def test_a_truncated_adapter_is_rejected(shapes, tmp_path):
    write_zeros(tmp_path / "adapter.gguf", {f"blk.0.attn_q.weight.lora_{k}": s for k, s in shapes.items()})
    write_zeros(tmp_path / "base.gguf", {})
    with pytest.raises(UserError, match=r"adapter.gguf' lacks lora_a or lora_b of a layer, or holds no layer"):
        check_base(tmp_path / "base.gguf", tmp_path / "adapter.gguf")


def test_an_export_to_gguf_agrees_and_is_verified_again(save_adapter, tiny_llama, tmp_path):
    save_adapter(tmp_path / "adapter", tiny_llama, target_modules=["q_proj", "k_proj", "down_proj", "lm_head"])
    done = export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "out", to="gguf")
    assert done.agreement.agree
    assert {file.name for file in (tmp_path / "out").iterdir()} == {ADAPTER, "README.md", "verification.json"}
    for name in (tmp_path / "out", tmp_path / "out" / ADAPTER):
        assert verify(str(tmp_path / "adapter"), str(name)).agree
        assert verify(str(name), str(tmp_path / "adapter")).agree
        assert not verify(str(tiny_llama), str(name)).agree


def test_an_adapter_with_its_own_tokenizer_is_compared_with_that_tokenizer(adapter, tiny_llama, tmp_path):
    own = AutoTokenizer.from_pretrained(tiny_llama)
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(adapter)
    assert export(locate_adapter(str(adapter)), tmp_path / "out", to="gguf").agreement.agree
    assert verify(str(adapter), str(tmp_path / "out")).agree


@pytest.mark.parametrize(
    ("base", "options", "words"),
    [
        ("tiny_gpt2", {"target_modules": ["c_attn"]}, "model_type='gpt2' of the base model is not supported in GGUF"),
        ("tied_llama", {"target_modules": ["lm_head"]}, "'lm_head' shares its weight with the embeddings"),
        ("tiny_llama", {"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is not a linear layer"),
        ("tiny_llama", {"modules_to_save": ["lm_head"]}, "which a GGUF adapter cannot hold"),
    ],
)
def test_what_gguf_cannot_hold_is_rejected(base, options, words, request, save_adapter, tmp_path):
    save_adapter(tmp_path / "adapter", request.getfixturevalue(base), **options)
    with pytest.raises(UserError, match=words):
        export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_gives_the_reason_of_the_system(tmp_path):
    model = adapted("llama")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(model, tmp_path / "a.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_is_not_an_adapter_is_rejected(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF no more")
    with pytest.raises(UserError, match="is not a complete GGUF file"):
        read_adapter(tmp_path / "broken.gguf", model_of("llama"))
    write_zeros(tmp_path / "model.gguf", {})
    with pytest.raises(UserError, match=r"is not a LoRA: general.type should be 'adapter'"):
        read_adapter(tmp_path / "model.gguf", model_of("llama"))
