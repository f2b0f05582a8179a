"""Conversions between LoRA and other adapters of a model in memory.

A PERA adapter of rank r is exactly a LoRA of the expanded rank K, and so are adapters of several other methods
(:mod:`pera.folding`). A LoRA is exactly a PERA adapter with h = 0. The functions of this module need torch and PEFT
only; ``pera export`` and ``pera import`` work on files.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs
from torch import Tensor
from torch.nn.functional import pad

from pera.errors import UserError, nearest
from pera.folding import Folded, changes_base, folded_layers
from pera.polynomial import Normalization, Terms, num_coefficients
from pera.tuner import ParamWrapper, PeraConfig
from pera.tuner.layers import layer_class
from pera.tuner.names import is_wrapped
from pera.tuner.sharding import reshard
from pera.tuner.tying import without


def to_lora(model: PeftModel, adapter_names: list[str] | None = None) -> PeftModel:
    """Return the model with each adapter replaced by the equivalent LoRA.

    The conversion is exact: h, normalization and scale go into the factors, in float64. The LoRA has rank K and
    lora_alpha = K, and loads without pera when saved. With r = 8 and all terms, K = 44::

        model                               # PERA: pera_A (8, in), pera_B (out, 8), pera_h (36,)
        lora = to_lora(model)               # LoRA: lora_A (44, in), lora_B (out, 44)
        lora.save_pretrained("adapter")     # plain PEFT loads it
        lora.merge_and_unload()             # or merge it

        to_lora(model, ["a", "b"])          # converts these adapters and drops the others

    Adapters of PEFT's methods are converted too, if their update has exact factors of low rank
    (:data:`pera.folding.METHODS`). A LoHa of r = 4 becomes a LoRA of rank 16.

    Like ``unload``, this takes the base model out of ``model``. Use only the returned object.

    Args:
        model: model with adapters of one method, none of them merged.
        adapter_names: adapters to convert. None converts all. Other adapters are not in the result.

    Returns:
        The LoRA model. The active adapters stay active if they were converted; otherwise the first is active.

    Raises:
        UserError: ``model`` has no adapters, an adapter is unknown or merged, or LoRA cannot express its method or a
            layer. ``model`` is then unchanged.
    """
    names = _adapters(model, adapter_names)
    return _replace_adapters(model, {name: fold(model, name) for name in names})


def combine(model: PeftModel, weights: dict[str, float], adapter_name: str = "combined") -> PeftModel:
    """Return the model with its adapters replaced by one LoRA, their weighted sum Σ w ΔW.

    The sum is exact. Its factors are the factors of all adapters side by side, so the ranks add up::

        model                                        # adapters a, b and c, each of r = 8
        combine(model, {"a": 0.7, "b": 0.3})         # lora_A (88, in), lora_B (out, 88)
        combine(model, {"a": 1, "b": -1})            # the difference of two adapters
        combine(model, {"a": 0.5})                   # one adapter at half strength, of rank 44

    Like ``unload``, this takes the base model out of ``model``. Use only the returned object.

    Args:
        model: model with adapters of one method, as for :func:`to_lora`.
        weights: a finite weight for each adapter that takes part.
        adapter_name: name of the LoRA.

    Returns:
        The LoRA model, with one adapter.

    Raises:
        UserError: as for :func:`to_lora`; also if a weight is not a finite number, or an adapter trains more than its
            factors (``modules_to_save``, ``bias``, ``trainable_token_indices``), which cannot be added.
    """
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"weights={weights!r} names no adapter; give one or more as {{name: weight}}.")
    _adapters(model, list(weights))
    if "." in adapter_name:
        raise UserError(f"adapter_name={adapter_name!r} becomes the name of a module; leave out the dot.")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise UserError(f"weights[{name!r}]={weight!r} should be a finite number.")
        config: Any = model.peft_config[name]
        for key in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, key, None):
                raise UserError(f"{key}={getattr(config, key)!r} of adapter {name!r} has no weighted sum.")
        if getattr(config, "bias", "none") != "none":
            raise UserError(f"bias={config.bias!r} of adapter {name!r} has no weighted sum.")
    folded = folded_layers(model, weights)
    configs: list[Any] = [model.peft_config[name] for name in weights]
    parameters = {name for config in configs for name in getattr(config, "target_parameters", None) or ()}
    named = _by_name(folded) | {"target_parameters": sorted(parameters)}
    config = lora_config(configs[0], _rank(folded), **named)
    return _replace_adapters(model, {adapter_name: (config, _lora_state(folded))})


def from_lora(
    model: PeftModel,
    adapter_names: list[str] | None = None,
    *,
    terms: Terms = "all",
    normalization: Normalization | None = None,
    anchors: int = 0,
    anchor_seed: int = 0,
) -> PeftModel:
    """Return the model with each LoRA adapter replaced by an equivalent PERA adapter, to train it further.

    A, B and the scale stay as they are and h is zero, so the outputs do not change. Training then moves h away from
    zero. With r = 8::

        model                                # LoRA: lora_A (8, in), lora_B (out, 8)
        pera = from_lora(model)              # PERA: pera_A (8, in), pera_B (out, 8), pera_h (36,)
        from_lora(model, terms="square")     # pera_h (8,)
        from_lora(model, anchors=4)          # pera_h (40,)
        from_lora(model, ["a"])              # converts this adapter and drops the others

    Like ``unload``, this takes the base model out of ``model``. Use only the returned object.

    Args:
        model: model with LoRA adapters, none of them merged.
        adapter_names: adapters to convert. None converts all. Other adapters are not in the result.
        terms: products of the new adapter: "all", "square" or "cross"; with anchors also "none".
        normalization: scale of the products; None means "rms" if there are products. With "rms", h has gradients of
            about the size of the other parameters'. With "none", products are tiny and h has almost no effect.
        anchors: number of anchors of the new adapter; see :class:`PeraConfig`. In a new adapter their coefficients
            start at 1; here they start at 0 as well, because the outputs would change otherwise.
        anchor_seed: seed of the anchors.

    Returns:
        The PERA model, trainable. The active adapters stay active if they were converted; otherwise the first is
        active.

    Raises:
        UserError: ``model`` has no LoRA adapters, an adapter is unknown or merged, it uses something that PERA does not
            have (DoRA, PiSSA, fused experts, …), or there is neither a product nor an anchor. ``model`` is then
            unchanged.
    """
    if terms == "none" and not anchors:
        raise UserError("terms='none' leaves no products to train; use 'all', 'square' or 'cross'.")
    if normalization is None:
        normalization = "none" if terms == "none" else "rms"
    options = {"terms": terms, "normalization": normalization, "anchors": anchors, "anchor_seed": anchor_seed}
    names = _adapters(model, adapter_names, LoraModel, "LoRA")
    return _replace_adapters(model, {name: _as_pera(model, name, **options) for name in names})


def fold(model: PeftModel, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and weights, as PEFT saves them, of the LoRA that equals an adapter.

    Args:
        model: model with the adapter.
        adapter_name: name of the adapter.

    Returns:
        The configuration, with r = lora_alpha = K, the largest expanded rank of all layers. The weights in float32:
        ``<layer>.lora_A.weight`` ``(K, in)`` and ``<layer>.lora_B.weight`` ``(out, K)``, or the names and shapes that
        LoRA has for other kinds of layers, and everything else that the adapter trains.

    Raises:
        UserError: LoRA cannot express the adapter or a layer of this kind.
    """
    return lora_of(model, folded_layers(model, {adapter_name: 1.0}), adapter_name)


