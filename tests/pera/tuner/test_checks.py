"""Names in a configuration that match nothing in the model are refused with the nearest name."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from pera import PeraConfig, UserError
from pera.tuner import check_names
from tiny import VOCABULARY, adapt, layers, llama, logits


def classifier():
    """A BERT of one layer with a head named "classifier"."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes))


@pytest.mark.parametrize("config", [PeraConfig, LoraConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "q_prj"]}, r"target_modules: 'q_prj' not found.*did you mean 'q_proj'\?"),
        ({"target_modules": ["self_attn.q_prj"]}, r"target_modules: 'self_attn\.q_prj' not found.*'q_proj'\?"),
        (
            {"target_modules": "q_proj, v_proj"},
            "target_modules: the regular expression 'q_proj, v_proj' matches no module",
        ),
        ({"target_modules": ["all-linear", "q_proj"]}, "target_modules lists 'all-linear' among names; give it alone"),
        (
            {"exclude_modules": "k_proj|o_proj"},
            r"exclude_modules: the regular expression 'k_proj\|o_proj' matches no module",
        ),
        ({"exclude_modules": "all-linear"}, "exclude_modules: the regular expression 'all-linear' matches no module"),
        (
            {"rank_pattern": {"v_proj": 2, "q_prj": 3}},
            r"^rank_pattern: 'q_prj' matches nothing.*did you mean 'q_proj'\?",
        ),
        ({"alpha_pattern": {"v_proj": 2, "q_prj": 3}}, "^alpha_pattern: 'q_prj' matches nothing in the base model"),
        ({"layers_to_transform": 2}, "layers_to_transform: the model has no layer 2, only 0 to 1"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform: the model has no layer 2, only 0 to 1"),
        ({"layers_to_transform": [1, 2], "layers_pattern": "layers"}, "layers_to_transform: the model has no layer 2"),
        ({"layers_to_transform": [2], "layers_pattern": ["layers"]}, "layers_to_transform: the model has no layer 2"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(config, options, message):
    with pytest.raises(UserError, match=message):
        check_names(llama(), config(**{"target_modules": ["q_proj", "v_proj"], **options}))


def test_patterns_may_be_names_or_expressions():
    pattern = {"q_proj": 2, r"layers\.1\..*v_proj": 3}
    check_names(llama(), PeraConfig(target_modules=["q_proj", "v_proj"], rank_pattern=pattern, alpha_pattern=pattern))


def test_names_are_checked_for_a_second_adapter_too():
    model = adapt(llama(), target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"target_modules: 'v_prj' not found.*did you mean 'v_proj'\?"):
        model.add_adapter("second", PeraConfig(target_modules=["q_proj", "v_prj"]))


@pytest.mark.parametrize("exclusions", [["mlp"], ["layers.0"], r".*\.mlp"])
def test_excluding_a_container_of_layers_is_refused(exclusions):
    """PEFT compares the exclusions with the names of layers only."""
    with pytest.raises(UserError, match=r"exclude_modules: .* contains layers .* nothing would be excluded"):
        adapt(llama(), target_modules="all-linear", exclude_modules=exclusions)


def test_excluding_the_layers_of_a_container_is_accepted():
    model = adapt(llama(), target_modules="all-linear", exclude_modules=r".*\.mlp\..*")
    assert {name.rpartition(".")[2] for name in layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model.add_adapter("second", PeraConfig(r=2, target_modules="all-linear", exclude_modules=["q_proj"]))


# Tokens


@pytest.mark.parametrize("name", ["model", "norm"])
def test_token_indices_of_a_module_that_is_not_an_embedding_are_refused(name):
    with pytest.raises(UserError, match=rf"trainable_token_indices\['{name}'\] is not an embedding or a linear layer"):
        adapt(llama(), target_modules=["q_proj"], trainable_token_indices={name: [1]})


@pytest.mark.parametrize("tokens", [[VOCABULARY], [-1], {"embed_tokens": [0, VOCABULARY]}], ids=str)
def test_a_token_outside_the_vocabulary_is_refused(tokens):
    with pytest.raises(UserError, match=r"trainable_token_indices.*: token (64|-1) is not in the vocabulary, 0 to 63"):
        adapt(llama(), trainable_token_indices=tokens)


def test_a_token_outside_the_vocabulary_is_refused_for_a_second_adapter():
    model = adapt(llama(), target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [0]})
    with pytest.raises(UserError, match=rf"\['tokens'\]: token {VOCABULARY} is not in the vocabulary"):
        model.add_adapter("b", PeraConfig(target_modules=["q_proj"], trainable_token_indices={"tokens": [VOCABULARY]}))


# Heads


@pytest.mark.parametrize("task_type", [None, TaskType.QUESTION_ANS])
def test_a_head_that_the_model_lacks_is_refused(task_type):
    config = PeraConfig(target_modules=["query"], modules_to_save=["classifer"], task_type=task_type)
    with pytest.raises(UserError, match=r"modules_to_save: 'classifer' not found.*did you mean 'classifier'\?"):
        check_names(classifier(), config)
    config.modules_to_save = ["score"]
    with pytest.raises(UserError, match="modules_to_save: 'score' not found"):
        check_names(classifier(), config)


@pytest.mark.parametrize("task_type", [TaskType.SEQ_CLS, "TOKEN_CLS"])
def test_heads_that_peft_adds_itself_may_be_missing(task_type):
    model = get_peft_model(classifier(), PeraConfig(target_modules=["query"], task_type=task_type))
    assert set(model.peft_config["default"].modules_to_save) == {"classifier", "score"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"k_proj": 4}}, r"rank_pattern: 'k_proj' fits no adapted module; "),
        ({"alpha_pattern": {"k_proj": 4}}, r"alpha_pattern: 'k_proj' fits no adapted module; "),
        ({"modules_to_save": ["q_proj"]}, r"modules_to_save: 'q_proj' is also in target_modules"),
    ],
)
def test_an_entry_without_effect_is_refused(options, message):
    base = llama()
    expected = logits(base)
    with pytest.raises(UserError, match=f"^{message}"):
        adapt(base, target_modules=["q_proj", "v_proj"], **options)
    assert torch.equal(logits(base), expected)


def test_a_saved_adapter_with_an_idle_pattern_loads(tmp_path):
    adapt(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": {"k_proj": 4}}))
    PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("options", [{"r": 20_000}, {"r": 2, "rank_pattern": {"q_proj": 20_000}}])
def test_a_rank_above_both_sides_is_refused_before_anything_is_allocated(options):
    refusal = r"r=20000 is above both sides of a \(32, 32\) weight \(K=200030000\); use r of at most 32"
    with pytest.raises(UserError, match=refusal):
        adapt(llama(), target_modules=["q_proj"], **options)


def test_an_expansion_that_is_too_large_is_refused():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(8192, 8192))
    with pytest.raises(UserError, match=r"r=4096 expands to K=8394752 on a \(8192, 8192\) weight"):
        adapt(base, target_modules=["0"], r=4096)
