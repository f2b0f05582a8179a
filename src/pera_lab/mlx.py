"""A LoRA in the format of mlx-lm.

Its adapters.safetensors holds ``<layer>.lora_a`` (in, r) and ``<layer>.lora_b`` (r, out). All layers have the same rank
r and the same scale, and mlx-lm computes y + scale · (x a) b. It silently skips names that it does not know.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from pera.errors import UserError
from pera_lab.adapters import Adapter
from pera_lab.files import read_object, write_json

ARCHITECTURES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("olmo2", "starcoder2", "cohere", "granite", "smollm3"),
)
"""Values of ``model_type`` in transformers whose linear layers have the same names and shapes in mlx-lm 0.32.2."""

WEIGHTS = "adapters.safetensors"
_CONFIG = "adapter_config.json"
_WHOLE = "base_model.model."


class MlxAdapter(Adapter):
    """A LoRA that mlx-lm trained, or that was exported for it, as PEFT's LoRA of the same outputs.

    Its base model is the one that ``model`` names in adapter_config.json, as mlx-lm writes it.
    """

    weights_name = WEIGHTS
    method = "LORA"

    @cached_property
    def config(self) -> LoraConfig:
        """PEFT's configuration.

        Raises:
            UserError: the file describes no LoRA of mlx-lm, or a value is missing or out of range.
        """
        content = read_object(self.path / _CONFIG)
        if (kind := content.get("fine_tune_type", "lora")) != "lora":
            raise self._wrong("fine_tune_type", kind, "'lora', the only kind that can be read")
        parameters = content.get("lora_parameters")
        if not isinstance(parameters, dict):
            raise self._wrong("lora_parameters", parameters, "a table with rank, scale and dropout")
        rank = parameters.get("rank")
        if type(rank) is not int or rank < 1:
            raise self._wrong("lora_parameters.rank", rank, "a whole number of at least 1")
        scale, dropout = (self._number(parameters, *key) for key in (("scale", None), ("dropout", 0.0)))
        if dropout >= 1:
            raise self._wrong("lora_parameters.dropout", dropout, "below 1")
        base = content.get("model")
        if not isinstance(base, str | None):
            raise self._wrong("model", base, "the base model, a folder or a hub id")
        return LoraConfig(
            r=rank,
            lora_alpha=scale * rank,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=sorted({name.rpartition(".")[0] for name in self._stored}),
            base_model_name_or_path=base,
            task_type="CAUSAL_LM",
        )

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The factors under PEFT's names.

        Raises:
            UserError: as of :attr:`Adapter.weights`, or a tensor is no factor of a linear layer.
        """
        found = {}
        for name, factor in self._stored.items():
            layer, _, side = name.rpartition(".")
            if factor.ndim != 2 or factor.shape[side == "lora_a"] != self.config.r:
                raise UserError(
                    f"{str(self.path)!r}: {name!r} has shape {tuple(factor.shape)}, which is no factor of a linear "
                    f"layer at rank {self.config.r}."
                )
            found[f"{_WHOLE}{layer}.lora_{side[-1].upper()}.weight"] = factor.T.contiguous()
        return found

    @cached_property
    def _stored(self) -> dict[str, Tensor]:
        stored = self._read()
        for name in stored:
            layer, _, side = name.rpartition(".")
            if side not in ("lora_a", "lora_b"):
                raise UserError(f"{str(self.path)!r}: {name!r} is no factor of a LoRA, which ends in lora_a or lora_b.")
            if f"{layer}.lora_{'b' if side == 'lora_a' else 'a'}" not in stored:
                raise UserError(f"{str(self.path)!r}: the other factor of {name!r} is missing.")
        return stored

    def _number(self, parameters: dict[str, Any], key: str, default: float | None) -> float:
        value: Any = parameters.get(key, default)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise self._wrong(f"lora_parameters.{key}", value, "a number of at least 0")
        return float(value)

    def _wrong(self, key: str, value: Any, right: str) -> UserError:
        return UserError(f"{str(self.path)!r}: {_CONFIG}: {key}={value!r:.80} should be {right}.")


def is_mlx(folder: Path) -> bool:
    """Whether a folder holds an adapter of mlx-lm."""
    return (folder / WEIGHTS).is_file() and "peft_type" not in read_object(folder / _CONFIG)


def check_architecture(config: PreTrainedConfig) -> None:
    """Raise UserError if the names of layers may differ in mlx-lm, which would then skip them."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"model_type={config.model_type!r} was not compared with mlx-lm, which would skip layers of another name; "
            f"supported are {', '.join(ARCHITECTURES)}. Merge the adapter instead."
        )


def write_adapter(folder: Path, lora: LoraConfig, weights: dict[str, Tensor], blocks: int) -> None:
    """Write a LoRA of linear layers, all of rank r and without patterns, in float32.

    Args:
        folder: where to write.
        lora: the configuration of the LoRA, which names its base model.
        weights: ``base_model.model.<layer>.lora_A.weight`` ``(r, in)`` and ``…lora_B.weight`` ``(out, r)``.
        blocks: number of blocks of the base model.
    """
    stored, layers = {}, set()
    for key, factor in weights.items():
        layer, _, side = key.removeprefix(_WHOLE).removesuffix(".weight").rpartition(".lora_")
        stored[f"{layer}.lora_{side.lower()}"] = factor.float().T.contiguous()
        layers.add(layer)
    save_file(stored, folder / WEIGHTS, metadata={"format": "mlx"})
    parameters = {"rank": lora.r, "scale": lora.lora_alpha / lora.r, "dropout": 0.0, "keys": sorted(layers)}
    content = {
        "fine_tune_type": "lora",
        "num_layers": blocks,
        "lora_parameters": parameters,
        "model": lora.base_model_name_or_path,
    }
    write_json(folder / _CONFIG, content)
