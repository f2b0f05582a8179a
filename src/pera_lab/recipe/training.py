"""The ``training`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pera.optim import check_groups
from pera_lab.sections import GrownSection, one_message


class TrainingSection(GrownSection):
    """How the adapter is trained. Give exactly one of ``max_steps`` and ``epochs``."""

    newer = ("packing",)

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    lr_ratio: dict[str, float] = Field(default_factory=dict)
    """Learning rates of "B", "h" and "other" divided by the rate of A, as in :func:`pera.optim.parameter_groups`."""
    max_steps: int | None = Field(None, ge=1, le=10**9)
    """Optimizer steps."""
    epochs: float | None = Field(None, gt=0, le=10**6)
    """Passes over the training rows."""
    batch_size: int = Field(16, ge=1, le=10**6)
    """Examples in a forward pass. Several processes share them, so the results do not depend on their number."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=10**6)
    """Forward passes for each optimizer step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises from zero."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Warm-up as a share of all steps; an alternative to ``warmup_steps``."""
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Shape of the learning rate after the warm-up."""
    weight_decay: float | dict[str, float] = 0.0
    """Weight decay for all parameters, or by group as in :func:`pera.optim.parameter_groups`."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 turns clipping off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    train_share: float = Field(1.0, gt=0, le=1)
    """Share of the training rows to use."""
    held_out: int = Field(0, ge=0)
    """Training rows that are scored instead of the test rows and not trained on. Use them to choose settings."""
    group_by_length: bool = False
    """Draw batches of examples of similar length: less padding, another order."""
    packing: bool = False
    """Train a language model on batches without padding: the examples of a batch become one row, in which each attends
    to itself alone. A loss on the answers and its gradients are the same."""
    max_length: int = Field(1024, ge=1)
    """Longest training example in tokens. A language model leaves longer examples out; a classifier truncates them.
    Both are counted."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the initialization, the data order and dropout."""
    logging_steps: int = Field(10, ge=1)
    """Steps between lines of ``metrics.jsonl``."""
    save_steps: int = Field(50, ge=1)
    """Steps between checkpoints. With ``keep: best``, a checkpoint is also saved with each evaluation."""
    eval_steps: Annotated[
        Annotated[int, Field(ge=1)] | Literal["epoch"] | None,
        one_message("Input should be a whole number of at least 1, or 'epoch'"),
    ] = None
    """Steps between evaluations on the validation rows, or "epoch"; by default there are none."""
    keep: Literal["last", "best"] = "last"
    """"last": keep the adapter after the last step. "best": keep the best checkpoint on the validation rows, by loss
    or, for classification, by the task's metric. A checkpoint is then saved with each evaluation."""
    report_to: list[str] = Field(default_factory=list)
    """Trackers for transformers: tensorboard, trackio, wandb."""

    @property
    def effective_batch_size(self) -> int:
        """Examples in an optimizer step, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps

    @model_validator(mode="after")
    def _check_steps(self) -> TrainingSection:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of max_steps and epochs")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give one of warmup_steps and warmup_ratio")
        if self.lr_scheduler == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError("lr_scheduler='constant' has no warm-up; give 'constant_with_warmup', or no warm-up")
        if self.keep == "best" and self.eval_steps is None:
            raise ValueError("keep='best' needs eval_steps, the steps between evaluations, or 'epoch'")
        return self

    @model_validator(mode="before")
    @classmethod
    def _check_groups(cls, section: Any) -> Any:
        if isinstance(section, dict):
            check_groups(section.get("lr_ratio", {}), section.get("weight_decay", 0.0))
        return section
