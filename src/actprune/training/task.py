"""A LightningModule for image classification: cross entropy, top-1 accuracy, optimizer and scheduler from partials.

It knows nothing of pruning: the callback attaches to it as to anybody else's module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as functional
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from actprune.core.errors import ConfigError

Batch = tuple[Tensor, Tensor]  # (N, C, H, W) images, (N,) int64 class indices


class ClassificationTask(LightningModule):
    """Train and evaluate a classifier.

    Logs, once per epoch: ``train/loss``, ``train/accuracy``, ``val/loss``, ``val/accuracy``, ``test/loss`` and
    ``test/accuracy``; accuracies are shares in [0, 1] over all samples (and all processes).
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        num_classes: int,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        """Keep the network and the two partials; nothing goes into hyperparameters, so checkpoints stay plain.

        Args:
            net: maps (N, C, H, W) images to (N, num_classes) logits.
            optimizer: called with the parameters when training starts.
            num_classes: number of classes, at least 2.
            scheduler: called with the optimizer; stepped once per epoch. A plateau scheduler follows ``val/loss``.
            label_smoothing: share of the target spread over all classes while training, in [0, 1).

        Raises:
            ConfigError: ``num_classes`` or ``label_smoothing`` is out of range.
        """
        super().__init__()
        if num_classes < 2:
            raise ConfigError(f"num_classes={num_classes} must be at least 2; use the number of classes of the data")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing={label_smoothing} must lie in [0, 1); 0 switches it off")
        self.net = net
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._label_smoothing, self._num_classes = label_smoothing, num_classes
        accuracy = MetricCollection({"accuracy": MulticlassAccuracy(num_classes, average="micro")})
        self.train_metrics = accuracy.clone(prefix="train/")
        self.val_metrics = accuracy.clone(prefix="val/")
        self.test_metrics = accuracy.clone(prefix="test/")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) for images (N, C, H, W)."""
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the training loss of one batch."""
        loss, logits = self._compared(batch, self._label_smoothing)
        self._log_epoch("train", loss, self.train_metrics, logits, batch[1])
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate loss and accuracy of one validation batch."""
        self._evaluate("val", self.val_metrics, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate loss and accuracy of one test batch."""
        self._evaluate("test", self.test_metrics, batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the logits of one batch, of images alone or of images with targets."""
        return self.net(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and, if there is one, the scheduler.

        Raises:
            ConfigError: one of them refuses its settings.
        """
        optimizer = _built("optimizer", self._optimizer, self.parameters())
        if self._scheduler is None:
            return {"optimizer": optimizer}
        scheduler = _built("scheduler", self._scheduler, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch", "monitor": "val/loss"}}

    def _evaluate(self, stage: str, metrics: MetricCollection, batch: Batch) -> None:
        loss, logits = self._compared(batch, 0.0)
        self._log_epoch(stage, loss, metrics, logits, batch[1])

    def _compared(self, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch.

        Raises:
            ConfigError: network, task and data do not have the same number of classes.
        """
        images, targets = batch
        logits = self.net(images)
        cure = "give model, module and data the same num_classes"
        if logits.shape != (len(targets), self._num_classes):
            raise ConfigError(
                f"num_classes={self._num_classes} needs logits of shape {(len(targets), self._num_classes)}, the network gives "
                f"{tuple(logits.shape)}; {cure}"
            )
        try:
            return functional.cross_entropy(logits, targets, label_smoothing=label_smoothing), logits
        except IndexError as error:  # on a GPU the driver tells, later
            raise ConfigError(f"num_classes={self._num_classes} but the data have other classes ({error}); {cure}") from error

    def _log_epoch(
        self,
        stage: str,
        loss: Tensor,
        metrics: MetricCollection,
        logits: Tensor,  # (N, num_classes)
        targets: Tensor,  # (N,)
    ) -> None:
        metrics.update(logits, targets)
        n_samples = len(targets)
        epoch: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": n_samples}
        self.log(f"{stage}/loss", loss.detach(), sync_dist=True, prog_bar=stage == "train", **epoch)
        self.log_dict(metrics, prog_bar=stage == "val", **epoch)


def _built(what: str, make: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return make(argument)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{what}: {type(error).__name__}: {error}; check its settings") from error
