"""From the scores of a group at each of its sites to one score per unit.

Formula: with s_k(u) the scores at site k and c_k = mean_u |s_k(u)| that site's scale,

    score(u) = mean_k(c_k) * max_k s_k(u) / c_k.

Dividing by c_k lets no site dominate because its numbers are larger. The maximum keeps a unit that is important to any
one consumer: a unit leaves only when every consumer can spare it. The factor in front gives the result back the size of
a typical site, so that groups with one site and with several can be ranked together; with one site the scores are
returned as they are. Sites whose scores are all zero say nothing and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from actprune.core.errors import ObservationError
from actprune.core.views import GroupView, Statistic


def combine(
    scores: Sequence[Tensor],  # one (U,) float64 per site
) -> Tensor:
    """Combine the scores of several sites; float64 (U,)."""
    if len(scores) == 1:
        return scores[0]
    stacked = torch.stack(list(scores))
    sizes = stacked.abs().mean(1, keepdim=True)
    telling = (sizes > 0).squeeze(1)
    if not telling.any():
        return torch.zeros_like(stacked[0])
    return sizes[telling].mean() * (stacked[telling] / sizes[telling]).amax(0)


def score_sites(view: GroupView, key: str, score: Callable[[Statistic], Tensor]) -> Tensor:
    """Score the statistic ``key`` at every site of the group and combine.

    Args:
        view: the group.
        key: which of the view's statistics.
        score: the statistic of one site -> float64 (U,).

    Returns:
        Float64 tensor (U,) on the CPU.

    Raises:
        ObservationError: the statistic is missing, saw nothing, or saw NaN or Inf; the message names the group.
    """
    sites = view.statistics.get(key, ())
    if not sites:
        known = ", ".join(view.statistics) or "none"
        raise ObservationError(
            f"group {view.name} has no statistic {key!r} (it has: {known}); observe with this criterion's statistics()"
        )
    try:
        return combine([score(statistic).cpu() for statistic in sites])
    except ObservationError as error:
        raise ObservationError(f"group {view.name}: {error}") from error
