"""A llama.cpp server on the loopback interface, from the package xllamacpp, and requests to it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pera.errors import UserError
from pera_lab.convert.gguf import check_base, open_gguf
from pera_lab.extras import missing_extra
from pera_lab.gguf_header import check_header

LEAST = -80.0
"""Lower bound of log-probabilities. llama.cpp may round smaller ones to a probability of zero."""


@contextmanager
def serving(model: Path, adapter: Path | None = None, *, context: int = 2048, threads: int = 2) -> Iterator[str]:
    """Context manager that runs a llama.cpp server on the CPU, with keys and values in float32.

    Args:
        model: the GGUF model.
        adapter: a GGUF adapter to load with it.
        context: the longest prompt with its answer, in tokens.
        threads: number of threads.

    Yields:
        The address of the server.

    Raises:
        UserError: xllamacpp is not installed, the adapter is for another model, or llama.cpp cannot load a file.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise missing_extra("xllamacpp", "llamacpp") from error
    check_header(model)
    if adapter is not None:
        check_base(model, adapter)
    parameters: Any = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = context, 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.verbosity, parameters.warmup, parameters.ui = -1, False, False
    if adapter is not None:
        loaded: Any = xllamacpp.CommonAdapterLoraInfo()
        loaded.path, loaded.scale = str(adapter), 1.0
        parameters.lora_adapters = [loaded]
    try:
        server = xllamacpp.Server(parameters)
    except (RuntimeError, ValueError) as error:
        files = " with ".join(repr(str(file)) for file in (model, adapter) if file)
        raise UserError(f"llama.cpp cannot load {files}: {error}") from error
    try:
        yield str(server.listening_address)
    finally:
        del server


def complete(address: str, prompt: list[int], **options: Any) -> dict[str, Any]:
    """Request a greedy completion from the server.

    Args:
        address: the address from :func:`serving`.
        prompt: token ids.
        options: additional fields of the request, such as ``n_predict``.

    Returns:
        The JSON response.

    Raises:
        UserError: the server does not answer with JSON.
    """
    body = json.dumps({"prompt": prompt, "temperature": 0, "cache_prompt": True, **options}).encode()
    request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            found: dict[str, Any] = json.load(response)
            return found
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"llama.cpp did not answer at {address}: {error}") from error


def log_probabilities(address: str, prompt: list[int], vocabulary: int, last: int) -> Tensor:
    """Log-probabilities of the next token after each of the last tokens of a prompt.

    Args:
        address: the address from :func:`serving`.
        prompt: token ids.
        vocabulary: number of tokens of the model.
        last: number of positions, counted from the end of the prompt.

    Returns:
        ``(last, vocabulary)``, float32, at least :data:`LEAST`.
    """
    found = torch.full((min(last, len(prompt)), vocabulary), LEAST)
    for row in range(len(found)):
        end = len(prompt) - len(found) + row + 1
        answer = complete(address, prompt[:end], n_predict=1, n_probs=vocabulary)
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        ids = torch.tensor([entry["id"] for entry in entries])
        found[row, ids] = torch.tensor([entry["logprob"] for entry in entries]).clamp(min=LEAST)
    return found


def weights_of(model: Path) -> str:
    """Storage type of the matrices of a GGUF model: a dtype such as "float16", or GGUF types such as "Q4_1, Q8_0"."""
    kinds = {tensor.tensor_type.name for tensor in open_gguf(model).tensors} - {"F32"}
    plain = {"F16": "float16", "BF16": "bfloat16"}
    return ", ".join(plain.get(kind, kind) for kind in sorted(kinds)) or "float32"
