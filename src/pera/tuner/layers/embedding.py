"""PERA on an embedding: row t of the table becomes E_t + s · (B̂ Â)ᵀ_t."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import embedding

from pera.errors import UserError
from pera.polynomial import expand, expand_B
from pera.tuner.config import PeraConfig
from pera.tuner.layers.base import PeraLayer


class PeraEmbedding(PeraLayer):
    """An ``nn.Embedding`` with PERA adapters.

    ``pera_A`` is ``(r, num_embeddings)`` and ``pera_B`` is ``(embedding_dim, r)``. The table,
    ``(num_embeddings, embedding_dim)``, receives ΔW transposed. Only the columns of A that are looked up are expanded.
    With normalization "rms", ρ is still taken over the whole A. Dropout drops the whole update of a position.
    """

    @staticmethod
    def check_config(config: PeraConfig) -> None:
        if config.normalization == "centred":
            raise UserError(
                "normalization='centred' is not for embeddings, because the mean would change tokens that never occur; "
                "use 'rms', or leave the embedding out of target_modules."
            )

    def _reset_factors(self, A: Tensor, B: Tensor, init_weights: bool | str) -> None:
        """Initialize A with zeros (with ``init_weights=False``, N(0, 1)) and B with N(0, 1), as LoRA does.

        Rows of the table that are never looked up then keep their values.
        """
        nn.init.normal_(B)
        if init_weights:
            nn.init.zeros_(A)
        else:
            nn.init.normal_(A)

    def _to_base_layout(self, delta: Tensor) -> Tensor:
        return delta.T

    @staticmethod
    def as_lora(base_layer: Any, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        return {"lora_embedding_A": A, "lora_embedding_B": B}

    def adapter_output(self, adapter_name: str, x: Tensor) -> Tensor:
        """Map indices ``(...)`` to ``(..., embedding_dim)``, in the dtype of the factors or of autocast."""
        base: Any = self.get_base_layer()
        A, B, h = self.factors(adapter_name)
        terms, normalization, anchors = self.expansion_on(A.device, adapter_name)
        rows = embedding(x.flatten(), A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        signs = None if anchors is None else anchors.V.index_select(1, x.flatten())
        rows_hat = expand(rows.T, h, terms, normalization, signs, whole=A).T
        update = self.scaling[adapter_name] * rows_hat @ expand_B(B, terms, normalization, anchors).T
        update = update * self.pera_dropout[adapter_name](update.new_ones(len(update), 1))
        embed_scale = self._get_embed_scale()
        if embed_scale is not None:
            update = update * embed_scale
        return update.reshape(*x.shape, self.out_features)
