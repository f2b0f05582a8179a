"""A PERA adapter in another form: the LoRA of rank K that it equals, or one of smaller rank that comes near it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from pera.errors import UserError
from pera.lora import folded_layers, lora_of
from pera_lab import embedded, models
from pera_lab.adapters import Adapter
from pera_lab.card import write_card
from pera_lab.convert import gguf, servers
from pera_lab.convert.gguf import ADAPTER
from pera_lab.convert.servers import Form
from pera_lab.convert.truncate import Truncation, measured, truncate
from pera_lab.convert.verify import Agreement, compare, logits, prompts_of
from pera_lab.files import atomic_folder, require_free
from pera_lab.opening import Location, copy_tokenizer, locate_adapter, open_model


class Export(NamedTuple):
    """What an export came to."""

    agreement: Agreement
    """The export, read back from the disk, against the adapter."""
    truncation: Truncation | None
    """What was left out, if it was cut to a smaller rank."""
    start: str | None
    """The line that starts the server it was made for."""

    @property
    def good(self) -> bool:
        """Whether the outputs agree, or were asked to change."""
        asked = self.truncation is not None and not self.truncation.lossless
        return self.agreement.agree or (asked and self.agreement.max_difference < float("inf"))


def export(
    source: str,
    output: Path,
    *,
    to: Form | None = None,
    max_rank: int | None = None,
    energy: float | None = None,
    server: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Export:
    """Write the adapter of a run or an adapter folder as a LoRA, and compare its outputs with the adapter's.

    h, normalization and scale are folded into the factors, in float64, and r = lora_alpha = K for every layer, without
    patterns; layers of smaller expanded rank are padded with zeros. That is exact. With ``max_rank`` below K, or
    ``energy``, each layer becomes its best approximation of that rank, which is exact too where the rank reaches
    the smaller side of its weight. The export is read back from the disk for the check, and kept when the
    check fails.

    Args:
        source: what :func:`pera_lab.opening.locate` takes, with a PERA adapter.
        output: folder to write, with ``verification.json`` and a model card: for "lora" PEFT's
            ``adapter_config.json`` and weights, for "gguf" ``adapter.gguf``.
        to: the form; by default what the server reads, or "lora".
        max_rank: the largest rank of the export.
        energy: the least share of ‖ΔW‖_F² to keep in each layer; the rank follows from it.
        server: a key of :data:`pera_lab.convert.servers.SERVERS`, whose limits are kept; what it would not take is
            refused.
        dtype: what the check is computed in, a key of :data:`pera_lab.models.DTYPES`.
        trust_remote_code: run code that comes with the base, also where no recipe says so.

    Raises:
        UserError: there is no PERA adapter, it is broken or not finite; the form or the server cannot carry a part of
            it or its rank; the base is not the one it was trained on; the output cannot be written.
    """
    form = _form(to, server)
    _check_options(max_rank, energy, server)
    require_free(output)
    location = locate_adapter(source, trust_remote_code=trust_remote_code)
    adapter = location.require_adapter()
    if not adapter.is_pera:
        raise UserError(f"{source!r} is a {adapter.method} adapter; only a PERA adapter is exported.")
    model, tokenizer = open_model(location, dtype)
    _check_tokens(source, location, model, form, server)
    layers, truncation = folded_layers(model, {"default": 1.0}), None
    written, rank = layers, max(layer.A.shape[-2] for layer in layers.values())
    if energy is not None or (max_rank is not None and max_rank < rank):
        written, truncation = truncate(layers, max_rank=max_rank, energy=energy)
    lora, weights = lora_of(model, written, "default")
    base = model.get_base_model()
    weights |= adapter.saved_embeddings(base)
    if server is not None:
        servers.check_rank(server, lora.r, chosen=max_rank is not None or energy is not None)
        servers.check(server, layers, lora, getattr(base.config, "num_hidden_layers", None))
        servers.short_names(lora, layers, [name for name, _ in base.named_modules()])
    if form == "gguf":
        _check_gguf(lora, weights, base)
    with atomic_folder(output) as folder:
        if form == "lora":
            _write_lora(folder, lora, weights)
            copy_tokenizer(location, folder)
        else:
            gguf.write_adapter(folder / ADAPTER, weights, lora.lora_alpha, base.config)
            if file := embedded.resolve_gguf(location.base):
                gguf.check_base(file, folder / ADAPTER)
        prompts = prompts_of(location)
        if truncation is None:
            before = logits(model, tokenizer, prompts)
        else:
            with measured(layers, written) as changes:
                before = logits(model, tokenizer, prompts)
            truncation.output_change.update(changes)
        del model, base
        after = logits(*_read_back(location, folder, form, dtype), prompts)
        agreement = compare(before, after, models.DTYPES[dtype])
        further: dict[str, Any] = {"truncation": asdict(truncation)} if truncation else {}
        agreement.save(folder, of=_NAMES[form], against=source, **further)
        said = [truncation.sentence()] if truncation else []
        write_card(folder, form, location, "; ".join([*said, agreement.sentence()]))
    start = servers.find(server).start(location.base, output, lora.r) if server else None
    return Export(agreement, truncation, start)


_NAMES = {"lora": "LoRA export", "gguf": "GGUF export"}


def _form(to: Form | None, server: str | None) -> Form:
    if server is None:
        return to or "lora"
    read = servers.find(server).form
    if to is not None and to != read:
        raise UserError(f"--to {to} is not for {server}, which reads {read}; use --to {read}")
    return read


def _check_options(max_rank: int | None, energy: float | None, server: str | None) -> None:
    if max_rank is not None and energy is not None:
        raise UserError(f"--max-rank={max_rank} and --energy={energy} both set the rank; keep one.")
    if max_rank is not None and max_rank < 1:
        raise UserError(f"--max-rank={max_rank} should be at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"--energy={energy} should be a share above 0, at most 1, such as 0.999.")


def _check_tokens(source: str, location: Location, model: Any, form: Form, server: str | None) -> None:
    """Raise UserError if the adapter was trained with other tokens than its base's, for a reader that takes none."""
    if form == "lora" and (server is None or servers.find(server).trained_whole):
        return
    own = models.vocabulary(location.base, revision=location.revision, trust_remote_code=location.trust_remote_code)
    trained = len(model.get_input_embeddings().weight)
    if trained != own:
        reader = server or "a GGUF adapter"
        raise UserError(
            f"{source!r} was trained with {trained} tokens, and its base has {own}, which cannot be carried to "
            f"{reader}; merge it: pera merge"
        )


