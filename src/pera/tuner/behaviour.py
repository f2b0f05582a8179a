"""Whether a layer computes what its kind computes.

A merged adapter changes the weight, and an unmerged one adds to the output. Both agree only if the layer is its kind:
a router that subclasses ``nn.Linear`` and returns two tensors is not, and a subclass that scales its output is not.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from pera.errors import UserError
from pera.tuner.names import plain_name

KINDS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The kinds of layers that can be adapted. Quantized linear layers are decided by PEFT."""


def kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """The kind of a layer, or None."""
    return next((kind for kind in KINDS if isinstance(layer, kind)), None)


def departure(layer: nn.Module, quantization: dict[str, Any]) -> str | None:
    """Why an adapter on a layer would be ignored or wrong, as the end of a sentence; None if it would be right.

    Classes that inherit the ``forward`` of their kind, and hooks of accelerate, are accepted as they are. A ``forward``
    of its own and other hooks are run on two inputs and compared with the kind.

    Args:
        layer: the layer without adapters.
        quantization: PEFT's ``get_quantization_kwargs`` of the model.
    """
    if isinstance(layer, (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)):
        return (
            "belongs to torch.nn.MultiheadAttention, which never calls the layer, so an adapter would be ignored; name "
            "its in_proj_weight in target_parameters instead."
        )
    if hasattr(layer, "weight") and "weight" not in layer._parameters:
        return (
            "computes its weight in every forward, such as weight_norm does, so an adapter could not be merged; leave "
            "it out."
        )
    kind: Any = kind_of(layer)
    if kind is None or resolve_quantization_backend(layer, **quantization) is not None:
        return None
    if kind is nn.Embedding and layer.max_norm is not None:
        return (
            f"has max_norm={layer.max_norm}, which changes its weight in every forward, so a merged adapter would "
            "differ; leave it out."
        )
    if _replaced_forward(layer) and not hasattr(layer.weight, "device_mesh"):  # not by tensor parallelism
        return "has a forward that was replaced, so an adapter would be wrong; leave it out."
    if type(layer).forward is not kind.forward and not _agrees(layer, kind):
        return (
            f"is a {type(layer).__name__}, whose forward is different from {_name(kind)}, so an adapter would be "
            "wrong; leave it out."
        )
    if (layer._forward_pre_hooks or layer._forward_hooks) and not _agrees(layer, kind):
        return "has a forward hook that changes what it computes, so a merged adapter would differ; leave it out."
    return None


def resolve_all_linear(model: nn.Module, config: Any) -> None:
    """Replace "all-linear" in ``target_modules`` by the names of the linear layers that an adapter fits.

    PEFT's choice also has routers and other subclasses that compute something else; they are left out.

    Raises:
        UserError: no layer is left.
    """
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) or targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    plain: Any = getattr(model, "_orig_mod", model)  # PEFT looks for the head of a PreTrainedModel
    _maybe_include_all_linear_layers(config, plain)
    quantization = get_quantization_kwargs(plain)
    config.target_modules = {
        plain_name(name) for name in config.target_modules if _fits(plain.get_submodule(name), quantization)
    }
    config.target_modules = {name for name in config.target_modules if check_target_module_exists(config, name)}
    if not config.target_modules:
        raise UserError("target_modules='all-linear' finds no linear layer that an adapter fits; give a list of names.")


def layers_within(module: nn.Module, name: str) -> list[str]:
    """The names of the layers inside a module that is not a layer itself."""
    return [f"{name}.{inner}" for inner, layer in module.named_modules() if inner and kind_of(layer)]


def _fits(module: nn.Module, quantization: dict[str, Any]) -> bool:
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return departure(layer, quantization) is None


def _name(kind: type[nn.Module]) -> str:
    return "transformers' Conv1D" if kind is Conv1D else f"torch.nn.{kind.__name__}"


def _replaced_forward(layer: nn.Module) -> bool:
    """Whether ``forward`` was replaced on this one object, except by accelerate, which calls the replaced one."""
    own = vars(layer)
    replaced = own.get("_old_forward" if "_hf_hook" in own else "forward")
    return replaced is not None and getattr(replaced, "__func__", None) is not type(layer).forward


def _agrees(layer: nn.Module, kind: Any) -> bool:
    """Whether calling a layer gives the output of its kind, in training and in evaluation, up to its dtype.

    A copy of the layer is called, with another weight on the device of the layer: the weight may be all zeros, or on
    the meta device. Layers that are sharded over devices have hooks that move data, and are accepted.
    """
    if hasattr(layer.weight, "device_mesh"):
        return True
    if any(True for _ in layer.children()) or any(buffer.is_meta for buffer in layer.buffers()):
        return False
    trial: Any = copy.copy(layer)
    for key in ("forward", "_hf_hook", "_old_forward"):
        vars(trial).pop(key, None)
    device = "cpu" if trial.weight.is_meta else trial.weight.device
    trial._parameters = {
        key: None if p is None else nn.Parameter(_numbers(p.shape, device)) for key, p in trial._parameters.items()
    }
    scale: Any = 1.0
    if kind is nn.Embedding:
        trial.weight, trial.padding_idx = nn.Parameter(_numbers((8, layer.embedding_dim), device)), None
        x = torch.arange(8, device=device)[None]
        inputs = [x, x.flip(-1)]
        scale = getattr(layer, "embed_scale", 1.0)
    else:
        x = _numbers(_input_shape(layer, kind), device)
        inputs = [x, 1000 * x]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return all(_equal(trial, kind, x, scale, training) for x in inputs for training in (False, True))
    except Exception:  # it does not take what its kind takes
        return False


def _equal(trial: Any, kind: Any, x: Tensor, scale: Any, training: bool) -> bool:
    trial.training = training
    expected, found = kind.forward(trial, x.clone()) * scale, trial(x.clone())
    if not isinstance(found, Tensor) or found.shape != expected.shape or not found.is_floating_point():
        return False
    tolerance = 1e-4 if found.dtype == expected.dtype else 2e-2
    return bool((found.float() - expected).norm() <= tolerance * expected.norm())


def _input_shape(layer: Any, kind: Any) -> tuple[int, ...]:
    if kind is nn.Linear:
        return 2, layer.in_features
    if kind is Conv1D:
        return 2, layer.weight.shape[0]
    sizes = zip(layer.kernel_size, layer.dilation, strict=True)
    return 2, layer.in_channels, *(dilation * (size - 1) + 2 for size, dilation in sizes)


def _numbers(shape: Any, device: Any) -> Tensor:
    """Numbers between -1 and 1 that need no random generator."""
    return torch.linspace(-1, 1, torch.Size(shape).numel(), device=device).sin().mul(7).cos().reshape(shape)
