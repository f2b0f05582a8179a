"""One model of each architecture: targets, training, saving, merging."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from pera import PeraConfig
from reference import relative_error
from tiny import VOCABULARY, gpt2, layers, llama, tokens

TEXT = {"input_ids": tokens()}
PAIRS = {**TEXT, "labels": tokens()}
CLASSES = {**TEXT, "labels": torch.tensor([0, 2])}
IMAGES = {
    "pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().reshape(2, 3, 8, 8),
    "labels": torch.tensor([0, 2]),
}
SOUND = torch.linspace(0, 400, 2 * 400).sin().reshape(2, 400)
SPECTRUM = torch.linspace(0, 90, 2 * 8 * 20).sin().reshape(2, 8, 20)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
BERT = {**SIZES, **WORDS}
LLAMA = {**SIZES, **WORDS, "num_key_value_heads": 2, "pad_token_id": VOCABULARY - 1}
OPT = {**SIZES, **WORDS, "ffn_dim": 48, "word_embed_proj_dim": 16}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
VIT = {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3}
WAV2VEC2 = {
    **SIZES,
    **{"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16},
    **{"num_labels": 3, "mask_time_prob": 0.0, "layerdrop": 0.0},
}
WHISPER = {
    **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_source_positions": 10},
    **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_target_positions": 16},
    **{"d_model": 32, "num_mel_bins": 8, "vocab_size": VOCABULARY, "decoder_start_token_id": 1},
    **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
}


class Architecture(NamedTuple):
    """A base model, its inputs, PEFT's choice of targets (None if it has none), the task, and the heads to train."""

    make: Callable[[], nn.Module]
    given: dict
    chosen: set | None
    task: str | None = None
    heads: tuple = ()


def of(model_class, config_class, **options):
    """A function that makes the same model each time, without dropout."""

    def make():
        torch.manual_seed(0)
        model = model_class(config_class(**options))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.eval()

    return make


QUERY_VALUE = {"query", "value"}
Q_V = {"q_proj", "v_proj"}
ARCHITECTURES = {
    "bert": Architecture(of(BertForMaskedLM, BertConfig, **BERT), PAIRS, QUERY_VALUE),
    "llama": Architecture(llama, PAIRS, Q_V, "CAUSAL_LM"),
    "gpt2": Architecture(gpt2, PAIRS, {"c_attn"}, "CAUSAL_LM"),
    "opt": Architecture(of(OPTForCausalLM, OPTConfig, **OPT), PAIRS, Q_V, "CAUSAL_LM"),
    "qwen2": Architecture(of(Qwen2ForCausalLM, Qwen2Config, **LLAMA), PAIRS, Q_V, "CAUSAL_LM"),
    "t5": Architecture(
        of(T5ForConditionalGeneration, T5Config, **T5, decoder_start_token_id=0), PAIRS, {"q", "v"}, "SEQ_2_SEQ_LM"
    ),
    "bert, sequences": Architecture(
        of(BertForSequenceClassification, BertConfig, **BERT, num_labels=3),
        CLASSES,
        QUERY_VALUE,
        "SEQ_CLS",
        ("classifier",),
    ),
    "llama, sequences": Architecture(
        of(LlamaForSequenceClassification, LlamaConfig, **LLAMA, num_labels=3), CLASSES, Q_V, "SEQ_CLS", ("score",)
    ),
    "bert, tokens": Architecture(
        of(BertForTokenClassification, BertConfig, **BERT, num_labels=3),
        {**TEXT, "labels": tokens() % 3},
        QUERY_VALUE,
        "TOKEN_CLS",
        ("classifier",),
    ),
    "bert, questions": Architecture(
        of(BertForQuestionAnswering, BertConfig, **BERT),
        {**TEXT, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        QUERY_VALUE,
        "QUESTION_ANS",
        ("qa_outputs",),
    ),
    "vit": Architecture(of(ViTForImageClassification, ViTConfig, **VIT), IMAGES, None, None, ("classifier",)),
    "wav2vec2": Architecture(
        of(Wav2Vec2ForSequenceClassification, Wav2Vec2Config, **WAV2VEC2),
        {"input_values": SOUND, "labels": torch.tensor([0, 2])},
        None,
        None,
        ("projector", "classifier"),
    ),
    "whisper": Architecture(
        of(WhisperForConditionalGeneration, WhisperConfig, **WHISPER),
        {"input_features": SPECTRUM, "labels": tokens()},
        None,
    ),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return ARCHITECTURES[request.param]


def config(architecture, **options):
    task = {"task_type": architecture.task, "modules_to_save": list(architecture.heads) or None}
    return PeraConfig(**{"r": 3, "target_modules": "all-linear", "normalization": "rms", **task, **options})


def adapted(architecture, **options):
    base = architecture.make()
    torch.manual_seed(1)
    return get_peft_model(base, config(architecture, **options)).eval()


def outputs(model, given):
    """The logits. Question answering has two, start and end."""
    with torch.no_grad():
        found = model(**given)
    return found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits])


def names(model):
    return {name.rpartition(".")[2] for name in layers(model)}


def test_all_linear_adapts_all_layers_except_the_head(architecture):
    base = architecture.make()
    linear = {name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    output = {name for name, module in base.named_modules() if module is base.get_output_embeddings()}
    assert set(layers(adapted(architecture))) == linear - output - set(architecture.heads)


def test_default_targets_are_the_choice_of_peft(architecture):
    if architecture.chosen is None:
        with pytest.raises(ValueError, match="Please specify `target_modules`"):
            adapted(architecture, target_modules=None)
    else:
        assert names(adapted(architecture, target_modules=None)) == architecture.chosen


def test_training_starts_at_the_base_and_lowers_the_loss(architecture):
    model, base = adapted(architecture), architecture.make()
    assert torch.equal(outputs(model, architecture.given), outputs(base, architecture.given))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model.train()(**architecture.given).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert ".pera_" in name or any(f".{head}." in name for head in architecture.heads), name
            assert p.grad.any(), name
    after = model.unload().state_dict()
    changed = {name for name, weight in base.state_dict().items() if not torch.equal(after[name], weight)}
    assert {name.partition(".")[0] for name in changed} == set(architecture.heads)


def test_a_loaded_adapter_gives_equal_outputs(architecture, tmp_path):
    model = adapted(architecture, init_weights=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.mul_(-2)
    expected = outputs(model, architecture.given)
    assert relative_error(expected, outputs(architecture.make(), architecture.given)) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.make(), tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded, architecture.given), expected)


def test_a_merged_model_has_the_base_architecture_and_equal_outputs(architecture):
    model = adapted(architecture, init_weights=False)
    expected = outputs(model, architecture.given)
    merged = model.merge_and_unload(safe_merge=True)
    base = architecture.make()
    kinds = [[(name, type(module).__name__) for name, module in m.named_modules()] for m in (merged, base)]
    assert kinds[0] == kinds[1]
    assert relative_error(expected, outputs(base, architecture.given)) > 1e-3
    assert relative_error(outputs(merged, architecture.given), expected) <= 1e-5
