"""SeReNe in Lightning: units decay by their insensitivity while training, and small ones leave while the loss allows it.

The maths is in ``actprune.sparsity.serene``. Two differences from the paper's procedure: the pruning stage comes at the steps
of a schedule, where the paper waits until the validation loss stagnates and goes back to the best network; and units are not
set to zero but taken out, so what the bisection tries is exactly the network that training goes on with, compensation included.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from actprune.compensation import Compensation
from actprune.core.budget import Budget
from actprune.core.errors import ConfigError
from actprune.criteria import ZeroUnits
from actprune.graph import Graph
from actprune.pruning import Observation, Selection
from actprune.schedule import Schedule
from actprune.sparsity.preactivations import MODES
from actprune.sparsity.serene import InsensitivityDecay, check_decay, largest_accepted, tolerated
from actprune.surgery import rehearsed
from actprune.training.callback import PruningCallback
from actprune.training.gradients import Loss, require_loss
from actprune.training.validating import validation_loss


class SeReNe(PruningCallback):
    """Sparsity by the sensitivity of the outputs to neurons (Tartaglione et al., arXiv:2102.03773).

    After every optimizer step w <- w - decay * w * max(0, 1 - S) for whole units. After each validation at which a step is due,
    the units leave whose root mean square is at most the largest threshold that costs no more than ``tolerance`` of the
    validation loss. Works with any optimizer, with accumulated gradients (the mean over the batches of a step), mixed precision
    and DDP (the mean over processes); frozen parameters stay.

    Cost: ``full`` one backward pass over the activations per output and training batch, ``lower_bound`` one per batch,
    ``local`` none; the pruning stage passes over the validation data 1 + ceil(log2(1 + units)) times at most.

    Args:
        budget: a limit: at least that share is left.
        decay: share of an insensitive unit's weights that goes in every step, whatever the learning rate; in [0, 1].
        sensitivity: ``"full"``, ``"lower_bound"`` or ``"local"``.
        tolerance: how much of the validation loss a pruning stage may cost, relative to what it was, at least 0.
        loss: module and batch -> mean loss of a batch; None: what ``training_step`` returns in evaluation mode.
        schedule: epochs after whose validation a pruning stage comes; its curve has no effect.
        selection: ``max_ratio`` and ``round_to`` hold.
        compensation: folds what removed units contributed into what stays.
        monitor: the validation metric to record beside the size.
        modules: dotted names of the submodules that are pruned; each must be called itself and return its outputs.
        copies: averaged copies that take the same cuts.
        max_metric_drop: as in ``PruningCallback``.
        mode: as in ``PruningCallback``: whether more of ``monitor`` is better.

    Raises:
        ConfigError: an argument is not what it should be.
    """

    def __init__(
        self,
        budget: Budget,
        decay: float = 1e-4,
        sensitivity: str = "full",
        tolerance: float = 0.0,
        loss: Loss | None = None,
        schedule: Schedule | None = None,
        *,
        selection: Selection | None = None,
        compensation: Compensation | Literal["mean"] | None = "mean",
        monitor: str | None = None,
        modules: Sequence[str] | None = None,
        copies: Mapping[str, str] | None = None,
        max_metric_drop: float | None = None,
        mode: str | None = None,
    ) -> None:
        super().__init__(
            ZeroUnits(),
            budget,
            schedule,
            selection,
            compensation,
            monitor,
            modules=modules,
            copies=copies,
            max_metric_drop=max_metric_drop,
            mode=mode,
            loss=loss,
        )
        check_decay(decay)
        if sensitivity not in MODES:
            raise ConfigError(f"sensitivity={sensitivity!r} is not known; choose one of {', '.join(MODES)}")
        if not tolerance >= 0:
            raise ConfigError(f"tolerance={tolerance!r} must be at least 0, a share of the validation loss")
        self.decay, self.sensitivity, self.tolerance = decay, sensitivity, tolerance
        self.stages: list[dict[str, float]] = []
        """One entry per pruning stage: epoch, threshold, loss before and with what leaves, networks tried, seconds."""
        self._decays: dict[str, tuple[Graph, InsensitivityDecay]] = {}
        self._watching = ExitStack()
        self._stepped = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As ``PruningCallback``.

        Raises:
            ConfigError: there is no loss to judge thresholds by, or what ``PruningCallback`` raises.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            require_loss(pl_module, self.loss, "SeReNe judges thresholds by the loss on validation data")
            self._decays = {}
            if trainer.current_epoch == 0:
                self.stages = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch what the networks are sensitive to in this batch."""
        if not self.decay:
            return
        self._stepped = trainer.global_step
        for path, pruner in self.pruners.items():
            known = self._decays.get(path)
            if known is None or known[0] is not pruner.graph:
                made = InsensitivityDecay(pruner.model, pruner.graph, self.decay, self.sensitivity)
                known = self._decays[path] = (pruner.graph, made)
            self._watching.enter_context(known[1].watching())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decay, if an optimizer stepped.

        Raises:
            ObservationError: training did not call a network that is to be pruned.
        """
        self._watching.close()
        if trainer.global_step != self._stepped:
            for _, decay in self._decays.values():
                decay.step(lambda total: _sum(trainer, total))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the threshold, if a step is due; then record and decide as ``PruningCallback`` does.

        Raises:
            ActPruneError: the loss cannot be had, or what ``PruningCallback`` raises.
        """
        if self._observer is not None and self.pruners and not trainer.sanity_checking:
            with torch.inference_mode(False):
                self._stage(trainer, pl_module, self._observer.observations)
        super().on_validation_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._watching.close()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind when training breaks off."""
        self._watching.close()
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """The callback's state and the pruning stages so far."""
        return {**super().state_dict(), "stages": self.stages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        super().load_state_dict(state_dict)
        self.stages = copy.deepcopy(state_dict["stages"])

    def _stage(self, trainer: Trainer, task: LightningModule, observations: Mapping[str, Observation]) -> None:
        began, tried = time.perf_counter(), {}
        scores = [s for path, p in self.pruners.items() for s in p.scores(observations[path]).values()]
        candidates: list[float] = torch.cat(scores).unique().tolist()
        before = validation_loss(trainer, task, self.loss)

        def accepts(threshold: float) -> bool:
            tried[threshold] = self._loss_below(trainer, task, observations, threshold)
            return tolerated(tried[threshold], before, self.tolerance)

        found = largest_accepted(candidates, accepts)
        threshold = 0.0 if found is None else found
        self._use(threshold)
        self.stages.append(
            {
                "epoch": trainer.current_epoch,
                "threshold": threshold,
                "loss_before": before,
                "loss_after": tried.get(threshold, before),
                "tried": len(tried),
                "seconds": round(time.perf_counter() - began, 4),
            }
        )

    def _loss_below(
        self, trainer: Trainer, task: LightningModule, observations: Mapping[str, Observation], threshold: float
    ) -> float:
        """Validation loss of what is left without the units below a threshold."""
        self._use(threshold)
        with ExitStack() as cuts:
            for path, pruner in self.pruners.items():
                plan = pruner.plan(observations[path])
                if plan is not None:
                    cuts.enter_context(rehearsed(pruner.model, plan))
            return validation_loss(trainer, task, self.loss)

    def _use(self, threshold: float) -> None:
        for pruner in self.pruners.values():
            pruner.criterion = ZeroUnits(threshold)


def _sum(trainer: Trainer, total: Tensor) -> Tensor:
    return trainer.strategy.reduce(total, reduce_op="sum")  # type: ignore[return-value]
