"""Change one line of a PEFT script: LoRA becomes PERA.

    python examples/101_change_one_line.py [MODEL]

MODEL is a folder or a Hub id (default: the embedded SmolLM2-135M). The script trains both adapters for 20 steps on the
same 80 problems and prints the loss of each. It takes about 2 minutes on two cores.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from reasoning_gym import create_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import pera  # registers the method with PEFT
from pera_lab.models import resolve

MODEL = resolve(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
OPTIONS = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def rows(tokenizer, size=80):
    """Prompts with their answers. Only the answer counts in the loss."""
    found = []
    for problem in create_dataset("family_relationships", size=size, seed=1, min_family_size=3, max_family_size=4):
        prompt = tokenizer(f"Question: {problem['question']}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {problem['answer']}")["input_ids"] + [tokenizer.eos_token_id]
        found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return found


def collate(batch):
    """A batch, padded on the right."""
    length = max(len(row["input_ids"]) for row in batch)

    def padded(key, value):
        return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in batch])

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor([[n < len(row["input_ids"]) for n in range(length)] for row in batch]).long(),
    }


def train(config, output):
    """Train an adapter and return its losses."""
    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), config)
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output, learning_rate=3e-3, max_steps=20, per_device_train_batch_size=4, logging_steps=5,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows(tokenizer), data_collator=collate)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    losses = {
        "LoRA": train(LoraConfig(**OPTIONS, lora_alpha=8), "out/lora"),
        "PERA": train(pera.PeraConfig(**OPTIONS, normalization="rms"), "out/pera"),  # the line that changed
    }
    for name, values in losses.items():
        print(name, "loss:", " → ".join(f"{value:.2f}" for value in values))
