"""Weights as criteria see them: columns that read a unit at each of its sites, batch norms it goes through, what it owns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from actprune.core.tensors import real
from actprune.graph import Graph, Group, Site
from actprune.sparsity import unit_groups

_Conv = nn.modules.conv._ConvNd
_BatchNorm = nn.modules.batchnorm._BatchNorm


def columns_of(model: nn.Module, graph: Graph, group: Group) -> list[Tensor | None]:
    """The weights that read each unit, (U, n_elements) float64 for every site in order.

    None where what the site reads is not multiplied by a layer's weight: by another activation, or by a weight that is computed
    on the way.
    """
    return [_columns(model, graph, group, site) for site in group.sites]


def _columns(model: nn.Module, graph: Graph, group: Group, site: Site) -> Tensor | None:
    by_input = _by_input(model, graph, site)
    if by_input is None:
        return None
    index = torch.from_numpy(site.positions).to(by_input.device)
    return real(by_input[index.flatten()].reshape(group.size, -1)).double()


def _by_input(model: nn.Module, graph: Graph, site: Site) -> Tensor | None:
    """(inputs, elements): everything that multiplies each input channel."""
    module = model.get_submodule(site.module)
    if site.ordinal is None:
        if isinstance(module, nn.RNNBase):
            both = ("weight_ih_l0", "weight_ih_l0_reverse")[: 1 + module.bidirectional]
            return torch.cat([getattr(module, name).detach() for name in both]).T
        assert isinstance(module, (nn.Linear, _Conv))
        weight = module.weight.detach()
        if isinstance(module, nn.Linear):
            return weight.T
        if module.transposed:
            return weight.flatten(1)
        return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    consumer = next((c for c in graph.consumers if (c.site, c.operand) == (site.name, site.operand)), None)
    if consumer is None:
        return None
    return model.get_parameter(consumer.weight).detach().movedim(consumer.reads_dim, 0).flatten(1)


def norms_of(model: nn.Module, group: Group) -> list[Tensor]:
    """Scales gamma of every batch norm whose channels leave with the units, (U, k) float64 each, in order of first use."""
    found = []
    for (name, _), positions in group.members.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight" and isinstance(module, _BatchNorm):
            gamma = module.weight.detach().double()
            found.append(gamma[torch.from_numpy(positions).to(gamma.device)])
    return found


def owned(model: nn.Module, graph: Graph) -> dict[str, list[Tensor]]:
    """Group -> the elements that each of its units owns, (U, n_elements) per parameter; frozen ones count too."""
    return {rows.name: [real(part) for part in rows.rows()] for rows in unit_groups(model, graph, frozen=True)}
