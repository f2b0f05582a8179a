"""What each server takes of an adapter: its form, its ranks, what it would pass over, and the line that starts it.

Read in the servers' sources and documentation, not tried; docs/serving.md says in which versions.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig

from pera.errors import UserError, nearest
from pera.lora import Folded
from pera.tuner.layers import ParamWrapper, PeraConv1DLinear, PeraEmbedding, PeraLayer, PeraLinear
from pera_lab.adapters import Adapter
from pera_lab.convert.gguf import ADAPTER
from pera_lab.embedded import hub_name, resolve_gguf

Form = Literal["lora", "gguf"]


@dataclass(frozen=True)
class Server:
    """One server. What a field forbids is refused at the export, since the server would reject or ignore it."""

    form: Form
    """What it reads."""
    start: Callable[[str, Path, int], str]
    """The line that starts it: from the base, the export and its rank."""
    max_rank: int | None = None
    """The largest rank it takes."""
    trained_whole: bool = False
    """Whether it takes biases, modules and tokens that are trained as they are, not by an adapter."""
    embeddings: bool = False
    """Whether it takes an adapter on an embedding."""
    other_layers: bool = False
    """Whether it takes adapters on layers that are neither linear nor embeddings."""
    every_block: bool = False
    """Whether it drops a kind of layer that is not adapted in every block of the model."""


def _base(base: str) -> str:
    return shlex.quote(hub_name(base))


def _gguf_base(base: str) -> str:
    return shlex.quote(str(resolve_gguf(base) or "BASE.gguf"))


def _path(output: Path) -> str:
    return shlex.quote(str(output))


_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def _vllm(base: str, output: Path, rank: int) -> str:
    allowed = next(r for r in _VLLM_RANKS if r >= rank)
    return (
        f"vllm serve {_base(base)} --enable-lora --max-lora-rank {allowed} "
        f"--lora-modules {shlex.quote(output.name)}={_path(output)}"
    )


def _sglang(base: str, output: Path, rank: int) -> str:
    return (
        f"python -m sglang.launch_server --model-path {_base(base)} --enable-lora --max-lora-rank {rank} "
        f"--lora-paths {shlex.quote(output.name)}={_path(output)}"
    )


def _lorax(base: str, output: Path, rank: int) -> str:
    slow = ", slowly above rank 128" if rank > 128 else ""
    return (
        f"lorax-launcher --model-id {_base(base)}  "
        f'# and in each request{slow}: "adapter_id": "{output}", "adapter_source": "local"'
    )


def _llama_cpp(base: str, output: Path, rank: int) -> str:
    return f"llama-server --model {_gguf_base(base)} --lora {_path(output / ADAPTER)}"


def _ollama(base: str, output: Path, rank: int) -> str:
    # In a Modelfile a path runs to the end of its line, and quotes of the shell would belong to it.
    lines = rf"'FROM %s\nADAPTER %s\n' {_gguf_base(base)} {_path(output / ADAPTER)}"
    return f"printf {lines} > Modelfile && ollama create {shlex.quote(output.name)} -f Modelfile"


def _peft(base: str, output: Path, rank: int) -> str:
    labels = Adapter(output).labels
    kind, head = ("CausalLM", "") if labels is None else ("SequenceClassification", f", num_labels={labels}")
    code = f"from peft import AutoPeftModelFor{kind} as M; model = M.from_pretrained({str(output)!r}{head})"
    return f"python -c {shlex.quote(code)}"


SERVERS = {
    "vllm": Server("lora", _vllm, max_rank=max(_VLLM_RANKS), embeddings=True),
    "sglang": Server("lora", _sglang),
    "lorax": Server("lora", _lorax, every_block=True),
    "llama.cpp": Server("gguf", _llama_cpp),
    "ollama": Server("gguf", _ollama),
    "peft": Server("lora", _peft, trained_whole=True, embeddings=True, other_layers=True),
}


def find(name: str) -> Server:
    """A server by its name; raises UserError, with the nearest known one, if there is none."""
    if name not in SERVERS:
        raise UserError(f"--for: {name!r} is not a server that is known; {nearest(name, SERVERS)}")
    return SERVERS[name]


def check_rank(name: str, rank: int, *, chosen: bool) -> None:
    """Raise UserError if a rank is above what the server takes.

    Args:
        name: a key of :data:`SERVERS`.
        rank: the rank of the export.
        chosen: whether it was asked for; else it is the adapter's K.
    """
    limit = find(name).max_rank
    if limit is None or rank <= limit:
        return
    if chosen:
        raise UserError(f"--max-rank: {rank} is above {limit}, the largest rank that {name} takes.")
    raise UserError(
        f"the adapter is a LoRA of rank K = {rank}, and {name} takes {limit} at most; "
        f"add --max-rank {limit}, which says what it loses."
    )


def check(name: str, layers: dict[str, Folded], config: LoraConfig, blocks: int | None) -> None:
    """Raise UserError if the server would reject or ignore a part of the adapter.

    Args:
        name: a key of :data:`SERVERS`.
        layers: the adapter's layers.
        config: the configuration of the LoRA.
        blocks: how many blocks the base model has, if it says so.
    """
    server = find(name)
    if not server.trained_whole:
        refuse_trained_whole(name, config)
    for layer, (module, *_) in layers.items():
        kind = "an embedding" if isinstance(module, PeraEmbedding) else f"a {_kind(module)}"
        allowed = server.embeddings if isinstance(module, PeraEmbedding) else isinstance(module, PeraLinear)
        if isinstance(module, (PeraConv1DLinear, ParamWrapper)) or not allowed:
            allowed = server.other_layers
        if not allowed:
            raise UserError(f"{layer!r} is {kind}, on which {name} takes no adapter; merge it, or leave the layer out.")
    if server.every_block and blocks:
        counts: dict[str, int] = defaultdict(int)
        for layer in layers:
            if any(part.isdigit() for part in layer.split(".")):
                counts[layer.rpartition(".")[2]] += 1
        for kind, count in counts.items():
            if count < blocks:
                raise UserError(
                    f"{kind!r} is adapted in {count} of {blocks} blocks, and {name} ignores a kind of layer that is "
                    "not adapted in all; merge the adapter, or train it on all."
                )


def refuse_trained_whole(reader: str, config: LoraConfig) -> None:
    """Raise UserError if a LoRA holds more than factors, for a ``reader`` that takes factors alone."""
    for key, plain in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None)):
        value: Any = getattr(config, key)
        if value not in (plain, [], {}):
            own = value.replace("lora", "pera") if isinstance(value, str) else value
            raise UserError(f"{key}={own!r} of the adapter cannot be carried to {reader}; merge it: pera merge")


def short_names(config: LoraConfig, layers: dict[str, Folded], modules: list[str]) -> None:
    """Name the targets as servers want them, by the last parts of their names, wherever that says the same, and not by
    an expression.

    Args:
        config: the configuration, changed in place.
        layers: the adapted layers by their names in the base model.
        modules: the names of all modules of the base model.
    """
    targets = {name for name, (layer, *_) in layers.items() if not isinstance(layer, ParamWrapper)}
    endings = {name.rpartition(".")[2] for name in targets}
    if {name for name in modules if name.rpartition(".")[2] in endings} == targets:
        config.target_modules, config.exclude_modules = sorted(endings), None
        config.layers_to_transform = config.layers_pattern = None
    elif isinstance(config.target_modules, str):  # which they would take for a name
        config.target_modules, config.exclude_modules = sorted(targets), None


def _kind(layer: PeraLayer) -> str:
    if isinstance(layer, ParamWrapper):
        return f"parameter of a {type(layer.get_base_layer()).__name__}"
    return type(layer.get_base_layer()).__name__
