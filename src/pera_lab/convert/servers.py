"""What each server accepts of an adapter: its format, its ranks, its kinds of layer, and the command that starts it.

The limits come from the sources and documentation of the servers. docs/serving.md names them, and says what was run.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from peft import LoraConfig

from pera.errors import UserError, nearest
from pera.folding import Folded
from pera.tuner.layers import ParamWrapper, PeraConv1DLinear, PeraEmbedding, PeraLayer, PeraLinear
from pera_lab.convert.gguf import ADAPTER
from pera_lab.embedded import embedded_name, hub_name, resolve_gguf

Form = Literal["lora", "gguf", "mlx"]
READERS: dict[Form, str] = {"lora": "PEFT", "gguf": "a GGUF adapter", "mlx": "an MLX adapter"}
"""What holds an adapter of each form, for messages."""


class Start(NamedTuple):
    """What the command that starts a server depends on."""

    base: str
    """The base model, as the user named it."""
    output: Path
    """The folder of the export."""
    rank: int
    labels: int | None = None
    """Outputs of the classification head."""
    in_float32: bool = False
    """Whether the base is stored in float32, which several servers would round to bfloat16."""
    tokenizer: bool = False
    """Whether the export has a tokenizer of its own."""
    template: Path | None = None
    """Its chat template, if it has one."""
    own_base: bool = False
    """Whether ``base`` is a folder that the export wrote."""

    def chosen(self, *, dtype: str = "", tokenizer: str = "", template: str = "") -> str:
        """The options that apply, each with a space in front.

        Args:
            dtype: the option that keeps float32.
            tokenizer: the option in front of the folder of a tokenizer.
            template: the option in front of the file of a chat template.
        """
        options = [dtype] * self.in_float32
        options += [f"{tokenizer} {_path(self.output)}"] * (bool(tokenizer) and self.tokenizer)
        options += [f"{template} {_path(self.template)}"] if template and self.template else []
        return "".join(f" {option}" for option in options if option)


@dataclass(frozen=True)
class Server:
    """One server. An export refuses what the server would reject or ignore."""

    name: str
    form: Form
    """The format that it reads."""
    start: Callable[[Start], str]
    """Returns the command that starts it."""
    max_rank: int | None = None
    """The largest rank that it accepts."""
    trained_whole: bool = False
    """Whether it accepts biases, modules and tokens that are trained as a whole."""
    embeddings: bool = False
    """Whether it accepts an adapter on an embedding."""
    other_layers: bool = False
    """Whether it accepts adapters on layers that are neither linear nor embeddings."""
    top_rope: bool = False
    """Whether it looks for ``rope_theta`` at the top of a config.json, where transformers 5 does not write it."""
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

    def check(self, layers: dict[str, Folded], blocks: int | None) -> None:
        """Check that the server accepts the layers of an adapter.

        Args:
            layers: the adapter's layers by name.
            blocks: number of blocks of the base model, or None if it is unknown.

        Raises:
            UserError: the server would reject or ignore a part of the adapter.
        """
        for layer, folded in layers.items():
            if not self._accepts(folded.kind):
                raise UserError(
                    f"{layer!r} is {_kind(folded)}, on which {self.name} accepts no adapter; merge the adapter, or "
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

    def caution(self, start: Start) -> str | None:
        """What to know about a start command that names another base model than the adapter was trained on."""
        if self.form == "gguf" or embedded_name(start.base) is None:  # the embedded models are GGUF files
            return None
        return (
            f"the adapter was trained on a quantized copy of {hub_name(start.base)!r} and compared on that copy; the "
            "model itself may answer differently. For the outputs that were compared, serve a merged model: pera merge"
        )

    def _accepts(self, kind: type[PeraLayer]) -> bool:
        if issubclass(kind, PeraEmbedding):
            return self.embeddings
        linear = issubclass(kind, PeraLinear) and not issubclass(kind, PeraConv1DLinear)
        return linear or self.other_layers


def _path(output: Path) -> str:
    return shlex.quote(str(output))


def _base(start: Start) -> str:
    return shlex.quote(hub_name(start.base))


def _named(start: Start) -> str:
    return f"{shlex.quote(start.output.name)}={_path(start.output)}"


def _gguf_base(start: Start) -> str:
    return shlex.quote(str(resolve_gguf(start.base) or (f"{start.base}.gguf" if start.own_base else "BASE.gguf")))


def _conversion(start: Start) -> str:
    """The command that converts a base that the export wrote, with the script in llama.cpp's sources."""
    if not start.own_base:
        return ""
    return f"python convert_hf_to_gguf.py {_base(start)} --outfile {_gguf_base(start)} && "


_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def _vllm(start: Start) -> str:
    allowed = next(r for r in _VLLM_RANKS if r >= start.rank)
    options = start.chosen(dtype="--dtype float32", tokenizer="--tokenizer", template="--chat-template")
    return f"vllm serve {_base(start)} --enable-lora --max-lora-rank {allowed} --lora-modules {_named(start)}{options}"


