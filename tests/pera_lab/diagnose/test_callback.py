"""The high-order ratio in the logs of a training."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from peft.utils.other import fsdp_auto_wrap_policy

import tiny
from pera import PeraConfig
from pera_lab.diagnose import RatioCallback, diagnose_layer, high_order_ratios
from pera_lab.diagnose.callback import ratios
from processes import needs_processes, run_in_two_processes


@pytest.fixture
def model():
    """A model with the adapter "default" on one kind of layer, and "second" on two."""
    model = tiny.adapt(tiny.llama(), target_modules=["q_proj"])
    model.add_adapter("second", PeraConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False))
    return model


def logged(model, callback):
    logs = {"loss": 1.0}
    callback.on_log(None, SimpleNamespace(global_step=3), None, model=model, logs=logs)
    return logs["high_order_ratio"]


def test_the_ratio_of_the_active_adapter_is_logged(model):
    callback = RatioCallback()
    assert logged(model, callback) == high_order_ratios(model, "default")
    model.set_adapter("second")
    second = logged(model, callback)
    assert second == high_order_ratios(model, "second")
    assert set(second) == {"q_proj", "v_proj"}
    assert callback.history[1] == (3, second)


def test_products_and_anchors_have_ratios_of_their_own():
    model = tiny.adapt(tiny.llama(), target_modules=["q_proj", "v_proj"], layers_to_transform=[1], anchors=2)
    model.add_adapter("products", PeraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    logs = {"loss": 1.0}
    RatioCallback().on_log(None, SimpleNamespace(global_step=3), None, model=model, logs=logs)
    for name in ("q_proj", "v_proj"):
        layer = tiny.layers(model)[f"model.layers.1.self_attn.{name}"]
        exact = diagnose_layer(*layer.factors("default"), *layer.expansion["default"])
        assert logs["high_order_ratio"][name] == pytest.approx(exact.high_order_ratio, rel=1e-4)
        assert logs["anchor_ratio"][name] == pytest.approx(exact.anchor_ratio, rel=1e-4)
    assert ratios(model, "products").anchors == {}


def test_the_ratio_of_a_named_adapter_is_logged(model):
    assert logged(model, RatioCallback("second")) == high_order_ratios(model, "second")


def sharded(model, engine):
    """The model, divided over processes by an engine."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if engine == "FSDP2":
        return fully_shard(model)
    if engine == "ZeRO-3":
        import deepspeed

        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "optimizer": {"type": "Adam"}}
        return deepspeed.initialize(model=model, config={**config, "zero_force_ds_cpu_optimizer": False})[0]
    policy = fsdp_auto_wrap_policy(model) if engine != "FSDP1, one unit" else None
    options = {"auto_wrap_policy": policy, "use_orig_params": engine != "FSDP1, flat"}
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def check_ratios(rank, folder, engine):
    torch.manual_seed(0)
    options = {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "normalization": "rms", "anchors": 2}
    model = tiny.adapt(tiny.llama(tie_word_embeddings=True), ensure_weight_tying=True, **options)
    expected = ratios(model)
    divided = sharded(model, engine)
    tiny.logits(divided)
    if engine == "FSDP2":
        divided.reshard()  # the outermost unit keeps whole factors after a forward pass
    for _ in range(2):
        found = ratios(divided)
        assert found.high_order == pytest.approx(expected.high_order, rel=1e-5)
        assert found.anchors == pytest.approx(expected.anchors, rel=1e-5)
        tiny.logits(divided)


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
ENGINES = ["FSDP2", "FSDP1", "FSDP1, flat", "FSDP1, one unit", pytest.param("ZeRO-3", marks=needs_deepspeed)]


@pytest.mark.slow
@needs_processes
@pytest.mark.parametrize("engine", ENGINES)
def test_ratios_of_a_model_in_two_processes(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("DS_BUILD_OPS", "0")
    run_in_two_processes(check_ratios, tmp_path, engine)
