"""The adapter folder: its configuration, its weights, and the model they make with a base model.

:class:`Adapter` owns a folder and reads each of its files once. Other code takes the object, not the path.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType, TaskType, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from pera.errors import UserError, one_line
from pera.tuner import PeraConfig, check_lists, check_speed
from pera.tuner.saved import check_values
from pera_lab.environment import out_of_memory
from pera_lab.files import read_json
from pera_lab.methods import repeatable
from pera_lab.models import token_rows

HEAD = re.compile(r"\.(classifier|score)\.")
"""Matches the weights of a classification head, which PEFT trains and saves with an adapter."""

_ELSEWHERE = ("megatron_config", "shadow_model", "adapters")
"""Keys of an adapter's configuration by which PEFT imports a module or loads further models."""

_WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter|modules_to_save)\b")
"""What PEFT inserts into the module names of a base model."""


class Adapter:
    """An adapter folder of any PEFT method, read once and cached.

    Args:
        path: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``. Nothing is read before it is
            asked for, so the folder may appear later.
    """

    weights_name = SAFETENSORS_WEIGHTS_NAME
    """The file of the weights."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Adapter({str(self.path)!r})"

    @cached_property
    def config(self) -> PeftConfig:
        """The configuration.

        Raises:
            UserError: the file is missing or not JSON, its method is unknown, or the method rejects a value.
        """
        content = read_json(self.path / "adapter_config.json")
        if not isinstance(content, dict) or "peft_type" not in content:
            raise UserError(f'{str(self.path)!r}: adapter_config.json has no peft_type; add it, such as "LORA".')
        for key in ("base_model_name_or_path", "revision"):
            if not isinstance(value := content.get(key), str | None):
                raise UserError(f"{str(self.path)!r}: adapter_config.json: {key}={value!r} should be a string.")
        for key in _ELSEWHERE:
            if content.get(key):
                raise UserError(
                    f"{str(self.path)!r}: adapter_config.json: {key} names code or models outside the adapter, "
                    "which are not loaded; remove it."
                )
        if not repeatable(init := content.get("init_lora_weights")):
            raise UserError(
                f"{str(self.path)!r}: init_lora_weights={init!r} changed the base model, which loading cannot repeat; "
                "save the adapter with PEFT's path_initial_model_for_weight_conversion, or set the key to true if its "
                "base is the changed model."
            )
        content.pop("runtime_config", None)  # PEFT rejects a saved one
        try:
            config: PeftConfig = PeftConfig.from_peft_type(**content)  # type: ignore[no-untyped-call]
            check_lists(config)
        except KeyError as error:
            kind = content["peft_type"]
            raise UserError(f"{str(self.path)!r}: peft_type={kind!r} is unknown to PEFT {peft.__version__}.") from error
        except Exception as error:  # the methods of PEFT check little
            raise UserError(f"{str(self.path)!r}: adapter_config.json: {one_line(error)}") from error
        if isinstance(config, LoraConfig):
            for key, least in (("r", 1), ("lora_alpha", 0)):
                value = getattr(config, key)
                if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value:
                    raise UserError(
                        f"{str(self.path)!r}: adapter_config.json: {key}={value!r:.80} should be a number of at least "
                        f"{least}."
                    )
        return config

    @property
    def method(self) -> str:
        """PEFT's name of the method, such as "LORA"."""
        return PeftType(self.config.peft_type).value

    @property
    def is_pera(self) -> bool:
        """Whether this is a PERA adapter."""
        return isinstance(self.config, PeraConfig)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The saved tensors by name, on the CPU.

        Raises:
            UserError: the file is missing or truncated, or a tensor holds NaN, infinity or no real numbers.
        """
        return self._read()

    def _read(self) -> dict[str, Tensor]:
        with self._opened() as f:
            weights = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
        try:
            check_values(weights, indices=self.method not in ("PERA", "LORA"))  # which other methods also save
        except UserError as error:
            raise UserError(f"{str(self.path)!r}: {error}") from error
        return weights

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of values in each trained tensor, from the header of the weights file.

        Tensors that PEFT saves untrained are left out: base weights of embeddings, and DeLoRA's column norms.
        """
        with self._opened() as f:
            sizes = {key: math.prod(f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118
        return {key: n for key, n in sizes.items() if not key.endswith((".base_layer.weight", ".delora_w_norm"))}

    @cached_property
    def labels(self) -> int | None:
        """Number of outputs of the classification head, or None for an adapter of a causal language model.

        Raises:
            UserError: the adapter is for classification, but holds no head.
        """
        if self.config.task_type != TaskType.SEQ_CLS:
            return None
        for key, weight in self.weights.items():
            if key.endswith(("classifier.weight", "classifier.out_proj.weight", "score.weight")):
                return int(weight.shape[0])
        raise UserError(
            f"{str(self.path)!r} is an adapter for classification, but its weights lack the head; save it too."
        )

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer that was saved with the adapter, as TRL, Axolotl and LLaMA-Factory do."""
        return self.path if (self.path / "tokenizer_config.json").is_file() else None

    def saved_embeddings(self, base: PreTrainedModel) -> dict[str, Tensor]:
        """The saved tensors that are whole token embeddings or output heads of ``base``."""
        embeddings = _embeddings(base)
        return {key: weight for key, weight in self.weights.items() if base_name(key) in embeddings}

    def resized_to(self, base: PreTrainedModel) -> int | None:
        """The vocabulary size that the adapter was trained with, or None if ``base`` has the same size.

        PEFT saves whole embeddings after ``resize_token_embeddings``, which tell the size.

        Raises:
            UserError: the weights lack the new rows of the embeddings or of the output head.
        """
        embeddings, rows = _embeddings(base), token_rows(base)
        saved = {base_name(key): len(weight) for key, weight in self.saved_embeddings(base).items()}
        resized = max((found for found in saved.values() if found != rows), default=None)
        shared = len({id(weight) for weight in embeddings.values()}) == 1
        if resized and not shared and (missing := sorted(embeddings.keys() - saved.keys())):
            raise UserError(
                f"{str(self.path)!r} was trained with {resized} tokens, but its base model has {rows} and its weights "
                f"lack {missing[0]!r}; merge the adapter where it was trained."
            )
        return resized

    def load_on(self, base: PreTrainedModel) -> PeftModel:
        """Put the adapter on its base model, for inference.

        The result equals ``PeftModel.from_pretrained``, but is built from the cached configuration and weights. If the
        adapter was trained with another vocabulary size, ``base`` is resized to it. On a base model on the meta device,
        the adapter's weights are on the meta device too.

        Args:
            base: the base model. It is changed in place.

        Returns:
            The model in evaluation mode, with the adapter unmerged.

        Raises:
            UserError: the folder is broken, or the adapter was trained on another base model.
        """
        whole = tuple(
            f"base_model.model.{base_name(key).removesuffix('weight')}" for key in self.saved_embeddings(base)
        )
        if rows := self.resized_to(base):
            base.resize_token_embeddings(rows, mean_resizing=False)
        self._check_rank()
        try:
            model = self._build(base)
        except KeyError as error:
            raise UserError(
                f"{str(self.path)!r} does not fit its own configuration: the weights file lacks {error}."
            ) from error
        except Exception as error:  # PEFT meets values that it does not expect
            if out_of_memory(error):
                raise
            first, *others = one_line(error).split(" size mismatch for ")
            reason = " size mismatch for ".join([first, *others[:1]])
            reason += f" ({len(others)} such)" if len(others) > 1 else ""
            raise UserError(
                f"{str(self.path)!r} does not fit its base model or its own configuration: {reason}"
            ) from error
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        for key in sorted(expected.keys() ^ self.weights.keys()):
            if key not in expected and key.startswith(whole):  # saved with whole embeddings
                continue
            where = "the weights file lacks" if key in expected else "the base model has no place for"
            raise UserError(f"{str(self.path)!r} does not fit the base model: {where} {key!r}.")
        return model

    def _check_rank(self) -> None:
        """Raise UserError for a rank that no saved factor has, before PEFT allocates factors of that rank."""
        if not isinstance(self.config, LoraConfig | PeraConfig):
            return
        largest = max((side for weight in self.weights.values() for side in weight.shape), default=0)
        for r in (self.config.r, *(self.config.rank_pattern or {}).values()):
            if isinstance(r, int | float) and r > largest:
                raise UserError(
                    f"{str(self.path)!r}: adapter_config.json: r={r} does not fit the weights, whose largest side is "
                    f"{largest}."
                )

    def _build(self, base: PreTrainedModel) -> PeftModel:
        config = copy.deepcopy(self.config)  # PEFT changes it
        check_speed((name for name, _ in base.named_modules()), config)
        config.inference_mode = True
        on_meta = any(weight.is_meta for weight in base.parameters())
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)
        model: Any = kind(base, config, low_cpu_mem_usage=on_meta)
        set_peft_model_state_dict(model, self.weights, low_cpu_mem_usage=on_meta)
        if hasattr(model.base_model, "_cast_adapter_dtype"):  # assigned weights keep the dtype of the file
            model.base_model._cast_adapter_dtype(adapter_name="default", autocast_adapter_dtype=True)
        return model.eval()  # type: ignore[no-any-return]

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        file = self.path / self.weights_name
        if not file.is_file() and (self.path / WEIGHTS_NAME).is_file():
            raise UserError(
                f"{str(self.path)!r} has its weights in {WEIGHTS_NAME}, but only safetensors is read; if you trust the "
                "file, convert it with: "
                f"PeftModel.from_pretrained(base, {str(self.path)!r}).save_pretrained({str(self.path)!r})"
            )
        if not file.is_file():
            raise UserError(f"{str(self.path)!r} has no {self.weights_name}; the adapter's weights are missing.")
        try:
            with safe_open(file, framework="pt") as f:
                yield f
        except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{str(file)!r} is not a complete safetensors file: {one_line(error)}.") from error


def base_name(key: str) -> str:
    """The name that a weight has in the base model, from its name in a PEFT model or in an adapter file."""
    return _WRAPPERS.sub("", key.removeprefix("base_model.model."))


def _embeddings(base: Any) -> dict[str, Tensor]:
    """The weights of the token embeddings and of the output head by name."""
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    return {f"{name}.weight": module.weight for name, module in base.named_modules() if module in ends}
