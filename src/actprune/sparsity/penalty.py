"""The group penalties: what they cost and how they shrink.

A unit (what the literature calls a group) has n elements; its strength is ``lam * sqrt(n)``, as in the paper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.sparsity.prox import Layout, prox_group_lasso, prox_group_mcp


class Penalty(ABC):
    """A penalty on the Euclidean norm of every unit."""

    name: str
    """What configuration calls it."""
    lam: float
    """Strength per unit, before the factor sqrt(n)."""

    @abstractmethod
    def value(self, norms: Tensor, weights: Tensor) -> Tensor:
        """Penalty of every unit, from its norm and ``weights`` = sqrt(n), both (G,)."""

    @abstractmethod
    def prox(self, x: list[Tensor], step: float, weights: Tensor, metric: list[Tensor] | None, layout: Layout) -> list[Tensor]:
        """Proximal operator of ``step * penalty`` for blocks of a layout under a positive metric, None = ones."""


@dataclass(frozen=True)
class GroupLasso(Penalty):
    """``lam sqrt(n) ||x||``, the L1/L2 penalty.

    Raises:
        ConfigError: ``lam`` is negative or not finite.
    """

    lam: float

    name = "group_lasso"

    def __post_init__(self) -> None:
        """Check the strength."""
        _check_strength(self.lam)

    def value(self, norms: Tensor, weights: Tensor) -> Tensor:
        """``lam sqrt(n) ||x||`` of every unit."""
        return self.lam * weights * norms

    def prox(self, x: list[Tensor], step: float, weights: Tensor, metric: list[Tensor] | None, layout: Layout) -> list[Tensor]:
        """Proximal operator, see ``prox_group_lasso``."""
        return prox_group_lasso(x, step * self.lam * weights, metric, layout)


@dataclass(frozen=True)
class GroupMCP(Penalty):
    """Minimax concave penalty of ``||x||``: as the group lasso near zero, flat beyond ``gamma lam sqrt(n)``.

    Raises:
        ConfigError: ``lam`` or ``gamma`` is outside what it may be.
    """

    lam: float
    gamma: float
    """Where the penalty becomes flat, in units of its strength; exact while above step / min(metric)."""

    name = "group_mcp"

    def __post_init__(self) -> None:
        """Check strength and gamma."""
        _check_strength(self.lam)
        if not 0 < self.gamma < float("inf"):
            raise ConfigError(f"gamma={self.gamma!r} must be positive and finite, e.g. 2 * lr / eps for Adam or 3.0 for SGD")

    def value(self, norms: Tensor, weights: Tensor) -> Tensor:
        """``lam s - s^2 / (2 gamma)`` up to ``s = gamma lam``, then constant, with lam times sqrt(n)."""
        lam = self.lam * weights
        s = torch.minimum(norms, self.gamma * lam)
        return lam * s - s.square() / (2 * self.gamma)

    def prox(self, x: list[Tensor], step: float, weights: Tensor, metric: list[Tensor] | None, layout: Layout) -> list[Tensor]:
        """Proximal operator, see ``prox_group_mcp``."""
        return prox_group_mcp(x, step, self.lam * weights, self.gamma, metric, layout)


PENALTIES: dict[str, type[Penalty]] = {"group_lasso": GroupLasso, "group_mcp": GroupMCP}


def make_penalty(name: str, lam: float | None, gamma: float | None) -> Penalty:
    """The penalty that configuration names.

    Raises:
        ConfigError: the name is unknown, or a number that the penalty needs is missing or outside what it may be.
    """
    if name not in PENALTIES:
        raise ConfigError(f"penalty={name!r} must be one of {', '.join(PENALTIES)} or null")
    if lam is None:
        raise ConfigError(f"penalty={name!r} needs lam, got None; e.g. lam=1e-4")
    if name == GroupLasso.name:
        return GroupLasso(lam)
    if gamma is None:
        raise ConfigError(f"penalty={name!r} needs gamma, got None; e.g. gamma=2 * lr / eps for Adam or gamma=3.0 for SGD")
    return GroupMCP(lam, gamma)


def _check_strength(lam: float) -> None:
    if not 0 <= lam < float("inf"):
        raise ConfigError(f"lam={lam!r} must be finite and at least 0, e.g. 1e-4")
