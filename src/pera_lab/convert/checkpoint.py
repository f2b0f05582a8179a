"""A model whose weights are read from its folder on demand, so that it can run without fitting in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pera_lab.adapters import base_name
from pera_lab.bases import INDEX, SINGLE, check_base, open_weights, weight_files
from pera_lab.files import write_json
from pera_lab.models import reading


class Checkpoint:
    """The safetensors files of a model folder.

    Args:
        folder: a folder with ``model.safetensors``, or an index and its shards.

    Raises:
        UserError: a file is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, list[str]] = {}
        """Names of the tensors by file name."""
        for name in weight_files(folder):
            with open_weights(folder / name) as f:
                self.shards[name] = list(f.keys())
        self._file = {key: name for name, keys in self.shards.items() for key in keys}

    def __contains__(self, key: str) -> bool:
        return key in self._file

    def read(self, key: str) -> Tensor:
        """Return a tensor, memory-mapped from its file."""
        with open_weights(self.folder / self._file[key]) as f:
            tensor: Tensor = f.get_tensor(key)
            return tensor


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the causal language model of a checkpoint with its weights on the meta device, in evaluation mode.

    Buffers have their values.

    Args:
        checkpoint: the files of the model.
        dtype: dtype of the weights.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: the configuration or the code of the model cannot be read.
    """
    with reading(str(checkpoint.folder)):
        check_base(
            str(checkpoint.folder),
            checkpoint.folder,
            AutoModelForCausalLM,
            None,
            trust_remote_code=trust_remote_code,
        )
    with reading(str(checkpoint.folder)), init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        build: Any = AutoModelForCausalLM.from_config
        model = build(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    for name, buffer in model.state_dict().items():
        if not buffer.is_meta and name in checkpoint:
            buffer.copy_(checkpoint.read(name))
    empty: PreTrainedModel = model.eval()
    return empty


def sources(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str] | None:
    """Find the weights of an :func:`empty_model` in its checkpoint.

    Returns:
        The key in the checkpoint by name in ``model``. None if a weight has no key, because transformers fuses or
        renames weights of this model when it loads them.
    """
    shared: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.is_meta:
            shared.setdefault(id(weight), []).append(name)
    found = {}
    for names in shared.values():
        key = next((plain for name in names if (plain := base_name(name)) in checkpoint), None)
        if key is None:
            return None
        found.update(dict.fromkeys(names, key))
    return found


def fill_adapter(model: PeftModel, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Fill in the weights of an adapter that PEFT left on the meta device, where an :func:`empty_model` has its own.

    Args:
        model: the model with the adapter.
        weights: the saved weights. Base weights of embeddings, which PEFT saves with some adapters, are not used.
        dtype: dtype of the base model, and so of whole modules that were trained.
    """
    own = dict(model.named_parameters())
    names = {id(weight): name for name, weight in own.items()}
    for key, weight in get_peft_model_state_dict(model, state_dict=own).items():
        name = names[id(weight)]
        path, _, attribute = name.rpartition(".")
        factor = f".{model.base_model.prefix}" in name
        of_base = not factor and attribute == "weight" and ".modules_to_save." not in name
        filled = weight.to("meta", dtype) if of_base else weights[key].to(weight.dtype if factor else dtype)
        model.get_submodule(path)._parameters[attribute] = nn.Parameter(filled, requires_grad=False)


@contextmanager
def weights_on_demand(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[None]:
    """Context manager in which each module of an :func:`empty_model` has its weights while it runs.

    A member of an ``nn.ModuleList``, such as a block, has the weights of all modules in it, because a module may read
    the weights of another.

    Args:
        model: the model, with or without an adapter.
        checkpoint: the files of the base model.
        dtype: dtype of the weights.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = sources(base, checkpoint) or {}
    listed = {each for module in base.modules() if isinstance(module, nn.ModuleList) for each in module}
    with ExitStack() as stack:
        for name, module in base.named_modules():
            inner = module.named_modules(prefix=name) if module in listed else [(name, module)]
            keys = {
                (owner, attribute): found[weight]
                for path, owner in inner
                for attribute in owner._parameters
                if (weight := f"{path}.{attribute}".lstrip(".")) in found
            }
            if keys:
                fill, clear = _filling(checkpoint, keys, dtype)
                stack.callback(module.register_forward_pre_hook(fill).remove)
                stack.callback(module.register_forward_hook(clear, always_call=True).remove)
        yield


def _filling(checkpoint: Checkpoint, keys: dict[tuple[nn.Module, str], str], dtype: torch.dtype) -> Any:
    """Two hooks: one reads the weights of modules, the other frees them."""
    filled: list[tuple[nn.Module, str, Any]] = []

    def fill(*_: Any) -> None:
        for (owner, attribute), key in keys.items():
            empty: Any = owner._parameters[attribute]
            if empty.is_meta:
                weight = checkpoint.read(key)
                owner._parameters[attribute] = nn.Parameter(
                    weight.to(dtype) if weight.is_floating_point() else weight, requires_grad=False
                )
                filled.append((owner, attribute, empty))

    def clear(*_: Any) -> None:
        while filled:
            owner, attribute, empty = filled.pop()
            owner._parameters[attribute] = empty

    return fill, clear


def write_index(folder: Path, shards: dict[str, list[str]], size: int) -> None:
    """Write the index of a model's shards; nothing is written for a single file.

    Args:
        folder: the folder of the model.
        shards: names of the tensors by file name.
        size: bytes of all tensors.
    """
    if list(shards) == [SINGLE]:
        return
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
