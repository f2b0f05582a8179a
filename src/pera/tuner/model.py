"""Puts PERA layers into a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    check_target_module_exists,
)
from peft.utils import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import GenerationConfig

from pera.errors import UserError, nearest
from pera.tuner.call import one_call
from pera.tuner.config import check_lists
from pera.tuner.layers import BASE, ParamWrapper, PeraLayer, keep_unpacked, layer_class, require_one_name_each
from pera.tuner.tying import separate_shared_weights, sharing_the_embedding, with_name, without


def _has(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, PeraLayer) and (adapter_name in module.pera_A or adapter_name in module.tied)


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
        keep_unpacked(model)
        before = {name for name, module in model.named_modules() if _has(module, adapter_name)}
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            self._take_out(model, adapter_name, before)
            raise

    def _take_out(self, model: nn.Module, adapter_name: str, keep: set[str]) -> None:
        """Undo an injection that was refused half-way: what it added would be trained and saved under the next adapter
        of that name."""
        layers = [(name, module) for name, module in model.named_modules() if _has(module, adapter_name)]
        for name, layer in reversed(layers):  # wrappers of parameters may lie in one another
            if name in keep:
                continue
            layer.delete_adapter(adapter_name)
            if not layer.pera_A and not layer.tied:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, layer.base_layer)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        known = model_config["model_type"] in self.target_module_mapping
        if peft_config.target_modules is None and peft_config.target_parameters and not known:
            return peft_config  # parameters alone
        return super()._prepare_adapter_config(peft_config, model_config)

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
                f"target_modules: {current_key!r} belongs to torch.nn.TransformerEncoderLayer, which in evaluation "
                "reads weights without calling layers, so that an adapter would be ignored; call "
                "torch.backends.mha.set_fastpath_enabled(False) first."
            )
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
        layer = cls(target, adapter_name, config=pera_config, r=r, alpha=alpha, tied_to=source, **quantization)
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
                f"target_parameters: {current_key!r} is read by a module around it without calling its own, so that an "
                "adapter would be ignored; leave it out."
            )
        if config.pera_dropout:
            raise UserError(
                f"pera_dropout={config.pera_dropout} cannot act on {current_key!r}, a parameter, which has no input of "
                "its own; set it to 0."
            )
        names = current_key, current_key.rpartition(".")[0]
        for key, name in (*(("exclude_modules", name) for name in names), ("layers_to_transform", current_key)):
            ending, option = name.rpartition(".")[2], getattr(config, key)
            alone = SimpleNamespace(target_modules=[ending], layers_pattern=config.layers_pattern, **{key: option})
            if not check_target_module_exists(alone, name):
                raise UserError(
                    f"{key}={option!r} would leave out {current_key!r}, but acts on target_modules alone; name in "
                    "target_parameters those to adapt in full, such as 'layers.0.mlp.experts.down_proj'."
                )
        for key in ("rank_pattern", "alpha_pattern"):
            if matching := [p for p in getattr(config, key) for n in names if re.match(rf"(.*\.)?({p})$", n)]:
                raise UserError(
                    f"{key}: {matching[0]!r} matches {current_key!r}, a parameter, which takes r and alpha."
                )
        if isinstance(target, ParamWrapper) and target.parameter_name == parameter_name:
            target.update_layer(adapter_name, config.r, config.pera_alpha, config=config)
            return
        layer = ParamWrapper(
            target,
            adapter_name,
            parameter_name=parameter_name,
            config=config,
            r=config.r,
            alpha=config.pera_alpha,
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
                    f"target_parameters={mine} differs from {theirs} of adapter {name!r}; adapters of one model "
                    "that have any should have the same."
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
                f"target_modules: {target_name!r} of a {kind} model is read by a kernel without being called, so that "
                "an adapter would be ignored; leave it out."
            )

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """As PEFT's, which knows embeddings by two names; here an embedding is what the model says it is."""
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
        """Adapt the input embedding; PEFT then comes back with the layers tied to it, in ``target_modules_to_tie``."""
        peft_config.target_modules_to_tie = tied = set(tied_weight_keys)
        embedding = sharing_the_embedding(self.model)[0]
        if isinstance(peft_config.target_modules, str):
            peft_config.target_modules = with_name(peft_config.target_modules, embedding)
        else:
            peft_config.target_modules = without(peft_config.target_modules, tied) | {embedding}

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Save the input embedding; PEFT ties the others, in ``modules_to_tie``, to it."""
        peft_config.modules_to_tie = tied = set(tied_weight_keys)
        if embeddings := [name for name in sorted(tied) if isinstance(self.model.get_submodule(name), nn.Embedding)]:
            raise UserError(
                f"modules_to_save: {embeddings[0]!r} is an embedding, which PEFT ties to another as if it were linear; "
                "use ensure_weight_tying with target_modules, or leave it out."
            )
        embedding = sharing_the_embedding(self.model)[0]
        peft_config.modules_to_save = sorted(without(peft_config.modules_to_save, tied) | {embedding})

    def _check_merge_allowed(self) -> None:
        for name, layer in self.model.named_modules():
            if not isinstance(layer, PeraLayer):
                continue
            if isinstance(layer.get_base_layer(), AuxiliaryTrainingWrapper):
                raise UserError(
                    f"{name!r} cannot be merged: PEFT lays the rows of trainable_token_indices over its weight, where "
                    "the update would be lost; use the adapter unmerged, or train it without one of the two."
                )
            backend = layer.quantization_backend
            if backend is not None and not backend.supports_merge:
                raise UserError(
                    f"{name!r} is a {backend.backend_name} layer, which PEFT cannot merge into; load the adapter on "
                    "the base model before quantisation, and merge it there."
                )
        separate_shared_weights(self.model)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Of LoRA; raises UserError."""
        raise UserError("add_weighted_adapter is LoRA's; use pera.combine(model, {name: weight, …}), which is exact.")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, PeraLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloading: what was wrapped is as it should be
            setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT enters around every call of the model, ``forward`` or ``generate``."""
        names = kwargs.get("adapter_names")
        with ExitStack() as stack:
            if names is not None:
                self._route_samples(names, args, kwargs, stack)
            if not torch.compiler.is_compiling():
                stack.enter_context(one_call())
            yield

    def _route_samples(self, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any], stack: ExitStack) -> None:
        """Give every adapted layer the name of an adapter for each sample, until ``stack`` is closed.

        Raises:
            UserError: in training, with merged adapters, with a name that is no adapter's, or without one name for each
                sample, where the samples are seen here; else the layers see them.
        """
        layers = [module for module in self.modules() if isinstance(module, PeraLayer)]
        if self.training:
            raise UserError("Cannot pass `adapter_names` when the model is in training mode.")
        if any(layer.merged for layer in layers):
            raise UserError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise UserError(f"adapter_names={names!r} should be a list with the name of an adapter for each sample.")
        if unknown := sorted(set(names) - {BASE} - self.peft_config.keys()):
            raise UserError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        inputs = (*args[:1], kwargs.get("inputs"), kwargs.get(getattr(self.model, "main_input_name", "input_ids")))
        for samples in inputs:
            if isinstance(samples, Tensor):
                require_one_name_each(names, len(samples))
        repeats = _repeats(args, kwargs, getattr(self.model, "generation_config", None))
        for module in self.modules():
            if isinstance(module, (PeraLayer, AuxiliaryTrainingWrapper)):
                hook = partial(_add_adapter_names, names=names, repeats=repeats)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _add_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: Sequence[str], repeats: int) -> Any:
    if args and len(args[0]) == repeats * len(names):  # else it runs before samples are repeated, as an encoder does
        names = [name for name in names for _ in range(repeats)]
    if isinstance(module, AuxiliaryTrainingWrapper):  # which knows only adapters of its own
        own = module._get_available_adapters()
        names = [name if name in own else BASE for name in names]
    return args, {**kwargs, "adapter_names": list(names)}


def _repeats(args: tuple[Any, ...], kwargs: dict[str, Any], default: Any) -> int:
    """How often ``generate`` repeats each sample: once for each beam or returned sequence."""
    configs = [*(arg for arg in args if isinstance(arg, GenerationConfig)), kwargs.get("generation_config"), default]

    def count(key: str) -> int:
        return next(filter(None, [kwargs.get(key), *(getattr(config, key, None) for config in configs)]), 1)

    return max(count("num_beams"), count("num_return_sequences"))


_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that PEFT names in ``modules_to_save`` by itself, by task, whether or not the model has them."""


