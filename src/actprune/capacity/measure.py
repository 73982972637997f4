"""Capacity of a network against its initialisation: Lipschitz constants, distances, and what surrounds every layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from actprune.capacity.distance import distance
from actprune.capacity.flow import Use, follow
from actprune.capacity.lipschitz import lipschitz_constant
from actprune.capacity.maps import LinearMap, batch_norm_scale, linear_map
from actprune.core.calling import Example
from actprune.core.errors import ConfigError


@dataclass(frozen=True)
class LayerCapacity:
    """One layer: a convolution, linear layer or batch norm, with the batch norm that alone reads it."""

    name: str
    """Module path, with ``#k`` where it is called more than once."""
    batch_norm: str | None
    """Path of the batch norm that is part of it."""
    lipschitz: float
    """s: spectral norm of the layer's map."""
    distance: float
    """b: (2, 1) distance of its weight to initialisation."""
    params: int
    """W: elements of its weight."""
    before: float
    """Lipschitz constant of the map from the network's input to the layer's."""
    after: float
    """Lipschitz constant of the map from the layer's output to the network's."""

    @property
    def influence(self) -> float:
        """What surrounds the layer times its distance: (prod s) b_i / s_i in a chain."""
        return self.before * self.distance * self.after


@dataclass(frozen=True)
class NetworkCapacity:
    """What the bounds are made of."""

    layers: tuple[LayerCapacity, ...]
    """In order of execution."""
    lipschitz: float
    """Upper bound of the network's Lipschitz constant, by composition."""

    @property
    def distance(self) -> float:
        """Sum of the layers' distances to initialisation."""
        return sum(layer.distance for layer in self.layers)

    @property
    def complexity(self) -> float:
        """(sum of influence^(2/3))^(3/2): in a chain the spectral complexity (prod s) (sum (b / s)^(2/3))^(3/2)."""
        return sum(layer.influence ** (2 / 3) for layer in self.layers) ** 1.5


def measure(model: nn.Module, initial: nn.Module, example_inputs: Example, *, tolerance: float = 1e-5) -> NetworkCapacity:
    """Measure a network in evaluation mode; arithmetic on weights is in float64. Biases have no share in the measure.

    Args:
        model: the network; it and ``initial`` are left as they are.
        initial: the same network as it was initialised, cut the same way if ``model`` is pruned (``apply_record``).
        example_inputs: what it takes, see ``trace``; sizes of the maps are those of this call.
        tolerance: of iterated constants, see ``largest_singular_value``.

    Raises:
        TraceError: the network is made of something that has no Lipschitz constant; names it.
        ConfigError: the two networks differ in a module or a shape, or a weight is not finite.
    """
    flow = follow(model, example_inputs)
    own, far, size = {}, {}, {}
    for use in set(flow.uses):
        layer = effective(model, use)
        if not bool(layer.weight.isfinite().all()):
            raise ConfigError(f"{use.path} has NaN or infinite weights; capacity is that of a trained network, load another")
        own[use] = lipschitz_constant(layer, tolerance=tolerance)
        far[use] = _distance(use, layer, initial)
        size[use] = layer.weight.numel()
    before, after = flow.before(own), flow.after(own)
    layers, calls = [], Counter[str]()
    for index, node in enumerate(flow.nodes):
        if node.use is None:
            continue
        use, (source, _) = node.use, node.arguments[0]
        calls[use.path] += 1
        name = use.path if calls[use.path] == 1 else f"{use.path}#{calls[use.path]}"
        layers.append(LayerCapacity(name, use.batch_norm, own[use], far[use], size[use], before[source], after[index]))
    return NetworkCapacity(tuple(layers), sum(before[k] ** 2 for k in flow.outputs) ** 0.5)


def effective(model: nn.Module, use: Use) -> LinearMap:
    """The linear map of a layer with the batch norm that is part of it, in float64."""
    layer = linear_map(model.get_submodule(use.path), use.input_shape, torch.float64)
    if use.batch_norm is None:
        return layer
    return layer.scaled(batch_norm_scale(model.get_submodule(use.batch_norm), torch.float64))  # type: ignore[arg-type]


def _distance(use: Use, layer: LinearMap, initial: nn.Module) -> float:
    try:
        return distance(layer, effective(initial, use))
    except AttributeError as error:
        raise ConfigError(f"the initial network has no {use.path}; build it with the settings of the network") from error
    except ConfigError as error:
        raise ConfigError(f"{use.path}: {error}") from error
