"""Weights that are divided over processes, by FSDP, DeepSpeed ZeRO-3 or tensor parallelism.

FSDP1, FSDP2 and ZeRO-3 divide where weights are stored. A layer computes with whole weights, which these engines gather
before a forward pass and drop after it. Tensor parallelism also divides the computation: each process holds a part of a
frozen weight and computes with it. The factors of an adapter are then whole on every process, and stay equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

from torch import Tensor, distributed, nn

from pera.errors import UserError


class Factors(nn.ParameterDict):
    """The parameters of a layer that play one role, such as ``pera_A``, by adapter.

    PEFT's wrap policy gives a unit of FSDP1 to each module without children that has a trainable ``weight``. A unit
    replaces the dictionary, and gathers the parameters when it is called. The hooks of accelerate, which load offloaded
    parameters, also need a call.
    """

    @property
    def weight(self) -> Tensor:
        """A trainable parameter. Without one, there is no such attribute."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                return parameter
        raise AttributeError("no factor is trainable")

    __call__ = nn.Module.__call__  # torch forbids to call a dictionary of parameters

    def forward(self, adapter_name: str) -> Tensor:
        """Return a copy of a parameter, because the parameter itself is dropped after the call."""
        parameter: Tensor = self[adapter_name]
        return parameter.clone()


def read(factors: Any, adapter_name: str) -> Tensor:
    """Return the parameter of an adapter from :class:`Factors`, which FSDP1 or accelerate may have wrapped.

    Raises:
        UserError: FSDP1 has dropped the whole parameter, or the model has made no forward pass yet.
    """
    if type(factors) is not Factors or "_hf_hook" in vars(factors):
        if "SUMMON_FULL_PARAMS" in str(getattr(factors, "training_state", None)):
            return read(factors.module, adapter_name)
        if getattr(factors, "_is_root", False) is None:  # a unit that is called first believes it is the outermost
            raise UserError(_not_whole(adapter_name))
        loaded: Tensor = factors(adapter_name)
        return loaded
    parameter: Tensor = factors[adapter_name]
    if adapter_name not in factors._parameters and not parameter.untyped_storage().nbytes():
        raise UserError(_not_whole(adapter_name))
    return parameter


def check_factors(A: Tensor, B: Tensor, rows: int, columns: int, r: int, adapter_name: str) -> None:
    """Raise UserError if FSDP1 or ZeRO-3 has left a part of the factors ``(r, columns)`` and ``(rows, r)``."""
    if A.shape[-2:] != (r, columns) or B.shape[-2:] != (rows, r):
        raise UserError(_not_whole(adapter_name))


def _not_whole(adapter_name: str) -> str:
    return (
        f"adapter {adapter_name!r} is divided over processes and whole in a forward pass only; call this within "
        "FSDP.summon_full_params(model) or deepspeed.zero.GatheredParameters(model.parameters())."
    )


def check_whole(weight: Any, module: nn.Module, name: str) -> None:
    """Raise UserError if FSDP1 or ZeRO-3 manages the parameter ``name`` of a module: a change of it would be lost."""
    plain = isinstance(vars(module).get(name), Tensor)  # as FSDP1 leaves it with use_orig_params=False
    if plain or hasattr(weight, "ds_id") or hasattr(weight, "_fsdp_flattened"):
        raise UserError(
            "an adapter cannot be merged or replaced while FSDP1 or DeepSpeed ZeRO-3 divides the model over processes; "
            "save the adapter, and load it on a model in one process."
        )


def reshard(module: nn.Module) -> None:
    """Put the sharded parameters of FSDP2 back in place.

    After a forward pass the outermost module keeps the whole parameters for a while, and a change of those is lost.
    FSDP2 puts the sharded ones back when a state is asked for.
    """
    if distributed.is_available() and distributed.is_initialized():
        module.state_dict()


def whole(t: Tensor) -> Tensor:
    """Return a tensor that FSDP2 shards in full. All processes have to call this."""
    gathered: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return gathered


def like_weight(delta: Tensor, weight: Any) -> Tensor:
    """Return ΔW divided in the same way as the base weight."""
    if not hasattr(weight, "device_mesh"):
        return whole(delta)
    divided: Any = delta
    if not hasattr(delta, "device_mesh"):
        divided = _replicated(delta, weight.device_mesh)
    placed: Tensor = divided.redistribute(weight.device_mesh, weight.placements)
    return placed


