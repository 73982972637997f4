"""Largest singular value of a linear map that is given by its action alone.

Power iteration on A^T A, sped up: each cycle runs ``_STEPS`` Lanczos steps (fully reorthogonalised) from the best vector so
far and goes on from their top Ritz vector, which is never worse than as many power steps. The adjoint comes from autograd, so
that strides, dilation, groups and any padding are right by construction (for a convolution it is the transposed convolution).

Lanczos, J. Res. Nat. Bur. Standards 45 (1950); Golub and Van Loan, Matrix Computations, ch. 10.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_STEPS = 32
_CYCLES = 60


def largest_singular_value(
    forward: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    *,
    like: Tensor,
    start: Tensor | None = None,
    tolerance: float = 1e-5,
) -> tuple[float, Tensor]:
    """The spectral norm of ``forward`` and the unit vector that attains it.

    Args:
        forward: a linear map of tensors of ``shape``.
        shape: of its argument.
        like: gives dtype and device of the arithmetic.
        start: first vector, of ``shape``, e.g. that of an earlier call; None: drawn, the same at every call.
        tolerance: the top Ritz pair of A^T A has a residual of at most this share of its value. The value is approached
            from below, and its relative error is at most half of that where the vector found is near the top one.

    Returns:
        sigma, and v of ``shape`` with ||v|| = 1 and ||forward(v)|| = sigma.
    """
    v = _drawn(shape, like) if start is None else start.to(like).reshape(-1)
    if not bool(v.norm() > 0):
        v = _drawn(shape, like)
    v = v / v.norm()

    def normal(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().reshape(*shape).requires_grad_()
            y = forward(x)
        (image,) = torch.autograd.grad(y, x, y.detach())
        return image.detach().reshape(-1)

    for _ in range(_CYCLES):
        value, v, residual = _cycle(normal, v)
        if residual <= tolerance * value or value == 0:
            break
    else:
        warnings.warn(
            f"the largest singular value is {value**0.5:.6g} with a relative residual of {residual / value:.1e} after "
            f"{_CYCLES * _STEPS} steps, more than the tolerance of {tolerance:.1e}",
            stacklevel=2,
        )
    return value**0.5, v.reshape(*shape)


def _cycle(normal: Callable[[Tensor], Tensor], v: Tensor) -> tuple[float, Tensor, float]:
    """Lanczos from a unit vector: top Ritz value, its vector, and the norm of its residual."""
    basis, diagonal, below = [v], [], []
    while True:
        image = normal(basis[-1])
        diagonal.append(float(basis[-1] @ image))
        known = torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors that grow
            image = image - known.T @ (known @ image)
        beta = float(image.norm())
        if len(basis) == min(_STEPS, len(v)) or beta <= 1e-12 * max(diagonal):
            break
        below.append(beta)
        basis.append(image / beta)
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    if below:
        off = torch.tensor(below, dtype=torch.float64, device="cpu")
        small += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(small)
    top = known.T @ vectors[:, -1].to(known)
    return max(float(values[-1]), 0.0), top / top.norm(), beta * abs(float(vectors[-1, -1]))


def _drawn(shape: Sequence[int], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(torch.Size(shape).numel(), generator=generator, dtype=torch.float64, device="cpu").to(like)
