"""Ridge regression from a covariance matrix, in float64, by Cholesky with a ladder of jitter."""

from __future__ import annotations

import torch
from torch import Tensor

from actprune.core.errors import ObservationError

LADDER = 12
"""How many times the ridge may grow tenfold before a matrix counts as hopeless."""


def ridge_solve(
    covariance: Tensor,  # (d, d) symmetric
    right: Tensor,  # (d, m)
    ridge: float,
) -> Tensor:
    """Solve (G + lambda I) X = right with lambda = ridge * mean diagonal, larger only where G asks for it.

    Returns:
        Float64 (d, m); zeros where G is zero throughout, for then nothing can be explained.

    Raises:
        ObservationError: the matrix is not finite.
    """
    covariance, right = covariance.double(), right.double()
    scale = covariance.diagonal().mean()
    if not torch.isfinite(covariance).all():
        raise ObservationError("the second moments are not finite; lower the precision's range, and check the input data")
    if scale <= 0:
        return torch.zeros_like(right)
    for rung in range(LADDER):
        # the first rung is the ridge itself, the next start where float64 begins to matter
        jitter = ridge if rung == 0 else max(ridge, 1e-12) * 10.0**rung
        shifted = covariance.clone()
        shifted.diagonal().add_(jitter * scale)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            solution = torch.cholesky_solve(right, factor)
            if torch.isfinite(solution).all():
                return solution
    raise ObservationError(f"no ridge up to {jitter:.0e} of the mean variance makes the second moments solvable")
