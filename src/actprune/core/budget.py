"""The budget: what share of the parameters or of the MACs is left when pruning is done."""

from __future__ import annotations

from dataclasses import dataclass

from actprune.core.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """Share that is left at the end, of parameters or of MACs; exactly one of the two is given.

    Raises:
        ConfigError: none or both are given, or the share is outside (0, 1].
    """

    params: float | None = None
    """Parameters left / parameters of the original model, in (0, 1]."""
    macs: float | None = None
    """Multiply-adds left / multiply-adds of the original model, in (0, 1]."""

    def __post_init__(self) -> None:
        """Check that exactly one share is given and lies in (0, 1]."""
        if (self.params is None) == (self.macs is None):
            raise ConfigError(
                f"Budget takes exactly one of params and macs, got params={self.params}, macs={self.macs}; "
                "write Budget(params=0.4) or Budget(macs=0.5)"
            )
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise ConfigError(f"budget {self.unit}={self.share!r} must be a share left in (0, 1], e.g. 0.4")

    @property
    def unit(self) -> str:
        """What is counted: ``"params"`` or ``"macs"``."""
        return "params" if self.params is not None else "macs"

    @property
    def share(self) -> float:
        """The share that is left at the end."""
        return self.params if self.params is not None else self.macs  # type: ignore[return-value]

    def due(self, fraction: float) -> float:
        """Share that may be left when ``fraction`` in [0, 1] of the whole reduction is due."""
        return 1.0 - fraction * (1.0 - self.share)
