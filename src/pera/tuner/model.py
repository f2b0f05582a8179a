"""PeraModel: injects PERA layers into a model and replaces the layers that they adapt."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    check_target_module_exists,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pera.anchors import names_digest
from pera.errors import UserError
from pera.tuner.behaviour import resolve_all_linear
from pera.tuner.call import one_call
from pera.tuner.checks import check_effects, check_names
from pera.tuner.layers import ParamWrapper, PeraLayer, adapted_layers, keep_unpacked, layer_class
from pera.tuner.names import check_wrapped, plain_name
from pera.tuner.routing import route_samples
from pera.tuner.saved import anchored_name, check_anchored_names, check_loaded, is_factor
from pera.tuner.sharding import Factors, divided_by_fsdp, reshard, tensor_parallel
from pera.tuner.tying import separate_shared_weights, sharing_the_embedding, with_name, without


def _has(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, PeraLayer) and module.has(adapter_name)


class PeraModel(BaseTuner):
    """A model with PERA adapters (arXiv 2604.11841). ``peft.get_peft_model(model, PeraConfig(…))`` creates it.

    Args:
        model: model to adapt. It is changed in place.
        peft_config: a :class:`PeraConfig`, or one for each adapter name.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's weights on the meta device, because saved weights are loaded next.

    Raises:
        UserError: a name in the configuration matches nothing in the model, or PERA does not support the kind of a
            target.
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
        if adapter_name in dir(Factors()):
            raise UserError(f"adapter_name={adapter_name!r} is reserved; use another name, such as 'default'.")
        check_wrapped(model, self.peft_config[adapter_name])
        if state_dict is None:  # otherwise its keys say what to adapt
            check_names(model, self.peft_config[adapter_name])
        keep_unpacked(model)
        if not self.peft_config[adapter_name].inference_mode and divided_by_fsdp(model):
            warnings.warn(
                f"adapter {adapter_name!r} is added to a model that FSDP divides already, which does not average its "
                "gradients over the processes; add the adapter before you shard the model",
                stacklevel=2,
            )
        before = {name for name, module in model.named_modules() if _has(module, adapter_name)}
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            config: Any = self.peft_config[adapter_name]
            adapted = adapted_layers(model, adapter_name)
            if state_dict is None and config.checks_effects:
                check_effects(adapted, config)
            self._check_anchors(adapted.values(), adapter_name)
        except Exception:
            self._remove_injected(model, adapter_name, before)
            raise

    def _check_anchors(self, layers: Iterable[PeraLayer], adapter_name: str) -> None:
        """Record the names that the anchors of a new adapter are drawn from; compare the names of a saved adapter."""
        config: Any = self.peft_config[adapter_name]
        names = {layer.module_name for layer in layers if adapter_name not in layer.tied}
        if config.anchors and names:
            if config.checks_effects:  # a new adapter; its configuration may have served another model before
                config.anchor_names = None
            check_anchored_names(config, names)
            config.anchor_names = names_digest(names)

    def _remove_injected(self, model: nn.Module, adapter_name: str, keep: set[str]) -> None:
        """Undo an injection that failed halfway. Its layers would become part of the next adapter with that name."""
        layers = [(name, module) for name, module in model.named_modules() if _has(module, adapter_name)]
        for name, layer in reversed(layers):  # wrappers of parameters can be nested
            if name in keep:
                continue
            layer.delete_adapter(adapter_name)
            if not layer.r:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, layer.base_layer)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        known = model_config["model_type"] in self.target_module_mapping
        if peft_config.target_modules is None and peft_config.target_parameters and not known:
            return peft_config  # it targets parameters only
        return super()._prepare_adapter_config(peft_config, model_config)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return check_target_module_exists(peft_config, plain_name(key))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name of a weight in the saved file."""
        return plain_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The weights to save. PEFT finds the factors by the names of modules, which can differ in a state."""
        factors = {key: weight for key, weight in state_dict.items() if is_factor(key, adapter_name)}
        others = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        return {**others, **factors}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The weights of a saved file by their names in the model. PEFT only warns of weights that have no place."""
        own = model.state_dict()
        places = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in own}
        places |= {plain_name(key): key for key in own}
        loaded = {}
        for key, weight in state_dict.items():
            name = plain_name(key)  # a model outside PeftModel has no prefix
            loaded[places.get(name) or places.get(name.removeprefix("base_model.model."), key)] = weight
        check_loaded(loaded, own, adapter_name)
        return loaded

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        resolve_all_linear(model, peft_config)

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
        if parameter_name is not None:
            self._wrap_parameter(pera_config, adapter_name, target, target_name, parent, current_key, parameter_name)
            return
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise UserError(
                f"target_modules: torch.nn.TransformerEncoderLayer does not call {current_key!r} in evaluation, so it "
                "would ignore an adapter; call torch.backends.mha.set_fastpath_enabled(False) first."
            )
        current_key = plain_name(current_key)
        source = None
        if current_key in (getattr(pera_config, "target_modules_to_tie", None) or ()):
            source = self.model.get_input_embeddings()
            current_key = sharing_the_embedding(self.model)[0]
        r, alpha = pera_config.layer_settings(current_key)
        if isinstance(target, PeraLayer):
            target.update_layer(adapter_name, r, alpha, config=pera_config, tied_to=source)
            return
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization = get_quantization_kwargs(self)
        cls = layer_class(base_layer, current_key, quantization)
        parallel = tensor_parallel(self.model, base_layer, current_key)
        settings = {"config": pera_config, "r": r, "alpha": alpha, "module_name": current_key, "parallel": parallel}
        layer = cls(target, adapter_name, tied_to=source, **settings, **quantization)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _wrap_parameter(
        self,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str,
    ) -> None:
        if isinstance(target, NonDynamicallyQuantizableLinear) or isinstance(parent, nn.TransformerEncoderLayer):
            raise UserError(
                f"target_parameters: the parent of {current_key!r} reads it without calling its module, so it would "
                "ignore an adapter; leave it out."
            )
        if config.pera_dropout:
            raise UserError(
                f"pera_dropout={config.pera_dropout} cannot apply to {current_key!r}, because a parameter has no "
                "input; set it to 0."
            )
        names = current_key, current_key.rpartition(".")[0]
        for key, name in (*(("exclude_modules", name) for name in names), ("layers_to_transform", current_key)):
            ending, option = name.rpartition(".")[2], getattr(config, key)
            alone = SimpleNamespace(target_modules=[ending], layers_pattern=config.layers_pattern, **{key: option})
            if not check_target_module_exists(alone, name):
                raise UserError(
                    f"{key}={option!r} would exclude {current_key!r}, but it applies to target_modules only; give full "
                    "names in target_parameters, such as 'layers.0.mlp.experts.down_proj'."
                )
        for key in ("rank_pattern", "alpha_pattern"):
            if matching := [p for p in getattr(config, key) for n in names if re.match(rf"(.*\.)?({p})$", n)]:
                raise UserError(
                    f"{key}: {matching[0]!r} matches the parameter {current_key!r}, which takes r and pera_alpha; name "
                    "modules only."
                )
        if isinstance(target, ParamWrapper) and target.parameter_name == parameter_name:
            target.update_layer(adapter_name, config.r, config.pera_alpha, config=config)
            return
        tensor_parallel(self.model, target, current_key.rpartition(".")[0], parameter_name)
        layer = ParamWrapper(
            target,
            adapter_name,
            parameter_name=parameter_name,
            config=config,
            r=config.r,
            alpha=config.pera_alpha,
            module_name=anchored_name(current_key.rpartition(".")[0]),
            **get_quantization_kwargs(self),
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        for name, other in self.peft_config.items():
            mine, theirs = (sorted(getattr(c, "target_parameters", None) or ()) for c in (config, other))
            if mine and theirs and mine != theirs:
                raise UserError(
                    f"target_parameters={mine} differs from {theirs} of adapter {name!r}; use the same parameters "
                    "in all adapters of a model."
                )

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        ignored = kind in ("mamba", "falcon_mamba") and target_name == "dt_proj"
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, target_name)
        except ValueError:
            ignored = True
        if ignored:
            raise UserError(
                f"target_modules: a {kind} model reads {target_name!r} without calling it, so it would ignore an "
                "adapter; leave it out."
            )

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Find tied embeddings through ``get_input_embeddings``. PEFT's version knows only two names of embeddings."""
        known = peft_config.ensure_weight_tying and hasattr(model, "get_input_embeddings")
        embedding, *tied = sharing_the_embedding(model) if known else [""]
        saved = set(peft_config.modules_to_save or ())
        if tied and without(saved, {embedding, *tied}) != saved:
            self._add_modules_to_save_to_tie(peft_config, tied)
        elif (
            tied
            and peft_config.target_modules
            and any(check_target_module_exists(peft_config, name) for name in (embedding, *tied))
        ):
            self._add_targets_to_tie(peft_config, tied)
        else:
            super()._check_tied_modules(model, peft_config)

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Adapt the input embedding. PEFT then adapts the layers in ``target_modules_to_tie`` with the same factors."""
        peft_config.target_modules_to_tie = tied = set(tied_weight_keys)
        embedding = sharing_the_embedding(self.model)[0]
        if isinstance(peft_config.target_modules, str):
            peft_config.target_modules = with_name(peft_config.target_modules, embedding)
        else:
            peft_config.target_modules = without(peft_config.target_modules, tied) | {embedding}

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Save the input embedding. PEFT ties the layers in ``modules_to_tie`` to it."""
        peft_config.modules_to_tie = tied = set(tied_weight_keys)
        if embeddings := [name for name in sorted(tied) if isinstance(self.model.get_submodule(name), nn.Embedding)]:
            raise UserError(
                f"modules_to_save: PEFT would tie the embedding {embeddings[0]!r} as if it were a linear layer; use "
                "ensure_weight_tying with target_modules, or leave it out."
            )
        embedding = sharing_the_embedding(self.model)[0]
        peft_config.modules_to_save = sorted(without(peft_config.modules_to_save, tied) | {embedding})

    def _check_merge_allowed(self) -> None:
        for name, layer in self.model.named_modules():
            if not isinstance(layer, PeraLayer):
                continue
            layer.check_base_weight()
            if isinstance(layer.get_base_layer(), AuxiliaryTrainingWrapper):
                raise UserError(
                    f"{name!r} cannot be merged: trainable_token_indices replaces rows of its weight, which would lose "
                    "the update; use the adapter unmerged, or train without one of the two."
                )
            backend = layer.quantization_backend
            if backend is not None and not backend.supports_merge:
                raise UserError(
                    f"{name!r} is a {backend.backend_name} layer, which PEFT cannot merge into; load the adapter on "
                    "the base model before quantization and merge it there."
                )
        reshard(self.model)
        separate_shared_weights(self.model)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Not for PERA: use :func:`pera.combine`."""
        raise UserError("add_weighted_adapter is for LoRA; use pera.combine(model, {name: weight, …}), which is exact.")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, PeraLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloading: the module that was wrapped needs no preparation
            setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this context around every ``forward`` and ``generate`` of the model."""
        with ExitStack() as stack:
            if kwargs.get("adapter_names") is not None:
                route_samples(self, args, kwargs, stack)
            if not torch.compiler.is_compiling():
                stack.enter_context(one_call())
            yield
