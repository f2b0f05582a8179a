"""Generation with every strategy, with and without a cache, merged and unmerged."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration, pipeline

from reference import relative_error
from tiny import VOCABULARY, adapt, gpt2, llama, tokens

STRATEGIES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
}


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def base(make):
    """A model that never stops early, with logits so far apart that rounding does not change tokens."""
    model = make()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1 if make is t5 else 20)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(params=[llama, gpt2, t5])
def model(request):
    return adapt(base(request.param), target_modules="all-linear", normalization="rms")


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return STRATEGIES[request.param]


def generate(model, prompts=None, **options):
    torch.manual_seed(3)
    prompts = tokens() if prompts is None else prompts
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 10, **options}
    return model.generate(input_ids=prompts, return_dict_in_generate=True, output_logits=True, **options)


def same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    assert relative_error(torch.stack(found.logits), torch.stack(expected.logits)) <= 1e-4


def test_generation_with_a_cache_equals_generation_without(model, strategy):
    cached = generate(model, **strategy, use_cache=True)
    same(generate(model, **strategy, use_cache=False), cached)
    with model.disable_adapter():
        assert not torch.equal(generate(model, **strategy).sequences, cached.sequences)


def test_generation_with_a_static_cache_equals_generation_without(model):
    same(generate(model, do_sample=False, cache_implementation="static"), generate(model, do_sample=False))


def test_merged_generation_equals_unmerged_generation(model, strategy):
    expected = generate(model, **strategy)
    same(generate(model.merge_and_unload(), **strategy), expected)


def test_a_padded_prompt_generates_the_same_tokens():
    model = adapt(base(llama), target_modules="all-linear", normalization="rms")
    alone = generate(model, tokens()[1:, 2:], do_sample=False).sequences[0, 4:]
    mask = torch.ones_like(tokens())
    mask[1, :2] = 0
    padded = generate(model, tokens(), attention_mask=mask, do_sample=False).sequences[1, 6:]
    assert torch.equal(padded, alone)


def test_drafting_with_the_base_generates_the_same_tokens():
    """In assisted generation the base model proposes tokens and the adapted model accepts them."""
    model = adapt(base(llama), target_modules=["q_proj"])
    one = tokens()[:1]
    expected = generate(model, one, do_sample=False)
    same(generate(model, one, do_sample=False, assistant_model=base(llama)), expected)


def test_training_works_after_generation(model):
    """The expansions that a call keeps in evaluation are not used in the next training step."""
    before = generate(model, do_sample=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    after = generate(model.eval(), do_sample=False)
    assert not torch.equal(torch.stack(after.logits), torch.stack(before.logits))
    same(generate(model.merge_and_unload(), do_sample=False), after)


def test_a_pipeline_accepts_the_model(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = adapt(AutoModelForCausalLM.from_pretrained(tiny_llama), target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"max_new_tokens": 6, "do_sample": False}
    text = pipeline("text-generation", model, tokenizer=tokenizer)("Who is", **options)[0]["generated_text"]
    merged = pipeline("text-generation", model.merge_and_unload(), tokenizer=tokenizer)
    assert merged("Who is", **options)[0]["generated_text"] == text
    plain = pipeline("text-generation", AutoModelForCausalLM.from_pretrained(tiny_llama), tokenizer=tokenizer)
    assert plain("Who is", **options)[0]["generated_text"] != text
