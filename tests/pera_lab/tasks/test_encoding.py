"""From example to tokens, and a loss that is on the answer only."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from pera import PeraConfig
from pera.errors import UserError
from pera_lab.tasks import Example
from pera_lab.tasks.encoding import (
    CHAT,
    IGNORED,
    AnswerCollator,
    Frame,
    PackingCollator,
    count_labels,
    encode_chat,
    encode_example,
    encode_prompt,
)

EXAMPLES = [
    Example("How is Liam related to Zoe?", "father"),
    Example("Jennifer is married to Ethan. What is she to him? Answer with a single word.", "wife"),
    Example("Who?", "a sister-in-law, on the other side"),
]


@pytest.fixture
def plain(tokenizer):
    """A tokenizer without a chat template that, like many, adds an end-of-sequence token to every text."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    plain._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", plain.bos_token_id), ("</s>", plain.eos_token_id)]
    )
    return plain


def test_a_prompt_uses_the_chat_template(tokenizer):
    ids = encode_prompt(tokenizer, "How is Liam related to Zoe?")
    assert tokenizer.decode(ids) == "<s>user\nHow is Liam related to Zoe?</s><s>assistant\n"


def test_messages_that_the_template_rejects_are_an_error_with_its_reason(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported.') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert encode_chat(strict, messages[1:])
    sentence = (
        "messages with the roles system, user: the model's chat template rejects them: System role not supported\\."
    )
    with pytest.raises(UserError, match=f"^{sentence}"):
        encode_chat(strict, messages)


def test_half_of_a_surrogate_pair_in_a_message_is_an_error(tokenizer):
    with pytest.raises(UserError, match=r"the messages hold '\\ud83d', half of a surrogate pair"):
        encode_chat(tokenizer, [{"role": "user", "content": "Who?\ud83d"}])


def test_without_a_template_a_prompt_is_a_line_without_an_end_token(plain):
    assert plain("a").input_ids[-1] == plain.eos_token_id
    assert plain.decode(encode_prompt(plain, "How is Liam related to Zoe?")) == "<s>How is Liam related to Zoe?\n"


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_loss_is_on_the_answer_and_the_end_token_only(example, tokenizer):
    encoded = encode_example(tokenizer, example)
    prompt = encode_prompt(tokenizer, example.prompt)
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert encoded["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert encoded["labels"][len(prompt) :] == encoded["input_ids"][len(prompt) :]
    assert tokenizer.decode(encoded["labels"][len(prompt) :]) == f"{example.answer}</s>"
    assert encoded["attention_mask"] == [1] * len(encoded["input_ids"])


def test_the_answer_gets_no_special_tokens_of_its_own(plain):
    encoded = encode_example(plain, EXAMPLES[0])
    assert plain.decode(encoded["input_ids"]) == "<s>How is Liam related to Zoe?\nfather</s>"


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def adapted(request):
    """A base model in float64 with a PERA adapter whose update is not zero."""
    base = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(request.param), dtype=torch.float64)
    targets = {"tiny_llama": ["q_proj", "v_proj", "down_proj"], "tiny_gpt2": ["c_attn", "c_fc"]}[request.param]
    torch.manual_seed(1)
    model = get_peft_model(base, PeraConfig(r=2, target_modules=targets, normalization="rms", init_weights=False))
    return model.double()


def loss_of_whole_sequences(model, encoded):
    """Mean loss of all answer tokens, from the logits of every position, one unpadded example at a time."""
    total, count = 0.0, 0
    for example in encoded:
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
        labels = torch.tensor(example["labels"])[1:]
        answer = labels != IGNORED
        total = total + cross_entropy(logits[:-1][answer], labels[answer], reduction="sum")
        count += int(answer.sum())
    return total / count


def gradients(model, loss):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


@pytest.mark.parametrize(
    ("frame", "packing"), [(CHAT, False), (CHAT, True), (Frame("{prompt}", loss="all"), True)]
)  # with padding, the loss on all tokens counts the first token of a row too
def test_loss_and_gradients_are_those_of_whole_sequences(frame, packing, adapted, tokenizer):
    encoded = [encode_example(tokenizer, example, frame) for example in EXAMPLES]
    base = adapted.get_base_model()
    batch = (PackingCollator(base) if packing else AnswerCollator(tokenizer, base))(encoded)
    loss = adapted(**batch).loss
    assert count_labels(batch["labels"]) == sum(label != IGNORED for row in encoded for label in row["labels"][1:])
    expected = loss_of_whole_sequences(adapted, encoded)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=0)  # transformers takes it in float32
    found, wanted = gradients(adapted, loss), gradients(adapted, expected)
    assert {name.split(".")[-2] for name in found} == {"pera_A", "pera_B", "pera_h"}
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


def test_a_batch_is_padded_on_the_left_and_asks_for_the_answers_only(tokenizer, adapted):
    encoded = [encode_example(tokenizer, example) for example in EXAMPLES]
    batch = AnswerCollator(tokenizer, adapted.get_base_model())(encoded)
    longest = max(len(example["input_ids"]) for example in encoded)
    answers = [sum(label != IGNORED for label in example["labels"]) for example in encoded]
    assert batch["input_ids"].shape == (3, longest)
    assert batch["labels"].shape == (3, max(answers) + 1)
    assert batch["logits_to_keep"].tolist() == list(range(longest - max(answers) - 1, longest))
    for row, (example, answer) in enumerate(zip(encoded, answers, strict=True)):
        size = len(example["input_ids"])
        assert batch["input_ids"][row, -size:].tolist() == example["input_ids"]
        assert batch["attention_mask"][row].tolist() == [0] * (longest - size) + [1] * size
        assert batch["position_ids"][row, -size:].tolist() == list(range(size))
        assert batch["labels"][row].tolist() == [IGNORED] * (max(answers) + 1 - answer) + example["labels"][-answer:]
    assert adapted(**batch).logits.shape[:2] == batch["labels"].shape


def test_a_packed_batch_has_no_padding_and_asks_for_the_answers_only(tokenizer, adapted):
    encoded = [encode_example(tokenizer, example) for example in EXAMPLES]
    batch = PackingCollator(adapted.get_base_model())(encoded)
    sizes = [len(example["input_ids"]) for example in encoded]
    answers = [sum(label != IGNORED for label in example["labels"]) for example in encoded]
    assert batch["input_ids"].tolist() == [[token for example in encoded for token in example["input_ids"]]]
    assert batch["position_ids"].tolist() == [[i for size in sizes for i in range(size)]]
    assert "attention_mask" not in batch
    assert batch["labels"].shape == (1, sum(answers) + len(answers))
    assert adapted(**batch).logits.shape[:2] == batch["labels"].shape


class OldModel(torch.nn.Linear):
    """Cannot be asked for some of its logits, and finds positions by itself."""

    def forward(self, input_ids, attention_mask, labels=None):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2))


def test_a_model_without_logits_to_keep_gets_whole_sequences(tokenizer):
    encoded = [encode_example(tokenizer, example) for example in EXAMPLES]
    batch = AnswerCollator(tokenizer, OldModel(1, 1))(encoded)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [
        sum(label != IGNORED for label in example["labels"]) for example in encoded
    ]
