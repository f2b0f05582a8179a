"""Layers that share a weight: one adapter with ensure_weight_tying, separate weights after a merge without it."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import reference
from pera import PeraConfig, UserError
from reference import relative_error
from tiny import adapt, evaluate, gpt2, layers, llama, logits, reference_base, tokens


class Tied(NamedTuple):
    """A model whose head shares the weight of its embedding, and the names of the embedding and of another target."""

    make: Callable
    embedding: str
    other: str

    @property
    def ending(self):
        return self.embedding.rpartition(".")[2]

    def adapt(self, *names, **options):
        """The model with a tied adapter on ``names``, where "embedding" and "other" stand for the two modules."""
        names = [{"embedding": self.ending, "other": self.other}.get(name, name) for name in names]
        return adapt(self.make(), **{"target_modules": names, "ensure_weight_tying": True, **options})


MODELS = {
    "llama": Tied(lambda: llama(tie_word_embeddings=True), "model.embed_tokens", "q_proj"),
    "gpt2": Tied(gpt2, "transformer.wte", "c_attn"),
}
TARGETS = {
    "head": lambda tied: ["lm_head", tied.other],
    "embedding": lambda tied: [tied.embedding, tied.other],
    "both": lambda tied: ["lm_head", tied.ending, tied.other],
    "expression": lambda tied: rf".*\.({tied.other}|{tied.ending})",
}
SAVED = [["lm_head"], ["embedding"], ["embedding", "lm_head"]]


@pytest.fixture(params=MODELS)
def tied(request):
    return MODELS[request.param]


@pytest.fixture(params=TARGETS)
def adapted(request, tied):
    """A model with an adapter that is tied in both uses, and that also adapts another layer."""
    return adapt(tied.make(), target_modules=TARGETS[request.param](tied), ensure_weight_tying=True)


def shared(model):
    """Whether the head has the weight of the embedding."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    embedding, head = (
        getattr(module, "base_layer", module) for module in (base.get_input_embeddings(), base.get_output_embeddings())
    )
    return embedding.weight is head.weight


def trained(model):
    """Names in the base model of what is trained."""
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


def factors_of(*names):
    return {f"{name}.pera_{factor}.default" for name in names for factor in "ABh"}


def explicit(tied, model, adapter_names=("default",)):
    """The base model in float64 with explicit updates, that of the embedding in the one weight of both."""
    base = tied.make().double()
    for name, layer in layers(model).items():
        if name != "lm_head":
            own = [adapter for adapter in adapter_names if layer.has(adapter)]
            base.get_submodule(name).weight.data.copy_(reference_base(layer, own).weight)
    assert shared(base)
    return base


