"""Adapters to convert."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import pera


@pytest.fixture(scope="session")
def biased_llama(save_llama, tmp_path_factory):
    """Folder of a LLaMA whose attention has biases."""
    return save_llama(tmp_path_factory.mktemp("models") / "biased", attention_bias=True, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tied_llama(save_llama, tmp_path_factory):
    """Folder of a LLaMA whose head is its embeddings."""
    return save_llama(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def save_adapter():
    """Saves a random adapter that changes the base's outputs far, and returns the model it is on. Given a tokenizer,
    it is saved too, and the base gets as many tokens, as in TRL."""

    def save(folder, base, tokenizer=None, **options):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base)
        if tokenizer is not None:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            tokenizer.save_pretrained(folder)
        chosen = {"task_type": "CAUSAL_LM", "r": 3, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
        adapted = get_peft_model(model, pera.PeraConfig(**{**chosen, **options}))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "pera_h" not in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        adapted.save_pretrained(folder)
        return adapted.eval()

    return save


@pytest.fixture
def own_tokenizer(tiny_llama):
    """The tokenizer of the tiny models with another chat template and two more tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<|user|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    return tokenizer


@pytest.fixture
def adapter(save_adapter, tiny_llama, tmp_path):
    """Folder of an adapter with rms normalization on the tiny LLaMA, to be damaged."""
    save_adapter(tmp_path / "adapter", tiny_llama, normalization="rms")
    return tmp_path / "adapter"


@pytest.fixture
def unmerged():
    """The base model with a saved adapter on it."""
    return lambda base, adapter: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


@pytest.fixture
def stored():
    """What ``verification.json`` should hold of an agreement on a run's own task, in float32."""

    def of(agreement, form, against):
        return {
            "of": form,
            "against": str(against),
            "agree": True,
            "prompts": 6,
            "tokens": agreement.tokens,
            "max_difference": agreement.max_difference,
            "tolerance": 1e-3,
            "dtype": "float32",
            "near_ties": agreement.near_ties,
            "same_top1": 1.0,
            "kl_divergence": agreement.kl_divergence,
        }

    return of
