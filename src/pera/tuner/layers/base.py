"""The base class of the adapted layers: parameters, several adapters, forward, merging."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from pera.anchors import Anchors, draw_anchors
from pera.errors import UserError
from pera.linear import Expansions, expansions, without_autocast
from pera.polynomial import Normalization, Terms, delta_weight, expanded_rank, fixed_coefficients, num_coefficients
from pera.tuner.call import keep
from pera.tuner.checks import check_sizes
from pera.tuner.config import PeraConfig
from pera.tuner.sharding import Factors, Parallel, check_factors, check_whole, like_weight, read, reshard

BASE = "__base__"
"""The name in ``adapter_names`` that means no adapter, as in PEFT."""


def require_one_name_each(adapter_names: Sequence[str], samples: int) -> None:
    """Raise UserError unless there are as many names as samples."""
    if len(adapter_names) != samples:
        raise UserError(
            "Length of `adapter_names` should be the same as the number of inputs, "
            f"but got {len(adapter_names)} and {samples} respectively."
        )


class Expansion(NamedTuple):
    """How the factors of one adapter are expanded."""

    terms: Terms
    normalization: Normalization
    anchors: Anchors | None = None

    @property
    def k(self) -> int:
        """Number of anchors."""
        return 0 if self.anchors is None else self.anchors.k


class PeraLayer(nn.Module, BaseTunerLayer):
    """Base class of the adapted layers: y = base(x) + Σ s · x ΔWᵀ over the active adapters.

    Each adapter has the parameters ``pera_A`` ``(r, columns)``, ``pera_B`` ``(rows, r)`` and, for learned coefficients,
    ``pera_h`` ``(num_coefficients,)``: squares, then crosses lexicographically, then anchors. Rows and columns are
    :attr:`delta_shape`. An adapter in ``tied`` has no parameters here; it uses the transposed ΔW of another layer.

    The frozen rows of anchors follow from the seed, :attr:`module_name` and :attr:`delta_shape`. ``expansion`` holds
    them. They are neither parameters nor buffers, which can be cast, sharded, broadcast and emptied.
    """

    adapter_layer_names = ("pera_A", "pera_B", "pera_h")
    other_param_names = ("r", "pera_alpha", "scaling", "pera_dropout", "expansion", "tied")
    module_name: str
    """Name of the layer in the base model without wrappers; for a tied layer, of the layer that it is tied to."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PeraConfig,
        r: int,
        alpha: float | None,
        tied_to: PeraLayer | None = None,
        module_name: str = "",
        parallel: Parallel | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.parallel = parallel
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.r: dict[str, int] = {}
        self.pera_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.expansion: dict[str, Expansion] = {}
        self.tied: dict[str, PeraLayer] = {}
        self.pera_dropout = nn.ModuleDict()
        self.pera_A = Factors()
        self.pera_B = Factors()
        self.pera_h = Factors()
        self._initial_scaling: dict[str, float] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters = []
        self.in_features, self.out_features = self._features()
        self.update_layer(adapter_name, r, alpha, config=config, tied_to=tied_to)

    def _features(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        if isinstance(base, nn.Linear):
            return base.in_features, base.out_features  # PEFT: of this process's part, if it is tensor-parallel
        features: Any = _get_in_out_features(base)
        return features[0], features[1]

    @property
    def delta_shape(self) -> tuple[int, int]:
        """Rows and columns of B̂ Â."""
        return self.out_features, self.in_features

    @property
    def experts(self) -> tuple[int, ...]:
        """Leading dimensions of the factors, one entry per ΔW; empty for a layer with a single ΔW."""
        return ()

    @staticmethod
    def check_config(config: PeraConfig) -> None:
        """Raise UserError if this kind of layer does not support ``config``."""

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        alpha: float | None,
        config: PeraConfig,
        tied_to: PeraLayer | None = None,
        **_: Any,
    ) -> None:
        """Add an adapter, or replace it.

        Args:
            adapter_name: name of the adapter.
            r: rank.
            alpha: α, which sets the scale; None means r.
            config: the other options.
            tied_to: layer whose parameters the adapter shares.

        Raises:
            UserError: this kind of layer does not support ``config``.
        """
        self.check_config(config)
        if self.parallel is not None and config.pera_dropout and not config.inference_mode:
            raise UserError(
                f"pera_dropout={config.pera_dropout} would drop other inputs in each process of a tensor-parallel "
                "model; set it to 0."
            )
        rows, columns = self.delta_shape
        K = expanded_rank(r, config.terms, config.anchors)
        check_sizes(rows, columns, r, K, config.anchors)
        if r > min(rows, columns):
            warnings.warn(
                f"r={r} (K={K}) is above a side of a ({rows}, {columns}) weight: "
                "the factors have more parameters than the weight itself.",
                stacklevel=2,
            )
        self.r[adapter_name] = r
        self.pera_alpha[adapter_name] = r if alpha is None else alpha
        self.scaling[adapter_name] = self._initial_scaling[adapter_name] = config.scaling(r, alpha)
        anchors = draw_anchors(config.anchors, config.anchor_seed, self.module_name, rows, columns)
        if tied_to is not None and (anchors := tied_to.expansion[adapter_name].anchors) is not None:
            anchors = anchors if type(tied_to) is type(self) else anchors.transposed
        self.expansion[adapter_name] = Expansion(config.terms, config.normalization, anchors)
        self.pera_dropout[adapter_name] = nn.Dropout(config.pera_dropout) if config.pera_dropout else nn.Identity()
        for parameters in (self.pera_A, self.pera_B, self.pera_h, self.tied):
            if adapter_name in parameters:
                del parameters[adapter_name]
        if tied_to is not None:
            self.tied[adapter_name] = tied_to
        else:
            self.pera_A[adapter_name] = nn.Parameter(torch.empty(*self.experts, r, columns))
            self.pera_B[adapter_name] = nn.Parameter(torch.empty(*self.experts, rows, r))
            if config.learns_coefficients:
                count = num_coefficients(r, config.terms, config.anchors)
                self.pera_h[adapter_name] = nn.Parameter(torch.empty(*self.experts, count))
            self.reset_parameters(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if self.parallel is not None:
            dictionaries = (self.pera_A, self.pera_B, self.pera_h)
            self.parallel.share([d[adapter_name] for d in dictionaries if adapter_name in d])
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, config: PeraConfig) -> None:
        """Initialize with ΔW = 0 and constant h, 1 for anchors. With ``init_weights=False``, draw a random ΔW."""
        self._reset_factors(self.pera_A[adapter_name], self.pera_B[adapter_name], config.init_weights)
        if adapter_name in self.pera_h:
            if config.init_weights:
                h = self.pera_h[adapter_name]
                nn.init.constant_(h, config.init_coefficients)
                nn.init.ones_(h[..., h.shape[-1] - config.anchors :])
            else:
                nn.init.normal_(self.pera_h[adapter_name])

    def _reset_factors(self, A: Tensor, B: Tensor, init_weights: bool | str) -> None:
        """Initialize A with Kaiming-uniform(a=√5), that is U(−1/√n, 1/√n), and B with zeros.

        With "gaussian", A is N(0, 1/r²). With ``init_weights=False``, B is U(−1/√r, 1/√r).
        """
        if init_weights == "gaussian":
            nn.init.normal_(A, std=1 / A.shape[-2])
        else:
            nn.init.uniform_(A, -1 / math.sqrt(A.shape[-1]), 1 / math.sqrt(A.shape[-1]))
        if init_weights:
            nn.init.zeros_(B)
        else:
            nn.init.uniform_(B, -1 / math.sqrt(B.shape[-1]), 1 / math.sqrt(B.shape[-1]))

    def has(self, adapter_name: str) -> bool:
        """Return whether the adapter changes this layer."""
        return adapter_name in self.r

    def coefficients(self, adapter_name: str) -> Tensor:
        """Return h of the adapter, learned or fixed, ``(num_coefficients,)``."""
        if adapter_name in self.tied:
            return self.tied[adapter_name].coefficients(adapter_name)
        if not isinstance(self.pera_h, Factors) or adapter_name in self.pera_h:
            return read(self.pera_h, adapter_name)
        A, expansion = read(self.pera_A, adapter_name), self.expansion[adapter_name]
        r = self.r[adapter_name]
        return fixed_coefficients(r, expansion.terms, expansion.k, dtype=A.dtype, device=A.device)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return (A, B, h) of the adapter: ``(r, columns)``, ``(rows, r)``, ``(num_coefficients,)``.

        Raises:
            UserError: the layer has no adapter of this name, or its factors are divided over processes.
        """
        if adapter_name in self.tied:
            source = self.tied[adapter_name]
            A, B, h = source.factors(adapter_name)
            return (A, B, h) if type(source) is type(self) else (B.T, A.T, h)
        if not self.has(adapter_name):
            raise UserError(f"adapter {adapter_name!r} is not on this layer; it has: {', '.join(self.r)}.")
        A, B = read(self.pera_A, adapter_name), read(self.pera_B, adapter_name)
        check_factors(A, B, *self.delta_shape, self.r[adapter_name], adapter_name)
        return A, B, self.coefficients(adapter_name)

    def expansions(self, adapter_name: str, dtype: torch.dtype) -> Expansions:
        """Return the expansions in ``dtype``; in evaluation without gradients they are kept while a call lasts."""
        expansion, scaling = self.expansion[adapter_name], self.scaling[adapter_name]

        def compute() -> Expansions:
            factors = self.factors(adapter_name)
            form = self.expansion_on(factors[0].device, adapter_name)._asdict()
            return expansions(*factors, **form, scaling=scaling, dtype=dtype)

        if not self._unchanging():
            return compute()
        form = (expansion.terms, expansion.normalization, expansion.k)
        return keep((self, adapter_name, dtype, *form, scaling), compute)

    def expansion_on(self, device: torch.device, adapter_name: str) -> Expansion:
        """Return how the factors of the adapter are expanded, with the anchors on ``device``, where they then stay."""
        expansion = self.expansion[adapter_name]
        if expansion.anchors is None or expansion.anchors.V.device == device:
            return expansion
        with torch.inference_mode(False):
            anchors = expansion.anchors.to(device)
        if not torch.compiler.is_compiling() and device.type != "meta":  # those have no values
            anchors = Anchors(*map(torch.func.debug_unwrap, anchors))
            if all(type(t) is Tensor for t in anchors):  # no fake tensors
                self.expansion[adapter_name] = expansion._replace(anchors=anchors)
        return expansion._replace(anchors=anchors)

    def _unchanging(self) -> bool:
        """Return whether the weights of the adapter stay the same during a call."""
        return not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return ΔW of the adapter in the layout of the base weight, float32 or better."""
        factors = self.factors(adapter_name)
        with without_autocast(factors[0]):
            expansion = self.expansion_on(factors[0].device, adapter_name)
            delta = delta_weight(*factors, *expansion, self.scaling[adapter_name])
        return self._to_base_layout(delta)

    def _to_base_layout(self, delta: Tensor) -> Tensor:
        """Convert ΔW from :attr:`delta_shape` to the layout of the base weight."""
        return delta

    @staticmethod
    def check_lora(base_layer: Any, name: str) -> None:
        """Raise UserError, naming the layer, if PEFT's LoRA computes something different for this kind of layer."""

    @staticmethod
    def as_lora(base_layer: Any, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """Return the factors ``(K, columns)`` and ``(rows, K)`` of ΔW = B A, named and shaped as in PEFT's LoRA."""
        return {"lora_A.weight": A, "lora_B.weight": B}

    def adapter_output(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return what the adapter adds to the output of the base layer for the input ``x``."""
        raise NotImplementedError

    def add_adapter_output(self, result: Tensor, adapter_name: str, x: Tensor) -> Tensor:
        """Return ``result`` plus :meth:`adapter_output`, in the dtype of ``result``."""
        return result + self.adapter_output(adapter_name, x).to(result.dtype)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Return the output of the base layer plus the outputs of the active adapters, in the dtype of the base.

        Merged adapters are part of the base layer and are not added again.

        Args:
            x: the input of the base layer, with the batch first.
            adapter_names: one adapter per sample, which replaces the active ones; "__base__" means none.

        Raises:
            UserError: the number of names differs from the number of samples.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            return self._add_by_sample(result, x, adapter_names)
        for name in self.active_adapters:
            if self.has(name) and name not in self.merged_adapters:
                result = self.add_adapter_output(result, name, x)
        return result

    def _add_by_sample(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        require_one_name_each(adapter_names, len(x))
        for name in dict.fromkeys(adapter_names):
            if self.has(name):
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                result = result.index_add(0, rows, self.adapter_output(name, x[rows]).to(result.dtype))
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the active adapters to the base weight, in place.

        The sum is computed in float32 or better; the base weight keeps its dtype. A quantized weight is replaced.

        Args:
            safe_merge: check the sum first, and leave the weight unchanged if it is not finite.
            adapter_names: adapters to merge; None means the active ones.

        Raises:
            ValueError: ``safe_merge`` is set and the merged weight would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        self._add_to_base_weight(names, 1, safe_merge)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Subtract all merged adapters from the base weight, in place, in float32 or better."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        names = [name for name in self.merged_adapters if self.has(name)]
        self.merged_adapters.clear()
        self._add_to_base_weight(names, -1)

    @torch.no_grad()
    def _add_to_base_weight(self, adapter_names: list[str], sign: int, check: bool = False) -> None:
        """Add ``sign`` times the sum of ΔW to the base weight, in place unless it is quantized."""
        names = [name for name in adapter_names if not self._merged_with_another(name)]
        if not names:
            return
        self.check_base_weight()
        reshard(self.get_base_layer())
        weight = self.get_base_weight()
        total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=check)
        for name in names:
            total.add_(like_weight(self.get_delta_weight(name), weight).to(total), alpha=sign)
            if check and not torch.isfinite(total.to(weight.dtype)).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if self.quantization_backend is not None:
            self.set_base_weight(total.to(weight.dtype))
        elif total is not weight:
            weight.copy_(total)

    def check_base_weight(self) -> None:
        """Raise UserError if FSDP1 or ZeRO-3 divides the base weight, which then cannot be changed."""
        base: Any = self.get_base_layer()
        check_whole(getattr(base, "weight", None), base, "weight")

    def _merged_with_another(self, adapter_name: str) -> bool:
        """Return whether the adapter is tied to a layer with the same weight, which merges it for both."""
        other = self.tied.get(adapter_name)
        return other is not None and other.get_base_layer().weight is self.get_base_layer().weight

    def set_base_weight(self, weight_data: Tensor) -> None:
        bias = getattr(self.get_base_layer(), "bias", None)
        super().set_base_weight(weight_data)
        if bias is not None:
            self.get_base_layer().bias = bias  # PEFT creates a new layer for HQQ and drops its bias

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether PEFT's ``convert_to_lora`` applies, which supports linear layers. ``to_lora`` is exact."""
        return False

    def rescale(self, adapter_name: str, alpha: float, scaling: float) -> None:
        """Set α of the adapter and the scale s that follows from it."""
        self._change_scaling({adapter_name: scaling})
        self.pera_alpha[adapter_name] = alpha
        self._initial_scaling[adapter_name] = scaling

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of the adapter to ``scale`` times its own s."""
        if adapter in self.scaling:
            self._change_scaling({adapter: scale * self._initial_scaling[adapter]})

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        active = [name for name in self.active_adapters if name in self.scaling]
        self._change_scaling({name: self.scaling[name] * scale for name in active})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by ``scale``; without ``scale``, reset it to α / r."""
        before = self._initial_scaling if scale is None else {n: s / scale for n, s in self.scaling.items()}
        self._change_scaling({name: before[name] for name in self.active_adapters if name in self.scaling})

    def _change_scaling(self, scaling: dict[str, float]) -> None:
        for name in scaling.keys() & set(self.merged_adapters):  # otherwise unmerge would subtract a different ΔW
            raise UserError(f"adapter {name!r} is merged; call unmerge_adapter before you change its scale.")
        self.scaling.update(scaling)

    def delete_adapter(self, adapter_name: str) -> None:
        self._initial_scaling.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def __repr__(self) -> str:
        return "pera." + super().__repr__()
