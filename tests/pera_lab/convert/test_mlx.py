"""An adapter in the format of mlx-lm: exported, read back, imported; what mlx-lm would skip is refused."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pera.errors import UserError
from pera_lab.convert.export import export
from pera_lab.convert.from_lora import import_lora
from pera_lab.embedded import state_rope_theta
from pera_lab.mlx import check_architecture
from pera_lab.opening import locate_adapter

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


@pytest.fixture
def exported(save_adapter, tiny_llama, tmp_path):
    """The folder of an MLX export, next to the folder "adapter" that it was made from."""
    save_adapter(tmp_path / "adapter", tiny_llama, rank_pattern={"v_proj": 2}, normalization="rms", anchors=2)
    with pytest.warns(UserWarning, match="rope_theta inside rope_parameters only, where mlx does not look; add"):
        done = export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "out", server="mlx")
    assert done.agreement.agree
    assert done.start == f"mlx_lm.server --model {tiny_llama} --adapter-path {tmp_path / 'out'}"
    return tmp_path / "out"


def edited(folder, change):
    """Changes the configuration of an MLX adapter by ``change``."""
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    (folder / CONFIG).write_text(json.dumps(content))
    return locate_adapter(str(folder))


@torch.no_grad()
def test_what_mlx_computes_from_the_files_gives_the_logits_of_the_adapter(exported, tiny_llama, tmp_path, logits):
    """W + scale · (a b)ᵀ in every layer that ``keys`` names."""
    content, weights = json.loads((exported / CONFIG).read_text()), load_file(exported / WEIGHTS)
    parameters = content["lora_parameters"]
    assert (content["fine_tune_type"], content["num_layers"], parameters["dropout"]) == ("lora", 2, 0.0)
    assert content["model"] == str(tiny_llama)
    names = [f"model.layers.{i}.self_attn.{which}_proj" for i in (0, 1) for which in "qv"]
    assert parameters["keys"] == names
    assert weights.keys() == {f"{name}.lora_{side}" for name in names for side in "ab"}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = logits(model)
    for name in parameters["keys"]:
        a, b = weights[f"{name}.lora_a"], weights[f"{name}.lora_b"]
        assert a.shape[1] == b.shape[0] == parameters["rank"] == 3 + 6 + 2 * 3
        model.get_submodule(name).weight += parameters["scale"] * (a @ b).T
    adapter = locate_adapter(str(tmp_path / "adapter")).require_adapter()
    expected = logits(adapter.load_on(AutoModelForCausalLM.from_pretrained(tiny_llama)))
    assert (logits(model) - expected).abs().max() < 1e-4
    assert (before - expected).abs().max() > 0.1


def test_an_adapter_of_mlx_is_imported_with_equal_outputs(exported, pera):
    outcome = pera("import", exported, "--from", "mlx", "--output", "back")
    assert (outcome.code, outcome.err) == (0, "")
    assert pera("verify", exported, "back").code == 0
    assert pera("verify", "adapter", "back").code == 0
    config = json.loads((exported.parent / "back" / CONFIG).read_text())
    assert (config["peft_type"], config["r"]) == ("PERA", 15)


def test_the_scale_of_an_mlx_adapter_counts(exported, pera):
    edited(exported, lambda content: content["lora_parameters"].update(scale=2.5))
    assert import_lora(locate_adapter(str(exported)), exported.parent / "back", form="mlx").agree
    assert json.loads((exported.parent / "back" / CONFIG).read_text())["pera_alpha"] == 2.5 * 15
    assert pera("verify", "adapter", "back").code == 1


def test_the_form_of_an_imported_adapter_must_be_the_one_named(exported, refused, tmp_path):
    refused("import", exported, "--from", "lora", "--output", "back", words=["--from lora", "mlx-lm", "--from mlx"])
    export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "lora", to="lora")
    refused("import", "lora", "--from", "mlx", "--output", "back", words=["--from mlx", "PEFT", "--from lora"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(fine_tune_type="dora"), "fine_tune_type='dora' should be 'lora'"),
        (lambda c: c.pop("lora_parameters"), "lora_parameters=None should be a table"),
        (lambda c: c["lora_parameters"].pop("rank"), "lora_parameters.rank=None should be a whole number"),
        (lambda c: c["lora_parameters"].update(rank=4), "has shape .* no factor of a linear layer at rank 4"),
        (lambda c: c["lora_parameters"].pop("scale"), "lora_parameters.scale=None should be a number"),
        (lambda c: c["lora_parameters"].update(scale=True), "lora_parameters.scale=True should be a number"),
        (lambda c: c["lora_parameters"].update(dropout=1), "lora_parameters.dropout=1.0 should be below 1"),
        (lambda c: c.update(model=3), "model=3 should be the base model"),
        (lambda c: c.pop("model"), "adapter_config.json has no model; add it"),
    ],
)
def test_a_wrong_value_of_an_mlx_adapter_is_named(exported, change, words):
    with pytest.raises(UserError, match=words):
        import_lora(edited(exported, change), exported.parent / "back")
    assert not (exported.parent / "back").exists()


def test_a_missing_factor_or_another_weight_is_named(exported):
    weights = load_file(exported / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.lora_b"
    b = weights.pop(name)
    for changed, words in (
        (weights, "the other factor of 'model.layers.0.self_attn.q_proj.lora_a' is missing"),
        ({**weights, name: b, "model.norm.weight": b.clone()}, "'model.norm.weight' is no factor of a LoRA"),
        ({**weights, name: b[None]}, "has shape .* no factor of a linear layer"),
    ):
        save_file(changed, exported / WEIGHTS)
        with pytest.raises(UserError, match=words):
            import_lora(locate_adapter(str(exported)), exported.parent / "back")


def test_a_base_that_states_rope_theta_at_the_top_needs_no_warning(save_llama, save_adapter, tmp_path):
    base = save_llama(tmp_path / "base")
    state_rope_theta(base)
    save_adapter(tmp_path / "adapter", base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*rope_theta.*")
        export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "out", to="mlx")
        export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "for", server="mistralrs")


@pytest.mark.parametrize(
    ("base", "options", "words"),
    [
        ("tied_llama", {"target_modules": ["lm_head", "q_proj"]}, "'lm_head' shares its weight with the embeddings"),
        ("tiny_llama", {"target_modules": ["embed_tokens", "q_proj"]}, "'model.embed_tokens' is not a linear layer"),
        ("biased_llama", {"bias": "all"}, "bias='all', which an MLX adapter cannot hold"),
        ("tiny_llama", {"modules_to_save": ["lm_head"]}, "modules_to_save=.* an MLX adapter cannot hold"),
    ],
)
def test_what_mlx_would_skip_is_refused(base, options, words, request, save_adapter, tmp_path):
    save_adapter(tmp_path / "adapter", request.getfixturevalue(base), **options)
    with pytest.raises(UserError, match=words):
        export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "out", to="mlx")
    assert not (tmp_path / "out").exists()


def test_an_architecture_whose_names_were_not_compared_is_refused():
    check_architecture(AutoConfig.for_model("qwen3"))
    with pytest.raises(UserError, match="model_type='gpt_neox' was not compared with mlx-lm"):
        check_architecture(AutoConfig.for_model("gpt_neox"))
