"""Puts PERA layers into a model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
)
from torch import Tensor, nn

from pera.errors import UserError, nearest
from pera.tuner.layers import PeraLayer, layer_class


class PeraModel(BaseTuner):
    """A model with PERA adapters (arXiv 2604.11841); made by ``peft.get_peft_model(model, PeraConfig(…))``.

    Args:
        model: the model to adapt, changed in place.
        peft_config: a :class:`PeraConfig`, or several by adapter name.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be loaded into.

    Raises:
        UserError: a name in ``target_modules`` matches no module, or a target is of a kind that PERA
            does not support.
    """

    prefix: str = "pera_"
    tuner_layer_cls = PeraLayer
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        if state_dict is None:  # else its keys say what is adapted
            check_names(model, self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _create_and_replace(
        self,
        pera_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r, alpha = pera_config.layer_settings(current_key)
        if isinstance(target, PeraLayer):
            target.update_layer(adapter_name, r, alpha, config=pera_config)
            return
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        cls = layer_class(base_layer)
        if cls is None:
            raise UserError(
                f"target_modules: {current_key!r} is a {type(base_layer).__name__}, which PERA does not support; "
                "supported are torch.nn.Linear, plain or quantised, and transformers' Conv1D."
            )
        layer = cls(target, adapter_name, config=pera_config, r=r, alpha=alpha, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UserError("adapter_names is not supported: a batch runs with one set of adapters, see set_adapter.")
        yield


_HEADS = ("classifier", "score", "qa_outputs")
"""Heads that PEFT names in ``modules_to_save`` by itself, whether or not the model has them."""


def check_names(model: nn.Module, config: PeftConfig) -> None:
    """Refuse a configuration, of any PEFT method, that names a module which the model does not have.

    Raises:
        UserError: a name in a list of ``target_modules``, ``exclude_modules`` or ``modules_to_save`` matches no
            module; the nearest name is given.
    """
    modules = [name for name, _ in model.named_modules() if ".pera_" not in name and "base_layer" not in name]
    for key, allowed in (("target_modules", ()), ("exclude_modules", ()), ("modules_to_save", _HEADS)):
        names = getattr(config, key, None)
        if isinstance(names, str):
            unmatched = names != INCLUDE_LINEAR_LAYERS_SHORTHAND and not any(re.fullmatch(names, m) for m in modules)
            if unmatched and key == "target_modules":
                raise UserError(f"{key}: {names!r}, as a regular expression, matches no module; give a list of names.")
            continue
        for wanted in sorted(set(names or ()) - set(allowed)):
            if wanted == INCLUDE_LINEAR_LAYERS_SHORTHAND:
                raise UserError(f"{key} lists {wanted!r} among names; give it alone, as a string.")
            if not any(name == wanted or name.endswith(f".{wanted}") for name in modules):
                endings = {ending for name in modules if not (ending := name.rpartition(".")[2]).isdigit()}
                close = nearest(wanted.rpartition(".")[2], endings - {""})
                raise UserError(f"{key}: {wanted!r} not found in the base model; {close}")
