"""Tries an installed pera, outside the checkout: the method, and the command."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import pera

CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)


def main() -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    config = pera.PeraConfig(r=2, anchors=4, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM")
    tokens = torch.arange(8)[None]
    model = get_peft_model(base, config).eval()
    expected = model(tokens).logits
    with model.disable_adapter():
        assert not torch.allclose(model(tokens).logits, expected)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fresh = LlamaForCausalLM(CONFIG)
        fresh.load_state_dict(state)
        loaded = PeftModel.from_pretrained(fresh, folder).eval()
    torch.testing.assert_close(loaded(tokens).logits, expected)
    torch.testing.assert_close(pera.to_lora(loaded)(tokens).logits, expected)
    pera_command = str(Path(sys.executable).parent / "pera")
    for arguments in (["--version"], ["train", "--help"], ["env"]):
        subprocess.run([pera_command, *arguments], check=True, stdout=subprocess.DEVNULL)
    mistake = subprocess.run([pera_command, "train", "quickstar"], capture_output=True, text=True)
    assert mistake.returncode == 2, mistake
    assert "quickstart" in mistake.stderr, mistake.stderr
    print(f"pera {pera.__version__} from {Path(pera.__file__).parent}: adapter, LoRA and command work")


if __name__ == "__main__":
    main()
