"""What ends an answer, which settings it is written with, and models whose output changes with padding."""

import copy
import json

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tokenizers import normalizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from pera.errors import UserError
from pera_lab.inference import (
    Branches,
    end_token,
    generate,
    log_likelihoods,
    stop_tokens,
    takes_packing,
    takes_padding,
    turn_end,
)
from pera_lab.models import load_tokenizer
from pera_lab.scorers import Output, answer_batches, make_scorer
from pera_lab.tasks import EvaluationSection, Example, Splits
from pera_lab.tasks.encoding import AnswerCollator, encode_example
from pera_lab.tasks.own import OwnTask

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]
SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}
OWN = OwnTask(data="none.jsonl")


@pytest.fixture
def llama(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture
def other(tokenizer):
    """A copy of the tokenizer that a test may change."""
    return copy.deepcopy(tokenizer)


@pytest.fixture(scope="module")
def rwkv():
    torch.manual_seed(0)
    return RwkvForCausalLM(RwkvConfig(**SIZES, context_length=512)).eval()


# The end of an answer


def test_answers_end_at_the_tokens_of_the_base_and_at_the_taught_one(llama, tokenizer):
    llama.generation_config.eos_token_id, llama.config.eos_token_id = [20, 21], 22
    assert stop_tokens(llama, tokenizer) == [20, 21, 22, tokenizer.eos_token_id]


@pytest.mark.parametrize("where", ["tokenizer", "generation_config", "config"])
def test_an_answer_stops_before_the_end_token_wherever_it_is_declared(where, llama, other):
    llama.generation_config.eos_token_id = llama.config.eos_token_id = None
    prompt = torch.tensor([PROMPTS[0]])
    written = llama.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    at = next(i for i in range(1, 6) if written[i] not in written[:i])
    if where == "tokenizer":
        other.eos_token = other.convert_ids_to_tokens(written[at])
    else:
        owner = llama.generation_config if where == "generation_config" else llama.config
        owner.eos_token_id = written[at]
    assert generate(llama, other, [PROMPTS[0]], 6) == [other.decode(written[:at]).strip()]


@pytest.mark.parametrize("declared", [99999, -3, [99999, "x"]])
def test_an_end_token_outside_the_vocabulary_is_ignored_with_a_warning(declared, llama, tokenizer):
    llama.generation_config = GenerationConfig(eos_token_id=declared)
    with pytest.warns(UserWarning, match="in the base model's generation_config.json is ignored"):
        assert stop_tokens(llama, tokenizer) == [1]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }} </s>{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.content }} END {% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_template_says_what_closes_a_turn(template, end, other):
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    other.chat_template = template
    assert turn_end(other) == (end and other.convert_tokens_to_ids(end))
    assert end_token(other) == other.eos_token_id
    other.eos_token = None
    assert end_token(other) == turn_end(other)


def test_a_tokenizer_without_an_end_is_refused_in_one_sentence(other):
    other.eos_token = other.chat_template = None
    with pytest.raises(UserError, match="has no end of sequence to teach after an answer; set eos_token"):
        encode_example(other, Example("a", "b"))


def test_a_tokenizer_without_a_padding_token_gets_one(other, tmp_path, llama):
    other.eos_token = other.pad_token = None
    other.save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path)
    llama.generation_config.eos_token_id = llama.config.eos_token_id = None
    assert [generate(llama, found, [p], 4)[0] for p in PROMPTS] == generate(llama, found, PROMPTS, 4)


# Settings


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 50.0, "top_k": 0},
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"max_time": 0.0},
        {"min_new_tokens": 5, "suppress_tokens": list(range(3, 390))},
        {"forced_eos_token_id": 7},
        {"stop_strings": ["a"]},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_settings_of_the_base_have_no_effect(settings, llama, tokenizer):
    expected = generate(llama, tokenizer, PROMPTS, 6)
    own = llama.generation_config = GenerationConfig(eos_token_id=1, **settings)
    assert generate(llama, tokenizer, PROMPTS, 6) == expected
    assert llama.generation_config is own


# Padding


def test_models_that_read_the_padding_are_found(llama, rwkv):
    xlstm = xLSTMForCausalLM(xLSTMConfig(vocab_size=64, hidden_size=128, num_blocks=1, num_heads=4))
    assert [takes_padding(model) for model in (llama, rwkv, xlstm)] == [True, False, False]


