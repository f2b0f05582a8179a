"""Names of modules and weights, without what torch.compile and other wrappers insert into them.

An adapter that is made on a compiled base is saved under the names of the plain base, and loads on both.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from pera.errors import UserError

_INSERTED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")


def plain_name(name: str) -> str:
    """The name that a module or weight has in the model that is not wrapped.

    >>> plain_name("model._orig_mod.layers.0._orig_mod.q_proj.weight")
    'model.layers.0.q_proj.weight'
    >>> plain_name("q_proj._orig_mod")
    'q_proj'
    """
    return _INSERTED.sub("", name).removesuffix(".")


def is_wrapped(model: nn.Module) -> bool:
    """Whether the model, or a module of it, is compiled or wrapped."""
    return any(_INSERTED.search(name) for name, _ in model.named_modules())


def check_wrapped(model: nn.Module, config: Any) -> None:
    """Check that an adapter can be added to a model that is compiled or wrapped.

    Raises:
        UserError: the model is in ``DataParallel``, or PEFT handles an option by names that a wrapper changes.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise UserError(
                f"{name or 'the base model'} is in a {type(module).__name__}, so the adapter would not be trained in "
                "parallel; give the model inside it, and wrap what get_peft_model returns."
            )
    if not is_wrapped(model):
        return
    for key in ("modules_to_save", "trainable_token_indices", "target_parameters", "ensure_weight_tying"):
        if value := getattr(config, key, None):
            raise UserError(
                f"{key}={value!r} needs a base model that is not compiled or wrapped; compile what get_peft_model "
                "returns."
            )
