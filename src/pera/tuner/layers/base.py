"""What all adapted layers have in common: parameters, several adapters, merging, the kept expansion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from pera.errors import UserError
from pera.linear import computation_dtype, expanded_linear, expansions, pera_linear
from pera.polynomial import Normalization, Terms, delta_weight, fixed_coefficients, num_coefficients
from pera.tuner.config import PeraConfig


class Expansion(NamedTuple):
    """How the factors of one adapter are expanded."""

    terms: Terms
    normalization: Normalization


class _Kept(NamedTuple):
    """Expansions, and what they were computed from."""

    factors: list[Tensor]
    state: tuple[Any, ...]
    expansions: tuple[Tensor, Tensor]


class PeraLayer(nn.Module, BaseTunerLayer):
    """Base class of the adapted layers.

    For each adapter: ``pera_A`` ``(r, in_features)``, ``pera_B`` ``(out_features, r)`` and, for learned
    coefficients, ``pera_h`` ``(num_coefficients,)``, squares first, then crosses lexicographically.

    **The kept expansion.** In evaluation mode, without gradients, the expansion of an adapter is computed
    once and kept in the dtype of the computation. It is dropped by ``train()`` and ``eval()``, loading a
    state dict, moving or casting the module, merging and unmerging, setting, adding or deleting an adapter
    and changing its scale; and it is not used when a factor is another tensor, or has been written to in
    place, since. Only one thing escapes this: a write through ``.data`` while the model stays in
    evaluation mode, which PyTorch does not record. Call :meth:`drop_expansions` after one.
    """

    adapter_layer_names = ("pera_A", "pera_B", "pera_h")
    other_param_names = ("r", "pera_alpha", "scaling", "pera_dropout", "expansion")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.r: dict[str, int] = {}
        self.pera_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.expansion: dict[str, Expansion] = {}
        self.pera_dropout = nn.ModuleDict()
        self.pera_A = nn.ParameterDict()
        self.pera_B = nn.ParameterDict()
        self.pera_h = nn.ParameterDict()
        self._initial_scaling: dict[str, float] = {}
        self._kept: dict[str, _Kept] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        sides: Any = _get_in_out_features(self.get_base_layer())
        self.in_features: int = sides[0]
        self.out_features: int = sides[1]

    def update_layer(self, adapter_name: str, r: int, alpha: float | None, config: PeraConfig, **_: Any) -> None:
        """Add the adapter ``adapter_name`` of rank ``r``, or replace it."""
        if r > min(self.in_features, self.out_features):
            warnings.warn(
                f"r={r} is above a side of a ({self.out_features}, {self.in_features}) weight: "
                "the factors have more parameters than the weight itself.",
                stacklevel=2,
            )
        self.r[adapter_name] = r
        self.pera_alpha[adapter_name] = r if alpha is None else alpha
        self.scaling[adapter_name] = self._initial_scaling[adapter_name] = config.scaling(r, alpha)
        self.expansion[adapter_name] = Expansion(config.terms, config.normalization)
        self.pera_dropout[adapter_name] = nn.Dropout(config.pera_dropout) if config.pera_dropout else nn.Identity()
        self.pera_A[adapter_name] = nn.Parameter(torch.empty(r, self.in_features))
        self.pera_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, r))
        count = num_coefficients(r, config.terms)
        if config.coefficients == "learned" and count:
            self.pera_h[adapter_name] = nn.Parameter(torch.empty(count))
        elif adapter_name in self.pera_h:
            del self.pera_h[adapter_name]
        self.reset_parameters(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, config: PeraConfig) -> None:
        """A Kaiming-uniform (a = √5, as LoRA), B zero, h constant; without ``init_weights`` all three random."""
        nn.init.kaiming_uniform_(self.pera_A[adapter_name], a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.pera_B[adapter_name])
        else:
            nn.init.kaiming_uniform_(self.pera_B[adapter_name], a=math.sqrt(5))
        if adapter_name in self.pera_h:
            if config.init_weights:
                nn.init.constant_(self.pera_h[adapter_name], config.init_coefficients)
            else:
                nn.init.normal_(self.pera_h[adapter_name])

    def coefficients(self, adapter_name: str) -> Tensor:
        """h of the adapter, learned or fixed, ``(num_coefficients,)``."""
        if adapter_name in self.pera_h:
            h: Tensor = self.pera_h[adapter_name]
            return h
        A, terms = self.pera_A[adapter_name], self.expansion[adapter_name].terms
        return fixed_coefficients(self.r[adapter_name], terms, dtype=A.dtype, device=A.device)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """(A, B, h) of the adapter, ``(r, in_features)``, ``(out_features, r)``, ``(num_coefficients,)``.

        Raises:
            UserError: this layer has no adapter of that name.
        """
        if adapter_name not in self.pera_A:
            raise UserError(f"adapter {adapter_name!r} is not on this layer; it has: {', '.join(self.pera_A)}.")
        return self.pera_A[adapter_name], self.pera_B[adapter_name], self.coefficients(adapter_name)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW of the adapter in the layout of the base weight, float32 or better."""
        delta = delta_weight(*self.factors(adapter_name), *self.expansion[adapter_name], self.scaling[adapter_name])
        return self._to_base_layout(delta)

    def _to_base_layout(self, delta: Tensor) -> Tensor:
        """``(out_features, in_features)`` in the layout in which the base layer stores its weight."""
        return delta

    def adapter_output(self, adapter_name: str, x: Tensor) -> Tensor:
        """s · dropout(x) ΔWᵀ, ``(..., in_features)`` → ``(..., out_features)``, in the dtype of the computation."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            A, B, h = self.factors(adapter_name)
            terms, normalization = self.expansion[adapter_name]
            x = self.pera_dropout[adapter_name](x)
            return pera_linear(x, A, B, h, terms=terms, normalization=normalization, scaling=self.scaling[adapter_name])
        dtype = computation_dtype(x)
        return expanded_linear(x.to(dtype), *self._kept_expansions(adapter_name, dtype))

    def _kept_expansions(self, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The kept expansions in ``dtype``, computed if there are none or what they were computed from has changed."""
        factors = [p[adapter_name] for p in (self.pera_A, self.pera_B, self.pera_h) if adapter_name in p]
        terms, normalization = self.expansion[adapter_name]
        scaling = self.scaling[adapter_name]
        recorded = not any(factor.is_inference() for factor in factors)  # else in-place writes leave no trace
        state = (dtype, scaling, terms, normalization, [f._version for f in factors] if recorded else None)
        kept = self._kept.get(adapter_name)
        if (
            kept
            and recorded
            and kept.state == state
            and all(a is b for a, b in zip(kept.factors, factors, strict=True))
        ):
            return kept.expansions
        computed = expansions(
            *self.factors(adapter_name), terms=terms, normalization=normalization, scaling=scaling, dtype=dtype
        )
        self._kept[adapter_name] = _Kept(factors, state, computed)
        return computed

    def drop_expansions(self) -> None:
        """Forget the kept expansions; the next forward computes them anew."""
        self._kept.clear()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the given, or else of the active, adapters to the base weight.

        The addition is made in float32 or better; the base weight keeps its dtype.

        Args:
            safe_merge: leave the weight as it was if the sum is not finite.
            adapter_names: adapters to merge; None means the active ones.

        Raises:
            ValueError: ``safe_merge`` and a merged weight would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.pera_A]
        self.drop_expansions()
        if not names:
            return
        weight = self.get_base_weight()
        dtype = weight.dtype
        merged = weight.to(torch.promote_types(dtype, torch.float32), copy=True)
        for name in names:
            merged += self.get_delta_weight(name).detach().to(merged)
            if safe_merge and not torch.isfinite(merged.to(dtype)).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.set_base_weight(merged.to(dtype))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Subtract all merged adapters from the base weight again, in float32 or better."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.drop_expansions()
        weight = self.get_base_weight()
        dtype = weight.dtype
        base = weight.to(torch.promote_types(dtype, torch.float32), copy=True)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.pera_A:
                base -= self.get_delta_weight(name).detach().to(base)
        self.set_base_weight(base.to(dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """ΔW is additive, so PEFT's ``convert_to_lora`` applies; the exact factors need no conversion at all."""
        return True

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale the adapter by ``scale`` times its own s."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._initial_scaling[adapter]
            self.drop_expansions()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale
        self.drop_expansions()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by ``scale``, or set it back to α / r."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self._initial_scaling[name] if scale is None else self.scaling[name] / scale
        self.drop_expansions()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self.drop_expansions()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.drop_expansions()
        self._initial_scaling.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def train(self, mode: bool = True) -> Any:
        self.drop_expansions()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_expansions()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.drop_expansions()
        return super()._apply(fn, recurse)
