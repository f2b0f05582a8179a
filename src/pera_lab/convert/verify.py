"""Do two models answer alike? Both run the same prompts, and their logits are compared token by token."""

from __future__ import annotations

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
from pera_lab.files import write_json
from pera_lab.opening import Location, locate, open_model
from pera_lab.tasks.encoding import encode_prompt

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 1.0}
"""Largest logit difference that rounding explains in a model computed in this dtype (docs/architecture.md)."""

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "If a train leaves at nine and arrives at noon, how long does it take?",
    "Translate to Spanish: good morning.",
    "Name three animals that live in Africa.",
    "Explain in a few words why the sky is blue.",
)
"""Asked when the model's own task is not known."""


QUANTISED_TOLERANCE = 3.0
"""The same for llama.cpp with quantised weights, for which it rounds activations to 8 bits: of the log-probabilities,
most of them far below those that matter (docs/serving.md). The KL divergence says more."""

COMPARED_IN_LLAMA_CPP = 4
"""Tokens at the end of each prompt that are compared with llama.cpp, which gives one token's at a time."""


@dataclass(frozen=True)
class Agreement:
    """How far two models agree over the tokens of some prompts."""

    prompts: int
    tokens: int
    max_difference: float
    """Largest absolute difference of two logits."""
    tolerance: float
    dtype: str
    near_ties: int
    """Tokens whose two best logits lie closer together than the tolerance, so that rounding may swap them."""
    same_top1: float
    """Share of the other tokens for which both models would say the same."""
    kl_divergence: float
    """Mean over the tokens of KL(reference ‖ other) between the distributions of the next token, in nats."""
    of: str = ""
    """What was compared; with ``against`` it is known once the agreement is saved."""
    against: str = ""

    @property
    def agree(self) -> bool:
        """Whether the difference is within the tolerance and every token that is no near-tie is the same."""
        return self.max_difference <= self.tolerance and self.same_top1 == 1.0

    def sentence(self) -> str:
        """The result in one line."""
        return (
            f"largest logit difference {self.max_difference:.1e} (tolerance {self.tolerance:g}, {self.dtype}), "
            f"{100 * self.same_top1:.1f} % of top-1 tokens equal over {self.tokens} tokens"
            + (f", near-ties ({self.near_ties}) apart" if self.near_ties else "")
            + f", KL divergence {self.kl_divergence:.1e}"
        )

    def save(self, folder: Path, of: str, against: str, **further: Any) -> None:
        """Write the result, and what else is known, to ``verification.json`` in ``folder``."""
        record = {**asdict(self), "of": of, "against": against, "agree": self.agree, **further}
        write_json(folder / "verification.json", record)


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
    """Compare two of: run folder, adapter folder (of any PEFT method), model, GGUF adapter. B is judged against A.

    Args:
        a, b: what :func:`pera_lab.opening.locate` takes, or a GGUF adapter or the folder of its export.
        dtype: what both are computed in, a key of :data:`pera_lab.models.DTYPES`.
        prompts: a text file, one prompt a line; None takes those of a run's task, else :data:`PROMPTS`.
        base: the base model of a GGUF adapter, such as a .gguf file; None takes that of the other side.
        in_llama_cpp: compute B, a GGUF adapter or model, in llama.cpp itself, by its HTTP endpoint, and compare
            log-probabilities at the last tokens of each prompt. On a quantised base llama.cpp rounds activations too.
        trust_remote_code: run code that comes with either model, also where no recipe says so.

    Raises:
        UserError: one of them cannot be opened, or their vocabularies differ.
    """
    first, second = (_side(name, other, base, trust_remote_code) for name, other in ((a, b), (b, a)))
    if base is not None and not (first.gguf or second.gguf):
        raise UserError(f"--base={base!r} is for a GGUF adapter, and neither {a!r} nor {b!r} is one.")
    asked = prompts_in(prompts) if prompts else prompts_of(first.location, second.location)
    model, tokenizer = first.open(dtype)
    reference = logits(model, tokenizer, asked)
    if not in_llama_cpp:
        return compare(reference, logits(*second.open(dtype), asked), models.DTYPES[dtype])
    return _compare_with_llama_cpp(reference, [_ids(model, tokenizer, prompt) for prompt in asked], second, b)


