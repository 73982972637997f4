"""Several criteria on one observation: every statistic that two of them ask for alike is accumulated once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.core.views import Criterion, GroupView, Statistic
from actprune.pruning.scored import scored
from actprune.pruning.settings import settings


class Panel(Criterion):
    """Many criteria that look at the same batches.

    Args:
        criteria: name -> criterion.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, criteria: Mapping[str, Criterion]) -> None:
        if not criteria:
            raise ConfigError("a panel of 0 criteria has nothing to say; give at least 1")
        self.criteria = dict(criteria)
        self.needs_readers = any(criterion.needs_readers for criterion in criteria.values())
        self.scores: dict[str, dict[str, Tensor]] = {}
        """Group name -> criterion -> (U,) float64; without the criteria that have nothing to go by there."""
        self._made: dict[str, Callable[[int], Statistic]] = {}
        self._keys: dict[str, dict[str, str]] = {}
        for name, criterion in self.criteria.items():
            self._keys[name] = {key: self._share(make, f"{name}.{key}") for key, make in criterion.statistics().items()}

    def _share(self, make: Callable[[int], Statistic], key: str) -> str:
        """The key under which such a statistic is made already, else ``key``."""
        own = settings(make(1))
        for known, other in self._made.items():
            if settings(other(1)) == own:
                return known
        self._made[key] = make
        return key

    def statistics(self) -> dict[str, Callable[[int], Statistic]]:
        """Everything that any of the criteria asks for."""
        return dict(self._made)

    def score(self, view: GroupView) -> Tensor | None:
        """Let every criterion score the group; ``scores`` keeps what they say, the first one's is returned.

        Raises:
            ObservationError: one of them does not give one finite number per unit.
        """
        said: dict[str, Tensor] = {}
        for name, criterion in self.criteria.items():
            own = {key: view.statistics[shared] for key, shared in self._keys[name].items() if shared in view.statistics}
            score = scored(criterion, dataclasses.replace(view, statistics=own))
            if score is not None:
                said[name] = score
        self.scores[view.name] = said
        return next(iter(said.values()), None)
