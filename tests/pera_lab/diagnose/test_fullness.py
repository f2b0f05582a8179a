"""Whether an adapter is full: the least rank, the bits learned, and the sentence."""

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from pera import PeraConfig
from pera_lab.diagnose import Cuts, Fullness, Learned, diagnose_adapter, fullness
from pera_lab.diagnose.effect import frequency_loss
from pera_lab.diagnose.fullness import learned
from pera_lab.files import checked
from pera_lab.tasks.encoding import IGNORED

FEATURES, CLASSES = 48, 32
UNIFORM = math.log(CLASSES)
UNKNOWN = "nobody counted"


def model_of(config):
    """A frozen zero matrix with an adapter, and its factors."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(FEATURES, CLASSES, bias=False))
    nn.init.zeros_(base[0].weight)
    return get_peft_model(base, config)


def lora(r):
    return LoraConfig(r=r, lora_alpha=r, target_modules=["0"])


def planted(rank, r=8):
    """A LoRA of rank r whose ΔW has ``rank`` directions of equal strength, and its loss on labels that follow them."""
    model = model_of(lora(r))
    layer = model.base_model.model[0]
    orthogonal = torch.linalg.qr(torch.randn(FEATURES, r)).Q.T, torch.linalg.qr(torch.randn(CLASSES, r)).Q
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = orthogonal
    layer.lora_B["default"].weight.data[:, rank:] = 0
    x = torch.randn(400, FEATURES)
    y = model(x).detach()
    return model, lambda: (model(x) - y).square().mean().item() + 0.1


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_planted_rank_is_found_and_suffices(rank):
    model, loss = planted(rank)
    found = fullness(Cuts(model), loss, math.inf, UNKNOWN)
    assert (found.needed, found.verdict) == (rank, "enough")
    assert found.sentence().startswith(f"A LoRA of rank {rank} would do: cut to that rank, the adapter keeps 100 %")
    assert found.effective_rank == pytest.approx(rank, abs=1e-4)
    assert found.gain == pytest.approx(found.loss_at_rank[0] - found.loss)


def test_a_planted_direction_of_a_pera_is_found():
    model = model_of(PeraConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.pera_A["default"].data[1] = layer.pera_B["default"].data[:, 1] = 0
    layer.pera_B["default"].data[:, 0] = torch.randn(CLASSES)
    x = torch.randn(400, FEATURES)
    y = model(x).detach()
    found = fullness(Cuts(model), lambda: (model(x) - y).square().mean().item() + 0.1, math.inf, UNKNOWN)
    assert (found.r, found.rank, found.needed, found.verdict) == (2, 5, 1, "enough")


def memorized(config, rows, epochs=150, batch=32):
    """An adapter that was trained to memorize random labels, and its fullness on them."""
    model = model_of(config)
    x, labels = torch.randn(rows, FEATURES), torch.randint(CLASSES, (rows,))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, online = torch.optim.Adam(trained, lr=0.03), 0.0
    for epoch in range(epochs):
        for i in range(0, rows, batch):
            loss = cross_entropy(model(x[i : i + batch]), labels[i : i + batch])
            online += loss.item() * len(x[i : i + batch]) if epoch == 0 else 0.0
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def mean_loss():
        with torch.no_grad():
            return cross_entropy(model(x), labels).item()

    count = sum(p.numel() for p in trained)
    bits = (online - rows * mean_loss()) / math.log(2)
    return fullness(Cuts(model), mean_loss, UNIFORM, Learned(rows, bits, count))


@pytest.mark.parametrize("config", [lora(2), PeraConfig(r=1, normalization="rms", target_modules=["0"])])
def test_an_adapter_that_memorized_random_labels_is_full_and_a_larger_one_stores_more(config):
    full = memorized(config, rows=320)
    assert full.needed == full.rank
    assert full.learned.per_parameter > 0.5
    assert full.verdict == "full"
    assert "The adapter is full: a cut to rank 1 loses" in full.sentence()
    assert "Anchors, a larger rank or more layers will store more." in full.sentence()
    assert memorized(lora(4), rows=320).learned.bits > 1.3 * full.learned.bits


def test_an_adapter_that_memorized_everything_is_not_full():
    found = memorized(lora(8), rows=32)
    assert found.loss < 0.01
    assert found.verdict == "enough"
    assert found.sentence().startswith("The adapter suffices: of a loss of 3.47, ")


WHOLE = Fullness(2, 2, 1.9, 1.0, {0: 3.0, 1: 2.0}, 9.0, Learned(100, 700.0, 1000))


@pytest.mark.parametrize(
    ("change", "verdict", "sentence"),
    [
        ({}, "full", "loses 50 % of the gain, and it learned 0.7 bits per parameter."),
        (
            {"learned": Learned(100, 300.0, 1000)},
            "undecided",
            "it learned 0.3 bits per parameter, between 0.1 and 0.5. Train longer or with a larger rank",
        ),
        (
            {"learned": Learned(100, 20.0, 1000)},
            "enough",
            "A LoRA of rank 2 would do: a cut to rank 1 loses 50 % of the gain, but it learned 0.02 bits per parameter",
        ),
        ({"learned": None}, "undecided", "and the bits that it learned are unknown."),
        ({"loss": 0.1}, "enough", "of a loss of 3, 0.1 is left. But a cut to rank 1 loses 66 % of the gain."),
        ({"loss_at_rank": {0: 3.0, 1: 9.0}}, "full", "a cut to rank 1 loses 100 % of the gain"),
        ({"loss_at_rank": {0: 3.0, 1: 1.09}}, "enough", "rank 1 would do: cut to that rank, the adapter keeps 96 %"),
        ({"loss_at_rank": {0: 3.0, 1: 1.2}}, "full", "a cut to rank 1 loses 10 %"),
        ({"frequency_loss": 2.0, "loss_at_rank": {0: 30.0, 1: 1.2}}, "full", "a cut to rank 1 loses 20 % of the gain"),
        ({"r": 3, "rank": 3, "loss_at_rank": {0: 3.0, 1: 2.0, 2: 1.05}}, "full", "a cut to rank 1 loses 50 %"),
        ({"r": 1, "rank": 1, "loss_at_rank": {0: 3.0}}, "full", "The adapter is full: it uses its rank of 1, and it"),
        ({"loss": 3.2}, "undecided", "the loss, 3.2, is no lower than without ΔW or with label frequencies alone, 3."),
        ({"frequency_loss": 0.9}, "undecided", "the loss, 1, is no lower than without ΔW or"),
        ({"loss": math.nan}, "undecided", "the loss, nan, is no lower than without ΔW"),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_rank_bits_and_the_loss_that_is_left(change, verdict, sentence):
    found = replace(WHOLE, **change)
    assert found.verdict == verdict
    assert sentence in found.sentence()


def test_a_guess_of_the_label_frequencies_has_the_entropy_of_the_labels():
    answers = {"labels": torch.tensor([[5, IGNORED, 7, 7], [5, 8, 7, 7]])}
    assert frequency_loss([answers]) == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    classes = [{"labels": torch.tensor([0, 1, 1])}, {"labels": torch.tensor([1])}]
    assert frequency_loss(classes) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert frequency_loss([{"labels": torch.tensor([1.0, 3.0])}]) == pytest.approx(1.0)


def test_a_rank_below_a_rank_that_loses_the_gain_does_not_suffice():
    found = replace(WHOLE, r=4, rank=4, loss_at_rank={0: 3.0, 1: 1.0, 2: 1.5, 3: 1.0})
    assert found.needed == 3


def test_a_record_without_rank_zero_is_rejected():
    with pytest.raises(ValueError, match="loss_at_rank lacks rank 0"):
        checked({**json.loads(json.dumps(WHOLE.__dict__, default=vars)), "loss_at_rank": {"1": 2.0}}, Fullness, "file")


NOT_RECORDED = "metrics.jsonl does not have the losses of the whole first epoch."


def line(step, epoch, **entry):
    return {"step": step, "epoch": epoch, "loss": 1.0, **({"first_epoch": entry} if entry else {})}


def test_bits_are_the_losses_of_the_first_epoch_less_the_final_loss_of_as_many_labels():
    lines = [line(2, 0.5, since=0, labels=30, nats=90.0), line(4, 1.0, since=2, labels=10, nats=20.0), line(6, 1.5)]
    found = learned(lines, 1.5, 25)
    assert found.labels == 40
    assert found.bits == pytest.approx((110 - 40 * 1.5) / math.log(2))
    assert found.per_parameter == found.bits / 25
    assert learned(lines[:1], 1.5, 25).labels == 30  # a training of half an epoch


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], NOT_RECORDED),
        ([line(2, 0.5), line(4, 1.0)], NOT_RECORDED),
        (
            [line(2, 0.2), line(4, 0.5, since=2, labels=3, nats=3.0)],
            NOT_RECORDED,
        ),
        (
            [line(4, 0.5, since=2, labels=3, nats=3.0)],
            "The training was resumed, and the losses of steps 1 to 2 are lost.",
        ),
        (
            [line(2, 0.2, since=0, labels=3, nats=3.0), line(6, 0.6, since=5, labels=3, nats=3.0)],
            "The training was resumed, and the losses of steps 3 to 5 are lost.",
        ),
        (
            [line(2, 0.4, since=0, labels=3, nats=3.0), line(6, 1.2)],
            "The training was resumed, and the losses of steps 3 to 6 are lost.",
        ),
    ],
)
def test_missing_losses_of_the_first_epoch_are_said_in_words(lines, reason):
    assert reason in learned(lines, 1.0, 10)


@pytest.fixture(scope="module")
def lora_run(train_run, tmp_path_factory):
    """A run of rsLoRA with a rank and an alpha of its own for some layers."""
    method = "{name: rslora, r: 3, alpha: 5, rank_pattern: {v_proj: 2}, alpha_pattern: {up_proj: 9}, target_modules: "
    options = [f"method={method}[q_proj, v_proj, up_proj]}}", "training.max_steps=4"]
    return train_run(tmp_path_factory.mktemp("runs") / "lora", *options)


def test_a_saved_lora_is_diagnosed_with_the_scale_of_each_layer(lora_run, tiny_llama, unmerged):
    found = diagnose_adapter(lora_run.adapter)
    layers = dict(unmerged(tiny_llama, lora_run.adapter.path).get_base_model().named_modules())
    assert len(found) == 6
    for name, layer in found.items():
        explicit = torch.linalg.svdvals(layers[name].get_delta_weight("default").double())
        assert layer.r == (2 if "v_proj" in name else 3)
        assert layer.singular_values == pytest.approx(explicit[: layer.r].tolist(), rel=1e-5)
        energy = explicit.square() / explicit.square().sum()
        entropy = -sum(float(p) * math.log(p) for p in energy if p > 1e-12)
        assert layer.effective_rank == pytest.approx(math.exp(entropy), rel=1e-4)
        assert (layer.high_order, layer.square, layer.cross) == (0, 0, 0)


def test_inspect_says_whether_the_lora_of_a_run_is_full(lora_run, pera):
    shown = pera("inspect", lora_run.path, "--effect", "--examples", 6).out
    kept = json.loads(lora_run.effect_file.read_text())
    assert list(kept["fullness"]["loss_at_rank"]) == ["0", "1", "2"]
    assert "every ΔW cut to rank 2" in shown
    assert checked(kept["fullness"], Fullness, "file").sentence() in shown
    assert "square" not in shown
    entries = [line["first_epoch"] for line in lora_run.metrics()]
    assert kept["fullness"]["learned"]["labels"] == sum(entry["labels"] for entry in entries)


def test_an_adapter_folder_is_measured_on_the_task_of_a_recipe(lora_run, recipe_file, pera):
    folder = json.loads(pera("inspect", lora_run.adapter.path, "--effect", "--recipe", recipe_file, "--json").out)
    run = json.loads(pera("inspect", lora_run.path, "--effect", "--json").out)
    assert folder["effect"]["fullness"]["loss_at_rank"] == run["effect"]["fullness"]["loss_at_rank"]
    assert folder["effect"]["fullness"]["learned"] is None
    assert "An adapter folder does not have the losses" in folder["effect"]["fullness"]["not_learned"]
    assert folder["verdict"]["sentence"]
    other = [lora_run.adapter.path, "--effect", "--recipe", recipe_file, "task.test_size=3", "--json"]
    assert json.loads(pera("inspect", *other).out)["effect"]["tokens"] < folder["effect"]["tokens"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["ADAPTER", "--effect"], ["--effect needs data", "give --recipe"]),
        (["ADAPTER", "--recipe", "quickstart"], ["--recipe", "add --effect"]),
        (["RUN", "--examples", 3], ["--examples", "add --effect"]),
        (["RUN", "task.test_size=3"], ["'task.test_size=3' has no effect without --recipe"]),
        (["RUN", "--effect", "--recipe", "quickstart"], ["--recipe='quickstart' has no effect for a run"]),
        (
            ["ADAPTER", "--effect", "--recipe", "glue-minilm", "method.r=1"],
            ["'method.r=1' has no effect", "task and training.max_length"],
        ),
        (["ADAPTER", "--effect", "--recipe", "glue-minilm"], ["'sst2' needs a head of 2 outputs", "has no head"]),
    ],
)
def test_options_of_inspect_that_have_no_use_are_refused(options, words, lora_run, refused):
    given = {"RUN": lora_run.path, "ADAPTER": lora_run.adapter.path}
    refused("inspect", *(given.get(option, option) for option in options), words=words)
