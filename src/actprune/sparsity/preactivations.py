"""Where the pre-activation of every unit is, and how much the outputs move with it while a network trains.

The pre-activation p of a unit is the output of the batch norm that it goes through, else of the layer that produces it (linear,
convolution). A unit of a residual stream, which several layers write, has several.
Formula, source and cost of the sensitivity: ``actprune.statistics.sensitivity``. It is taken when the network's forward ends,
of the graph that training then uses, so it costs no forward pass of its own and is that of the weights before the step.
In training mode a batch norm lets samples influence each other: there the derivative is that of the batch's summed outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from actprune.core.errors import ConfigError, ObservationError
from actprune.core.hooks import Live, uncompiled
from actprune.core.layers import runs_torch_forward
from actprune.core.outputs import logits_of
from actprune.graph import Graph, Group
from actprune.statistics.sensitivity import mean_gradients

MODES = ("full", "lower_bound", "local")
Reduce = Callable[[Tensor], Tensor]
"""A tensor -> its sum over all processes."""

_BatchNorm = nn.modules.batchnorm._BatchNorm
_Conv = nn.modules.conv._ConvNd


@dataclass(frozen=True, eq=False)
class Place:
    """An output of a module that holds a pre-activation of every unit of a group."""

    group: str
    module: str
    dim: int
    """The channel dimension of that output."""
    positions: Tensor
    """(U, k) int64 positions of every unit along ``dim``."""


def preactivations(model: nn.Module, graph: Graph) -> list[Place]:
    """The places of every group that may be cut; a group without any (attention in one fused module) has none."""
    return [place for group in graph.unlocked for place in _of_group(model, group)]


def _of_group(model: nn.Module, group: Group) -> list[Place]:
    norms: dict[str, Place] = {}
    layers: dict[str, Place] = {}
    for (name, dim), positions in group.members.items():
        path, _, leaf = name.rpartition(".")
        module, index = model.get_submodule(path), torch.as_tensor(positions, device="cpu")
        if isinstance(module, _BatchNorm):
            norms[path] = Place(group.name, path, 1, index)
        elif leaf == "weight" and dim == _out_dim(module):
            layers[path] = Place(group.name, path, -1 if isinstance(module, nn.Linear) else 1, index)
    return list((norms or layers).values())


def _out_dim(module: nn.Module) -> int | None:
    """The dimension of the weight that counts output channels, if positions there are positions in the output."""
    if not runs_torch_forward(module):
        return None
    if isinstance(module, _Conv) and module.transposed:
        return 1 if module.groups == 1 else None
    return 0 if isinstance(module, (nn.Linear, _Conv)) else None


class Sensitivities:
    """Mean sensitivity of the outputs to every unit's pre-activation over the forward passes since it was last taken.

    Args:
        model: the network, whose forward returns the outputs.
        graph: its channel graph.
        mode: ``"full"``: (1/C) sum_k |dy_k/dp|, one backward pass per output; ``"lower_bound"``: |sum_k dy_k/dp| / C, one in
            all; ``"local"``: 1 where the mean of p is above 0, else 0, none.

    Raises:
        ConfigError: the mode is not known, or no unit has a pre-activation that can be watched.
    """

    def __init__(self, model: nn.Module, graph: Graph, mode: str = "full") -> None:
        if mode not in MODES:
            raise ConfigError(f"sensitivity={mode!r} is not known; choose one of {', '.join(MODES)}")
        self.model, self.mode = model, mode
        self.places = preactivations(model, graph)
        if not self.places:
            raise ConfigError(
                f"{type(model).__name__} has no group whose units a linear layer, a convolution or a batch norm outputs: "
                "there is no pre-activation to be sensitive to"
            )
        self._edges: list[tuple[int, int, GradientEdge]] = []
        self._totals: list[Tensor | None] = [None] * len(self.places)
        self._counts = [0] * len(self.places)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block, every forward pass of the network with gradients counts."""
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            for number, place in enumerate(self.places):
                hook = partial(self._seen, number)
                stack.callback(self.model.get_submodule(place.module).register_forward_hook(Live(hook)).remove)
            stack.callback(self.model.register_forward_hook(Live(self._finish), with_kwargs=True).remove)
            stack.callback(self._edges.clear)
            yield

    def take(self, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """Group -> (U,) float32, of a unit with several pre-activations the largest; then start again.

        Args:
            reduce: adds up over processes, where there are several.

        Raises:
            ObservationError: no forward pass was seen.
        """
        sizes = [int(place.positions.max()) + 1 for place in self.places]
        device = next((total.device for total in self._totals if total is not None), torch.device("cpu"))
        totals = [torch.zeros(n, device="cpu") if t is None else t[:n] for t, n in zip(self._totals, sizes, strict=True)]
        flat = torch.cat([*(total.to(device) for total in totals), torch.tensor(self._counts, device=device).float()])
        self._totals, self._counts = [None] * len(self.places), [0] * len(self.places)
        flat = flat if reduce is None else reduce(flat)
        *totals, counts = flat.split([*sizes, len(self.places)])
        if not counts.any():
            raise ObservationError(
                f"training ran no {type(self.model).__name__} whose outputs depend on a pre-activation: call the network "
                "itself in training_step, with gradients; where it is one of several, name them: modules=[...]"
            )
        found: dict[str, Tensor] = {}
        for place, total, count in zip(self.places, totals, counts, strict=True):
            mean = (total / count.clamp(min=1))[place.positions.to(device)].mean(1)
            said = (mean > 0).float() if self.mode == "local" else mean
            said = torch.where(count > 0, said, 0.0)
            found[place.group] = said if place.group not in found else torch.maximum(found[place.group], said)
        return found

    def _seen(self, number: int, _module: nn.Module, _args: Any, p: Tensor) -> None:
        if not torch.is_grad_enabled() or not p.requires_grad:
            return
        if self.mode == "local":
            self._add(number, p.detach())
        else:
            self._edges.append((number, p.dim(), get_gradient_edge(p)))

    def _finish(self, _module: nn.Module, args: Any, kwargs: Any, said: Any) -> None:
        if not self._edges:
            return
        seen = list(self._edges)
        self._edges.clear()
        n = next(len(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim())
        edges = [edge for _, _, edge in seen]

        def gradients(y: Tensor, _again: bool) -> Any:
            return torch.autograd.grad(y, edges, retain_graph=True, allow_unused=True)

        for (number, _, _), gradient in zip(seen, mean_gradients(logits_of(said, n), gradients, self.mode), strict=True):
            if gradient is not None:
                self._add(number, gradient)

    @torch.no_grad()
    def _add(self, number: int, values: Tensor) -> None:
        by_channel = values.movedim(self.places[number].dim, 0).flatten(1)
        total, before = by_channel.sum(1, dtype=torch.float32), self._totals[number]
        self._totals[number] = total if before is None else before + total
        self._counts[number] += by_channel.shape[1]
