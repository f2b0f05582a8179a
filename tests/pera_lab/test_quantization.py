"""``model.quantization``: training, scores and conversions of an adapter on a base that is quantized while loading."""

import io
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaModel,
    TorchAoConfig,
)

from pera.errors import UserError
from pera.tuner.layers import is_packed, keep_unpacked
from pera_lab import models, quantization
from pera_lab.bases import check_loaded
from pera_lab.convert.export import export
from pera_lab.convert.merge import merge
from pera_lab.convert.verify import verify
from pera_lab.evaluation import evaluate_run
from pera_lab.extras import install_command
from pera_lab.opening import locate, locate_adapter, locate_run, open_model
from pera_lab.recipe import load_recipe
from pera_lab.runs import Run
from pera_lab.study import load_study
from pera_lab.study.plan import choose_trials
from pera_lab.training import train
from reference import relative_error

pytest.importorskip("bitsandbytes")
Int8WeightOnlyConfig = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig

NF4 = "model.quantization=nf4"
TORCHAO = "model.quantization=torchao-int8"
ON_PLAIN_BASE = pytest.mark.filterwarnings("ignore:.*this command uses the base model before quantization")


@pytest.fixture(scope="session")
def wide_llama(save_llama, tmp_path_factory):
    """Folder of a LLaMA wide enough for blocks of 64."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
    return save_llama(tmp_path_factory.mktemp("models") / "wide", **shape)


@pytest.fixture(scope="session")
def wide_recipe(recipe_file, tiny_llama, wide_llama, tmp_path_factory):
    """``recipe_file`` on the wide LLaMA."""
    file = tmp_path_factory.mktemp("recipes") / "wide.yaml"
    file.write_text(recipe_file.read_text().replace(str(tiny_llama), str(wide_llama)))
    return file


@pytest.fixture(scope="session")
def train_wide(train_run, wide_llama):
    """Trains a small run on the wide LLaMA."""
    return lambda folder, *overrides: train_run(folder, f"model.name={wide_llama}", *overrides)


@pytest.fixture(scope="session")
def finished_run(train_wide, tmp_path_factory):
    """Returns a trained run for a kind of quantization. Tests must not change it."""
    folder = tmp_path_factory.mktemp("runs")
    return cache(lambda kind: train_wide(folder / kind, f"model.quantization={kind}"))


@pytest.fixture
def finished_nf4_run(finished_run):
    """A trained run on a 4-bit base. Tests must not change it."""
    return finished_run("nf4")


@pytest.fixture
def nf4_run(finished_nf4_run, tmp_path):
    """A copy of ``finished_nf4_run`` that a test may change."""
    shutil.copytree(finished_nf4_run.path, tmp_path / "nf4-run")
    return Run(tmp_path / "nf4-run")


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [
        ("nf4", torch.bfloat16, (0.05, 0.15)),
        ("fp4", torch.float32, (0.05, 0.2)),
        ("int8", torch.float16, (0.001, 0.02)),
        ("torchao-int8", torch.bfloat16, (0.001, 0.02)),
    ],
)
def test_all_linear_layers_but_the_head_are_quantized(kind, dtype, error, wide_llama):
    plain = models.load_model(str(wide_llama), dtype="float32")
    model = models.load_model(str(wide_llama), dtype=str(dtype).removeprefix("torch."), quantization=kind)
    packed = linears(model)
    head = packed.pop("lm_head")
    assert type(head) is nn.Linear
    assert head.weight.dtype == model.get_input_embeddings().weight.dtype == dtype
    assert packed.keys() == linears(plain).keys() - {"lm_head"}
    for name, layer in packed.items():
        assert is_packed(layer.weight)
        found = dequantize_module_weight(layer).float()
        assert error[0] < relative_error(found, plain.get_submodule(name).weight) < error[1]
        if kind in ("nf4", "fp4"):
            assert (layer.weight.quant_type, layer.weight.quant_state.nested) == (kind, True)
            assert layer.compute_dtype == dtype


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_no_part_of_the_head_of_a_classifier_is_quantized(kind, tmp_path, tokenizer):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    RobertaModel(RobertaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    model = models.load_model(str(tmp_path), labels=2, quantization=kind)
    packed = {name for name, m in linears(model).items() if is_packed(m.weight)}
    assert linears(model).keys() - packed == {"classifier.dense", "classifier.out_proj"}
    assert model.classifier.dense.weight.dtype == torch.float32


def test_a_run_learns_and_is_scored_on_the_quantized_base(finished_nf4_run, nf4_run, monkeypatch, pera, wide_llama):
    losses = [line["loss"] for line in finished_nf4_run.metrics()]
    assert losses[-1] < 0.8 * losses[0]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(wide_llama, quantization_config=settings, dtype=torch.float32)
    keep_unpacked(base)
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        expected = locate(str(nf4_run.path)).adapter.load_on(base)(tokens).logits
        found = open_model(locate(str(nf4_run.path)), "float32")[0](tokens).logits
    assert torch.equal(found, expected)

    monkeypatch.setattr("sys.stdin", io.StringIO())
    loaded, load_model = [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda *a, **k: loaded.append(k["quantization"]) or load_model(*a, **k))
    rows = nf4_run.path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Who is Zoe?", "answer": "Luna"}) + "\n")
    for arguments in (
        ("evaluate", nf4_run.path),
        ("evaluate", nf4_run.path, "--base"),
        ("predict", nf4_run.path, "--input", rows, "--output", "answers.jsonl"),
        ("inspect", nf4_run.path, "--effect"),
        ("chat", nf4_run.path),
    ):
        outcome = pera(*arguments)
        assert outcome.code == 0, outcome.err
    assert loaded == ["nf4"] * 5


def test_a_run_on_torchaos_weights_learns_and_opens_the_same_base(finished_run, wide_llama, tmp_path):
    run = finished_run("torchao-int8")
    losses = [line["loss"] for line in run.metrics()]
    assert losses[-1] < 0.8 * losses[0]
    settings = TorchAoConfig(Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(wide_llama, quantization_config=settings, dtype=torch.float32)
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        expected = locate(str(run.path)).adapter.load_on(base)(tokens).logits
        found = open_model(locate(str(run.path)), "float32")[0](tokens).logits
    assert torch.equal(found, expected)
    shutil.copytree(run.path, tmp_path / "copy")
    assert evaluate_run(Run(tmp_path / "copy")).n > 0


def test_the_terminal_the_record_the_page_and_the_card_name_the_quantization(pera, wide_recipe):
    outcome = pera("train", wide_recipe, "training.max_steps=3", NF4, "--output", "run")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("this machine has no GPU") == (0 if torch.cuda.is_available() else 1)
    run = Run(Path("run"))
    assert run.recorded_base()["quantization"] == "nf4"
    assert "quantized to nf4," in (run.path / "report.html").read_text()
    assert "quantized to nf4 for training" in (run.adapter.path / "README.md").read_text()


def test_gradient_checkpointing_gives_the_same_losses(train_wide, finished_nf4_run, tmp_path):
    run = train_wide(tmp_path / "run", NF4, "training.gradient_checkpointing=true")
    assert [line["loss"] for line in run.metrics()] == [line["loss"] for line in finished_nf4_run.metrics()]


def test_a_resumed_run_equals_an_uninterrupted_one(nf4_run, finished_nf4_run):
    shutil.rmtree(nf4_run.adapter.path)
    shutil.rmtree(nf4_run.checkpoints / "checkpoint-12")
    train(nf4_run.recipe, nf4_run, resume=True)
    weights, expected = nf4_run.adapter.weights, finished_nf4_run.adapter.weights
    assert all(torch.equal(weights[key], expected[key]) for key in weights | expected)


def test_another_quantization_is_refused_when_a_run_is_resumed(nf4_run, refused):
    shutil.rmtree(nf4_run.adapter.path)
    refused("train", nf4_run.path, "model.quantization=fp4", "--resume", words=["--resume", "model.quantization"])


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_conversions_are_for_the_base_before_quantization(kind, finished_run, wide_llama, tmp_path, unmerged, logits):
    run = finished_run(kind)
    with pytest.warns(UserWarning, match=f"quantized to {kind}; this command uses the base model before quantization"):
        assert merge(locate_adapter(str(run.path)), tmp_path / "merged").agree
    adapted = logits(unmerged(wide_llama, run.adapter.path))
    assert (adapted - logits(tmp_path / "merged")).abs().max() < 1e-4
    with pytest.warns(UserWarning, match="before quantization"):
        assert export(locate_adapter(str(run.path)), tmp_path / "lora").agreement.agree
    for made in ("merged", "lora"):
        with pytest.warns(UserWarning, match="before quantization"):
            assert verify(str(run.path), str(tmp_path / made)).agree


@ON_PLAIN_BASE
@pytest.mark.parametrize(("kind", "rounding"), [("nf4", 0.1), ("torchao-int8", 0.01)])
def test_a_merge_into_the_dequantised_base_has_the_outputs_of_the_run(kind, rounding, finished_run, tmp_path, logits):
    location = locate_adapter(str(finished_run(kind).path))
    assert merge(location, tmp_path / "merged", dequantised=True).agree
    quantized, _ = open_model(location, "float32")
    assert (logits(quantized) - logits(tmp_path / "merged")).abs().max() < 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merge(location, tmp_path / "plain")
    assert (logits(quantized) - logits(tmp_path / "plain")).abs().max() > rounding


@ON_PLAIN_BASE
@pytest.mark.parametrize("dequantised", [False, True])
def test_a_run_on_the_transposed_layers_of_gpt2_is_merged(dequantised, tokenizer, train_run, tmp_path):
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **special)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    method = "method={name: pera, r: 2, target_modules: [c_attn, c_fc]}"
    run = train_run(tmp_path / "run", f"model.name={tmp_path / 'gpt2'}", NF4, method, "training.max_steps=3")
    assert merge(locate_adapter(str(run.path)), tmp_path / "merged", dequantised=dequantised).agree


def test_int8_is_not_dequantised(train_wide, refused, tmp_path):
    run = train_wide(tmp_path / "run", "model.quantization=int8", "training.max_steps=3")
    words = ["--dequantise", "int8", "before quantization"]
    refused("merge", run.path, "--output", "merged", "--dequantise", words=words)


@ON_PLAIN_BASE
def test_the_adapter_folder_of_a_run_opens_the_quantized_base(nf4_run, tmp_path):
    expected, _ = open_model(locate(str(nf4_run.path)), "float32")
    found, _ = open_model(locate(str(nf4_run.adapter.path)), "float32")
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)
    assert merge(locate_adapter(str(nf4_run.adapter.path)), tmp_path / "merged", dequantised=True).agree
    shutil.copytree(nf4_run.adapter.path, tmp_path / "copy")
    assert locate(str(tmp_path / "copy")).quantization is None


OPENED = {
    "evaluate": evaluate_run,
    "merge": lambda run: merge(locate_adapter(str(run.path)), run.path.parent / "merged"),
    "adapter folder": lambda run: open_model(locate(str(run.adapter.path)), "float32"),
}


@ON_PLAIN_BASE
@pytest.mark.parametrize("how", OPENED)
def test_another_base_is_refused(how, nf4_run, wide_llama, tmp_path, change_weights):
    def change(tensors):
        return {key: -weight if "o_proj" in key else weight for key, weight in tensors.items()}

    shutil.copytree(wide_llama, tmp_path / "other")
    for file in (nf4_run.recipe_file, nf4_run.adapter.path / "adapter_config.json"):
        file.write_text(file.read_text().replace(str(wide_llama), str(tmp_path / "other")))
    open_model(locate_run(Run(nf4_run.path)), "float32")  # a copy has the same fingerprint
    change_weights(tmp_path / "other" / "model.safetensors", change)
    with pytest.raises(UserError, match=r"was trained on .* with fingerprint .*; use the base model of the training"):
        OPENED[how](Run(nf4_run.path))


REFUSED = {
    "unknown": (["model.quantization=nf5"], ["model.quantization", "nf4", "int8"]),
    "full": ([NF4, "method={name: full}"], ["model.quantization='nf4'", "'full' trains the weights", "pera or lora"]),
    "DeLoRA": ([NF4, "method={name: delora, target_modules: [q_proj]}"], ["model.quantization='nf4'", "delora"]),
    "whole layers": ([NF4, "method.modules_to_save=[o_proj]"], ["model.quantization='nf4'", "o_proj"]),
    "PiSSA": (
        [NF4, "method={name: lora, target_modules: [q_proj], init_lora_weights: pissa}"],
        ["model.quantization='nf4'", "init_lora_weights='pissa'"],
    ),
    "OLoRA": (
        [NF4, "method={name: lora, target_modules: [q_proj], init_lora_weights: olora}"],
        ["model.quantization='nf4'", "init_lora_weights='olora'"],
    ),
    "parameters": (
        [NF4, "method={name: pera, target_modules: [q_proj], target_parameters: [o_proj.weight]}"],
        ["target_parameters", "torch.uint8 cannot be adapted"],
    ),
    "HiRA, torchao": (
        [TORCHAO, "method={name: hira, target_modules: [q_proj]}"],
        ["model.quantization='torchao-int8'", "'hira'", "give pera or lora"],
    ),
    "whole layers, torchao": (
        [TORCHAO, "method.modules_to_save=[o_proj]"],
        ["model.quantization='torchao-int8'", "modules_to_save=['o_proj']", "leave them out"],
    ),
    "parameters, torchao": (
        [TORCHAO, "method={name: pera, target_modules: [q_proj], target_parameters: [o_proj.weight]}"],
        ["target_parameters: 'weight' is packed by torchao; leave it out"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_train_on_a_quantized_base_is_refused(case, refused, wide_recipe):
    overrides, words = REFUSED[case]
    refused("train", wide_recipe, *overrides, "--output", "run", words=words)


def test_deepspeed_is_refused_on_a_quantized_base(refused, wide_recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refused("train", wide_recipe, NF4, words=["model.quantization='nf4'", "DeepSpeed", "torchrun"])


@pytest.mark.parametrize("method", ["lora", "dora", "hira"])
def test_other_methods_train_on_a_quantized_base(method, train_wide, tmp_path):
    options = f"method={{name: {method}, r: 2, target_modules: [q_proj, v_proj]}}"
    run = train_wide(tmp_path / "run", NF4, options, "training.max_steps=3", "training.logging_steps=1")
    losses = [line["loss"] for line in run.metrics()]
    assert losses[-1] != losses[0]


def test_a_stored_quantized_base_is_not_quantized_again(refused, wide_recipe, wide_llama, tmp_path):
    models.load_model(str(wide_llama), dtype="float32", quantization="nf4").save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(wide_llama).save_pretrained(tmp_path / "packed")
    words = ["model.quantization='int8'", "already quantized (bitsandbytes)", "leave quantization out"]
    refused("train", wide_recipe, f"model.name={tmp_path / 'packed'}", "model.quantization=int8", words=words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes rows of any length")
def test_rows_that_bitsandbytes_gets_wrong_on_a_cpu_are_refused(tiny_llama):
    models.load_model(str(tiny_llama), quantization="int8")
    with pytest.raises(UserError, match=r"q_proj has 32 inputs, .* multiples of 64; use a GPU, .*=int8, or none"):
        models.load_model(str(tiny_llama), quantization="nf4")


@pytest.mark.parametrize(("kind", "package"), [("nf4", "bitsandbytes"), ("torchao-int8", "torchao")])
def test_a_missing_package_is_named_before_training(kind, package, refused, wide_recipe, monkeypatch):
    monkeypatch.setattr(quantization, f"is_{package}_available", lambda: False)
    words = [f"model.quantization={kind!r}", repr(package), install_command("quantized")]
    refused("train", wide_recipe, f"model.quantization={kind}", words=words)


def test_a_model_without_layers_for_torchao_is_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"quantization='torchao-int8': .* has no layer that this quantizes"):
        models.load_model(str(tmp_path), quantization="torchao-int8")


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_weights_that_are_not_finite_are_refused(kind, wide_llama, tmp_path, change_weights):
    def change(tensors):
        return {key: weight * torch.inf if "o_proj" in key else weight for key, weight in tensors.items()}

    shutil.copytree(wide_llama, tmp_path / "broken")
    change_weights(tmp_path / "broken" / "model.safetensors", change)
    with pytest.raises(UserError, match=r"hold NaN or infinity in .*o_proj"):
        models.load_model(str(tmp_path / "broken"), quantization=kind)


def test_integers_that_no_library_packed_are_loaded():
    model = nn.Module()
    model.counts = nn.Module()
    model.counts.seen = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    check_loaded("a model", model, [])


@ON_PLAIN_BASE
def test_a_classifier_on_a_quantized_encoder_is_trained_scored_and_merged(glue_recipe, tokenizer, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"vocab_size": len(tokenizer), "pad_token_id": 2, "max_position_embeddings": 64}
    BertModel(BertConfig(**sizes, **options)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    recipe = load_recipe(str(glue_recipe), [NF4, f"model.name={tmp_path / 'bert'}"])
    run = Run.create(recipe, tmp_path / "run")
    train(recipe, run)
    assert evaluate_run(run).value > 0.9
    assert merge(locate_adapter(str(run.path)), tmp_path / "merged").agree


def test_a_study_sets_it_for_all_runs(wide_recipe, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        f"base: {wide_recipe}\nsettings: {{model: {{quantization: nf4}}}}\n"
        "grid: {task: family_relationships, method: [lora], r: [2]}\n"
        "choose: {learning_rate: [1e-3], seeds: [1], rows: 16}\nreport: {seeds: [42]}\n"
    )
    study = load_study(str(file))
    assert [trial.recipe().model.quantization for trial in choose_trials(study, study.cells()[0], {})] == ["nf4"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [NF4, TORCHAO])
def test_a_quantized_real_model_is_trained_scored_merged_exported_and_verified(kind, pera):
    overrides = ("training.max_steps=10", "training.logging_steps=2", "task.test_size=8", "training.batch_size=4", kind)
    commands = [
        ("train", "quickstart", *overrides, "--output", "run"),
        ("evaluate", "run"),
        ("merge", "run", "--output", "merged"),
        ("export", "run", "--to", "lora", "--output", "lora"),
        ("verify", "run", "merged"),
        ("verify", "run", "lora"),
    ]
    warned = set()
    for command in commands:
        outcome = pera(*command)
        assert outcome.code == 0, outcome.err
        warned |= {command[0]} if "before quantization" in outcome.err else set()  # Python repeats no warning
    assert warned == {"merge", "export", "verify"}
    run = Run(Path("run"))
    losses = [line["loss"] for line in run.metrics()]
    assert losses[-1] < losses[0]
    assert run.scores()["adapter"]["n"] == 8
