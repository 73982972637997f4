"""Mean rank of a unit's feature maps.

Formula: R(u) = (1/N) sum_i rank(A_iu), with A_iu the H x W map of unit u on sample i and singular values below
max(H, W) eps sigma_max counted as zero (``torch.linalg.matrix_rank``).
Source: HRank, Lin et al., CVPR 2020, arXiv:2002.10179. Deviation: all samples that are observed count, not 500.

Cost: one singular value decomposition per map, by far the most expensive statistic here. Memory: U float64.
Mergeable: yes, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.statistics.base import Accumulator


class MapRank(Accumulator):
    """Streaming mean of matrix ranks per unit; a unit without positions (P = 1) has rank 1 or 0.

    Args:
        n_units: units of the group at this site (U).
        shape: (H, W) of the maps; None: square.

    Raises:
        ConfigError: ``shape`` is no two whole numbers above 0; a map does not have H x W positions, or is not square when
            ``shape`` is None.
    """

    whole_maps = True
    ranks: Tensor  # (U,)

    def __init__(self, n_units: int, shape: Sequence[int] | None = None) -> None:
        super().__init__(n_units)
        if not (shape is None or _is_shape(shape)):
            raise ConfigError(
                f"shape={shape!r} must be (height, width), two whole numbers above 0, or null (None): square maps"
            )
        self.shape = None if shape is None else tuple(shape)
        self.add_state("ranks", torch.zeros(n_units, dtype=torch.float64), dist_reduce_fx="sum")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Add the ranks of a batch's maps."""
        side = math.isqrt(x.shape[2])
        shape = self.shape or (side, side)
        if math.prod(shape) != x.shape[2]:
            raise ConfigError(
                f"maps of {x.shape[2]} positions are not {shape[0]} x {shape[1]}; give the map's (height, width) as shape"
            )
        maps = x.unflatten(2, shape).nan_to_num(0.0, 0.0, 0.0)  # decompositions refuse NaN; the witness reports it
        self.ranks += torch.linalg.matrix_rank(maps).sum(0)
        return x.sum(2).sum(0, dtype=torch.float64)

    def evaluate(self) -> Tensor:
        """Mean rank, float64 (U,)."""
        return self.ranks / self.n_samples


def _is_shape(shape: object) -> bool:
    return (
        isinstance(shape, Sequence)
        and len(shape) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape)
    )
