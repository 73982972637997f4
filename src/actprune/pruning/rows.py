"""Which rows of what a layer reads are which samples, wherever the layer has its samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from actprune.core.errors import ObservationError
from actprune.core.tensors import listed
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
        self._counted: Tensor | None = None
        self._ids: Tensor | None = None
        self.announced: Tensor | range
        self.numbers: Tensor | range
        self._steps_first = attention | {path for path, layer in recurrent.items() if not layer.batch_first}
        self.begin(torch.empty(0, dtype=torch.int64, device="cpu"))
        self._was_named = self._was_read = False

    def begin(self, sample_ids: Tensor | range, labels: Tensor | None = None) -> None:
        """Name the samples of the batch that comes next, (N,); those of id -1 are left out."""
        if isinstance(sample_ids, range) and sample_ids and min(sample_ids[0], sample_ids[-1]) < 0:
            sample_ids = listed(sample_ids)
        self.labels, self._counted, self._ids, self._was_named = labels, None, None, True
        # what waits is counted by them later, when the caller may have changed a tensor
        self.announced = self.numbers = sample_ids if isinstance(sample_ids, range) else sample_ids.clone()
        if isinstance(self.announced, Tensor) and len(sample_ids) and int(self.announced.min()) < 0:
            self._counted = (self.announced >= 0).nonzero().flatten()
            self.numbers = self.announced[self._counted]
            self.labels = None if labels is None else labels[self._counted]

    @property
    def ids(self) -> Tensor:
        """``numbers``, those of the samples that are counted, (n,); made when first asked for, the same tensor each time."""
        if self._ids is None:
            self._ids = listed(self.numbers)
        return self._ids

    def check(self) -> None:
        """Raise if batches were read of which none was named: all of them count as one, whose samples come again and again."""
        if self._was_read and not self._was_named:
            raise ObservationError(
                "the model ran on samples that nobody named; call observation.begin_batch(sample_ids) before every batch"
            )

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
        self._was_read = True
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
