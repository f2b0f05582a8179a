"""Chat with a model in the terminal."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from pera.errors import UserError
from pera_lab.chat import Conversation, chat
from pera_lab.opening import locate, open_model
from pera_lab.tasks.encoding import encode_chat
from pera_lab.text import visible


@pytest.fixture
def talk(monkeypatch):
    """Types some lines into a chat and returns what is shown."""

    def with_lines(source, *lines, **options):
        screen = io.StringIO()
        console = Console(file=screen, width=100, force_terminal=False)
        waiting = iter(lines)

        def typed(*_, **__):
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(console, "input", typed)
        chat(locate(str(source)), console, dtype="float32", max_new_tokens=6, **options)
        return screen.getvalue()

    return with_lines


def test_an_answer_is_what_the_model_generates_from_the_whole_conversation(finished_run):
    model, tokenizer = open_model(locate(str(finished_run.path)), "float32")
    talk = Conversation(model, tokenizer, max_new_tokens=5)
    first, second = talk.answer("one"), talk.answer("two")
    roles = ["user", "assistant", "user", "assistant"]
    assert [m["role"] for m in talk.messages] == roles
    assert [m["content"] for m in talk.messages] == ["one", first, "two", second]
    ids = torch.tensor([encode_chat(tokenizer, talk.messages[:3])])
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).strip() == second


def test_the_oldest_turns_are_dropped_when_the_context_is_full(tokenizer):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 96}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    talk = Conversation(model, tokenizer, max_new_tokens=200)
    for i in range(4):
        assert talk.answer(f"message {i}")
    assert [m["content"] for m in talk.messages if m["role"] == "user"][-1] == "message 3"
    assert len(talk.messages) < 8
    remembered = list(talk.messages)
    with pytest.raises(UserError, match=r"^the message has \d+ tokens, but the model reads at most 96; shorten it"):
        talk.answer("too long " * 40)
    assert talk.messages == remembered


def test_a_message_that_is_too_long_does_not_end_the_chat(finished_run, talk):
    shown = talk(finished_run.path, "word " * 600, "/new")
    assert "but the model reads at most 512; shorten it" in " ".join(shown.split())
    assert "New conversation." in shown


def test_compare_shows_the_answers_of_base_model_and_adapter(finished_run, talk):
    model, tokenizer = open_model(locate(str(finished_run.path)), "float32")
    base = Conversation(model, tokenizer, base=True, max_new_tokens=6).answer("hello")
    adapted = Conversation(model, tokenizer, max_new_tokens=6).answer("hello")
    assert base != adapted
    shown = talk(finished_run.path, "hello", compare=True)
    assert "base" in shown
    assert "adapter" in shown


def test_compare_needs_an_adapter(tiny_llama, talk):
    with pytest.raises(UserError, match="--compare needs an adapter"):
        talk(tiny_llama, "hello", compare=True)


def test_commands_start_a_new_conversation_and_exit(finished_run, talk, monkeypatch):
    answered = []
    monkeypatch.setattr(Conversation, "answer", lambda self, text, *_: answered.append((text, id(self))) or text)
    shown = talk(finished_run.path, "a", "", "/new", "b", "/quit", "never")
    assert [text for text, _ in answered] == ["a", "b"]
    assert answered[0][1] != answered[1][1]
    assert "New conversation." in shown


@pytest.mark.parametrize("compare", [False, True])
def test_escapes_and_markup_in_an_answer_are_shown_as_text(finished_run, talk, monkeypatch, compare):
    model, tokenizer = open_model(locate(str(finished_run.path)), "float32")
    answer = "\x1b[31m[bold]x"
    ids = tokenizer(answer, add_special_tokens=False).input_ids

    def generate(*_, input_ids, streamer=None, **__):
        output = torch.cat([input_ids, torch.tensor([ids])], 1)
        if streamer is not None:
            streamer.put(input_ids)
            for token in ids:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return output

    monkeypatch.setattr(type(model), "generate", lambda self, **options: generate(**options))
    shown = talk(finished_run.path, "hello", compare=compare)
    assert "\x1b" not in shown
    assert r"\x1b[31m[bold]x" in shown


@pytest.fixture
def base_with_settings(tiny_llama, tmp_path):
    """A function that copies the tiny LLaMA with generation settings of its own."""

    def save(**settings):
        shutil.copytree(tiny_llama, tmp_path / "base")
        (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **settings}))
        return tmp_path / "base"

    return save


def test_the_settings_of_the_base_apply_and_are_shown(base_with_settings, talk):
    settings = {"num_beams": 2, "num_return_sequences": 2, "repetition_penalty": 1.5, "top_p": 0.5, "max_length": 9}
    base = base_with_settings(**settings)
    shown = talk(base, "hello")
    assert "The base model's generation settings apply: num_beams=2, repetition_penalty=1.5." in shown
    model, tokenizer = open_model(locate(str(base)), "float32")
    ids = torch.tensor([encode_chat(tokenizer, [{"role": "user", "content": "hello"}])])
    model.generation_config = GenerationConfig(num_beams=2, repetition_penalty=1.5, eos_token_id=1, max_new_tokens=6)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert visible(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()) in shown


def test_the_temperature_of_the_user_wins_over_the_base(base_with_settings, talk):
    base = base_with_settings(do_sample=True, temperature=0.5, repetition_penalty=1.5)
    assert "apply: do_sample=True, temperature=0.5, repetition_penalty=1.5." in talk(base, "/quit")
    assert "apply: repetition_penalty=1.5." in talk(base, "/quit", temperature=0.0)


def test_settings_that_cannot_be_used_are_named_and_the_chat_goes_on(base_with_settings, talk):
    shown = " ".join(talk(base_with_settings(repetition_penalty=-1.0), "hello", "/new").split())
    assert "the base model's generation_config.json has settings that cannot be used" in shown
    assert "New conversation." in shown


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_file_of_settings_is_refused(content, base_with_settings, talk):
    base = base_with_settings()
    (base / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        talk(base, "hello")


def test_the_token_that_ends_an_answer_is_not_shown(base_with_settings, tiny_llama, talk, monkeypatch):
    model, tokenizer = open_model(locate(str(tiny_llama)), "float32")
    (end,) = tokenizer("q", add_special_tokens=False).input_ids
    (first,) = tokenizer("Z", add_special_tokens=False).input_ids

    def generate(self, input_ids, streamer=None, **_):
        if streamer is not None:
            for ids in (input_ids, torch.tensor([first]), torch.tensor([end])):
                streamer.put(ids)
            streamer.end()
        return torch.cat([input_ids, torch.tensor([[first, end]])], 1)

    monkeypatch.setattr(type(model), "generate", generate)
    shown = talk(base_with_settings(eos_token_id=end), "hello")
    assert "Z" in shown.splitlines()
    assert "Zq" not in shown
