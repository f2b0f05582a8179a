"""TRL's trainers, which create the adapter from ``peft_config``."""

import math

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from pera import PeraConfig
from reference import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

LOG_2 = math.log(2)
QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 1}
STEPS = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "gradient_checkpointing": False}
QUESTIONS = ["Who is the mother of Ada?", "Who is the father of Ada?", "Is Ada a queen?", "Is Ada a countess?"]
ANSWERS = ["Annabella", "Byron", "No", "Yes"]


def config(**options):
    given = {"r": 4, "target_modules": "all-linear", "normalization": "rms", "task_type": "CAUSAL_LM"}
    return PeraConfig(**{**given, **options})


def losses(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


def frozen(model):
    """The base weights inside an adapted model, under the names of the base model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".pera_" not in name
    }


def check(trainer, base, logits, folder):
    """Check that the base is unchanged and that the last checkpoint gives the outputs of the trained model."""
    model = trainer.model
    assert isinstance(model, PeftModel)
    original = AutoModelForCausalLM.from_pretrained(base)
    expected = original.state_dict()
    assert frozen(model).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in frozen(model).items())
    checkpoint = folder / f"checkpoint-{trainer.state.max_steps}"
    assert [file.name for file in checkpoint.glob("*.safetensors")] == ["adapter_model.safetensors"]
    learned = logits(model)
    assert relative_error(learned, logits(original)) > 1e-3
    assert torch.equal(logits(PeftModel.from_pretrained(original, checkpoint)), learned)


@pytest.mark.parametrize(
    "options", [{}, {"packing": True, "max_length": 32}, {"gradient_checkpointing": True}], ids=str
)
def test_sft_trains_the_adapter(options, tiny_llama, tokenizer, logits, tmp_path):
    rows = [{"prompt": f"{q} ", "completion": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    trainer = trl.SFTTrainer(
        str(tiny_llama),
        args=trl.SFTConfig(str(tmp_path), **{**QUIET, **STEPS, **options}),
        train_dataset=datasets.Dataset.from_list(rows * 4),
        processing_class=tokenizer,
        peft_config=config(),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    check(trainer, tiny_llama, logits, tmp_path)


def preferences():
    rows = zip(QUESTIONS, ANSWERS, ANSWERS[::-1], strict=True)
    return datasets.Dataset.from_list([{"prompt": f"{q} ", "chosen": a, "rejected": b} for q, a, b in rows] * 4)


def optimise_preferences(model, tokenizer, folder, **options):
    arguments = trl.DPOConfig(str(folder), **{**QUIET, **STEPS})
    return trl.DPOTrainer(model, args=arguments, train_dataset=preferences(), processing_class=tokenizer, **options)


def test_dpo_trains_the_adapter(tiny_llama, tokenizer, logits, tmp_path):
    """The reference is the model with its adapter disabled. At the start both agree, so the loss is log 2."""
    trainer = optimise_preferences(str(tiny_llama), tokenizer, tmp_path, peft_config=config())
    assert trainer.ref_model is None
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(LOG_2, abs=1e-6)
    assert losses(trainer)[-1] < 0.5
    assert losses(trainer, "rewards/margins")[-1] > 0.1
    check(trainer, tiny_llama, logits, tmp_path)


@pytest.fixture
def learned(tiny_llama, tmp_path):
    """A model with a trained adapter, loaded to be trained further."""
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config(init_weights=False)).save_pretrained(
        tmp_path / "learned"
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    return PeftModel.from_pretrained(base, tmp_path / "learned", is_trainable=True)


@pytest.mark.xfail(strict=True, reason="TRL copies only parameters that end in .default.weight, as in LoRA (trl#6975)")
def test_trl_copies_a_trained_adapter_to_the_reference(learned, tokenizer, tmp_path):
    trainer = optimise_preferences(learned, tokenizer, tmp_path)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(LOG_2, abs=1e-6)


def test_a_reference_copied_by_hand_is_the_trained_adapter(learned, tokenizer, tmp_path):
    trainer = optimise_preferences(learned, tokenizer, tmp_path)
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(trainer.model), adapter_name="ref")
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(LOG_2, abs=1e-6)
    assert losses(trainer)[-1] < 0.6


def test_the_reference_of_a_merged_adapter_is_the_merged_model(learned, tokenizer, logits, tmp_path):
    merged = learned.merge_and_unload()
    trainer = optimise_preferences(merged, tokenizer, tmp_path, peft_config=config())
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(LOG_2, abs=1e-6)
    assert losses(trainer)[-1] < 0.6


def test_grpo_trains_the_adapter(tiny_llama, tokenizer, logits, tmp_path):
    """Generation and training alternate. The reference is the model with its adapter disabled."""
    torch.manual_seed(0)
    arguments = {"num_generations": 4, "max_completion_length": 8, "beta": 0.04, "temperature": 1.0}
    trainer = trl.GRPOTrainer(
        str(tiny_llama),
        reward_funcs=lambda completions, **_: [float(text.count("a")) for text in completions],
        args=trl.GRPOConfig(str(tmp_path), **{**QUIET, **STEPS, **arguments}),
        train_dataset=datasets.Dataset.from_list([{"prompt": q} for q in QUESTIONS]),
        processing_class=tokenizer,
        peft_config=config(),
    )
    trainer.train()
    distances = losses(trainer, "kl")
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances[-1] > 1e-3
    check(trainer, tiny_llama, logits, tmp_path)
