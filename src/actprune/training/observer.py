"""Observe the networks of a LightningModule over one validation epoch, and number the samples they see.

The number of a sample is its place in the data set as the sampler deals it out, the same whatever the number of processes:
process r of R has samples r, r + R, r + 2 R, ... of every loader. A ``DistributedSampler`` repeats the first ones until every
process has as many: those are not counted again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from actprune.core.hooks import around
from actprune.core.tensors import listed
from actprune.pruning import Observation, Pruner
from actprune.training.example import Call, Network, n_samples
from actprune.training.gradients import Gradients, Loss


class Observer:
    """The observations of one validation epoch; its hooks are on between ``start`` and ``stop``.

    Args:
        trainer: says which process this is, of how many.
        networks: path -> network.
        pruners: path -> its pruner.
        loss: what criteria of the loss differentiate; None: what ``training_step`` returns.
    """

    def __init__(
        self, trainer: Trainer, networks: Mapping[str, Network], pruners: Mapping[str, Pruner], loss: Loss | None = None
    ) -> None:
        self._trainer, self._loss = trainer, loss
        self._rank, self._ranks = trainer.global_rank, trainer.world_size
        self._networks, self._pruners = networks, pruners
        self._hooks = ExitStack()
        self._began = time.perf_counter()
        self._batch_size: dict[tuple[str, int], int] = {}
        self._dealt_out: dict[int, float] = {}
        self._position = (0, 0)
        self._batch: Any = None
        self._listens, self._in_step = True, False
        self._seen: set[str] = set()
        self._gradients: dict[str, Gradients] = {}
        self.seconds = 0.0
        """Wall time of the validation epoch that was observed, in seconds."""
        self.observations: dict[str, Observation] = {}
        """Path -> what was observed."""

    def start(self) -> None:
        """Attach the hooks."""
        expected = self._expected()
        for path, network in self._networks.items():
            self._hooks.enter_context(network.calls(partial(self._called, path)))
            observation = self._hooks.enter_context(self._pruners[path].observe(expected))
            self._hooks.enter_context(observation.paused())
            self.observations[path] = observation
            self._gradients[path] = Gradients(self._trainer, network, observation, self._loss)
        # other callbacks may run the networks as well, on whatever they like
        self._hooks.enter_context(around(self._trainer.lightning_module, "validation_step", self._step))

    def batch(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """A batch comes."""
        self._position, self._batch = (batch_idx, dataloader_idx), batch
        self._seen.clear()

    @contextmanager
    def _step(self) -> Iterator[None]:
        """What runs inside is observed; networks whose calls are not seen take the batch's samples as theirs."""
        if not self._listens:
            yield
            return
        with ExitStack() as stack:
            for path, network in self._networks.items():
                stack.enter_context(self.observations[path].resumed())
                if network.replays:
                    self._number(path, n_samples(self._batch))
            before, self._in_step = self._in_step, True
            try:
                yield
            finally:
                self._in_step = before

    def done(self) -> None:
        """The batch was validated: run it once more where gradients are asked for, for the networks that it reached."""
        if not any(observation.differentiates for observation in self.observations.values()):
            return
        self._listens = False
        try:
            for path in sorted(self._seen):
                self._gradients[path].run(self._batch, *self._position)
        finally:
            self._listens = True

    def stop(self) -> None:
        """Remove the hooks; harmless when there are none."""
        self._hooks.close()
        self.seconds = time.perf_counter() - self._began

    def reduce(self) -> None:
        """Merge what all processes saw."""
        for observation in self.observations.values():
            observation.reduce()

    def _called(self, path: str, *call: Any) -> None:
        if not self._in_step:
            return
        arguments: Call = (call[0], call[1])
        self._gradients[path].called(arguments)
        self._number(path, n_samples(arguments))

    def _number(self, path: str, n: int) -> None:
        batch_idx, dataloader_idx = self._position
        size = self._batch_size.setdefault((path, dataloader_idx), n)
        first = batch_idx * size * self._ranks + self._rank
        start = first + (dataloader_idx << 40)
        ids: Tensor | range = range(start, start + n * self._ranks, self._ranks)
        distinct = self._dealt_out.get(dataloader_idx)
        if distinct is None:
            distinct = self._dealt_out[dataloader_idx] = self._distinct(dataloader_idx)
        if first + n * self._ranks > distinct and n == n_samples(self._batch):  # the last of them are repeated
            ids = listed(ids)
            ids[max(0, -(-(int(distinct) - first) // self._ranks)) :] = -1
        self.observations[path].begin_batch(ids, self._gradients[path].labels(self._batch, n))
        self._seen.add(path)

    def _expected(self) -> int | None:
        """About how many samples all processes will validate; None: a loader does not say."""
        loop = self._trainer.fit_loop.epoch_loop.val_loop
        loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
        total = 0.0
        for number, (loader, batches) in enumerate(zip(loaders, loop.max_batches, strict=False)):
            size = getattr(loader, "batch_size", None)
            if not isinstance(size, int):
                return None
            whole = self._distinct(number)
            if whole == math.inf and isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
                whole = len(loader.sampler) * self._ranks  # type: ignore[arg-type]
            total += min(batches * size * self._ranks, whole)
        return int(total) if 0 < total < math.inf else None

    def _distinct(self, dataloader_idx: int) -> float:
        """How many samples a loader deals out to all processes before it repeats any."""
        loaders = self._trainer.fit_loop.epoch_loop.val_loop._combined_loader
        sampler = None if loaders is None else getattr(loaders.flattened[dataloader_idx], "sampler", None)
        return len(sampler.dataset) if isinstance(sampler, DistributedSampler) else math.inf  # type: ignore[arg-type]
