"""A trained LoRA is imported as a PERA adapter with the same outputs."""

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pera import PeraConfig
from pera.errors import UserError
from pera_lab.convert.from_lora import import_lora
from pera_lab.opening import locate_adapter

VARIANTS = {
    "plain": ("tiny_llama", {}),
    "alpha": ("tiny_llama", {"lora_alpha": 7}),
    "rslora": ("tiny_llama", {"lora_alpha": 7, "use_rslora": True}),
    "patterns": ("tiny_llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}}),
    "EVA": ("tiny_llama", {"init_lora_weights": "eva", "eva_config": EvaConfig()}),
    "orthogonal": ("tiny_llama", {"r": 4, "init_lora_weights": "orthogonal"}),
    "head saved whole": ("tiny_llama", {"modules_to_save": ["lm_head"]}),
    "embedding": ("tiny_llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "biases": ("biased_llama", {"bias": "lora_only"}),
    "Conv1D": ("tiny_gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.fixture
def save_lora():
    """Saves a random LoRA and returns its model."""

    def save(folder, base, **options):
        torch.manual_seed(0)
        chosen = {"task_type": "CAUSAL_LM", "r": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**chosen, **options}))
        if options.get("init_lora_weights"):
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "lora_" in name:
                        weight += 0.3 * torch.randn_like(weight)
        model.save_pretrained(folder)
        return model.eval()

    return save


@pytest.mark.parametrize(("variant", "normalization"), [*((name, "rms") for name in VARIANTS), ("plain", "none")])
def test_the_outputs_equal_those_of_the_lora(variant, normalization, request, save_lora, tmp_path, logits):
    base, options = VARIANTS[variant]
    base = request.getfixturevalue(base)
    expected = logits(save_lora(tmp_path / "lora", base, **options))
    agreement = import_lora(locate_adapter(str(tmp_path / "lora")), tmp_path / "pera", normalization=normalization)
    assert agreement.agree
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "pera")
    assert isinstance(found.peft_config["default"], PeraConfig)
    assert (expected - logits(base)).abs().max() > 0.01
    assert (expected - logits(found)).abs().max() < 1e-5 * max(1, expected.abs().max())
    h = [weight for name, weight in found.named_parameters() if "pera_h" in name]
    assert h
    assert all((weight == 0).all() for weight in h)


def test_a_lora_is_imported_with_anchors_whose_coefficients_are_zero(save_lora, tiny_llama, pera, tmp_path, logits):
    expected = logits(save_lora(tmp_path / "lora", tiny_llama))
    options = ("--terms", "none", "--anchors", "4", "--anchor-seed", "7")
    assert pera("import", tmp_path / "lora", "--from", "lora", "--output", tmp_path / "pera", *options).code == 0
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "pera")
    config = found.peft_config["default"]
    assert (config.terms, config.anchors, config.anchor_seed) == ("none", 4, 7)
    assert (expected - logits(found)).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert [weight.tolist() for name, weight in found.named_parameters() if "pera_h" in name] == [[0] * 4] * 4


def test_the_tokenizer_and_the_tokens_of_a_lora_are_kept(save_lora, own_tokenizer, tiny_llama, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    base.resize_token_embeddings(len(own_tokenizer), mean_resizing=False)
    base.save_pretrained(tmp_path / "grown")
    save_lora(tmp_path / "lora", tmp_path / "grown", modules_to_save=["embed_tokens", "lm_head"])
    own_tokenizer.save_pretrained(tmp_path / "lora")
    config = (tmp_path / "lora" / "adapter_config.json").read_text()
    (tmp_path / "lora" / "adapter_config.json").write_text(config.replace(str(tmp_path / "grown"), str(tiny_llama)))
    assert import_lora(locate_adapter(str(tmp_path / "lora")), tmp_path / "pera").agree
    assert len(AutoTokenizer.from_pretrained(tmp_path / "pera")) == len(own_tokenizer)


def test_training_continues_and_the_coefficients_learn(save_lora, tiny_llama, tmp_path):
    save_lora(tmp_path / "lora", tiny_llama)
    import_lora(locate_adapter(str(tmp_path / "lora")), tmp_path / "pera")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "pera", is_trainable=True
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.arange(3, 43).reshape(2, 20)
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(p.abs().max() > 1e-3 for name, p in model.named_parameters() if "pera_h" in name)


@pytest.mark.parametrize(
    ("options", "terms", "words"),
    [
        ({"use_dora": True}, "all", "use_dora=True has no counterpart"),
        ({}, "none", "terms='none' leaves no products"),
        ({"r": 1}, "cross", "terms='cross'"),
        ({"init_lora_weights": "pissa"}, "all", "init_lora_weights='pissa' .* changed the base model"),
        ({"init_lora_weights": "OLoRA"}, "all", "init_lora_weights='OLoRA' .* changed the base model"),
    ],
)
def test_what_cannot_be_imported_is_rejected(options, terms, words, save_lora, tiny_llama, tmp_path):
    save_lora(tmp_path / "lora", tiny_llama, **options)
    with pytest.raises(UserError, match=words):
        import_lora(locate_adapter(str(tmp_path / "lora")), tmp_path / "pera", terms=terms)
    assert not (tmp_path / "pera").exists()


def test_a_pera_adapter_is_rejected(adapter, tmp_path):
    with pytest.raises(UserError, match="is a PERA adapter; only a LoRA adapter can be imported"):
        import_lora(locate_adapter(str(adapter)), tmp_path / "pera")
