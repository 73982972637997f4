"""Class labels and gradients for what is observed in validation, taken from the batch and from the module's own training step.

Labels: the integer vector with one entry per sample that the batch holds, looked for in the order of ``core.labels``. Loss:
what ``training_step`` returns for the validation batch, or a function that the user gives; it counts as the mean over the
batch's samples. Either runs once more per batch, in evaluation mode, with gradients and without logging, and leaves no trace:
parameters, ``.grad``, buffers, metrics, attributes and random numbers are as before. Outputs: the network's last call of the
batch, again. No optimizer and no DDP wrapper takes part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from actprune.core.calling import undisturbed
from actprune.core.errors import ActPruneError, ConfigError, ObservationError
from actprune.core.labels import class_labels, unlabelled
from actprune.core.views import Criterion
from actprune.pruning import Observation
from actprune.training.example import Call, Network
from actprune.training.replay import Replay, harmless, mapped

Loss = Callable[[LightningModule, Any], Tensor]
"""The LightningModule and a validation batch -> the mean of its samples' losses."""


def check_loss(task: LightningModule, criterion: Criterion, loss: Loss | None) -> None:
    """Refuse a criterion of the loss where no loss can be had.

    Raises:
        ConfigError: the training step optimizes by itself or does not exist, and no loss is given.
    """
    if any(make(1).differentiates == "loss" for make in criterion.statistics().values()):
        require_loss(task, loss, f"{type(criterion).__name__} differentiates the loss")


def require_loss(task: LightningModule, loss: Loss | None, who: str) -> None:
    """Refuse where no loss can be had.

    Args:
        task: the LightningModule.
        loss: what the user gave.
        who: the sentence that says who needs it.

    Raises:
        ConfigError: the training step optimizes by itself or does not exist, and no loss is given.
    """
    if loss is not None:
        return
    if task.automatic_optimization and is_overridden("training_step", task, LightningModule):
        return
    why = "has no training_step" if task.automatic_optimization else "steps its optimizers itself in training_step"
    raise ConfigError(
        f"{who}, and {type(task).__name__} {why}; give PruningCallback loss=, a function of the module and a batch that "
        "returns the mean loss"
    )


class Gradients:
    """Runs validation batches once more for one network's observation.

    Args:
        trainer: its precision is that of the runs.
        network: what is observed.
        observation: asks for labels or gradients.
        loss: in place of the training step.
    """

    def __init__(self, trainer: Trainer, network: Network, observation: Observation, loss: Loss | None) -> None:
        self._trainer, self._network, self._observation, self._given = trainer, network, observation, loss
        self._call: Call | None = None

    def labels(self, batch: Any, n: int) -> Tensor | None:
        """The classes of the batch's samples, where they are asked for.

        Raises:
            ObservationError: the batch has none.
        """
        if not self._observation.needs_labels:
            return None
        found = class_labels(batch, n)
        if found is None:
            raise ObservationError(unlabelled(batch, n))
        return found

    def called(self, call: Call) -> None:
        """Remember how the network was called last."""
        if "outputs" in self._observation.differentiates or "output_sum" in self._observation.differentiates:
            self._call = call

    def run(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Run a batch again that was validated, if the criterion asks for gradients.

        Raises:
            ActPruneError: the batch cannot be run so, or what it gives has no gradient.
        """
        if not self._observation.differentiates:
            return
        task: LightningModule = self._trainer.lightning_module
        with isolate_rng(), undisturbed(task), harmless(task):
            self._observation.differentiate(
                outputs=lambda: self._outputs(_usable(batch), dataloader_idx),
                loss=lambda: loss_of(self._trainer, task, self._given, _usable(batch), batch_idx),
            )
        self._call = None

    def _outputs(self, batch: Any, dataloader_idx: int) -> Any:
        network = self._network
        with self._trainer.precision_plugin.val_step_context():
            if isinstance(network.example_inputs, Replay):
                return Replay(network.example_inputs.task, batch, dataloader_idx)(network.module)
            assert self._call is not None
            args, kwargs = _usable(self._call)
            return network.module(*args, **kwargs)


def loss_of(trainer: Trainer, task: LightningModule, given: Loss | None, batch: Any, batch_idx: int) -> Any:
    """The loss of a validation batch: what ``given`` or else the training step says, in the mode that the task is in.

    Raises:
        ObservationError: it does not run.
    """
    try:
        with trainer.precision_plugin.train_step_context():
            said = _step(task, given, batch, batch_idx)
    except ActPruneError:
        raise
    except Exception as error:
        what = "training_step" if given is None else "the given loss"
        raise ObservationError(
            f"{what} does not run on a validation batch in evaluation mode: {type(error).__name__}: {error}; give "
            "PruningCallback loss=, a function of the module and a validation batch that returns the mean loss"
        ) from error
    return said["loss"] if isinstance(said, dict) and "loss" in said else said


def _step(task: LightningModule, given: Loss | None, batch: Any, batch_idx: int) -> Any:
    if given is not None:
        return given(task, batch)
    takes_number = is_param_in_hook_signature(task.training_step, "batch_idx", min_args=2)
    return task.training_step(batch, batch_idx) if takes_number else task.training_step(batch)


def _usable(value: Any) -> Any:
    """Tensors that autograd may keep."""
    with torch.inference_mode(False):
        return mapped(value, lambda x: x.clone() if x.is_inference() else x)
