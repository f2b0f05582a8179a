"""This machine and process: hardware, versions, and the command that is running."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("pera", "torch", "transformers", "peft", "accelerate", "safetensors"),
    *("scipy", "scikit-learn", "matplotlib", "jinja2"),
    *("bitsandbytes", "reasoning-gym", "datasets", "lm-eval", "gguf", "xllamacpp", "ray"),
)
"""The packages whose versions :func:`environment` reports: of the method, of the laboratory, and optional ones."""


def device() -> torch.device:
    """The accelerator of this machine, or its CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def fast_dtype() -> torch.dtype:
    """bfloat16 if this machine computes in it natively, else float32."""
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = device().type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the accelerator or the machine has too little memory."""
    said = ("DefaultCPUAllocator: can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)


def environment() -> dict[str, Any]:
    """Versions and hardware of this machine. A package that is not installed has the version None."""
    accelerator = device()
    return {
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type,
        "fast_dtype": str(fast_dtype()).removeprefix("torch."),
    }


def command_line() -> list[str]:
    """The command that is running, as it is recorded in a run."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
