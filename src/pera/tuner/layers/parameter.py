"""PERA on a single parameter of a module, such as the weights of fused experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pera.errors import UserError
from pera.tuner.layers.base import PeraLayer
from pera.tuner.layers.quantised import of_torchao
from pera.tuner.sharding import check_whole

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ParamWrapper(PeraLayer):
    """A module with PERA adapters on one of its parameters (``target_parameters``).

    The parameter is a matrix ``(out, in)`` or one matrix per expert: ``(experts, out, in)``, or ``(experts, in, out)``
    if the module sets ``is_transposed``. With experts, ``pera_A`` is ``(experts, r, in)``, ``pera_B`` is
    ``(experts, out, r)`` and ``pera_h`` is ``(experts, num_coefficients)``.

    Every forward builds ΔW and calls the module with the sum instead of the parameter, because any module may use its
    parameter in its own way. This takes the memory of the parameter a second time, as in PEFT's LoRA. If several
    parameters of a module are adapted, the wrappers are nested. PEFT recognizes the class by its name.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, parameter_name: str, **options: Any) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, **options)

    @property
    def parameter(self) -> nn.Parameter:
        """The adapted parameter of the base module."""
        parameter: nn.Parameter = getattr(self.get_base_layer(), self.parameter_name)
        return parameter

    @property
    def experts(self) -> tuple[int, ...]:
        return self._experts

    def _features(self) -> tuple[int, int]:
        shape = tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))  # DeepSpeed ZeRO-3 leaves a part
        if of_torchao(self.parameter):
            raise UserError(f"target_parameters: {self.parameter_name!r} is packed by torchao; leave it out.")
        if len(shape) not in (2, 3) or self.parameter.dtype not in _FLOATING:
            raise UserError(
                f"target_parameters: {self.parameter_name!r} of shape {shape} and dtype "
                f"{self.parameter.dtype} cannot be adapted; it should have 2 or 3 dimensions and a floating dtype."
            )
        *experts, rows, columns = shape
        self._experts = tuple(experts)
        return (rows, columns) if self._transposed else (columns, rows)

    @property
    def _transposed(self) -> bool:
        return bool(self.experts and getattr(self.get_base_layer(), "is_transposed", False))

    def _to_base_layout(self, delta: Tensor) -> Tensor:
        return delta.mT if self._transposed else delta

    @staticmethod
    def as_lora(base_layer: Any, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        if A.ndim == 2:  # no experts
            return PeraLayer.as_lora(base_layer, A, B)
        return {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": B.permute(1, 2, 0).flatten(1)}

    def get_base_weight(self) -> Tensor:
        return self.parameter.data

    def set_base_weight(self, weight_data: Tensor) -> None:
        self.parameter.data = weight_data

    def check_base_weight(self) -> None:
        check_whole(self.parameter, self.get_base_layer(), self.parameter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.parameter.device, self.parameter.dtype

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Return the output of the base module with W + Σ ΔW of the active adapters as its parameter.

        Raises:
            UserError: ``adapter_names`` is given, but a parameter is the same for all samples; or FSDP holds the
                parameter apart from the factors.
        """
        if adapter_names is not None:
            raise UserError("Cannot pass `adapter_names` with adapters on target_parameters; run one at a time.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters else self.active_adapters
        deltas = [self.get_delta_weight(n) for n in names if self.has(n) and n not in self.merged_adapters]
        if not deltas:
            return self.base_layer(*args, **kwargs)
        base, divided = self.base_layer, hasattr(deltas[0], "device_mesh")
        if hasattr(base, "summon_full_params") or hasattr(self.parameter, "device_mesh") != divided:
            raise UserError(
                f"target_parameters: the module of {self.parameter_name!r} is an FSDP unit, which drops the parameter "
                "before the adapter is added to it; make the block around it the unit."
            )
        weight = self.parameter + torch.stack(deltas).sum(0).to(self.parameter.dtype)
        attributes = vars(self.get_base_layer())
        before = attributes.get(self.parameter_name)
        if before is None and not hasattr(self.parameter, "ds_id"):
            return functional_call(self.base_layer, {self._path(): weight}, args, kwargs)
        # FSDP1 hides the parameter behind an attribute; ZeRO-3 needs its own parameter to stay registered.
        attributes[self.parameter_name] = weight
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            attributes.pop(self.parameter_name)
            if before is not None:
                attributes[self.parameter_name] = before

    def _path(self) -> str:
        """Return the name of the parameter relative to ``base_layer``, which may be a wrapper itself."""
        depth, inner = 0, self.base_layer
        while isinstance(inner, ParamWrapper):
            depth, inner = depth + 1, inner.base_layer
        return "base_layer." * depth + self.parameter_name

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without this wrapper and the wrappers inside it. PEFT calls this to unload."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        inner: nn.Module = self.base_layer
        if isinstance(inner, ParamWrapper):
            return inner.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return inner
