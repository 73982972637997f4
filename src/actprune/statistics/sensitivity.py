"""How much the network's outputs move with what a unit says.

Formula: with y_1 .. y_C a sample's outputs, S(u) = (1/(n C)) sum_{i,p} sum_k |dy_ik/da_iup| over samples i and positions p
(``full``), or the lower bound (1/(n C)) sum_{i,p} |sum_k dy_ik/da_iup| (``lower_bound``).
Source: SeReNe, arXiv:2102.03773: the mean over the batch and over the positions of a map. There p is the pre-activation.
Not taken over from its published code: division by the batch size twice, a lower bound read from the first channel alone, and
gradients taken after the step that changed the weights.

Cost: ``full`` one backward pass per output, ``lower_bound`` one in all, beside a forward pass. Memory: U float64, and one
tensor of the activations' size while a batch lasts. Mergeable: yes, by sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from actprune.core.errors import ConfigError, ObservationError
from actprune.statistics.base import Accumulator

MODES = ("full", "lower_bound")
MOST_OUTPUTS = 32768

Gradients = Callable[[Tensor, bool], Sequence[Tensor | None]]
"""A scalar, and whether the graph is needed again -> its gradient at every place that is asked about; None for zero."""


def check_mode(mode: str) -> None:
    """Raise ConfigError unless ``mode`` is one of ``MODES``."""
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is not known; choose one of {', '.join(MODES)}")


def output_sensitivity(
    outputs: Tensor,  # (N, ...) the network's outputs, with their graph
    at: Sequence[Tensor],  # tensors of that graph
    mode: str = "full",
    retain_graph: bool = False,
) -> list[Tensor]:
    """Sensitivity of the outputs of a batch to every entry of some tensors of the graph; no parameter's ``.grad`` is touched.

    Args:
        outputs: all but the first dimension count as outputs of one sample, C in all. Samples must not influence each other.
        at: activations or pre-activations.
        mode: ``"full"``: (1/C) sum_k |dy_k/da|; ``"lower_bound"``: |sum_k dy_k/da| / C.
        retain_graph: keep the graph for another backward pass.

    Returns:
        For every tensor one of its shape and float32, without a graph; average it over samples and positions for S.

    Raises:
        ConfigError: the mode is not known.
        ObservationError: the outputs have no graph, or are too many for ``"full"``.
    """

    def gradients(y: Tensor, again: bool) -> Sequence[Tensor | None]:
        return torch.autograd.grad(y, list(at), retain_graph=again or retain_graph, allow_unused=True)

    found = mean_gradients(outputs, gradients, mode)
    return [torch.zeros_like(a, dtype=torch.float32) if g is None else g for a, g in zip(at, found, strict=True)]


def mean_gradients(outputs: Tensor, gradients: Gradients, mode: str) -> list[Tensor | None]:
    """The same, wherever ``gradients`` looks."""
    check_mode(mode)
    if not outputs.requires_grad:
        raise ObservationError("the network's outputs do not depend on any activation: they come without a gradient")
    columns = outputs.flatten(1) if outputs.dim() > 1 else outputs.unsqueeze(1)
    n = columns.shape[1]
    if mode == "lower_bound":
        return [None if g is None else g.float().abs() / n for g in gradients(columns.sum(), False)]
    if n > MOST_OUTPUTS:
        raise ObservationError(
            f"mode='full' takes one backward pass for each of {n} outputs, at most {MOST_OUTPUTS}; set mode='lower_bound'"
        )
    total: list[Tensor | None] = []
    for k in range(n):
        found = [None if g is None else g.float().abs() for g in gradients(columns[:, k].sum(), k < n - 1)]
        total = [_added(a, b) for a, b in zip(total or [None] * len(found), found, strict=True)]
    return [None if t is None else t / n for t in total]


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more)


class Sensitivity(Accumulator):
    """Mean over samples and positions of what a batch's outputs are sensitive to.

    Args:
        n_units: units of the group at this site (U).
        mode: ``"full"`` or ``"lower_bound"``.

    Raises:
        ConfigError: the mode is not known.
    """

    whole_maps = True
    n_values: Tensor  # ()
    total: Tensor  # (U,)

    def __init__(self, n_units: int, mode: str = "full") -> None:
        super().__init__(n_units)
        check_mode(mode)
        self.mode = mode
        self.differentiates = "outputs" if mode == "full" else "output_sum"
        self.add_state("n_values", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(n_units, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def accumulate(self, x: Tensor, sample_ids: Tensor) -> Tensor:
        """Add a batch of sensitivities."""
        self.n_values += len(x) * x.shape[2]
        total = x.abs().sum(2).sum(0, dtype=torch.float64)
        self.total += total
        return total

    def evaluate(self) -> Tensor:
        """Mean, float64 (U,)."""
        return self.total / self.n_values