def lora_of(model: PeftModel, folded: dict[str, Folded], adapter_name: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """As :func:`fold`, from folded layers that the caller may have changed, such as by truncation.

    Args:
        model: model with the adapter.
        folded: what :func:`pera.folding.folded_layers` returned.
        adapter_name: name of the adapter.
    """
    config: Any = model.peft_config[adapter_name]
    # Other methods may choose other modules by the same names.
    named = {} if isinstance(config, PeraConfig | LoraConfig) else _by_name(folded)
    return lora_config(config, _rank(folded), **named), _lora_state(folded) | _other_state(model, adapter_name)


def lora_config(config: Any, rank: int, **changed: Any) -> LoraConfig:
    """Configuration of the equivalent LoRA: the same modules, r = lora_alpha = ``rank``.

    Tied layers get separate weights: a merge would not keep LoRA's tie, and servers do not read it.

    Args:
        config: configuration of the adapter.
        rank: rank K of the LoRA.
        changed: options of LoRA that replace what ``config`` gives.
    """
    carried: dict[str, Any] = {
        key: getattr(config, key, None)
        for key in (
            "task_type",
            "base_model_name_or_path",
            "revision",
            "target_parameters",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "trainable_token_indices",
        )
    }
    targets, tied = config.target_modules, sorted(getattr(config, "target_modules_to_tie", None) or ())
    if isinstance(targets, str):
        carried["target_modules"] = "|".join([f"(?:{targets})", *map(re.escape, tied)])
    else:
        carried["target_modules"] = sorted({*(targets or ()), *tied})
    saved = {*(getattr(config, "modules_to_save", None) or ()), *(getattr(config, "modules_to_tie", None) or ())}
    carried["modules_to_save"] = sorted(saved) or None
    bias: Any = getattr(config, "bias", "none")
    if bias not in ("none", "all"):  # such as "pera_only"
        bias = "lora_only"
    return LoraConfig(r=rank, lora_alpha=rank, bias=bias, **{**carried, **changed})


def _by_name(folded: dict[str, Folded]) -> dict[str, Any]:
    """Options of LoRA that name each layer in full."""
    names = [name for name, found in folded.items() if not issubclass(found.kind, ParamWrapper)]
    return {"target_modules": names, **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))}


