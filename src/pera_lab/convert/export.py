"""Export an adapter: as the LoRA of rank K that equals it, or as one of smaller rank."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, TaskType
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.hub import CHAT_TEMPLATE_FILE

from pera.errors import UserError
from pera.folding import check_config, folded_layers
from pera.lora import lora_of
from pera_lab import embedded, mlx, models
from pera_lab.adapters import Adapter
from pera_lab.card import write_card
from pera_lab.convert import gguf, servers
from pera_lab.convert.gguf import ADAPTER
from pera_lab.convert.merge import write_base
from pera_lab.convert.servers import READERS, Form, Server, Start
from pera_lab.convert.truncate import Truncation, measured, truncate
from pera_lab.convert.verify import Agreement, compare, logits, prompts_of
from pera_lab.files import atomic_folder, read_object, require_free, reserved, write_json
from pera_lab.opening import Location, base_folder, before_quantization, copy_tokenizer, open_model
from pera_lab.progress import stage


class Export(NamedTuple):
    """The result of an export."""

    form: Form
    """The format."""
    agreement: Agreement
    """Comparison of the export, read back from the disk, with the adapter."""
    truncation: Truncation | None
    """The loss, if the export has a smaller rank."""
    start: str | None
    """The command that starts the server, if the export is for one."""
    base: Path | None = None
    """The base model that was written next to the LoRA, if the adapter trained modules or tokens as a whole."""

    @property
    def good(self) -> bool:
        """Whether the outputs agree, or are finite and were meant to change."""
        lossy = self.truncation is not None and not self.truncation.lossless
        return self.agreement.agree or (lossy and self.agreement.max_difference < float("inf"))


def export(
    location: Location,
    output: Path,
    *,
    to: Form | None = None,
    max_rank: int | None = None,
    energy: float | None = None,
    server: str | None = None,
    dtype: str = "float32",
) -> Export:
    """Write an adapter of PERA or another method as a LoRA, and compare its outputs with the adapter's.

    The export is exact. h, normalization and scale are folded into the factors in float64. Every layer has
    r = lora_alpha = K, without patterns; layers of smaller expanded rank are padded with zeros.

    With ``max_rank`` below K, or with ``energy``, each layer becomes its best approximation of the new rank. This is
    exact too if the rank reaches the smaller side of every weight. Methods whose update has full rank
    (:data:`pera.folding.FULL`) need one of the two.

    Most servers read only factors. If the adapter also trained modules or tokens as a whole, or has more tokens than
    its base, an export for such a server has a folder "base": the base model with these. The LoRA is for this model.

    The check reads the export back from the disk. The folder is kept if the check fails.

    Args:
        location: the adapter and its base model.
        output: folder to write. It holds ``adapter_config.json`` and weights in the format of PEFT ("lora") or mlx-lm
            ("mlx"), or ``adapter.gguf`` ("gguf"), and ``verification.json`` and a model card.
        to: the format. By default the server's format, or "lora".
        max_rank: the largest rank of the export.
        energy: the smallest share of ‖ΔW‖_F² to keep in each layer. It determines the rank.
        server: a key of :data:`pera_lab.convert.servers.SERVERS`. The export keeps the limits of this server.
        dtype: dtype of the check, a key of :data:`pera_lab.models.DTYPES`.

    Raises:
        UserError: the adapter is broken or is for another base; no LoRA equals it; the format or the server cannot
            hold a part of it or its rank; the output exists or another process writes it.
    """
    with reserved(output):
        require_free(output)
        return _export(before_quantization(location), output, to, max_rank, energy, server, dtype)


def _export(
    location: Location,
    output: Path,
    to: Form | None,
    max_rank: int | None,
    energy: float | None,
    server: str | None,
    dtype: str,
) -> Export:
    """:func:`export` to a folder that no other process writes."""
    target = None if server is None else servers.find(server)
    form = _form(to, target)
    _check_options(max_rank, energy)
    adapter = location.require_adapter()
    cut = max_rank is not None or energy is not None
    check_config(adapter.config, full=cut)
    model, tokenizer = open_model(location, dtype, needs_tokenizer=False)
    base = model.get_base_model()
    own_base = _needs_own_base(location, base, form, target)
    if not own_base and (form == "mlx" or (target is not None and target.top_rope)):
        _warn_of_rope(location, READERS[form] if target is None else target.name)
    with stage("folding the adapter"):
        layers, truncation = folded_layers(model, {"default": 1.0}, full=cut), None
    written, rank = layers, max(layer.A.shape[-2] for layer in layers.values())
    if energy is not None or (max_rank is not None and max_rank < rank):
        with stage("truncating the adapter"):
            written, truncation = truncate(layers, max_rank=max_rank, energy=energy)
    lora, weights = lora_of(model, written, "default")
    if own_base:
        weights = {key: weight for key, weight in weights.items() if ".lora_" in key}
        for key in servers.IN_BASE:
            setattr(lora, key, None)
    else:
        weights |= adapter.saved_embeddings(base)
    if target is not None:
        target.check_rank(lora.r, chosen=cut)
        target.check(layers, getattr(base.config, "num_hidden_layers", None))
        servers.short_names(lora, layers, [name for name, _ in base.named_modules()])
    if form != "lora":
        _check_linear(form, lora, weights, base)
    with atomic_folder(output) as folder:
        if own_base:
            lora.base_model_name_or_path, lora.revision = str(output.absolute() / BASE), None
        elif location.run is not None:  # the run may name another folder than its adapter, after the base was moved
            lora.base_model_name_or_path = models.resolve(location.base)
        if form == "lora":
            _write_lora(folder, lora, weights)
        elif form == "mlx":
            mlx.write_adapter(folder, lora, weights, base.config.num_hidden_layers)
        else:
            gguf.write_adapter(folder / ADAPTER, weights, lora.lora_alpha, base.config)
            if not own_base and (file := embedded.resolve_gguf(location.base)):
                gguf.check_base(file, folder / ADAPTER)
        prompts = prompts_of(location)
        if truncation is None:
            before = logits(model, tokenizer, prompts)
        else:
            with measured(layers, written) as changes:
                before = logits(model, tokenizer, prompts)
            truncation.output_change.update(changes)
        del base
        stored = None if target is None else _stored_dtype(location)
        served = location
        if own_base:
            assert stored is not None
            with stage("writing the base model"):
                write_base(folder / BASE, model, location, tokenizer, stored)
            served = Location(None, adapter, str(folder / BASE), trust_remote_code=location.trust_remote_code)
        else:
            copy_tokenizer(location, folder)
        del model
        after = logits(*_read_back(served, folder, form, dtype), prompts)
        agreement = compare(before, after, models.DTYPES[dtype])
        further: dict[str, Any] = {"truncation": asdict(truncation)} if truncation else {}
        agreement.save(folder, of=_NAMES[form], against=location.name, **further)
        sentences = [truncation.sentence()] if truncation else []
        write_card(folder, form, location, "; ".join([*sentences, agreement.sentence()]))
    made = Export(form, agreement, truncation, None, output / BASE if own_base else None)
    if target is None:
        return made
    template = output / CHAT_TEMPLATE_FILE
    start = Start(
        str(made.base or location.base),
        output,
        lora.r,
        adapter.labels,
        in_float32=stored == torch.float32 and (own_base or embedded.embedded_name(location.base) is None),
        tokenizer=location.tokenizer is not None and not own_base,
        template=template if template.is_file() else None,
        own_base=own_base,
    )
    if caution := target.caution(start):
        warnings.warn(caution, stacklevel=2)
    return made._replace(start=target.start(start))


BASE = "base"
"""The folder of a base model that was written for an export."""

_NAMES = {"lora": "LoRA export", "gguf": "GGUF export", "mlx": "MLX export"}


def _form(to: Form | None, server: Server | None) -> Form:
    if server is None:
        return to or "lora"
    if to not in (None, server.form):
        raise UserError(
            f"--to {to} does not fit --for {server.name}, which reads {server.form}; use --to {server.form}."
        )
    return server.form


def _check_options(max_rank: int | None, energy: float | None) -> None:
    if max_rank is not None and energy is not None:
        raise UserError(f"--max-rank={max_rank} and --energy={energy} both set the rank; give only one of them.")
    if max_rank is not None and max_rank < 1:
        raise UserError(f"--max-rank={max_rank} should be at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"--energy={energy} should be above 0 and at most 1, such as 0.999.")


def _needs_own_base(location: Location, base: Any, form: Form, server: Server | None) -> bool:
    """Whether the export needs a base model of its own, because the reader holds only factors.

    Raises:
        UserError: it would, but the reader is not a server, or no such base can be written.
    """
    if form == "lora" and (server is None or server.trained_whole):
        return False
    config: Any = location.require_adapter().config
    reader, found = READERS[form] if server is None else server.name, _configuration(location)
    own, trained = found.get_text_config().vocab_size, models.token_rows(base)
    whole = [f"{key}={value!r}" for key in servers.IN_BASE if (value := getattr(config, key, None))]
    if (bias := getattr(config, "bias", "none")) != "none":
        problem, instead = f"has bias={bias!r}, which {reader} cannot hold", "merge it with: pera merge"
    elif not whole and own == trained:
        return False
    elif config.task_type == TaskType.SEQ_CLS:
        problem, instead = f"has a classification head, which {reader} cannot hold", "merge it with: pera merge"
    else:
        reason = f"has {whole[0]}" if own == trained else f"was trained with {trained} tokens, but its base has {own}"
        problem = f"{reason}, which {reader} cannot hold"
        if server is None:
            instead = "use --for SERVER, which also writes a base model, or merge it with: pera merge"
        elif getattr(found, "quantization_config", None):
            instead = f"the base {location.base!r} is quantised, so merge it with: pera merge --dequantise"
        else:
            return True
    raise UserError(f"{location.name!r} {problem}; {instead}")


def _stored_dtype(location: Location) -> torch.dtype:
    """The dtype that the configuration of the base names, or float32."""
    found = _configuration(location).dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _warn_of_rope(location: Location, reader: str) -> None:
    """Warn if the base states its rotary base only where transformers 5 looks for it."""
    if embedded.embedded_name(location.base) is not None:  # served from the hub
        return
    content = read_object(base_folder(location) / "config.json")
    theta = embedded.with_rope_theta(content).get("rope_theta")
    if theta is not None and "rope_theta" not in content:
        warnings.warn(
            f"config.json of {location.base!r} has rope_theta inside rope_parameters only, where {reader} does not "
            f'look; add "rope_theta": {theta} at its top before you serve it',
            stacklevel=2,
        )


def _configuration(location: Location) -> PreTrainedConfig:
    return models.configuration(location.base, revision=location.revision, trust_remote_code=location.trust_remote_code)


def _check_linear(form: Form, lora: LoraConfig, weights: dict[str, Tensor], base: Any) -> None:
    """Raise UserError for anything that an adapter of linear layers, in GGUF or for MLX, cannot hold."""
    reader = READERS[form]
    factors = {key: weight for key, weight in weights.items() if ".lora_" in key}
    for key, weight in factors.items():
        if ".lora_embedding_" in key or weight.ndim != 2 or lora.target_parameters:
            (layer,) = gguf.layers_of({key: weight})
            raise UserError(f"{layer!r} is not a linear layer, and {reader} holds only those; merge the adapter.")
    layers = gguf.layers_of(weights)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head is not None and getattr(head, "base_layer", head).weight is embedding.weight
    if tied and "lm_head" in layers:
        raise UserError(
            f"'lm_head' shares its weight with the embeddings, and {reader} has no place for it; merge the adapter."
        )
    if form == "gguf":
        gguf.tensor_names(layers, base.config)
    else:
        mlx.check_architecture(base.config)


def _write_lora(folder: Path, lora: LoraConfig, weights: dict[str, Tensor]) -> None:
    for key in ("target_modules", "exclude_modules"):  # PEFT turns them into sets, whose order varies
        if isinstance(names := getattr(lora, key), set):
            setattr(lora, key, sorted(names))
    lora.inference_mode = True
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora.save_pretrained(str(folder))
    plain, file = LoraConfig().to_dict(), folder / models.ADAPTER_CONFIG  # type: ignore[no-untyped-call]
    content = read_object(file)
    content.pop("peft_version", None)
    write_json(file, {k: v for k, v in content.items() if k in _OLD_KEYS or k not in plain or v != plain[k]})


_OLD_KEYS = {
    *("alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    *("lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules"),
    *("task_type", "use_rslora"),
}
"""Keys of adapter_config.json that are always written. Others are written where they say something, because an older
PEFT rejects the keys it does not know, even at their defaults."""


def _read_back(location: Location, folder: Path, form: Form, dtype: str) -> tuple[Any, Any]:
    if form != "gguf":
        kind = Adapter if form == "lora" else mlx.MlxAdapter
        return open_model(location._replace(adapter=kind(folder)), dtype, needs_tokenizer=False)
    base, tokenizer = open_model(location._replace(adapter=None), dtype, needs_tokenizer=False)
    return gguf.read_adapter(folder / ADAPTER, base), tokenizer