def check_names(model: nn.Module, config: PeftConfig) -> None:
    """Refuse a configuration, of any PEFT method, that names a module or parameter which the model does not have.

    Raises:
        UserError: a name in a list of ``target_modules``, ``exclude_modules``, ``modules_to_save`` or
            ``target_parameters`` matches nothing; the nearest name is given. Or a regular expression or an entry of
            ``rank_pattern`` or ``alpha_pattern`` matches nothing, an index of ``layers_to_transform`` is no layer's, or
            a token of ``trainable_token_indices`` is not in the vocabulary. Or as :func:`check_lists`.
    """
    check_lists(config)
    parameters = {name.replace(".base_layer", "") for name, _ in model.named_parameters() if ".pera_" not in name}
    modules = {name for name, _ in model.named_modules() if ".pera_" not in name and "base_layer" not in name}
    _check_excluded(model, modules, config)
    for key, known, allowed in (
        ("target_modules", modules, ()),
        ("exclude_modules", modules, ()),
        ("modules_to_save", modules, _HEADS.get(config.task_type or "", ())),
        ("target_parameters", parameters, ()),
    ):
        names = getattr(config, key, None)
        if isinstance(names, str):
            shorthand = key == "target_modules" and names == INCLUDE_LINEAR_LAYERS_SHORTHAND
            if not shorthand and not any(re.fullmatch(names, module) for module in modules):
                raise UserError(f"{key}: {names!r}, as a regular expression, matches no module; give a list of names.")
            continue
        for wanted in sorted(set(names or ()) - set(allowed)):
            if wanted == INCLUDE_LINEAR_LAYERS_SHORTHAND:
                raise UserError(f"{key} lists {wanted!r} among names; give it alone, as a string.")
            if not any(name == wanted or name.endswith(f".{wanted}") for name in known):
                raise UserError(f"{key}: {wanted!r} not found in the base model; {_nearest_ending(wanted, known)}")
    _check_patterns(modules | parameters if getattr(config, "target_parameters", None) else modules, config)
    _check_layers(modules, config)
    _check_tokens(model, config)


