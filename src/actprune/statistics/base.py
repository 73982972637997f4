"""What every statistic of this room shares: checks of input, precision, the watch for NaN and Inf, an honest ``compute``.

Subclasses write ``accumulate`` (one batch into the sums) and ``evaluate`` (sums to values). Nothing here reads a
number back from the device during ``update``: a NaN is counted there and reported by ``compute``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actprune.core.errors import ConfigError, ObservationError
from actprune.core.tensors import sent
from actprune.core.views import Statistic

if TYPE_CHECKING:
    from typing_extensions import Self

POOLS = ("positions", "gap")
LARGEST = 2.0**64
"""Finite float32 numbers from here on, 1.8e19, have squares, and may have sums over a map, that are infinite."""


class Accumulator(Statistic):
    """A statistic whose sums are kept by ``accumulate`` and turned into values by ``evaluate``.

    Activations are read as float32 (half precision is widened, float64 narrowed). States follow the activations to
    their device. Updates may run under inference mode or autocast; both are switched off for the arithmetic.

    Args:
        n_units: units of the group at this site (U).

    Raises:
        ConfigError: ``n_units`` is below 1.
    """

    joinable: bool = False
    """Whether statistics of several sites can be updated as one, see ``joined``: every state has one entry per unit, or one per
    site; updates work in place."""
    batch: int | None = None
    """Number of the batch that updates belong to; None: each is a batch."""
    _is_bare: bool = False
    """Whether the states are those of others as well, see ``another``."""
    first_nonfinite: Tensor
    """(U,) number of the first batch, from 0, in which this process saw what ``nonfinite`` counts; inf for none."""

    def __init__(self, n_units: int) -> None:
        if n_units < 1:
            raise ConfigError(f"a statistic needs n_units >= 1, got {n_units}")
        with torch.device("cpu"):  # where a metric believes to be is PyTorch's default device
            super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.n_units = n_units
        self.add_state("n_samples", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("nonfinite", torch.zeros(n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("first_nonfinite", torch.full((n_units,), torch.inf, dtype=torch.float64, device="cpu"))

    def add_state(
        self,
        name: str,
        default: Tensor | list,
        dist_reduce_fx: str | Callable | None = None,
        persistent: bool = False,
    ) -> None:
        """Add a state that can be changed in place in any mode, wherever the statistic was built.

        Built inside inference mode (a validation loop), a state would otherwise refuse changes outside of it.
        """
        with torch.inference_mode(False):
            normal = default.clone() if isinstance(default, Tensor) else default
            super().add_state(name, normal, dist_reduce_fx, persistent)

    def constant(self, name: str) -> float | None:
        """What a state is full of at the beginning; None where its elements differ."""
        state: Tensor = self._defaults[name] if self.update_called else getattr(self, name)  # type: ignore[assignment]
        least, greatest = state.aminmax() if state.numel() else (state.new_zeros(()),) * 2
        return least.item() if least == greatest else None

    def reset(self) -> None:
        """Forget everything that was seen."""
        with torch.inference_mode(False):
            super().reset()

    def joined(self, sizes: Sequence[int]) -> None:
        """Called once the states are those of several sites; ``sizes``: units of each (default: nothing to do)."""

    def update(
        self,
        x: Tensor,  # (N, U, P), or (N, U, M, *extents) where ``takes_maps``
        sample_ids: Tensor,  # (N,) int64
        labels: Tensor | None = None,  # (N,) integers
        sizes: Sequence[int] | None = None,
        batches: Sequence[int] | None = None,
    ) -> None:
        """Accumulate one batch, or several in a row: ``sizes`` says how many samples each has, ``batches`` their numbers.

        By default one batch, numbered by ``batch`` or else by the updates so far.

        Raises:
            ObservationError: the shapes are not those above with this statistic's U, and (N,); or labels are missing.
        """
        fits = x.ndim == 3 or (self.takes_maps and x.ndim > 3)
        if not fits or x.shape[1] != self.n_units or sample_ids.shape != x.shape[:1]:
            of_unit = "M, *extents" if self.takes_maps else "P"
            raise ObservationError(
                f"{type(self).__name__} takes activations (N, {self.n_units}, {of_unit}) and N sample ids, "
                f"got {tuple(x.shape)} and {tuple(sample_ids.shape)}"
            )
        if self.needs_labels:
            if labels is None or labels.shape != x.shape[:1]:
                given = "none" if labels is None else tuple(labels.shape)
                raise ObservationError(
                    f"{type(self).__name__} takes the class of each of {len(x)} samples, got {given}; give labels too"
                )
            sample_ids = labels
        if x.numel() == 0:
            return
        with torch.inference_mode(False), torch.no_grad(), _full_precision(x.device.type):
            if self.device != x.device:
                self.to(x.device)
            self.own_states()
            self.n_samples.add_(len(x))
            witness = self.accumulate(x.float(), sample_ids.to(x.device, non_blocking=True))
            if witness.device.type == "cpu" and math.isfinite(witness.sum()):
                return  # free to ask on a CPU; a device would wait for the answer
            number = self.update_count - 1 if self.batch is None else self.batch
            self._report(~torch.isfinite(witness), x.float(), sizes or [len(x)], batches or [number])

    def _report(self, bad: Tensor, x: Tensor, sizes: Sequence[int], batches: Sequence[int]) -> None:
        """Note which units (U,) had a NaN or Inf, or sums that are, and in which batch the first one was."""
        self.nonfinite.add_(bad)
        if len(sizes) == 1:
            when = torch.full_like(self.first_nonfinite, float(batches[0])).masked_fill_(~bad, torch.inf)
        else:  # all at once: a device would take longer for each batch than for its numbers
            counts = torch.tensor(sizes, device="cpu")
            numbers = torch.tensor(batches, dtype=torch.float32, device="cpu").repeat_interleave(counts)
            fine, rows = (x.abs().amax(2) < LARGEST) | ~bad, sent(numbers, x.device)
            when = rows.unsqueeze(1).expand_as(fine).masked_fill(fine, torch.inf).amin(0).to(self.first_nonfinite.dtype)
            when.masked_fill_(bad & when.isinf(), float(batches[0]))  # smaller ones whose squares overflow in sum: any of them
        torch.minimum(self.first_nonfinite, when, out=self.first_nonfinite)

    def another(self) -> Self:
        """A statistic with the same settings and as many units that has seen nothing; cheaper than making one.

        Its states are this one's first ones until it sees something, which many that are joined never do by themselves.
        """
        first = self._defaults if self.update_called else {name: getattr(self, name) for name in self._defaults}
        self._is_bare |= not self.update_called
        made = type(self).__new__(type(self))
        own = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(self).items()}
        vars(made).update(own | first, _is_bare=True, _update_count=0)
        bound = {name: MethodType(getattr(type(made), name), made) for name in ("update", "compute")}
        vars(made).update(update=made._wrap_update(bound["update"]), compute=made._wrap_compute(bound["compute"]))
        return made

    def own_states(self) -> None:
        """Get states of its own, which may be changed in place."""
        if self._is_bare:
            with torch.inference_mode(False):
                for name in self._defaults:
                    vars(self)[name] = getattr(self, name).clone()
            self._is_bare = False

    def compute(self) -> Tensor:
        """The statistic's values in float64, first dimension U.

        Raises:
            ObservationError: no sample was seen, or a NaN or Inf was, or sums or squares of float32 numbers overflowed.
        """
        self.check()
        return self.evaluate()

    def check(self) -> None:
        """Raise unless there are samples, and all activations and their sums were finite."""
        if self.n_samples == 0:
            raise ObservationError(
                f"{type(self).__name__} saw 0 samples, needs at least 1; observe validation batches before scoring"
            )
        bad = int((self.nonfinite > 0).sum())
        if bad:
            first = self.first_nonfinite.min()
            where = "another rank" if first.isinf() else f"batch {int(first)}"
            raise ObservationError(
                f"{bad} of {self.n_units} units had NaN or Inf activations, or such above {LARGEST:.1e} whose squares or sums "
                f"over a map exceed float32 (3.4e38), first in {where}; lower the learning rate, use a precision of wider "
                "range, and check the input data and their scale"
            )

    @abstractmethod
    def accumulate(
        self,
        x: Tensor,  # (N, U, P) float32, or (N, U, M, *extents) where ``takes_maps``
        sample_ids: Tensor,  # (N,) int64; where ``needs_labels``, the labels instead
    ) -> Tensor:
        """Add one batch to the sums, in place.

        Returns:
            Tensor (U,), finite where and only where the unit's activations in this batch, and sums of them in float32, are.
        """

    @abstractmethod
    def evaluate(self) -> Tensor:
        """Turn the sums into values; first dimension U."""

    def _wrap_compute(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Leave ``compute`` alone: torchmetrics would squeeze a single unit to a scalar and warn after a merge."""
        return compute


def _full_precision(device_type: str) -> AbstractContextManager:
    """Switch autocast off, where the kind of device has it and it is on."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def check_pool(pool: str) -> None:
    """Raise ConfigError unless ``pool`` is one of ``POOLS``."""
    if pool not in POOLS:
        raise ConfigError(f"pool={pool!r} is not known; choose one of {', '.join(POOLS)}")
