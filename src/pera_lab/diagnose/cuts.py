"""ΔW of every layer of an adapter in a model, PERA or LoRA, and its best approximations of lower rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import pad

from pera.errors import UserError
from pera.lora import balanced_factors, factored_svd
from pera.polynomial import lora_factors
from pera.tuner import PeraLayer, adapted_layers
from pera_lab.diagnose.factors import check_lora, effective_rank

Factors = tuple[Tensor, Tensor, Tensor]


class Decomposition(NamedTuple):
    """One layer: U, singular values and Vᵀ of its ΔW in float64, and how to give it other factors.

    Fused experts have a leading dimension.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    r: int
    replace: Callable[[Tensor, Tensor], Any]
    """Context manager that gives the layer the update B A, from A ``(rank, in)`` and B ``(out, rank)``."""


class Cuts:
    """The ΔW of every layer of an adapter, decomposed once. The best approximation of rank q keeps the q leading
    singular directions (Eckart and Young).

    Args:
        model: a model with a PERA or LoRA adapter, not merged. It is changed only inside :meth:`at`.
        adapter_name: the adapter.

    Raises:
        UserError: the model has no such adapter, or a layer computes something else than ΔW = B A.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        self.layers = {
            name: _pera(layer, adapter_name) for name, layer in adapted_layers(model, adapter_name).items()
        } or {name: _lora(name, layer, adapter_name) for name, layer in _lora_layers(model, adapter_name).items()}
        if not self.layers:
            raise UserError(f"adapter_name={adapter_name!r} is neither a PERA nor a LoRA adapter of the model.")

    @property
    def r(self) -> int:
        """The largest r of the layers."""
        return max(layer.r for layer in self.layers.values())

    @property
    def rank(self) -> int:
        """The largest rank that a ΔW can have: the expanded rank, or a side of the matrix if that is smaller."""
        return max(layer.S.shape[-1] for layer in self.layers.values())

    @property
    def effective_rank(self) -> float:
        """Mean of :func:`effective_rank` over the layers, weighted by ‖ΔW‖_F²; 0 if every ΔW is zero."""
        spectra = [S for layer in self.layers.values() for S in layer.S.reshape(-1, layer.S.shape[-1])]
        energy = sum(float(S.square().sum()) for S in spectra)
        return sum(float(S.square().sum()) * effective_rank(S) for S in spectra) / energy if energy else 0.0

    @contextmanager
    def at(self, rank: int | None) -> Iterator[None]:
        """Context manager that cuts every ΔW to ``rank``; None cuts each to the layer's own r, and 0 removes it."""
        with ExitStack() as stack:
            for U, S, Vh, r, replace in self.layers.values():
                stack.enter_context(replace(*balanced_factors(U, S, Vh, r if rank is None else rank)))
            yield


def _pera(layer: PeraLayer, adapter_name: str) -> Decomposition:
    A, B, h = (factor.detach().cpu().double() for factor in layer.factors(adapter_name))  # accelerators lack float64
    exact = lora_factors(A, B, h, *layer.expansion[adapter_name], layer.scaling[adapter_name])

    @contextmanager
    def replace(A: Tensor, B: Tensor) -> Iterator[None]:
        expansion, scaling = layer.expansion[adapter_name], layer.scaling[adapter_name]
        like = layer.factors(adapter_name)[0]
        layer.expansion[adapter_name] = expansion._replace(terms="none", normalization="none", anchors=None)
        layer.scaling[adapter_name] = 1.0
        try:
            with with_factors({layer: (A.to(like), B.to(like), like.new_empty(0))}, adapter_name):
                yield
        finally:
            layer.expansion[adapter_name], layer.scaling[adapter_name] = expansion, scaling

    return Decomposition(*factored_svd(*exact), layer.r[adapter_name], replace)


def _lora_layers(model: Any, adapter_name: str) -> dict[str, Any]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    found = {name: layer for name, layer in layers.items() if adapter_name in layer._get_available_adapters()}
    if found:
        check_lora(model.peft_config[adapter_name])
    return found


def _lora(name: str, layer: Any, adapter_name: str) -> Decomposition:
    if adapter_name in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    else:
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    flat_A, flat_B = A.detach().flatten(1), B.detach().flatten(1)  # kernels of convolutions
    if len(flat_A) != flat_B.shape[1] or isinstance(layer, ParamWrapper):
        raise UserError(f"layer {name!r} has LoRA factors whose product is not its ΔW, so it cannot be cut to a rank.")
    scaling = layer.scaling[adapter_name]

    @contextmanager
    def replace(cut_A: Tensor, cut_B: Tensor) -> Iterator[None]:
        kept, missing = (A.data, B.data), len(A) - len(cut_A)
        try:
            A.data = pad(cut_A, (0, 0, 0, missing)).to(A).view_as(A)
            B.data = (pad(cut_B, (0, missing)) / (scaling or 1.0)).to(B).view_as(B)
            yield
        finally:
            A.data, B.data = kept

    exact = flat_A.cpu().double(), scaling * flat_B.cpu().double()
    return Decomposition(*factored_svd(*exact), len(A), replace)


@contextmanager
def with_factors(factors: dict[PeraLayer, Factors], adapter_name: str) -> Iterator[None]:
    """Context manager in which ``layer.factors`` returns these factors for the adapter."""
    outer = {layer: vars(layer).get("factors") for layer in factors}  # set by an enclosing context manager
    for layer, values in factors.items():
        vars(layer)["factors"] = lambda name, own=layer.factors, values=values: (
            values if name == adapter_name else own(name)
        )
    try:
        yield
    finally:
        for layer, before in outer.items():
            if before is None:
                del vars(layer)["factors"]
            else:
                vars(layer)["factors"] = before


def ranks_below(rank: int) -> Iterable[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16, 24, … below ``rank``."""
    power = 1
    yield from range(min(2, rank))
    while (power := 2 * power) < rank:
        yield power
        if power + power // 2 < rank:
            yield power + power // 2