def fsdp_units(model: nn.Module) -> dict[nn.Module, Any]:
    """Return the innermost unit of FSDP1 of each module in one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel

    units: dict[nn.Module, Any] = {}
    for unit in model.modules():
        if isinstance(unit, FullyShardedDataParallel):
            units |= dict.fromkeys(unit.modules(), unit)
    return units


def divided_by_fsdp(model: nn.Module) -> bool:
    """Return whether FSDP divides a model."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


@contextmanager
def gathered(layer: nn.Module, unit: Any) -> Iterator[None]:
    """Gather the factors of an adapted layer that FSDP1 or ZeRO-3 divides. All processes have to enter this.

    Args:
        layer: the layer.
        unit: its unit of :func:`fsdp_units`, or None. The whole unit is gathered, such as a transformer block, unless
            the factors are in units of their own, which gather when they are read.
    """
    context: Any = nullcontext()
    dictionaries = [layer.get_submodule(name) for name in ("pera_A", "pera_B", "pera_h")]
    divided = [p for dictionary in dictionaries for p in dictionary.parameters() if hasattr(p, "ds_id")]
    if divided:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(divided)
    elif unit is not None and all(type(dictionary) is Factors for dictionary in dictionaries):
        context = unit.summon_full_params(unit, recurse=False, writeback=False)
    with context:
        yield


class Parallel(NamedTuple):
    """How tensor parallelism divides an adapted layer."""

    mesh: Any
    """The processes, a ``DeviceMesh`` of one dimension."""
    side: Literal["in", "out"] | None
    """Whether inputs or outputs are divided; None if both are whole."""

    def share(self, parameters: list[Tensor]) -> None:
        """Give all processes the values of the first one."""
        group = self.mesh.get_group()
        for parameter in parameters:
            if not parameter.is_meta:
                distributed.broadcast(parameter.data, distributed.get_global_rank(group, 0), group=group)

    def part(self, t: Tensor) -> Tensor:
        """Return the columns of a whole matrix that belong to this process."""
        return t.chunk(self.mesh.size(), -1)[self.mesh.get_local_rank()]

    def sum(self, t: Tensor) -> Tensor:
        """Return the sum over the processes. Its gradient is the same on all processes, and passes unchanged."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        partial: Any = DTensor.from_local(t, self.mesh, [Partial()], run_check=False)
        total: Tensor = partial.redistribute(placements=[Replicate()]).to_local()
        return total

    def sum_gradient(self, t: Tensor) -> Tensor:
        """Return ``t``, which is the same on all processes. Its gradient is summed over the processes."""
        from torch.distributed.tensor import Partial

        same: Tensor = _replicated(t, self.mesh).to_local(grad_placements=[Partial()])
        return same


_PLANS: dict[str, Literal["in", "out"] | None] = {
    "colwise": "out",
    "rowwise": "in",
    "colwise_gather_output": None,
    "colwise_rep": None,
    "rowwise_split_input": None,
    "rowwise_rep": None,
    "embedding_rowwise": None,
    "embedding_colwise": None,
}
"""The plans of transformers that adapters support."""


def tensor_parallel(model: Any, layer: Any, name: str, parameter_name: str | None = None) -> Parallel | None:
    """Return how tensor parallelism divides a layer; None if it does not.

    Args:
        model: the base model, whose ``tp_plan`` is read.
        layer: the layer without adapters.
        name: its name in the base model.
        parameter_name: the single parameter to adapt, which is not supported; None for the whole layer.

    Raises:
        UserError: the layer is divided in a way that adapters do not support.
    """
    weight: Any = getattr(layer, parameter_name or "weight", None)
    divided = hasattr(weight, "device_mesh")
    hooked = getattr(layer, "_is_hooked", False) or getattr(layer, "_hf_tp_plan", None) is not None
    if divided and not hooked and not hasattr(layer, "reshard"):  # torch's parallelize_module; FSDP2 has reshard
        hooked = bool(layer._forward_pre_hooks or layer._forward_hooks)
    if not hooked:
        return None
    plan = (getattr(model, "tp_plan", None) or {}).get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
    if not divided or plan not in _PLANS or weight.device_mesh.ndim > 1 or parameter_name is not None:
        raise UserError(
            f"{name!r} has the tensor-parallel plan {plan!r}, which PERA does not support; leave it out, or use a "
            "colwise or rowwise plan with transformers 5.17 or later."
        )
    return Parallel(weight.device_mesh, _PLANS[plan])


def _replicated(t: Tensor, mesh: Any) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