def _check_gguf(lora: LoraConfig, weights: dict[str, Tensor], base: Any) -> None:
    """Raise UserError for what a GGUF adapter does not carry."""
    servers.refuse_trained_whole("a GGUF adapter", lora)
    factors = {key: weight for key, weight in weights.items() if ".lora_" in key}
    for key, weight in factors.items():
        if ".lora_embedding_" in key or weight.ndim != 2 or lora.target_parameters:
            (layer,) = gguf.layers_of({key: weight})
            raise UserError(f"{layer!r} is no linear layer, and a GGUF adapter holds linear layers alone; merge it.")
    layers = gguf.layers_of(weights)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head is not None and getattr(head, "base_layer", head).weight is embedding.weight
    if tied and "lm_head" in layers:
        raise UserError(
            "'lm_head' shares its weight with the embeddings, and a GGUF file has no tensor for it; merge the adapter."
        )
    gguf.tensor_names(layers, base.config)


def _write_lora(folder: Path, lora: LoraConfig, weights: dict[str, Tensor]) -> None:
    for key in ("target_modules", "exclude_modules"):  # PEFT makes them sets, which are written in any order
        if isinstance(names := getattr(lora, key), set):
            setattr(lora, key, sorted(names))
    lora.inference_mode = True
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora.save_pretrained(str(folder))


def _read_back(location: Location, folder: Path, form: Form, dtype: str) -> tuple[Any, Any]:
    if form == "lora":
        return open_model(location._replace(adapter=Adapter(folder)), dtype)
    base, tokenizer = open_model(location._replace(adapter=None), dtype)
    return gguf.read_adapter(folder / ADAPTER, base), tokenizer