def _check_excluded(model: nn.Module, modules: set[str], config: PeftConfig) -> None:
    excluded = getattr(config, "exclude_modules", None) or ()
    adapted = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    for wanted in [excluded] if isinstance(excluded, str) else sorted(excluded):
        pattern = wanted if isinstance(excluded, str) else rf"(.*\.)?{re.escape(wanted)}"  # as PEFT finds them
        found = [model.get_submodule(name) for name in modules if re.fullmatch(pattern, name)]
        if found and all(_holds_layers(m) and not isinstance(m, adapted) for m in found):
            raise UserError(
                f"exclude_modules: {wanted!r} holds layers and is none, so nothing would be left out; name the layers, "
                r"or give an expression such as '.*\.mlp\..*'."
            )


def _holds_layers(module: nn.Module) -> bool:
    """Whether a module has others and no parameters of its own."""
    return any(True for _ in module.children()) and not any(True for _ in module.parameters(recurse=False))


def _nearest_ending(wanted: str, names: set[str]) -> str:
    endings = {ending for name in names if not (ending := name.rpartition(".")[2]).isdigit()}
    return nearest(wanted.rpartition(".")[2], endings - {""})


def _check_patterns(names: set[str], config: PeftConfig) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key, None) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):  # as PEFT finds them
                raise UserError(
                    f"{key}: {pattern!r} matches nothing in the base model; {_nearest_ending(pattern, names)}"
                )


def _check_layers(modules: set[str], config: PeftConfig) -> None:
    indices = getattr(config, "layers_to_transform", None)
    if indices is None:
        return
    patterns = getattr(config, "layers_pattern", None) or ()
    lists = [rf"(?:^|.*?\.){pattern}" for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
    found = {
        int(match["index"])
        for start in lists or [r".*?\.[^.]*"]  # as PEFT finds them
        for name in modules
        if (match := re.match(rf"{start}\.(?P<index>\d+)\.", name))
    }
    for index in [indices] if isinstance(indices, int) else indices:
        if found and index not in found:
            raise UserError(f"layers_to_transform: {index} is not the index of a layer, {min(found)} to {max(found)}.")


def _check_tokens(model: Any, config: PeftConfig) -> None:
    key, wanted = "trainable_token_indices", getattr(config, "trainable_token_indices", None) or ()
    embeddings: list[tuple[str, Any, list[int]]] = []
    if isinstance(wanted, dict):
        modules = list(model.named_modules())
        for ending, tokens in wanted.items():  # as PEFT finds them
            embeddings += [(f"{key}[{ending!r}]", module, tokens) for name, module in modules if name.endswith(ending)]
    elif wanted and hasattr(model, "get_input_embeddings"):
        embeddings = [(key, model.get_input_embeddings(), wanted)]
    for place, embedding, tokens in embeddings:
        if not isinstance(weight := getattr(embedding, "weight", None), Tensor) or weight.dim() != 2:
            raise UserError(f"{place} is not an embedding or a linear layer; name one, such as 'embed_tokens'.")
        rows = len(weight)
        if outside := [token for token in tokens if not 0 <= token < rows]:
            raise UserError(f"{place}: {outside[0]} is not in the vocabulary, 0 to {rows - 1}.")