def factored_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of B A, computed from the factors in O((m + n) K² + K³).

    With B = Q_B R_B and Aᵀ = Q_A R_A, only the K × K matrix R_B R_Aᵀ is decomposed. Its singular vectors are
    multiplied by Q_B and Q_A.

    Args:
        A: ``(..., K, n)``.
        B: ``(..., m, K)``.

    Returns:
        U ``(..., m, k)``, singular values ``(..., k)`` in descending order, and Vᵀ ``(..., k, n)``, with
        k = min(K, m, n).
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def balanced_factors(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors √S Vᵀ ``(..., rank, n)`` and U √S ``(..., m, rank)`` of the leading ``rank`` singular directions."""
    root = S[..., :rank].sqrt()
    return root.unsqueeze(-1) * Vh[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)


def truncate_factors(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of B A of a given rank (Eckart and Young).

    Args:
        A: ``(..., K, n)``.
        B: ``(..., m, K)``.
        rank: the new rank. Above k = min(K, m, n) the factors have rank k and their product equals B A.

    Returns:
        A′ ``(..., rank, n)`` and B′ ``(..., m, rank)``.
    """
    return balanced_factors(*factored_svd(A, B), rank)


def _adapters(
    model: PeftModel, adapter_names: list[str] | None, tuner: type[BaseTuner] = BaseTuner, method: str = ""
) -> list[str]:
    """The names of the adapters to convert, after checks that need no conversion. ``method`` names ``tuner``."""
    if not isinstance(getattr(model, "base_model", None), tuner):
        wanted = f"a PeftModel with {method} adapters" if method else "a PeftModel whose adapters change weights"
        raise UserError(f"model is a {type(model).__name__}; give {wanted}.")
    if is_wrapped(model.get_base_model()):
        raise UserError(
            "the base model is compiled or wrapped; load the adapter on the plain base and convert it there."
        )
    if isinstance(adapter_names, str):
        raise UserError(f"adapter_names={adapter_names!r} should be a list of names.")
    if adapter_names == []:
        raise UserError("adapter_names=[] names no adapter; leave it out to convert all.")
    for name in adapter_names or ():
        if name not in model.peft_config:
            raise UserError(f"adapter {name!r} is not in the model; {nearest(name, model.peft_config)}")
    base: Any = model.base_model
    layers: list[Any] = [module for module in model.modules() if isinstance(module, base.tuner_layer_cls)]
    reshard(model)
    factors = [p for layer in layers for key in layer.adapter_layer_names for p in getattr(layer, key).parameters()]
    if any(hasattr(p, key) for p in factors for key in ("device_mesh", "ds_id", "_fsdp_flattened")):
        raise UserError(
            "the adapter is divided over processes, and can be converted in one process only; save it and load it on a "
            "model that is not divided."
        )
    for name in model.peft_config:
        if not any(name in layer._get_available_adapters() for layer in layers):
            raise UserError(f"adapter {name!r} is in no layer of the model; use the model that was returned from it.")
        if any(name in layer.merged_adapters for layer in layers):
            raise UserError(f"adapter {name!r} is merged; call unmerge_adapter first.")
    return list(model.peft_config) if adapter_names is None else adapter_names


def _rank(folded: dict[str, Folded]) -> int:
    return max(found.A.shape[-2] for found in folded.values())


def _lora_state(folded: dict[str, Folded]) -> dict[str, Tensor]:
    """The weights as PEFT saves them. Layers of smaller rank are padded with zeros."""
    state = {}
    for name, (layer, kind, A, B) in folded.items():
        missing = _rank(folded) - A.shape[-2]
        padded = pad(A, (0, 0, 0, missing)), pad(B, (0, missing))
        for key, weight in kind.as_lora(layer.get_base_layer(), *padded).items():
            state[f"base_model.model.{name}.{key}"] = weight.float().contiguous()
    return state


def _other_state(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """What an adapter trains besides its factors, as PEFT saves it. Tied modules share memory, so it is copied."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tuner: Any = model.base_model
    own = tuner.tuner_layer_cls.adapter_layer_names[0].partition("_")[0]
    return {key: weight.clone() for key, weight in state.items() if not _is_factor(key, own)}


def _is_factor(key: str, prefix: str = "lora") -> bool:
    """Whether a tensor is of an adapted layer. Methods begin the names of all their tensors with one prefix."""
    return f".{prefix}_" in key


def _as_pera(model: PeftModel, adapter_name: str, **options: Any) -> tuple[PeraConfig, dict[str, Tensor]]:
    """Configuration and weights of the PERA adapter with h = 0 that equals a LoRA."""
    lora: Any = copy.copy(model.peft_config[adapter_name])
    if changes_base(lora):
        raise UserError(
            f"init_lora_weights={lora.init_lora_weights!r} of adapter {adapter_name!r} also changed the base "
            "model; merge the adapter instead."
        )
    if lora.target_parameters:
        raise UserError(f"target_parameters={lora.target_parameters!r} cannot be converted; merge the adapter instead.")
    lora.init_lora_weights, lora.inference_mode = True, False  # trained weights replace the initial ones
    lora.eva_config = lora.corda_config = lora.lora_ga_config = None
    config = PeraConfig.from_lora(lora, **options)
    quantization = get_quantization_kwargs(model.base_model)
    state = _other_state(model, adapter_name)
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer._get_available_adapters():
            continue
        base_layer = layer.get_base_layer()
        cls = layer_class(base_layer, name, quantization)
        cls.check_config(config)
        cls.check_lora(base_layer, name)
        if not without([name], set(getattr(lora, "target_modules_to_tie", None) or ())):
            continue  # PERA keeps one set of factors for tied layers
        if adapter_name in layer.lora_embedding_A:
            A, B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        else:
            A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        h = A.new_zeros(num_coefficients(len(A), config.terms, config.anchors))
        for key, weight in (("pera_A", A.flatten(1)), ("pera_B", B.flatten(1)), ("pera_h", h)):
            state[f"base_model.model.{name}.{key}"] = weight.detach().clone()
    return config, state


def _replace_adapters(model: PeftModel, adapters: dict[str, tuple[Any, dict[str, Tensor]]]) -> PeftModel:
    """The base model of ``model`` with ``adapters``, each a configuration and weights, instead of its own."""
    first, *others = adapters
    active = [name for name in model.active_adapters if name in adapters] or [first]
    training = model.training
    names = {name: config.base_model_name_or_path for name, (config, _) in adapters.items()}
    adapters[first][0].base_model_name_or_path = None  # otherwise get_peft_model warns that it changes
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # otherwise unload leaves its module in the base model
            module.set_adapter([])
    result: Any = get_peft_model(model.unload(), adapters[first][0], adapter_name=first)
    for name in others:
        result.add_adapter(name, adapters[name][0])
    for name, (_, state) in adapters.items():
        set_peft_model_state_dict(result, state, adapter_name=name)
        result.peft_config[name].base_model_name_or_path = names[name]
        made = get_peft_model_state_dict(result, adapter_name=name, save_embedding_layers=False)
        assert set(filter(_is_factor, made)) == set(filter(_is_factor, state)), "PEFT adapted other layers"
    result.base_model.set_adapter(active)
    result.active_adapter = active[0]
    result.train(training)
    return result
