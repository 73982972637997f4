"""What a criterion says of a group, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from actprune.core.errors import ObservationError
from actprune.core.views import Criterion, GroupView


def scored(criterion: Criterion, view: GroupView) -> Tensor | None:
    """(U,) float64 scores on the CPU; None where the criterion has nothing to go by.

    Raises:
        ObservationError: there is not one finite number per unit.
    """
    said = criterion.score(view)
    if said is None:
        return None
    score = said.detach().double().cpu()
    if score.shape != (view.size,) or not torch.isfinite(score).all():
        raise ObservationError(
            f"{type(criterion).__name__} must give {view.size} finite scores for group {view.name!r}, got shape "
            f"{tuple(score.shape)} with {int((~torch.isfinite(score)).sum())} not finite"
        )
    return score
