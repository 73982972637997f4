"""Which rows of what a layer reads are which samples, wherever the layer has its samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from actprune.graph import is_recurrent
from actprune.pruning.sampling import Sampling


class Rows:
    """The samples of one batch after another.

    Args:
        model: whose layers read.
        sampling: numbers rows that are no samples.
    """

    def __init__(self, model: nn.Module, sampling: Sampling) -> None:
        self._sampling = sampling
        recurrent = {path: layer for path, layer in model.named_modules() if is_recurrent(layer)}
        attention = {path for path, layer in model.named_modules() if type(layer) is nn.MultiheadAttention}
        self._recurrent = set(recurrent)
        self._steps_first = attention | {path for path, layer in recurrent.items() if not layer.batch_first}
        self.begin(torch.empty(0, dtype=torch.int64, device="cpu"))

    def begin(self, sample_ids: Tensor, labels: Tensor | None = None) -> None:
        """Name the samples of the batch that comes next, (N,); those of id -1 are left out."""
        self.announced = self.ids = sample_ids.clone()  # what waits is counted by them later
        self.labels, self._counted = labels, None
        if len(sample_ids) and int(sample_ids.min()) < 0:  # one call, which every batch pays
            self._counted = (sample_ids >= 0).nonzero().flatten()
            self.ids = sample_ids[self._counted]
            self.labels = None if labels is None else labels[self._counted]

    @property
    def leaves_out(self) -> bool:
        """Whether some rows of the batch are not counted."""
        return self._counted is not None

    def are_usual(self, x: Tensor, dim: int, module: str) -> bool:
        """Whether x has one row per sample of the batch, and its channels next."""
        return x.dim() > 1 and dim % x.dim() == 1 and len(x) == len(self.announced) > 0 and module not in self._recurrent

    def samples(self, x: Tensor, dim: int, module: str) -> tuple[Tensor, Tensor]:
        """(N, C, *positions), of complex numbers the magnitudes, and the ids of the N rows.

        Where no dimension counts samples the rows are numbered anew.
        """
        x = x.abs() if x.is_complex() else x
        if self.are_usual(x, dim, module) and self._counted is None:
            return x.detach() if x.requires_grad else x, self.ids  # as nearly always
        x = x.detach().movedim(dim, -1)
        if x.dim() == 1:
            x = x.unsqueeze(0)
        if x.dim() == 3 and module in self._steps_first:
            x = x.movedim(1, 0)
        rows = x.shape[:-1]
        n = 0 if x.dim() == 2 and module in self._recurrent else len(self.announced)  # packed: steps of several sequences
        if n and rows[0] != n and rows[0] % n == 0:
            # several rows per sample: windows or frames, the sample first, unless the layer puts steps first
            first = module not in self._steps_first
            x = x.unflatten(0, (n, -1)).movedim(1, -2) if first else x.unflatten(0, (-1, n)).movedim(0, -2)
            x = x.movedim(-2, -1).movedim(-2, 1)
        elif n and rows[0] != n and n in rows:
            x = x.movedim(rows.index(n), 0).movedim(-1, 1)
        else:
            x = x.movedim(-1, 1)
            if rows[0] != n:
                return x, self._sampling.numbered(int(self.announced[0]) if len(self.announced) else 0, rows[0])
        if self._counted is not None:
            return x[self._counted.to(x.device, non_blocking=True)], self.ids
        return x, self.ids
