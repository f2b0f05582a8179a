"""The high-order ratio in the logs of a training."""

from types import SimpleNamespace

import pytest

import tiny
from pera import PeraConfig
from pera_lab.diagnose import RatioCallback, diagnose_layer, high_order_ratios
from pera_lab.diagnose.callback import ratios


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
