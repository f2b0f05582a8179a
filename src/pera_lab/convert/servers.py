"""What each server accepts of an adapter: its format, its ranks, its kinds of layer, and the command that starts it.

The limits come from the sources and documentation of the servers, named in docs/serving.md. Only llama.cpp was run.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig

from pera.errors import UserError, nearest
from pera.lora import Folded
from pera.tuner.layers import ParamWrapper, PeraConv1DLinear, PeraEmbedding, PeraLayer, PeraLinear
from pera_lab.convert.gguf import ADAPTER
from pera_lab.embedded import hub_name, resolve_gguf

Form = Literal["lora", "gguf"]


@dataclass(frozen=True)
class Server:
    """One server. An export refuses what the server would reject or ignore."""

    name: str
    form: Form
    """The format that it reads."""
    start: Callable[[str, Path, int, int | None], str]
    """Returns the command that starts it, from the base model, the export folder, its rank and its labels."""
    max_rank: int | None = None
    """The largest rank that it accepts."""
    trained_whole: bool = False
    """Whether it accepts biases, modules and tokens that are trained as a whole."""
    embeddings: bool = False
    """Whether it accepts an adapter on an embedding."""
    other_layers: bool = False
    """Whether it accepts adapters on layers that are neither linear nor embeddings."""
    every_block: bool = False
    """Whether it ignores a kind of layer that is not adapted in every block of the model."""

    def check_rank(self, rank: int, *, chosen: bool) -> None:
        """Check the rank of an export against the server's limit.

        Args:
            rank: the rank of the export.
            chosen: whether the user set it. Otherwise it is the adapter's K.

        Raises:
            UserError: the rank is above :attr:`max_rank`.
        """
        if self.max_rank is None or rank <= self.max_rank:
            return
        if chosen:
            raise UserError(f"--max-rank: {rank} is above {self.max_rank}, the largest rank that {self.name} accepts.")
        raise UserError(
            f"the adapter is a LoRA of rank K = {rank}, but {self.name} accepts at most {self.max_rank}; "
            f"add --max-rank {self.max_rank}, which reports the loss."
        )

    def check(self, layers: dict[str, Folded], config: LoraConfig, blocks: int | None) -> None:
        """Check that the server accepts every part of an adapter.

        Args:
            layers: the adapter's layers by name.
            config: the configuration of the exported LoRA.
            blocks: number of blocks of the base model, or None if it is unknown.

        Raises:
            UserError: the server would reject or ignore a part of the adapter.
        """
        if not self.trained_whole:
            refuse_trained_whole(self.name, config)
        for layer, (module, *_) in layers.items():
            if not self._accepts(module):
                raise UserError(
                    f"{layer!r} is {_kind(module)}, on which {self.name} accepts no adapter; merge the adapter, or "
                    "train one without this layer."
                )
        if self.every_block and blocks:
            in_blocks = [layer for layer in layers if any(part.isdigit() for part in layer.split("."))]
            for kind, count in Counter(layer.rpartition(".")[2] for layer in in_blocks).items():
                if count < blocks:
                    raise UserError(
                        f"{kind!r} is adapted in {count} of {blocks} blocks, but {self.name} ignores layers that are "
                        "not adapted in every block; merge the adapter, or train it on every block."
                    )

    def _accepts(self, module: PeraLayer) -> bool:
        if isinstance(module, PeraEmbedding):
            return self.embeddings
        linear = isinstance(module, PeraLinear) and not isinstance(module, PeraConv1DLinear)
        return linear or self.other_layers


def _base(base: str) -> str:
    return shlex.quote(hub_name(base))


def _gguf_base(base: str) -> str:
    return shlex.quote(str(resolve_gguf(base) or "BASE.gguf"))


def _path(output: Path) -> str:
    return shlex.quote(str(output))


_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def _vllm(base: str, output: Path, rank: int, labels: int | None) -> str:
    allowed = next(r for r in _VLLM_RANKS if r >= rank)
    return (
        f"vllm serve {_base(base)} --enable-lora --max-lora-rank {allowed} "
        f"--lora-modules {shlex.quote(output.name)}={_path(output)}"
    )


def _sglang(base: str, output: Path, rank: int, labels: int | None) -> str:
    return (
        f"python -m sglang.launch_server --model-path {_base(base)} --enable-lora --max-lora-rank {rank} "
        f"--lora-paths {shlex.quote(output.name)}={_path(output)}"
    )


def _lorax(base: str, output: Path, rank: int, labels: int | None) -> str:
    slow = " (slow above rank 128)" if rank > 128 else ""
    return (
        f"lorax-launcher --model-id {_base(base)}  "
        f'# in each request{slow}: "adapter_id": "{output}", "adapter_source": "local"'
    )


def _llama_cpp(base: str, output: Path, rank: int, labels: int | None) -> str:
    return f"llama-server --model {_gguf_base(base)} --lora {_path(output / ADAPTER)}"


def _ollama(base: str, output: Path, rank: int, labels: int | None) -> str:
    # In a Modelfile a path extends to the end of the line, and shell quotes would become part of it.
    lines = rf"'FROM %s\nADAPTER %s\n' {_gguf_base(base)} {_path(output / ADAPTER)}"
    return f"printf {lines} > Modelfile && ollama create {shlex.quote(output.name)} -f Modelfile"


def _peft(base: str, output: Path, rank: int, labels: int | None) -> str:
    kind, head = ("CausalLM", "") if labels is None else ("SequenceClassification", f", num_labels={labels}")
    code = f"from peft import AutoPeftModelFor{kind} as M; model = M.from_pretrained({str(output)!r}{head})"
    return f"python -c {shlex.quote(code)}"


SERVERS = {
    server.name: server
    for server in (
        Server("vllm", "lora", _vllm, max_rank=max(_VLLM_RANKS), embeddings=True),
        Server("sglang", "lora", _sglang),
        Server("lorax", "lora", _lorax, every_block=True),
        Server("llama.cpp", "gguf", _llama_cpp),
        Server("ollama", "gguf", _ollama),
        Server("peft", "lora", _peft, trained_whole=True, embeddings=True, other_layers=True),
    )
}


def find(name: str) -> Server:
    """A server by name; raises UserError, with the closest known name, if there is none."""
    if name not in SERVERS:
        raise UserError(f"--for: {name!r} is not a known server; {nearest(name, SERVERS)}")
    return SERVERS[name]


def refuse_trained_whole(reader: str, config: LoraConfig) -> None:
    """Check that a LoRA holds nothing but factors.

    Args:
        reader: the server or format that accepts only factors, for the message.
        config: the configuration of the LoRA.

    Raises:
        UserError: it also holds biases, whole modules or tokens.
    """
    for key, plain in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None)):
        value: Any = getattr(config, key)
        if value not in (plain, [], {}):
            own = value.replace("lora", "pera") if isinstance(value, str) else value
            raise UserError(f"the adapter has {key}={own!r}, which {reader} cannot hold; merge it with: pera merge")


def short_names(config: LoraConfig, layers: dict[str, Folded], modules: list[str]) -> None:
    """Replace the targets of a LoRA by names that every server understands.

    These are the last parts of the module names if they match the same modules, otherwise the full names in place of
    a regular expression.

    Args:
        config: the configuration; changed in place.
        layers: the adapted layers by name in the base model.
        modules: names of all modules of the base model.
    """
    targets = {name for name, (layer, *_) in layers.items() if not isinstance(layer, ParamWrapper)}
    endings = {name.rpartition(".")[2] for name in targets}
    if {name for name in modules if name.rpartition(".")[2] in endings} == targets:
        config.target_modules, config.exclude_modules = sorted(endings), None
        config.layers_to_transform = config.layers_pattern = None
    elif isinstance(config.target_modules, str):  # servers would take the expression for a name
        config.target_modules, config.exclude_modules = sorted(targets), None


def _kind(layer: PeraLayer) -> str:
    if isinstance(layer, PeraEmbedding):
        return "an embedding"
    base = type(layer.get_base_layer()).__name__
    return f"a parameter of a {base}" if isinstance(layer, ParamWrapper) else f"a {base}"
