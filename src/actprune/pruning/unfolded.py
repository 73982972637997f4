"""Places where units are read and nothing can be folded: no weight of the layer's own multiplies them."""

from __future__ import annotations

import logging

from torch import nn

from actprune.graph import Graph

_LOG = logging.getLogger(__name__)


def tell_unfolded(model: nn.Module, graph: Graph) -> None:
    """Name the sites without a consumer: a weight that is computed, or sliced, before it is used."""
    known = {(consumer.site, consumer.operand) for consumer in graph.consumers}
    sites = [site for group in graph.unlocked for site in group.sites if (site.name, site.operand) not in known]
    # whole groups of a grouped convolution leave with what they write
    names = list(dict.fromkeys(site.name for site in sites if getattr(model.get_submodule(site.module), "groups", 1) == 1))
    if names:
        listed = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        _LOG.warning("nothing is folded where units are read without a weight of its own: %s", listed)
