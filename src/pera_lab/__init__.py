"""The laboratory around the method: recipes, tasks, training, studies, conversion, and the ``pera`` command."""

from __future__ import annotations

from typing import Any


def load(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a model and its tokenizer, in evaluation mode, as the command line does.

    Example::

        model, tokenizer = pera_lab.load("smollm2-135m")

    Args:
        name: name of an embedded model, a model folder, a .gguf file or a Hub id; or a run or an adapter folder, whose
            adapter is then on its base model.
        dtype: dtype of the base model: "float32", "bfloat16", "float16", "stored" (as in its files) or "auto", which is
            bfloat16 if the hardware supports it natively, else float32.

    Returns:
        The model and its tokenizer.

    Raises:
        UserError: there is no such model.
    """
    from pera_lab.opening import locate, open_model  # they import torch

    return open_model(locate(name), dtype)


__all__ = ["load"]
