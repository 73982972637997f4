"""Gradients of what contractions read, each of it through that contraction alone: where a gate before the consumer would sit.

A module's own input is read through a view of its own, so that what other readers send back stays out. Operands of contractions
that a module runs itself are seen below autograd; there the contraction's node in the graph is found by its number, and says
what goes back to each of its operands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_map_only

from actprune.core.errors import ObservationError
from actprune.core.hooks import Watcher, watch_inputs
from actprune.core.operands import OPERANDS, Ordinal, watch_operands

_OPERANDS = {operator.replace("_", ""): place for operator, place in OPERANDS.items()}
"""The same by the names of nodes, in lower case."""

Place = tuple[str, Ordinal | None, int]
"""Module path; None for the module's own input, else which of its contractions; which factor of it."""


@dataclass
class Reading:
    """What one contraction read in one forward pass."""

    place: Place
    value: Tensor
    version: int
    """How often the value had been written to when it was read."""
    dim: int | None
    """The dimension that is summed over; None: as the place's owner knows it."""
    edge: GradientEdge
    """What to ask autograd for, so that the gradient arrives; kept from the start, because a view's history may change."""
    argument: int | None = None
    """Which of its operands a contraction's node sends this gradient to; None: the gradient is all that the edge receives."""
    gradient: Tensor | None = None

    @property
    def is_intact(self) -> bool:
        """Whether the value is still what was read."""
        return self.value._version == self.version


@dataclass
class _Seen:
    """An operand as the dispatcher saw it, before the graph around it is known."""

    place: Place
    number: int
    values: dict[int, tuple[Tensor, int]]


class Gates:
    """Records readings during one forward pass, and asks for their gradients.

    Args:
        model: the network.
        places: what is to be read.
    """

    def __init__(self, model: nn.Module, places: Sequence[Place]) -> None:
        self.model = model
        self.places = places
        self.readings: list[Reading] = []
        self._seen: list[_Seen] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside the block forward passes are recorded; gradients must be enabled."""
        inputs: dict[str, Watcher] = {path: partial(self._input, (path, None, op)) for path, o, op in self.places if o is None}
        operands: dict[str, dict[tuple[Ordinal, int], list[Watcher]]] = {}
        for path, ordinal, operand in self.places:
            if ordinal is not None:
                seen: dict[int, tuple[Tensor, int]] = {}
                both = operands.setdefault(path, {})
                for side in (0, 1):
                    both.setdefault((ordinal, side), []).append(partial(self._operand, (path, ordinal, operand), side, seen))
        with ExitStack() as stack:
            for path in operands:
                module = self.model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(_with_gradients, with_kwargs=True).remove)
            stack.enter_context(watch_inputs(self.model, inputs))
            stack.enter_context(watch_operands(self.model, operands))
            yield

    def _input(self, place: Place, x: Tensor) -> Tensor:
        gate = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        self.readings.append(Reading(place, gate.detach(), gate._version, None, get_gradient_edge(gate)))
        return gate

    def _operand(self, place: Place, side: int, seen: dict[int, tuple[Tensor, int]], x: Tensor) -> None:
        seen[side] = (x, x._version)
        if side == 1:
            # autograd numbers a node before it hands the operator on
            self._seen.append(_Seen(place, torch._C._autograd._get_sequence_nr() - 1, dict(seen)))
            seen.clear()

    def connect(self, output: Tensor) -> None:
        """Find what was read in the graph that leads to ``output``.

        Raises:
            ObservationError: no gradient can flow to an operand.
        """
        nodes = _nodes(output, {seen.number for seen in self._seen})
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        for seen in self._seen:
            node = nodes.get(seen.number)
            if node is None:
                continue  # the output does not depend on it
            operand = seen.place[2]
            if seen.values[operand][0].untyped_storage().data_ptr() in weights:
                operand = 1 - operand  # with gradients a product may run transposed
            value, version = seen.values[operand]
            name = node.name().removesuffix("Backward0").lower()
            argument = _OPERANDS.get(name, 0) + operand
            source, slot = node.next_functions[argument]
            if source is None:
                raise ObservationError(
                    f"no gradient reaches what {seen.place[0] or 'the network'!r} reads: everything before it is frozen and "
                    "takes no floating-point input; choose a criterion without gradients"
                )
            dim = 1 if name.startswith("convolution") else max(value.dim() - 1 - operand, 0)
            reading = Reading(seen.place, value.detach(), version, dim, GradientEdge(source, slot), argument)
            node.register_hook(partial(_keep, reading))
            self.readings.append(reading)
        self._seen.clear()

    def gradients(self, y: Tensor, retain_graph: bool) -> list[Tensor | None]:
        """Gradients of a scalar with respect to every reading; None where it does not depend on it."""
        for reading in self.readings:
            reading.gradient = None
        edges = [reading.edge for reading in self.readings]
        found = torch.autograd.grad(y, edges, retain_graph=retain_graph, allow_unused=True) if edges else ()
        return [
            gradient if reading.argument is None else reading.gradient
            for reading, gradient in zip(self.readings, found, strict=True)
        ]


def _keep(reading: Reading, inputs: Sequence[Tensor | None], _outputs: Any) -> None:
    assert reading.argument is not None
    reading.gradient = inputs[reading.argument]


def _nodes(output: Tensor, numbers: set[int]) -> dict[int, Node]:
    """The nodes of these numbers in the graph behind a tensor."""
    found: dict[int, Node] = {}
    known: set[Node] = set()
    waiting = [output.grad_fn] if numbers and output.grad_fn is not None else []
    while waiting:
        node = waiting.pop()
        if node in known:
            continue
        known.add(node)
        if node._sequence_nr() in numbers:
            found[node._sequence_nr()] = node
        waiting += [following for following, _ in node.next_functions if following is not None]
    return found


def _with_gradients(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let gradients flow as far as the module's arguments, also where everything before is frozen."""
    known: dict[int, Tensor] = {}  # what is one tensor stays one: attention asks whether query, key and value are the same

    def flowing(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.requires_grad:
            return x
        return known.setdefault(id(x), x.detach().requires_grad_().clone())

    return tree_map_only(Tensor, flowing, (args, kwargs))
