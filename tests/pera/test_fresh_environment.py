"""``pip install pera`` in an empty environment gives a method that works, and a command that says what it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, sys
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import pera

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))

def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits

ids = torch.arange(12).reshape(2, 6) * 5 % 64
config = pera.PeraConfig(r=4, target_modules="all-linear", normalization="rms", init_coefficients=0.3)
model = get_peft_model(base(), config)
optimizer = torch.optim.AdamW(pera.parameter_groups(model, lr=1e-2, lr_ratio={"h": 2}))
losses = []
for _ in range(20):
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
expected = logits(model)
model.save_pretrained("adapter")

def difference(model):
    return ((logits(model) - expected).abs().max() / expected.abs().max()).item()

result = {
    "losses": [losses[0], losses[-1]],
    "effect": difference(base()),
    "reloaded": difference(PeftModel.from_pretrained(base(), "adapter")),
    "merged": difference(PeftModel.from_pretrained(base(), "adapter").merge_and_unload(safe_merge=True)),
}
lora = pera.to_lora(model)
result["rank"] = lora.peft_config["default"].r
result["lora"] = difference(lora)
lora.save_pretrained("lora")
result["pera again"] = difference(pera.from_lora(lora))
result["modules"] = [name for name in ("pydantic", "rich", "typer", "scipy", "matplotlib") if name in sys.modules]
print(json.dumps(result))
"""

PLAIN_PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
PeftModel.from_pretrained(base, "lora")
print("pera" in sys.modules)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Folder of an environment with torch, PEFT and pera, at the versions of constraints.txt."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    for packages in (["torch"], ["peft"], [ROOT]):  # torch first, so that nothing else chooses its build
        subprocess.run([*pip, *packages], check=True)
    return folder


@pytest.fixture(scope="module")
def run(environment):
    """Run a command of the environment in its folder."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(command, *arguments):
        command = [environment / "bin" / command, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=environment, env=variables)

    return run


@pytest.mark.slow  # it installs torch
def test_the_method_trains_saves_merges_and_converts(run):
    done = run("python", "-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["losses"][1] < result["losses"][0]
    assert result["effect"] > 0.01
    assert result["reloaded"] == 0
    assert max(result["merged"], result["lora"], result["pera again"]) <= 1e-5
    assert result["rank"] == 14
    assert result["modules"] == []
    done = run("python", "-c", PLAIN_PEFT)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.slow  # it installs torch
@pytest.mark.parametrize("command", [["pera"], ["python", "-m", "pera"]], ids=" ".join)
def test_the_command_says_what_to_install(run, command):
    done = run(*command, "train", "x")
    print(done.stderr)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.endswith("pip install 'pera[lab]'")


@pytest.mark.slow  # it installs torch
def test_the_environment_has_the_types_of_both_packages(run):
    program = "import importlib.util as u; print(*(u.find_spec(p).origin for p in ('pera', 'pera_lab')))"
    for origin in run("python", "-c", program).stdout.split():
        assert Path(origin).with_name("py.typed").exists()