def loss_of(output):
    return cross_entropy(output[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


def separations(warned):
    return [str(w.message) for w in warned if "has been separated" in str(w.message)]


def test_tied_layers_share_one_update(tied, adapted):
    others = [name for name in layers(adapted) if name.endswith(tied.other)]
    assert len(others) == 2
    assert trained(adapted) == factors_of(tied.embedding, *others)
    assert set(layers(adapted)) == {tied.embedding, "lm_head", *others}
    assert relative_error(logits(adapted), logits(tied.make())) > 0.5
    assert relative_error(logits(adapted), logits(explicit(tied, adapted))) <= 1e-5


def test_tied_layers_share_their_anchors(tied):
    """The head has the frozen rows of the embedding, with the sides exchanged."""
    model = tied.adapt("embedding", "other", terms="none", anchors=3)
    embedding, head = (layers(model)[name].expansion["default"].anchors for name in (tied.embedding, "lm_head"))
    assert torch.equal(head.V, embedding.U_T)
    assert torch.equal(head.U_T, embedding.V)
    assert relative_error(logits(model), logits(explicit(tied, model))) <= 1e-5


@pytest.mark.parametrize("normalization", ["none", "rms"])
def test_gradients_of_both_uses_add_up(tied, normalization):
    model = tied.adapt("embedding", normalization=normalization, pera_alpha=2).double()
    layer = layers(model)[tied.embedding]
    loss_of(model(tokens()).logits).backward()
    factors = [p["default"].detach().clone().requires_grad_() for p in (layer.pera_A, layer.pera_B, layer.pera_h)]
    A, B, h = factors
    delta = reference.delta_weight(A, B, reference.by_pair(h, 3, "all"), normalization, 2 / 3).T
    base, weight = tied.make().double(), f"{tied.embedding}.weight"
    assert shared(base)
    summed = {weight: base.get_parameter(weight).detach() + delta}
    loss_of(functional_call(base, summed, (tokens(),)).logits).backward()
    for own, expected in zip((layer.pera_A, layer.pera_B, layer.pera_h), factors, strict=True):
        assert (
            relative_error(own["default"].grad, expected.grad) <= 1e-6
        )  # some operations of the model are always in float32


def test_tied_training_starts_at_the_base_model(tied):
    assert torch.equal(logits(tied.adapt("lm_head", init_weights=True)), logits(tied.make()))


def test_a_tied_adapter_is_saved_once_and_loaded(tied, adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    saved = {key for key in load_file(tmp_path / "adapter_model.safetensors") if "pera_" in key}
    assert saved == {f"base_model.model.{name.removesuffix('.default')}" for name in trained(adapted)}
    loaded = PeftModel.from_pretrained(tied.make(), tmp_path, is_trainable=True).eval()
    assert trained(loaded) == trained(adapted)
    assert torch.equal(logits(loaded), logits(adapted))


def test_a_merged_model_stays_tied(tied, adapted, tmp_path, recwarn):
    expected = logits(adapted)
    adapted.merge_adapter()
    assert shared(adapted)
    assert relative_error(logits(adapted), expected) <= 1e-5
    adapted.unmerge_adapter()
    assert shared(adapted)
    assert relative_error(logits(adapted), expected) <= 1e-5
    merged = adapted.merge_and_unload()
    assert type(merged.get_output_embeddings()) is torch.nn.Linear
    assert shared(merged)
    assert merged.config.tie_word_embeddings
    assert relative_error(logits(merged), expected) <= 1e-5
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(merged))
    assert separations(recwarn) == []


def test_a_disabled_tied_adapter_gives_the_base_model(tied, adapted):
    base = logits(tied.make())
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    adapted.merge_adapter()
    with adapted.disable_adapter():
        assert relative_error(logits(adapted), base) <= 1e-5


def test_an_unloaded_tied_adapter_gives_the_base_model(tied, adapted):
    base = adapted.unload()
    assert shared(base)
    assert torch.equal(logits(base), logits(tied.make()))


def test_a_second_tied_adapter_shares_its_own_update(tied, recwarn):
    model = tied.adapt("lm_head", "other")
    first = logits(model)
    options = {"target_modules": [tied.ending], "ensure_weight_tying": True, "init_weights": False}
    model.add_adapter("second", PeraConfig(r=2, normalization="rms", **options))
    assert not [name for name, _ in model.named_parameters() if "lm_head.pera_" in name]
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert relative_error(logits(model), logits(explicit(tied, model, ["second"]))) <= 1e-5
    model.base_model.set_adapter(["default", "second"])
    both = logits(explicit(tied, model, ["default", "second"]))
    assert relative_error(logits(model), both) <= 1e-5
    model.merge_adapter()
    assert shared(model)
    assert relative_error(logits(model), both) <= 1e-5
    model.unmerge_adapter()
    model.delete_adapter("second")
    assert relative_error(logits(model), first) <= 1e-5
    model.merge_adapter()
    assert shared(model)
    assert separations(recwarn) == []
    assert not [name for name, _ in model.named_parameters() if "second" in name]
    assert not [layer for layer in layers(model).values() if "second" in layer.tied]


def test_a_batch_can_mix_tied_adapters(tied):
    model = tied.adapt("embedding", "other")
    with torch.no_grad():
        mixed = model(tokens(), adapter_names=["default", "__base__"]).logits
    assert relative_error(mixed[0], logits(model)[0]) <= 1e-5
    assert relative_error(mixed[1], logits(tied.make())[1]) <= 1e-5


@pytest.mark.parametrize("name", ["lm_head", "embedding"])
def test_a_second_adapter_without_tying_separates_the_weights(tied, name):
    model = tied.adapt("embedding")
    name = tied.ending if name == "embedding" else name
    model.add_adapter("second", PeraConfig(r=2, target_modules=[name], init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    with pytest.warns(UserWarning, match="has been separated"):
        model.merge_adapter()
    assert not shared(model)
    assert relative_error(logits(model), expected) <= 1e-5
    model.unmerge_adapter()
    assert relative_error(logits(model), expected) <= 1e-5


def test_tied_layers_take_rank_and_scale_of_the_embedding(tied):
    model = tied.adapt("lm_head", rank_pattern={tied.ending: 2}, alpha_pattern={tied.ending: 5})
    both = [layers(model)[name] for name in (tied.embedding, "lm_head")]
    assert [(layer.r["default"], layer.scaling["default"]) for layer in both] == [(2, 2.5)] * 2
    assert relative_error(logits(model), logits(explicit(tied, model))) <= 1e-5


def t5():
    """Four uses of one weight: the shared embedding, which is not called, those of encoder and decoder, the head."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def t5_logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(), decoder_input_ids=tokens()[:, :4]).logits


@pytest.mark.parametrize("target", ["shared", "embed_tokens", "lm_head"])
def test_four_uses_of_one_weight_share_one_update(target, tmp_path):
    model = adapt(t5(), target_modules=[target], ensure_weight_tying=True)
    assert trained(model) == factors_of("shared")
    assert set(layers(model)) == {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}
    expected = t5().double()
    expected.shared.weight.data.copy_(reference_base(layers(model)["shared"]).weight)
    assert relative_error(t5_logits(t5()), t5_logits(expected)) > 0.5
    assert relative_error(t5_logits(model), t5_logits(expected)) <= 1e-5
    model.save_pretrained(tmp_path)
    assert torch.equal(t5_logits(PeftModel.from_pretrained(t5(), tmp_path)), t5_logits(model))
    merged = model.merge_and_unload()
    assert len({merged.get_parameter(f"{name}.weight") for name in ("shared", "decoder.embed_tokens", "lm_head")}) == 1
    assert relative_error(t5_logits(merged), t5_logits(expected)) <= 1e-5


def test_a_saved_embedding_that_peft_would_tie_as_linear_is_refused():
    with pytest.raises(UserError, match=r"modules_to_save: PEFT would tie the embedding 'decoder\.embed_tokens'"):
        adapt(t5(), target_modules=["q"], modules_to_save=["lm_head"], ensure_weight_tying=True)


def test_tying_without_a_shared_weight_warns():
    with pytest.warns(UserWarning, match="no tied modules were found"):
        model = adapt(llama(tie_word_embeddings=False), target_modules=["embed_tokens"], ensure_weight_tying=True)
    assert list(layers(model)) == ["model.embed_tokens"]


@pytest.mark.parametrize("names", SAVED, ids=" and ".join)
def test_tied_saved_modules_are_saved_once(tied, names, tmp_path):
    names = [tied.ending if name == "embedding" else name for name in names]
    model = tied.adapt("other", modules_to_save=names)
    weights = {name for name in trained(model) if "pera_" not in name}
    assert weights == {f"{tied.embedding}.modules_to_save.default.weight"}
    weight = model.get_parameter(f"base_model.model.{weights.pop()}")
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert weight.grad[63].any()  # through the head, because token 63 is not an input
    with torch.no_grad():
        weight.add_(0.1 * torch.randn_like(weight))
    expected = explicit(tied, model)
    expected.get_input_embeddings().weight.data.copy_(weight)
    assert relative_error(logits(model), logits(expected)) <= 1e-5
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved[f"base_model.model.{tied.embedding}.weight"], weight)
    loaded = PeftModel.from_pretrained(tied.make(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    merged = loaded.merge_and_unload()
    assert shared(merged)
    assert relative_error(logits(merged), logits(model)) <= 1e-5


APART = [["embedding"], ["lm_head"], ["embedding", "lm_head"]]


@pytest.mark.parametrize("names", APART, ids=" and ".join)
def test_a_merge_without_tying_separates_the_weights(tied, names, tmp_path):
    model = tied.adapt(*names, "other", ensure_weight_tying=False)
    expected = logits(model)
    adapted_ones = [tied.embedding if name == "embedding" else name for name in names]
    assert trained(model) >= factors_of(*adapted_ones)
    with pytest.warns(UserWarning, match="has been separated") as warned:
        model.merge_adapter()
    (sentence,) = separations(warned)
    assert sentence.startswith(f"{', '.join(adapted_ones)}: the weight was shared")
    assert "ensure_weight_tying=True" in sentence
    assert not shared(model)
    assert relative_error(logits(model), expected) <= 1e-5
    model.unmerge_adapter()
    assert relative_error(logits(model), expected) <= 1e-5
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    assert relative_error(logits(merged), expected) <= 1e-5
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(merged))


@pytest.mark.filterwarnings("ignore:.*has been separated")
def test_a_merge_does_not_change_the_other_use_of_a_weight(tied):
    hidden = torch.randn(3, 32)
    model = tied.adapt("embedding", ensure_weight_tying=False)
    head = model.get_base_model().get_output_embeddings()
    before = evaluate(head, hidden)
    model.merge_adapter()
    assert torch.equal(evaluate(head, hidden), before)

    model = tied.adapt("lm_head", ensure_weight_tying=False)
    embedding = model.get_base_model().get_input_embeddings()
    before = evaluate(embedding, tokens())
    model.merge_adapter()
    assert torch.equal(evaluate(embedding, tokens()), before)


@pytest.mark.parametrize("ensure_weight_tying", [False, True])
def test_trained_token_embeddings_stay_tied(tied, ensure_weight_tying, tmp_path, recwarn):
    rows = [3, 63]
    options = {"trainable_token_indices": rows, "ensure_weight_tying": ensure_weight_tying}
    model = tied.adapt("other", **options).train()
    base = tied.make().get_input_embeddings().weight
    (delta,) = [name for name in trained(model) if "pera_" not in name]
    assert delta == f"{tied.embedding}.token_adapter.trainable_tokens_delta.default"
    assert model.get_parameter(f"base_model.model.{delta}").shape == (2, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    (rows_saved,) = [weight for key, weight in saved.items() if "pera_" not in key]
    assert (rows_saved - base[rows]).abs().amin(1).gt(1e-4).all()
    loaded = PeftModel.from_pretrained(tied.make(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    merged = loaded.merge_and_unload()
    assert shared(merged)
    assert relative_error(logits(merged), logits(model)) <= 1e-5
    changed = (merged.get_input_embeddings().weight != base).any(1)
    assert changed.nonzero().flatten().tolist() == rows
    assert torch.equal(merged.get_input_embeddings().weight[rows], rows_saved)
    assert separations(recwarn) == []
