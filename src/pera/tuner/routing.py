"""Batches that mix adapters: ``model(…, adapter_names=["a", "b", "__base__"])`` names one adapter for each sample.

Forward hooks hand the names to every adapted layer for the length of one call of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import GenerationConfig

from pera.errors import UserError
from pera.tuner.layers import BASE, PeraLayer, require_one_name_each


def route_samples(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], stack: ExitStack) -> None:
    """Send each sample of a call to the adapter that ``kwargs["adapter_names"]`` names for it.

    Args:
        tuner: the :class:`~pera.tuner.model.PeraModel` that is called.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call, with ``adapter_names``.
        stack: the routing ends when this stack closes.

    Raises:
        UserError: the model is in training mode, an adapter is merged or unknown, or the number of names differs from
            the number of samples. Without an input that can be counted here, the layers check the number.
    """
    names = kwargs["adapter_names"]
    layers = [module for module in tuner.modules() if isinstance(module, PeraLayer)]
    if tuner.training:
        raise UserError("Cannot pass `adapter_names` when the model is in training mode.")
    if any(layer.merged for layer in layers):
        raise UserError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError(f"adapter_names={names!r} should be a list with the name of an adapter for each sample.")
    if unknown := sorted(set(names) - {BASE} - tuner.peft_config.keys()):
        raise UserError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    main = getattr(tuner.model, "main_input_name", "input_ids")
    for samples in (*args[:1], kwargs.get("inputs"), kwargs.get(main)):
        if isinstance(samples, Tensor):
            require_one_name_each(names, len(samples))
    repeats = _repeats(args, kwargs, getattr(tuner.model, "generation_config", None))
    for module in tuner.modules():
        if isinstance(module, (PeraLayer, AuxiliaryTrainingWrapper)):
            hook = partial(_add_adapter_names, names=names, repeats=repeats)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _add_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: Sequence[str], repeats: int) -> Any:
    # An encoder runs before `generate` repeats the samples, so its inputs are not repeated.
    if args and len(args[0]) == repeats * len(names):
        names = [name for name in names for _ in range(repeats)]
    if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's wrapper rejects adapters without a copy of its module
        own = module._get_available_adapters()
        names = [name if name in own else BASE for name in names]
    return args, {**kwargs, "adapter_names": list(names)}


def _repeats(args: tuple[Any, ...], kwargs: dict[str, Any], default: Any) -> int:
    """Number of rows that ``generate`` makes of each sample: one for each beam or returned sequence."""
    configs = [*(arg for arg in args if isinstance(arg, GenerationConfig)), kwargs.get("generation_config"), default]

    def count(key: str) -> int:
        return next(filter(None, [kwargs.get(key), *(getattr(config, key, None) for config in configs)]), 1)

    return max(count("num_beams"), count("num_return_sequences"))
