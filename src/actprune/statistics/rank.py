"""Mean rank of a unit's feature maps.

Formula: R(u) = mean over samples i and maps m of rank(A_ium), with A_ium the H x W map of one channel of unit u on sample i and
singular values below max(H, W) eps sigma_max counted as zero (``torch.linalg.matrix_rank``). Of more dimensions the last two
are the matrix, and every other position is a map of its own: a video's frames. A map of one dimension (tokens) is a vector, and
what has none (a linear layer) a number: rank 1 where anything in it is not zero, else 0.
Source: HRank, Lin et al., CVPR 2020, arXiv:2002.10179. Deviations: all samples that are observed count, not 500; maps are what
the next layer reads; the paper has one channel per unit and two dimensions.

Cost: one singular value decomposition per map, by far the most expensive statistic here; none for vectors and numbers.
Memory: U float64. Mergeable: yes, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actprune.statistics.base import Accumulator


class MapRank(Accumulator):
    """Streaming mean of the ranks of a unit's maps, which come with their extents, see ``takes_maps``.

    Args:
        n_units: units of the group at this site (U).
    """

    takes_maps = True
    n_maps: Tensor  # ()
    ranks: Tensor  # (U,)

    def __init__(self, n_units: int) -> None:
        super().__init__(n_units)
        self.add_state("n_maps", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("ranks", torch.zeros(n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Add the ranks of a batch's maps, (N, U, M, *extents)."""
        if x.ndim < 5:
            ranks = (x != 0).any(3) if x.ndim == 4 else x != 0
        else:
            ranks = torch.linalg.matrix_rank(x.nan_to_num(0.0, 0.0, 0.0))  # decompositions refuse NaN; the witness reports it
        ranks = ranks.flatten(2)
        self.n_maps += len(ranks) * ranks.shape[2]
        self.ranks += ranks.sum((0, 2))
        return x.flatten(2).sum(2).sum(0, dtype=torch.float64)

    def evaluate(self) -> Tensor:
        """Mean rank, float64 (U,)."""
        return self.ranks / self.n_maps
