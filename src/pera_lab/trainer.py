"""The Trainer of transformers with the rows of a run: their order, their loss, and their division over processes."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from pera_lab import processes
from pera_lab.progress import stage
from pera_lab.tasks.encoding import count_labels


class LengthOrder(LengthGroupedSampler):
    """Batches of rows of similar length. The order depends on the seed and the epoch only, so it is the same for every
    method, whatever its dropout draws, and for a resumed run.

    Args:
        lengths: the number of tokens in each row.
        size: rows in an optimizer step.
        seed: the seed of the order.
    """

    def __init__(self, lengths: list[int], size: int, seed: int) -> None:
        super().__init__(size, lengths=lengths, generator=torch.Generator())
        self._seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.generator.manual_seed(random.Random(f"{self._seed}, {epoch}").getrandbits(32))


class OnlineLoss:
    """Loss on batches of the first epoch, summed over their labels. Each batch counts before the model learns it."""

    def __init__(self) -> None:
        self._since: int | None = None
        self._labels = 0
        self._nats: torch.Tensor | float = 0.0  # a tensor, so that no step waits for the device

    def add(self, step: int, loss: torch.Tensor, labels: int, divisor: torch.Tensor | int | None) -> None:
        """Add a batch.

        Args:
            step: the number of optimizer steps before it.
            loss: the loss of the batch, a sum over its labels divided by ``divisor``.
            labels: the number of its labels.
            divisor: the labels of all batches of the optimizer step, or None for ``labels``.
        """
        self._since = step if self._since is None else self._since
        self._labels += labels
        if labels:  # otherwise the mean is NaN
            self._nats = self._nats + loss.detach().double() * (labels if divisor is None else divisor)

    def take(self) -> dict[str, Any]:
        """Entry of ``metrics.jsonl``: what all processes added since the last call; empty after the first epoch."""
        if self._since is None:
            return {}
        parts = processes.gathered((self._labels, float(self._nats)))
        labels, nats = (sum(part) for part in zip(*parts, strict=True))
        entry = {"since": self._since, "labels": labels, "nats": nats}
        self._since, self._labels, self._nats = None, 0, 0.0
        return {"first_epoch": entry}


class RunTrainer(Trainer):
    """A Trainer whose result does not depend on the number of processes.

    Each process takes its share of every batch that a single process would draw, and the loss is taken over the whole
    batch. transformers would instead fill up the last batch of an epoch with rows that were already drawn, and weight
    the mean losses of unequal shares equally.

    Args:
        order: the order of the training rows; None draws them at random.
        online: records the loss in the first epoch.
        validation_collator: makes the batches of validation rows. The Trainer weights their losses by the rows in them.
        options: the arguments of the Trainer.
    """

    def __init__(
        self, order: Sampler[int] | None, online: OnlineLoss, validation_collator: Callable[..., Any], **options: Any
    ) -> None:
        self._order, self._online, self._validation_collator = order, online, validation_collator
        super().__init__(**options)

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; also uses FSDP on CPUs, for which accelerate ignores it."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if processes.fsdp() and state.distributed_type is DistributedType.MULTI_CPU:
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in transformers; with several processes, the batches of one."""
        if processes.count() == 1:
            return super().get_train_dataloader()
        return self._shared(self.train_dataset, self._train_batch_size, self._get_train_sampler())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in transformers; with several processes, each takes whole batches of one."""
        collator, self.data_collator = self.data_collator, self._validation_collator
        try:
            if processes.count() == 1:
                return super().get_eval_dataloader(eval_dataset)
            return self._shared(self.eval_dataset, self.args.eval_batch_size, None)
        finally:
            self.data_collator = collator

    def _shared(self, rows: Any, size: int, order: Sampler[int] | None) -> DataLoader[Any]:
        """Batches of which each process takes ``size`` rows, and fewer or none of the last one."""
        loader: DataLoader[Any] = DataLoader(
            rows, size * processes.count(), sampler=order, collate_fn=partial(self._own_rows, self.data_collator, size)
        )
        shared: DataLoader[Any] = prepare_data_loader(  # as for one process: the rows are divided here
            loader,
            self.args.device,
            num_processes=1,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )
        return shared

    def _own_rows(self, collator: Callable[..., Any], size: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
        start = processes.index() * size
        own = rows[start : start + size]
        batch = dict(collator(own or rows[:1]))  # every process needs a forward pass
        if not own and self._sums(batch["labels"]):
            batch["labels"].fill_(-100)
        return {**batch, "rows": torch.tensor(len(own))}

    def _sums(self, labels: torch.Tensor) -> bool:
        """Whether the model divides the sum of its losses by ``num_items_in_batch``. A classifier takes the mean."""
        return self.model_accepts_loss_kwargs and labels.dim() == 2

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """As in transformers; says that it runs."""
        with stage("validating"):
            return super().evaluate(*arguments, **options)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As in transformers; also records the loss in the first epoch."""
        inputs = dict(inputs)
        labels, rows, several = inputs["labels"], inputs.pop("rows", None), processes.count() > 1
        if several and not model.training:
            return super().compute_loss(model, inputs, return_outputs)  # the mean, because the batch is not divided
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        loss: Any = result[0] if return_outputs else result
        number = 0 if rows == 0 else count_labels(labels)
        if several and self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            loss = loss / processes.count()  # transformers multiplies it, because the processes' gradients are averaged
        divisor = num_items_in_batch if self._sums(labels) else None
        if (self.state.epoch or 0.0) < 1:
            self._online.add(self.state.global_step, loss, number, divisor)
        if several:
            if divisor is None:
                loss = loss * number / self.accelerator.gather(torch.tensor(number, device=loss.device)).sum()
            loss = loss * processes.count()
        return (loss, result[1]) if return_outputs else loss

    def prediction_step(self, *arguments: Any, **options: Any) -> Any:
        """As in transformers; with several processes, the outputs have equal shapes, so that they can be gathered."""
        loss, *outputs = super().prediction_step(*arguments, **options)
        if processes.count() > 1:
            outputs = [o if o is None else self.accelerator.pad_across_processes(o, dim=0) for o in outputs]
        return loss, *outputs

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return super()._get_train_sampler(train_dataset) if self._order is None else self._order
