"""The budget: what share of the parameters, of the MACs or of the units is left when pruning is done."""

from __future__ import annotations

from dataclasses import dataclass, fields

from actprune.core.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """Share that is left at the end, of parameters, of MACs or of units; exactly one of the three is given.

    Raises:
        ConfigError: none or several are given, or the share is outside (0, 1].
    """

    params: float | None = None
    """Parameters left / parameters of the original model, in (0, 1]."""
    macs: float | None = None
    """Multiply-adds left / multiply-adds of the original model, in (0, 1]."""
    units: float | None = None
    """Units left / units of the groups that may be cut, in (0, 1]; with ``Selection(scope="uniform")``, of each of them."""

    def __post_init__(self) -> None:
        """Check that exactly one share is given and lies in (0, 1]."""
        if len(self._given()) != 1:
            raise ConfigError(
                f"Budget takes exactly one of params, macs and units, got params={self.params}, macs={self.macs}, "
                f"units={self.units}; write Budget(params=0.4), Budget(macs=0.5) or Budget(units=0.5)"
            )
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise ConfigError(f"budget {self.unit}={self.share!r} must be a share left in (0, 1], e.g. 0.4")

    @property
    def unit(self) -> str:
        """What is counted: ``"params"``, ``"macs"`` or ``"units"``."""
        return next(iter(self._given()))

    @property
    def share(self) -> float:
        """The share that is left at the end."""
        return self._given()[self.unit]

    def _given(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None}

    def due(self, fraction: float) -> float:
        """Share that may be left when ``fraction`` in [0, 1] of the whole reduction is due."""
        return fraction * self.share + (1.0 - fraction)
