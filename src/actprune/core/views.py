"""What a criterion sees of a group, and the contracts of statistics and criteria."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from torchmetrics import Metric


class Statistic(Metric):
    """A streaming accumulator over the activations of one site, one value or row per unit.

    Subclasses keep raw sums (``add_state`` with ``dist_reduce_fx="sum"``), so that shards merge by one reduction, and
    apply every non-linear function in ``compute``. A state that is no sum (a range, a reference) is brought in line by
    ``scale`` and ``aligned`` before the sums are added.
    """

    full_state_update = True
    """For ``forward``; and no ``merge_state``: torchmetrics would add states of different scales, see ``aligned``."""

    whole_maps: bool = False
    """True: needs every position of a map, in row-major order; a sample of positions will not do."""
    takes_maps: bool = False
    """True: x is (N, U, M, *extents), whole maps in their own extents (H, W): M of each unit, one per channel that it has there
    and per row of a sample (a window, a frame). Where a linear layer reads numbers there are no extents."""
    means_do: bool = False
    """True: of every map only the mean counts; it may be given in the map's place, as one position."""
    needs_labels: bool = False
    """True: ``update`` takes the class of every sample as well."""
    differentiates: str | None = None
    """What ``update`` is given as x. None: activations a. ``"loss"``: what each adds to its sample's loss to first order,
    a dL/da. ``"outputs"``: the mean over the network's C outputs of |dy_k/da|. ``"output_sum"``: |sum_k dy_k/da| / C."""
    n_units: int
    """Units of the group at this site (U)."""
    n_samples: Tensor
    """() samples seen."""
    nonfinite: Tensor
    """(U,) batches in which a NaN or Inf was seen, or sums of finite float32 numbers overflowed, per unit."""

    def update(
        self,
        x: Tensor,  # (N, U, P) activations: samples, units, positions of the unit in one sample
        sample_ids: Tensor,  # (N,) int64, the same for the same sample whatever the batch or the rank
        labels: Tensor | None = None,  # (N,) integers from 0, the samples' classes
    ) -> None:
        """Accumulate one batch."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ObservationError where there is nothing to compute from: no sample, or some that are not finite (default: no).

        Called before a criterion asks for values, so that the message can name the place.
        """

    def aligned(self, shared: Mapping[str, Tensor]) -> None:
        """Bring the state to a scale that is common to all shards, before they are summed (default: nothing to do).

        ``shared`` holds, element by element, the maximum over shards of every tensor that ``scale`` returned.
        """

    def scale(self) -> dict[str, Tensor]:
        """Float64 tensors whose maximum over shards ``aligned`` needs, -inf where nothing was seen (default: none)."""
        return {}


@dataclass(frozen=True)
class Reader:
    """One layer that reads a group, and how what it reads varies."""

    weight: Tensor
    """(outputs, d) float64, outputs in the units in which the network goes on with them."""
    covariance: Tensor
    """(d, d) float64 of what the layer reads together."""
    columns: Tensor
    """(U, k) int64: the d positions that belong to each unit."""
    size: float
    """Variance of what the outputs become, summed: what an error is compared with."""


@dataclass(frozen=True)
class GroupView:
    """One group as a criterion sees it."""

    name: str
    """The group's name, e.g. ``layer1.0.conv1``."""
    size: int
    """Number of units U."""
    statistics: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """The criterion's statistics by key: one ``Statistic`` per site of the group, in execution order."""
    slices: Callable[[], list[Tensor]] = list
    """Everything that leaves with a unit: one tensor of shape (U, n_elements) per parameter dimension concerned."""
    seed: int = 0
    """Seed of this run and step, for criteria that draw."""
    readers: Callable[[], list[Reader]] = list
    """The layers that read the group, where compensation observed their second moments; for criteria with ``needs_readers``."""
    frees: Callable[[], float] = lambda: 1.0
    """Computes ``cost``, which few criteria ask for."""
    columns: Callable[[], list[Tensor | None]] = list
    """The weights that read each unit, (U, n_elements) for every site in order; None where no layer's own weight reads it."""
    norms: Callable[[], list[Tensor]] = list
    """The scales gamma of the batch norms that the units go through, one (U, k) per norm."""
    own: Callable[[], list[Tensor]] = list
    """The elements that belong to each unit and to no other, (U, n_elements) per parameter: with all of them 0 it is off."""

    @cached_property
    def cost(self) -> float:
        """Share of the budgeted quantity (MACs, parameters or units) that one unit frees in the model as it is."""
        return self.frees()


class Criterion(ABC):
    """Scores the units of a group: one number per unit, higher = keep."""

    comparable: bool = False
    """True: scores of different groups mean the same as they are, and are not normalised unless one asks for it."""
    needs_readers: bool = False
    """True: ``score`` asks for ``view.readers``, so compensation has to observe how what layers read varies."""
    unscored: str = "nothing to score it by"
    """Why a group may have no score, and what to do about it."""
    threshold: float | None = None
    """None: as many units leave as the budget asks for. A number: at every step all units that score at most that leave, and no
    others; the budget is what is left at least."""

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """The statistics to accumulate at every site: key -> constructor taking the number of units (default: none)."""
        return {}

    def may_score(self, view: GroupView) -> bool:
        """Whether a group may have a score, as far as its weights tell before anything is observed (default: yes).

        Where no group may have one, or those that may are too few for the budget, that is told before training.
        """
        return True

    @abstractmethod
    def score(self, view: GroupView) -> Tensor | None:
        """Score every unit of a group.

        Returns:
            float64 tensor of shape (U,), finite; higher = keep. None where the criterion has nothing to go by: the group stays
            whole.
        """