def _sglang(start: Start) -> str:
    options = start.chosen(dtype="--dtype float32", tokenizer="--tokenizer-path", template="--chat-template")
    return (
        f"python -m sglang.launch_server --model-path {_base(start)} --enable-lora --max-lora-rank {start.rank} "
        f"--lora-paths {_named(start)}{options}"
    )


def _lorax(start: Start) -> str:
    slow = " (slow above rank 128)" if start.rank > 128 else ""
    return (
        f"lorax-launcher --model-id {_base(start)}{start.chosen(dtype='--dtype float32')}  "
        f'# in each request{slow}: "adapter_id": "{start.output}", "adapter_source": "local"'
    )


def _llama_cpp(start: Start) -> str:
    template = start.chosen(template="--jinja --chat-template-file")
    return (
        f"{_conversion(start)}llama-server --model {_gguf_base(start)} --lora {_path(start.output / ADAPTER)}{template}"
    )


def _ollama(start: Start) -> str:
    # In a Modelfile a path extends to the end of the line, and shell quotes would become part of it.
    lines = rf"'FROM %s\nADAPTER %s\n' {_gguf_base(start)} {_path(start.output / ADAPTER)}"
    command = f"printf {lines} > Modelfile && ollama create {shlex.quote(start.output.name)} -f Modelfile"
    return (
        f"{_conversion(start)}{command}  "
        "# up to Ollama 0.34.0; later ones take no adapters: use --for llama.cpp, or pera merge"
    )


def _mlx(start: Start) -> str:
    template = f' --chat-template "$(cat {_path(start.template)})"' if start.template else ""
    return f"mlx_lm.server --model {_base(start)} --adapter-path {_path(start.output)}{template}"


def _mistralrs(start: Start) -> str:
    options = ", dtype=ModelDType.F32" * start.in_float32 + f", max_rank={start.rank}" * (start.rank > 256)
    options += f", tokenizer_json={str(start.output / 'tokenizer.json')!r}" * start.tokenizer
    template = f", chat_template={str(start.template)!r}" if start.template else ""
    adapter = f"LoraAdapter({start.output.name!r}, {str(start.output)!r})"
    code = (
        "from mistralrs import LoraAdapter, ModelDType, Runner, Which; "
        f"runner = Runner(Which.Lora({hub_name(start.base)!r}, [{adapter}]{options}){template})"
    )
    return f"python -i -c {shlex.quote(code)}  # in each request: adapter={start.output.name!r}"


def _peft(start: Start) -> str:
    kind, head = "CausalLM", ""
    if start.labels is not None:
        kind, head = "SequenceClassification", f", num_labels={start.labels}"
    code = f"from peft import AutoPeftModelFor{kind} as M; model = M.from_pretrained({str(start.output)!r}{head})"
    return f"python -c {shlex.quote(code)}"


SERVERS = {
    server.name: server
    for server in (
        Server("vllm", "lora", _vllm, max_rank=max(_VLLM_RANKS), embeddings=True),
        Server("sglang", "lora", _sglang),
        Server("lorax", "lora", _lorax, every_block=True),
        Server("llama.cpp", "gguf", _llama_cpp),
        Server("ollama", "gguf", _ollama),
        Server("mlx", "mlx", _mlx, top_rope=True),
        Server("mistralrs", "lora", _mistralrs, top_rope=True),
        Server("peft", "lora", _peft, trained_whole=True, embeddings=True, other_layers=True),
    )
}


def find(name: str) -> Server:
    """A server by name; raises UserError, with the closest known name, if there is none."""
    if name not in SERVERS:
        raise UserError(f"--for: {name!r} is not a known server; {nearest(name, SERVERS)}")
    return SERVERS[name]


IN_BASE = ("modules_to_save", "trainable_token_indices")
"""Keys of a LoRA's configuration for what an export may write into a base model instead."""


def short_names(config: LoraConfig, layers: dict[str, Folded], modules: list[str]) -> None:
    """Replace the targets of a LoRA by names that every server understands.

    These are the last parts of the module names if they match the same modules, otherwise the full names in place of
    a regular expression.

    Args:
        config: the configuration; changed in place.
        layers: the adapted layers by name in the base model.
        modules: names of all modules of the base model.
    """
    targets = {name for name, layer in layers.items() if not issubclass(layer.kind, ParamWrapper)}
    endings = {name.rpartition(".")[2] for name in targets}
    if {name for name in modules if name.rpartition(".")[2] in endings} == targets:
        config.target_modules, config.exclude_modules = sorted(endings), None
        config.layers_to_transform = config.layers_pattern = None
    elif isinstance(config.target_modules, str):  # servers would take the expression for a name
        config.target_modules, config.exclude_modules = sorted(targets), None


def _kind(layer: Folded) -> str:
    if issubclass(layer.kind, PeraEmbedding):
        return "an embedding"
    base = type(layer.layer.get_base_layer()).__name__
    return f"a parameter of a {base}" if issubclass(layer.kind, ParamWrapper) else f"a {base}"
