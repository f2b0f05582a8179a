"""Comparison of two models: both run the same prompts, and their logits are compared token by token."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pera.errors import UserError
from pera_lab import embedded, models
from pera_lab.convert.gguf import ADAPTER, is_adapter, read_adapter
from pera_lab.convert.llamacpp import LEAST, log_probabilities, serving, weights_of
from pera_lab.files import refuse_pipe, user_path, write_json
from pera_lab.inference import base_model, end_ids, end_token
from pera_lab.opening import Location, before_quantization, locate, open_model
from pera_lab.progress import stage
from pera_lab.tasks.encoding import encode_prompt

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 1.0}
"""Largest logit difference that rounding explains, by the dtype of the computation (docs/architecture.md)."""

QUANTISED_TOLERANCE = 3.0
"""Largest difference of log-probabilities that rounding explains in llama.cpp with quantised weights.

llama.cpp then rounds activations to 8 bits. Most of the differences are in log-probabilities far below the largest
(docs/serving.md), so the KL divergence says more."""

COMPARED_IN_LLAMA_CPP = 4
"""Tokens at the end of each prompt that are compared with llama.cpp, which needs one request for each."""

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "If a train leaves at nine and arrives at noon, how long does it take?",
    "Translate to Spanish: good morning.",
    "Name three animals that live in Africa.",
    "Explain in a few words why the sky is blue.",
)
"""Prompts for a model whose task is not known."""


@dataclass(frozen=True)
class Agreement:
    """How far two models agree over the tokens of some prompts."""

    prompts: int
    tokens: int
    max_difference: float
    """Largest absolute difference between two logits."""
    tolerance: float
    dtype: str
    near_ties: int
    """Tokens whose two largest logits differ by less than the tolerance, so that rounding may swap them."""
    same_top1: float
    """Share of the other tokens for which both models predict the same token."""
    kl_divergence: float
    """Mean over the tokens of KL(reference ‖ other) between the distributions of the next token, in nats."""
    of: str = ""
    """What was checked, such as "merged model". Empty until the result is saved."""
    against: str = ""
    """Name of the reference. Empty until the result is saved."""
    lost_end: str = ""
    """The token that an adapter was taught as the end of an answer, if the other model does not stop at it."""

    @property
    def agree(self) -> bool:
        """Whether the difference is within the tolerance, all predictions are equal, apart from near-ties, and answers
        end at the same token."""
        return self.max_difference <= self.tolerance and self.same_top1 == 1.0 and not self.lost_end

    def sentence(self) -> str:
        """The result in one line."""
        return (
            f"largest logit difference {self.max_difference:.1e} (tolerance {self.tolerance:g}, {self.dtype}), "
            f"{100 * self.same_top1:.1f} % of top-1 tokens equal over {self.tokens} tokens"
            + (f" ({self.near_ties} near-ties left out)" if self.near_ties else "")
            + f", KL divergence {self.kl_divergence:.1e}"
            + (f"; eos_token_id in generation_config.json lacks {self.lost_end}" if self.lost_end else "")
        )

    def record(self) -> dict[str, Any]:
        """The result as a JSON object, with ``agree``; ``lost_end`` only if there is one."""
        record = {**asdict(self), "agree": self.agree}
        if not self.lost_end:
            del record["lost_end"]
        return record

    def save(self, folder: Path, of: str, against: str, **further: Any) -> None:
        """Write the result to ``verification.json``.

        Args:
            folder: the folder to write it to.
            of: what was checked, such as "merged model".
            against: the name of the reference.
            further: additional entries of the file.
        """
        record = replace(self, of=of, against=against).record()
        write_json(folder / "verification.json", {**record, **further})


def verify(
    a: str,
    b: str,
    *,
    dtype: str = "float32",
    prompts: Path | None = None,
    base: str | None = None,
    in_llama_cpp: bool = False,
    trust_remote_code: bool = False,
) -> Agreement:
    """Compare two models. Each is a run folder, an adapter folder of any PEFT method, a model or a GGUF adapter.

    If the recipe of a run quantized its base, the base before quantization is used, which merges and exports are for.

    Args:
        a: the reference: a name for :func:`pera_lab.opening.locate`, a GGUF adapter, or the folder of its export.
        b: the model that is compared with it, given in the same way.
        dtype: dtype of both computations, a key of :data:`pera_lab.models.DTYPES`.
        prompts: a text file with one prompt per line. None takes the prompts of a run's task, or :data:`PROMPTS`.
        base: the base model of a GGUF adapter, such as a .gguf file. None takes the base of the other side.
        in_llama_cpp: compute B, a GGUF adapter or model, with llama.cpp over HTTP, and compare log-probabilities at
            the last tokens of each prompt. On a quantised base llama.cpp also rounds activations.
        trust_remote_code: run code that comes with either model.

    Raises:
        UserError: a model cannot be opened, or their vocabularies differ.
    """
    first, second = (_side(name, other, base, trust_remote_code) for name, other in ((a, b), (b, a)))
    if base is not None and not (first.gguf or second.gguf):
        raise UserError(f"--base={base!r} is for a GGUF adapter, but neither {a!r} nor {b!r} is one; leave it out.")
    asked = prompts_in(prompts) if prompts else prompts_of(first.location, second.location)
    model, tokenizer = first.open(dtype)
    if prompts and tokenizer is None:
        raise UserError(f"--prompts={str(prompts)!r} needs a tokenizer, but the model of {a!r} has none; leave it out.")
    reference = logits(model, tokenizer, asked)
    if not in_llama_cpp:
        ends = [_End.of(first, model, tokenizer)]
        model, its_tokenizer = second.open(dtype)
        if (tokenizer is None) != (its_tokenizer is None):
            raise UserError(f"only one of {a!r} and {b!r} has a tokenizer to read the prompts with; add it.")
        ends.append(_End.of(second, model, its_tokenizer))
        found = compare(reference, logits(model, its_tokenizer, asked), models.DTYPES[dtype])
        return replace(found, lost_end=ends[0].lost_in(ends[1]) or ends[1].lost_in(ends[0]))
    return _compare_with_llama_cpp(reference, [_ids(model, tokenizer, prompt) for prompt in asked], second, b)


class _Side(NamedTuple):
    """One side of a comparison: a location, or a GGUF adapter on the base model of a location."""

    location: Location
    gguf: Path | None

    def open(self, dtype: str) -> tuple[Any, PreTrainedTokenizerBase | None]:
        model, tokenizer = open_model(self.location, dtype, needs_tokenizer=False)
        return (model if self.gguf is None else read_adapter(self.gguf, model)), tokenizer


class _End(NamedTuple):
    """Where the answers of one side end."""

    taught: int | None
    """The token that an adapter was taught as the end; None for a model without one."""
    text: str
    stops: list[int] | None
    """The tokens at which transformers stops; None for an adapter, whose stops are not in a file of its own."""

    @classmethod
    def of(cls, side: _Side, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> _End:
        """The end of the answers of an opened side."""
        plain = base_model(model)
        if side.gguf is not None or not plain.can_generate() or tokenizer is None:
            return cls(None, "", None)
        if side.location.adapter is None:
            return cls(None, "", end_ids(plain.generation_config))
        end = end_token(tokenizer)
        return cls(end, "" if end is None else f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})", None)

    def lost_in(self, other: _End) -> str:
        """The taught end, if ``other`` is a model that does not stop at it, else an empty text."""
        lost = self.taught is not None and other.stops is not None and self.taught not in other.stops
        return self.text if lost else ""


def _side(name: str, other: str, base: str | None, trust_remote_code: bool) -> _Side:
    file = _gguf_adapter(name)
    if file is None:
        return _Side(before_quantization(locate(name, trust_remote_code=trust_remote_code)), None)
    if base is None and _gguf_adapter(other) is not None:
        raise UserError(f"{name!r} and {other!r} are GGUF adapters, which do not name their base; add --base.")
    location = locate(other if base is None else base, trust_remote_code=trust_remote_code)
    return _Side(location._replace(run=None, adapter=None, quantization=None), file)


def _gguf_adapter(name: str) -> Path | None:
    """The GGUF adapter at a path or in an export folder; None if there is none."""
    path = user_path(name)
    if os.path.isfile(path / ADAPTER):
        return path / ADAPTER
    return path if path.suffix == ".gguf" and os.path.isfile(path) and is_adapter(path) else None


def _compare_with_llama_cpp(reference: list[Tensor], prompts: list[list[int]], side: _Side, name: str) -> Agreement:
    model = embedded.resolve_gguf(side.location.base)
    if model is None or side.location.adapter is not None:
        raise UserError(
            f"--llama-cpp: {name!r} is neither a GGUF model nor a GGUF adapter on one; give an adapter.gguf, and the "
            ".gguf file of its base model with --base."
        )
    kept = [log_p[-COMPARED_IN_LLAMA_CPP:].log_softmax(-1).clamp(min=LEAST) for log_p in reference]
    context = max(map(len, prompts)) + 1
    with stage("computing in llama.cpp"), serving(model, side.gguf, context=context) as address:
        found = [
            log_probabilities(address, prompt, rows.shape[1], len(rows))
            for prompt, rows in zip(prompts, kept, strict=True)
        ]
    weights = weights_of(model)
    if weights in models.DTYPES:
        return compare(kept, found, models.DTYPES[weights])
    return replace(compare(kept, found, torch.float32, tolerance=QUANTISED_TOLERANCE), dtype=weights)


def prompts_in(file: Path) -> list[str]:
    """Read the prompts in a text file, one per line; raises UserError if there are none."""
    refuse_pipe(file)
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: {str(file)!r} is not a readable text file: {error}.") from error
    if not found:
        raise UserError(f"--prompts: {str(file)!r} is empty; write one prompt per line.")
    return found


def prompts_of(*locations: Location, count: int = 6) -> list[str]:
    """The first held-out prompts of the task of a run, or :data:`PROMPTS`.

    If the data of the task are missing, the function warns and returns :data:`PROMPTS`.

    Args:
        locations: the first one that is a run provides the prompts.
        count: the largest number of prompts.
    """
    run = next((location.run for location in locations if location.run is not None), None)
    if run is not None:
        try:
            return [example.prompt for example in run.recipe.build_splits().test[:count]]
        except UserError as error:
            warnings.warn(f"the outputs are compared on built-in prompts: {error}", stacklevel=2)
    return list(PROMPTS[:count])


@stage("comparing outputs")
@torch.no_grad()
def logits(model: Any, tokenizer: PreTrainedTokenizerBase | None, prompts: list[str]) -> list[Tensor]:
    """Logits of every token of every prompt.

    Args:
        model: a causal language model or a classifier, in evaluation mode.
        tokenizer: its tokenizer. Without one, the bytes of a prompt are the numbers of its tokens.
        prompts: the prompts. A prompt that is too long for the model is cut at its beginning.

    Returns:
        For each prompt ``(tokens, vocabulary)``, or ``(1, labels)`` for a classifier, in float32 on the CPU.
    """
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    results = []
    for prompt in prompts:
        ids = torch.tensor([_ids(model, tokenizer, prompt)], device=device)
        results.append(model(input_ids=ids).logits.flatten(0, -2).float().cpu())
    return results


def _ids(model: Any, tokenizer: PreTrainedTokenizerBase | None, prompt: str) -> list[int]:
    if tokenizer is None:
        ids = [byte % (models.token_rows(model) or 256) for byte in prompt.encode()]
        return ids[-models.longest_input(model, tokenizer) :]
    ids = encode_prompt(tokenizer, prompt)[-models.longest_input(model, tokenizer) :]
    models.check_tokens(model, tokenizer, [ids])
    return ids


def compare(
    reference: list[Tensor], other: list[Tensor], dtype: torch.dtype, tolerance: float | None = None
) -> Agreement:
    """Compare the logits of two models.

    Args:
        reference: the :func:`logits` of one model.
        other: the :func:`logits` of the other model for the same prompts.
        dtype: the dtype in which they were computed.
        tolerance: the largest difference that counts as equal. None takes the value in :data:`TOLERANCE`.

    Raises:
        UserError: the shapes differ, as with different tokenizers or vocabularies.
    """
    for a, b in zip(reference, other, strict=True):
        if a.shape != b.shape:
            raise UserError(
                f"the models cannot be compared: their logits have shapes {tuple(a.shape)} and {tuple(b.shape)}."
            )
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    x, y = torch.cat(reference), torch.cat(other)
    best = x.topk(min(2, x.shape[-1]), dim=-1).values
    clear = (best[:, 0] - best[:, -1]) > tolerance  # False for a regression: it has one logit and predicts no token
    same = x.argmax(-1) == y.argmax(-1)
    difference = (x - y).abs().max().item()
    divergence = sum(_divergence(a, b) for a, b in zip(reference, other, strict=True)) / len(x)
    if difference != difference:  # NaN, for which argmax is meaningless
        same, clear = torch.zeros(1), torch.ones(1, dtype=torch.bool)
        difference = divergence = float("inf")
    return Agreement(
        prompts=len(reference),
        tokens=len(x),
        max_difference=difference,
        tolerance=tolerance,
        dtype=str(dtype).removeprefix("torch."),
        near_ties=int((~clear).sum()),
        same_top1=same[clear].float().mean().item() if clear.any() else 1.0,
        kl_divergence=divergence if divergence == divergence else float("inf"),
    )


def _divergence(reference: Tensor, other: Tensor) -> float:
    """Sum over the tokens of one prompt of Σ p log (p / q), in float64. A value that rounds below zero becomes zero."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return max(0.0, torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item())
