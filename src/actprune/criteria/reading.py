"""Scores of a site that weigh the activations by the weights that read them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from actprune.core.errors import ObservationError
from actprune.core.views import GroupView, Statistic
from actprune.criteria.combine import score_sites


def is_read(view: GroupView) -> bool:
    """Whether a layer's own weight reads the group, at any of its sites."""
    return any(weight is not None for weight in view.columns())


def score_read(
    view: GroupView,
    key: str,
    score: Callable[[Statistic, Tensor], Tensor],
) -> Tensor | None:
    """Score the statistic ``key`` with the weights that read it, at every site that is read by weights, and combine.

    Args:
        view: the group.
        key: which of the view's statistics.
        score: statistic and (U, n_elements) weights of one site -> float64 (U,).

    Returns:
        Float64 tensor (U,) on the CPU; None where no site is read by a layer's own weight. Other sites (a product of
        activations, a weight that is computed on the way) are left out.

    Raises:
        ObservationError: see ``score_sites``.
    """
    sites, columns = view.statistics.get(key, ()), view.columns()
    if sites and len(columns) != len(sites):
        raise ObservationError(
            f"group {view.name} has {len(sites)} sites and the weights of {len(columns)}; a view needs both of the same model"
        )
    read = [(site, weight) for site, weight in zip(sites, columns, strict=True) if weight is not None] if sites else []
    if sites and not read:
        return None
    weights = {id(site): weight for site, weight in read}
    only = GroupView(view.name, view.size, {**view.statistics, key: [site for site, _ in read]} if sites else view.statistics)
    return score_sites(only, key, lambda site: _on_one_device(score, site, weights[id(site)]))


def _on_one_device(score: Callable[[Statistic, Tensor], Tensor], site: Statistic, weight: Tensor) -> Tensor:
    return score(site, weight.detach().double().to(site.device))