def test_models_that_keep_packed_rows_apart_are_found(llama, rwkv, tiny_gpt2):
    gpt2 = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    tuned = get_peft_model(copy.deepcopy(llama), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    mixed = copy.deepcopy(llama)
    mixed.forward = lambda input_ids, position_ids, use_cache: llama(input_ids, position_ids=position_ids)  # a cache
    assert [takes_packing(model) for model in (llama, gpt2, rwkv, tuned, mixed)] == [True, True, False, False, False]


def test_rows_of_several_lengths_are_refused_if_padding_changes_the_loss(rwkv, tokenizer):
    rows = [encode_example(tokenizer, Example(prompt, "ok")) for prompt in ("hi", "hi", "a longer question")]
    collate = AnswerCollator(tokenizer, rwkv)
    assert len(collate(rows[:2])["input_ids"]) == 2
    assert len(collate(rows[2:])["input_ids"]) == 1
    with pytest.raises(UserError, match="padding changes what RwkvForCausalLM computes"):
        collate(rows)


def test_answers_of_such_a_model_do_not_depend_on_the_batch(rwkv, tokenizer):
    examples = [Example(prompt, "") for prompt in ("hi", "ho", "a longer question", "who?")]

    def answers(size):
        spec = EvaluationSection(batch_size=size, max_new_tokens=5)
        scorer = make_scorer(rwkv, tokenizer, OWN, examples, spec, None)
        return {i: output.answer for batch in answer_batches(scorer, "") for i, output in batch.items()}

    assert answers(4) == answers(1)


def test_likelihoods_of_models_with_recurrent_states_are_those_of_whole_texts(rwkv, tokenizer):
    layers = {"layer_types": ["conv", "full_attention"], "num_attention_heads": 4, "num_key_value_heads": 2}
    hybrid = Lfm2ForCausalLM(Lfm2Config(**SIZES, **layers, intermediate_size=48)).eval()
    batch = [Branches([5, 6, 7], 2, [[8], [9, 10, 11]]), Branches([5, 6, 9], 3, [[3, 4], [4, 5, 6, 7]])]
    for model in (rwkv, hybrid):
        for b, values in zip(batch, log_likelihoods(model, tokenizer, batch), strict=True):
            for suffix, value in zip(b.suffixes, values, strict=True):
                ids = b.shared + suffix
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                expected = sum(logits[i - 1, ids[i]].item() for i in range(b.start, len(ids)))
                assert value == pytest.approx(expected, abs=1e-4)


# Answers as the tokenizer writes them


@pytest.mark.parametrize(
    ("normalizer", "answer", "output", "right"),
    [
        (normalizers.NFC(), "cafe\u0301", "caf\u00e9", True),
        (normalizers.NFKC(), "\ufb01ne", "fine", True),
        (normalizers.Lowercase(), "Paris", "paris", True),
        (normalizers.Lowercase(), "Paris", "rome", False),
        (normalizers.Lowercase(), "use </s> here", "use", False),
    ],
)
def test_an_answer_is_compared_with_what_the_tokenizer_writes(normalizer, answer, output, right, llama, other):
    other.backend_tokenizer.normalizer = normalizer
    scorer = make_scorer(llama, other, OWN, [Example("a", answer)], EvaluationSection(), None)
    assert scorer.judge(0, Output(output)).correct is right
    (note,) = OWN.tokenizer_notes(other, Splits([Example("a", answer)], []))
    assert ascii(answer) in note


def test_options_that_the_tokenizer_writes_alike_are_named(other):
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    notes = OWN.tokenizer_notes(other, Splits([Example("a", "a", options=("A", "a"))], []))
    assert notes == ["the tokenizer writes two of the options ('A', 'a') alike; no scorer can tell."]


# The command line


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a recipe for prompts of several lengths and a base model in a folder, with its files."""

    def write(model, tokenizer, **method):
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        rows = [{"prompt": "say " + "a " * i, "completion": "ok"} for i in range(12)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        content = {
            "model": {"name": "base", "dtype": "float32"},
            "method": {"name": "pera", "r": 2, **method},
            "task": {"name": "own", "data": "rows.jsonl", "test_size": 4},
            "training": {"learning_rate": 0.01, "max_steps": 2, "batch_size": 4},
            "evaluation": {"max_new_tokens": 3, "batch_size": 4},
        }
        (tmp_path / "r.yaml").write_text(json.dumps(content))
        return "r.yaml"

    return write


def test_training_refuses_batches_that_would_be_padded_before_it_begins(recipe, rwkv, tokenizer, pera):
    file = recipe(rwkv, tokenizer, target_modules=["key", "value"])
    found = pera("train", file, "--output", "run")
    assert found.code == 2
    assert "training.batch_size=4: padding changes what RwkvForCausalLM computes" in found.err
    assert pera("train", file, "training.batch_size=1", "--output", "run2").code == 0
    assert pera("evaluate", "run2").code == 0


@pytest.mark.parametrize("end", [True, False])
def test_every_command_works_without_a_padding_token_and_says_what_ends_an_answer(end, recipe, llama, other, pera):
    other.eos_token = other.pad_token = None
    other.chat_template = other.chat_template if end else None
    llama.generation_config.pad_token_id = llama.config.pad_token_id = None
    file = recipe(llama, other, target_modules=["q_proj"])
    found = pera("train", file, "--output", "run")
    assert found.code == (0 if end else 2)
    if not end:
        assert found.err.count("\n") == 1
        assert "set eos_token in its tokenizer_config.json" in found.err
        return
    assert pera("evaluate", "run").code == 0
    assert pera("predict", "run", "--input", "rows.jsonl", "--output", "out.jsonl").code == 0