class _Side(NamedTuple):
    """What is compared: a location, or a GGUF adapter on the base of one."""

    location: Location
    gguf: Path | None

    def open(self, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
        model, tokenizer = open_model(self.location, dtype)
        return (model if self.gguf is None else read_adapter(self.gguf, model)), tokenizer


def _side(name: str, other: str, base: str | None, trust_remote_code: bool) -> _Side:
    file = _gguf_adapter(name)
    if file is None:
        return _Side(locate(name, trust_remote_code=trust_remote_code), None)
    if base is None and _gguf_adapter(other) is not None:
        raise UserError(f"{name!r} and {other!r} are GGUF adapters, which do not name their base; add --base.")
    location = locate(other if base is None else base, trust_remote_code=trust_remote_code)
    return _Side(Location(None, None, *location[2:]), file)


def _gguf_adapter(name: str) -> Path | None:
    """The GGUF adapter that ``name`` is, or that lies in the folder ``name`` of an export; else None."""
    path = Path(name).expanduser()
    if (path / ADAPTER).is_file():
        return path / ADAPTER
    return path if path.suffix == ".gguf" and path.is_file() and is_adapter(path) else None


def _compare_with_llama_cpp(reference: list[Tensor], prompts: list[list[int]], side: _Side, name: str) -> Agreement:
    base = side.location.base
    model = embedded.resolve_gguf(base)
    if model is None or side.location.adapter is not None:
        raise UserError(
            f"{name!r} is not what llama.cpp computes, a GGUF model or a GGUF adapter on one; give an adapter.gguf, "
            "and with --base the .gguf file of its base model."
        )
    kept = [log_p[-COMPARED_IN_LLAMA_CPP:].log_softmax(-1).clamp(min=LEAST) for log_p in reference]
    with serving(model, side.gguf, context=max(map(len, prompts)) + 1) as address:
        found = [
            log_probabilities(address, prompt, rows.shape[1], len(rows))
            for prompt, rows in zip(prompts, kept, strict=True)
        ]
    weights = weights_of(model)
    if weights in models.DTYPES:
        return compare(kept, found, models.DTYPES[weights])
    return replace(compare(kept, found, torch.float32, tolerance=QUANTISED_TOLERANCE), dtype=weights)


def prompts_in(file: Path) -> list[str]:
    """The prompts in a text file, one a line; raises UserError if there are none."""
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: {str(file)!r} is not a text file that can be read: {error}.") from error
    if not found:
        raise UserError(f"--prompts: {str(file)!r} holds no prompt; write one a line.")
    return found


def prompts_of(*locations: Location, count: int = 6) -> list[str]:
    """Held-out prompts of the task of the first run among ``locations``; else, and with a warning where the data of the
    task are gone, :data:`PROMPTS`."""
    run = next((location.run for location in locations if location.run is not None), None)
    if run is not None:
        try:
            return [example.prompt for example in run.recipe.build_splits().test[:count]]
        except UserError as error:
            warnings.warn(f"the check is made on prompts of its own: {error}", stacklevel=2)
    return list(PROMPTS[:count])


@torch.no_grad()
def logits(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[Tensor]:
    """Logits of every token of every prompt, one ``(tokens, vocabulary)`` tensor each, in float32 on the CPU; of a
    classifier ``(1, labels)``. Of a prompt longer than what the model takes, the end counts."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    results = []
    for prompt in prompts:
        ids = torch.tensor([_ids(model, tokenizer, prompt)], device=device)
        results.append(model(input_ids=ids).logits.flatten(0, -2).float().cpu())
    return results


def _ids(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    return encode_prompt(tokenizer, prompt)[-models.longest_input(model, tokenizer) :]


def compare(
    reference: list[Tensor], other: list[Tensor], dtype: torch.dtype, tolerance: float | None = None
) -> Agreement:
    """Compare the :func:`logits` of two models that were computed in ``dtype``, with its tolerance unless one is given.

    Raises:
        UserError: the shapes differ, as with different tokenizers or vocabularies.
    """
    for a, b in zip(reference, other, strict=True):
        if a.shape != b.shape:
            raise UserError(
                f"the two models cannot be compared: logits of shapes {tuple(a.shape)} and {tuple(b.shape)}."
            )
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    x, y = torch.cat(reference), torch.cat(other)
    best = x.topk(min(2, x.shape[-1]), dim=-1).values
    clear = (best[:, 0] - best[:, -1]) > tolerance  # a regression has one logit, and no token to choose
    same = x.argmax(-1) == y.argmax(-1)
    difference = (x - y).abs().max().item()
    divergence = sum(_divergence(a, b) for a, b in zip(reference, other, strict=True)) / len(x)
    if difference != difference:  # NaN, of which argmax says nothing
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
    """Σ over the tokens of one prompt of Σ p log (p / q), in float64; rounding below zero counts as zero."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return max(0.0, torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item())
