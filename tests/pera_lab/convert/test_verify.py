"""Two models agree if their logits do."""

import json
import shutil
from contextlib import nullcontext

import gguf
import pytest
import torch
from peft import get_peft_model

from pera import PeraConfig
from pera.errors import UserError
from pera_lab.convert.export import export
from pera_lab.convert.verify import COMPARED_IN_LLAMA_CPP, PROMPTS, TOLERANCE, compare, logits, prompts_of, verify
from pera_lab.embedded import resolve_gguf
from pera_lab.models import load_model, load_tokenizer
from pera_lab.opening import locate, locate_adapter
from pera_lab.recipe import load_recipe
from pera_lab.tasks.encoding import encode_prompt

CLEAR = torch.tensor([[0.0, 1.0, 3.0], [5.0, 1.0, 0.0]])
"""Logits of two tokens without a near-tie."""


def in_float32(source, target):
    """Write the GGUF model ``source`` with its weights in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_same_logits_agree():
    agreement = compare([CLEAR, CLEAR], [CLEAR, CLEAR], torch.float32)
    assert agreement.agree
    assert (agreement.prompts, agreement.tokens, agreement.near_ties) == (2, 4, 0)
    assert (agreement.max_difference, agreement.same_top1) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_limit_is_the_tolerance_of_the_dtype(dtype):
    for factor, agree in [(0.9, True), (1.1, False)]:
        other = CLEAR.clone()
        other[1, 2] -= factor * TOLERANCE[dtype]
        agreement = compare([CLEAR], [other], dtype)
        assert agreement.agree is agree
        assert agreement.max_difference == pytest.approx(factor * TOLERANCE[dtype], rel=1e-4)
        assert (agreement.tolerance, f"torch.{agreement.dtype}") == (TOLERANCE[dtype], str(dtype))


def test_the_largest_difference_is_found_in_either_direction_and_in_any_prompt():
    for change in (0.5, -0.5):
        assert compare([CLEAR, CLEAR], [CLEAR, CLEAR + change], torch.float32).max_difference == 0.5


def test_another_prediction_is_a_disagreement_except_at_a_near_tie():
    tie = torch.tensor([[1.0, 1.0005, 0.0]])
    swapped = torch.tensor([[1.0005, 1.0, 0.0]])
    agreement = compare([CLEAR, tie], [CLEAR, swapped], torch.float32)
    assert agreement.agree
    assert (agreement.near_ties, agreement.same_top1) == (1, 1.0)
    agreement = compare([CLEAR, tie], [CLEAR.flip(1), tie], torch.float32)
    assert not agreement.agree
    assert agreement.same_top1 == 0.0
    agreement = compare([CLEAR], [torch.stack([CLEAR[0], CLEAR[1].flip(0)])], torch.float32)
    assert agreement.same_top1 == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_never_agree(value):
    broken = torch.full_like(CLEAR, value)
    for pair in ([CLEAR, broken], [broken, CLEAR], [broken, broken]):
        agreement = compare(pair[:1], pair[1:], torch.float32)
        assert not agreement.agree
        assert agreement.max_difference == float("inf")


def test_nan_logits_count_as_different_predictions():
    nan = torch.full_like(CLEAR, float("nan"))
    assert compare([nan], [nan], torch.float32).same_top1 == 0


def test_models_of_different_vocabularies_cannot_be_compared():
    with pytest.raises(UserError, match=r"cannot be compared: their logits have shapes \(2, 3\) and \(2, 2\)"):
        compare([CLEAR, CLEAR], [CLEAR, CLEAR[:, :2]], torch.float32)


def test_the_sentence_holds_the_result():
    agreement = compare([CLEAR], [CLEAR + 0.25], torch.float32)
    assert agreement.sentence() == (
        "largest logit difference 2.5e-01 (tolerance 0.001, float32), 100.0 % of top-1 tokens equal over 2 tokens, "
        "KL divergence 0.0e+00"
    )
    ties = compare([torch.zeros(1, 3)], [torch.zeros(1, 3)], torch.float32)
    assert ties.sentence().endswith("equal over 1 tokens (1 near-ties left out), KL divergence 0.0e+00")


def test_the_result_is_saved(tmp_path):
    agreement = compare([CLEAR], [CLEAR + 0.25], torch.bfloat16)
    agreement.save(tmp_path, of="this", against="that")
    assert json.loads((tmp_path / "verification.json").read_text()) == {
        "of": "this",
        "against": "that",
        "agree": True,
        "prompts": 1,
        "tokens": 2,
        "max_difference": 0.25,
        "tolerance": 1.0,
        "dtype": "bfloat16",
        "near_ties": 0,
        "same_top1": 1.0,
        "kl_divergence": agreement.kl_divergence,
    }


def test_logits_belong_to_every_token_of_the_encoded_prompts(tiny_llama):
    model, tokenizer = load_model(str(tiny_llama), dtype="bfloat16"), load_tokenizer(str(tiny_llama))
    found = logits(model, tokenizer, ["Who?", "What is Zoe?"])
    for prompt, values in zip(["Who?", "What is Zoe?"], found, strict=True):
        assert values.shape == (len(encode_prompt(tokenizer, prompt)), 400)
        assert values.dtype == torch.float32


def test_a_prompt_that_is_too_long_is_cut_at_its_beginning(tiny_gpt2):
    model, tokenizer = load_model(str(tiny_gpt2), dtype="float32"), load_tokenizer(str(tiny_gpt2))
    (found,) = logits(model, tokenizer, ["Who is Zoe? " * 200])
    ids = encode_prompt(tokenizer, "Who is Zoe? " * 200)
    assert len(found) == 512 < len(ids)
    with torch.no_grad():
        assert torch.equal(found, model(input_ids=torch.tensor([ids[-512:]])).logits[0])


def test_llama_cpp_gets_the_same_tokens_and_a_context_that_holds_them(tiny_gpt2, tmp_path, monkeypatch):
    asked = []

    def serving(model, adapter, *, context):
        asked.append(context)
        return nullcontext("address")

    def log_probabilities(address, prompt, vocabulary, last):
        asked.append(len(prompt))
        return torch.zeros(last, vocabulary)

    for function in (serving, log_probabilities):
        monkeypatch.setattr(f"pera_lab.convert.verify.{function.__name__}", function)
    monkeypatch.setattr("pera_lab.convert.verify.weights_of", lambda model: "float32")
    monkeypatch.setattr("pera_lab.embedded.resolve_gguf", lambda name: tmp_path / "model.gguf")
    (tmp_path / "prompts.txt").write_text("Who?\n" + "Who is Zoe? " * 200)
    verify(str(tiny_gpt2), str(tiny_gpt2), prompts=tmp_path / "prompts.txt", in_llama_cpp=True)
    context, short, long = asked
    assert short < long == 512 < context


def test_a_run_provides_the_prompts_of_its_task(finished_run, recipe_file):
    held_out = [example.prompt for example in load_recipe(str(recipe_file)).build_splits().test[:6]]
    run, model = locate(str(finished_run.path)), locate("smollm2-135m")
    assert prompts_of(model, run) == prompts_of(run) == held_out
    assert prompts_of(model) == prompts_of(locate(str(finished_run.adapter.path))) == list(PROMPTS)


def test_a_run_its_adapter_and_a_copy_agree(finished_run, tmp_path):
    copy = shutil.copytree(finished_run.adapter.path, tmp_path / "copy")
    for a, b in [(finished_run.path, finished_run.adapter.path), (finished_run.adapter.path, copy)]:
        agreement = verify(str(a), str(b))
        assert agreement.agree
        assert agreement.max_difference == 0.0


def test_an_adapter_and_its_base_do_not_agree(finished_run, tiny_llama):
    for pair in [(finished_run.path, tiny_llama), (tiny_llama, finished_run.adapter.path)]:
        agreement = verify(*map(str, pair))
        assert not agreement.agree
        assert agreement.max_difference > 0.1
        assert agreement.same_top1 < 0.9


def test_both_models_are_computed_in_the_given_dtype(tiny_llama, save_llama, tmp_path):
    rounded = save_llama(tmp_path / "rounded", dtype=torch.bfloat16, tie_word_embeddings=False)
    assert verify(str(tiny_llama), str(rounded), dtype="bfloat16").max_difference == 0.0
    agreement = verify(str(tiny_llama), str(rounded), dtype="float32")
    assert agreement.dtype == "float32"
    assert agreement.max_difference > 1e-3


def test_the_kl_divergence_is_the_one_of_the_next_token():
    p, q = torch.randn(5, 7), torch.randn(5, 7)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    found = compare([p[:2], p[2:]], [q[:2], q[2:]], torch.float32)
    assert found.kl_divergence == pytest.approx(expected.mean().item(), rel=1e-5)
    assert compare([p], [p + 3], torch.float32).kl_divergence < 1e-6


def test_prompts_are_read_from_a_file(tiny_llama, tmp_path):
    (tmp_path / "prompts.txt").write_text("Who is Zoe?\n\nWho is Liam?\n")
    assert verify(str(tiny_llama), str(tiny_llama), prompts=tmp_path / "prompts.txt").prompts == 2
    (tmp_path / "empty.txt").write_text("\n")
    for name, words in [("empty.txt", "is empty"), ("missing.txt", "is not a readable text file")]:
        with pytest.raises(UserError, match=rf"--prompts: .*{name}.* {words}"):
            verify(str(tiny_llama), str(tiny_llama), prompts=tmp_path / name)


def test_base_needs_a_gguf_adapter_and_llama_cpp_a_gguf_base(tiny_llama, save_adapter, tmp_path):
    save_adapter(tmp_path / "adapter", tiny_llama)
    export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "gguf", to="gguf")
    with pytest.raises(UserError, match=r"--base=.* is for a GGUF adapter, but neither"):
        verify(str(tiny_llama), str(tiny_llama), base=str(tiny_llama))
    with pytest.raises(UserError, match=r"are GGUF adapters, which do not name their base; add --base"):
        verify(str(tmp_path / "gguf"), str(tmp_path / "gguf"))
    assert verify(str(tmp_path / "gguf"), str(tmp_path / "gguf"), base=str(tiny_llama)).max_difference == 0
    with pytest.raises(UserError, match=r"--llama-cpp: .* is neither a GGUF model nor a GGUF adapter on one"):
        verify(str(tmp_path / "adapter"), str(tmp_path / "gguf"), in_llama_cpp=True)


@pytest.mark.slow
@pytest.mark.parametrize("expansion", [{}, {"terms": "none", "anchors": 4}], ids=["products", "anchors"])
def test_llama_cpp_agrees_with_transformers_on_a_float32_file(expansion, tmp_path):
    """The embedded model agrees with a random adapter in llama.cpp, and disagrees without it."""
    pytest.importorskip("xllamacpp")
    f32 = tmp_path / "f32.gguf"
    in_float32(resolve_gguf("smollm2-135m"), f32)
    options = {"target_modules": ["q_proj", "k_proj", "down_proj"], "init_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_model("smollm2-135m", dtype="float32"), PeraConfig(r=2, **options, **expansion))
    model.save_pretrained(tmp_path / "adapter")
    export(locate_adapter(str(tmp_path / "adapter")), tmp_path / "gguf", to="gguf")
    (tmp_path / "prompts.txt").write_text("What is the capital of France?\n")
    options = {"in_llama_cpp": True, "base": str(f32), "prompts": tmp_path / "prompts.txt"}
    agreement = verify(str(tmp_path / "adapter"), str(tmp_path / "gguf"), **options)
    assert agreement.agree
    assert agreement.tokens == COMPARED_IN_LLAMA_CPP
    assert not verify("smollm2-135m", str(tmp_path / "gguf"), **options).agree
