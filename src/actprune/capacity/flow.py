"""How a network composes its layers: one run on an example, every operator a node with its Lipschitz constant per argument.

Composition multiplies constants; a sum (a residual block) adds them, ``Lip(x -> x + f(x)) <= 1 + Lip(f)`` (Graf et al. 2022,
sec. 3); parts that are concatenated add up in squares. Layers are nodes whose constant is measured. A batch norm that alone
reads a convolution or linear layer becomes part of it: the norm of the product is at most the product of the norms.

What is refused, by name: contractions outside ``nn.Conv*``, ``nn.ConvTranspose*`` and ``nn.Linear`` modules that run PyTorch's
forward, products of two activations (attention, gates), and norms whose statistics come from their own input (layer and group
norm): those are not Lipschitz, or only with a constant of no use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from actprune.capacity.maps import CONVOLUTIONS, LAYERS, NORMS
from actprune.capacity.rules import JOINED, RULES, Unbounded
from actprune.core.calling import Example, call, undisturbed
from actprune.core.errors import TraceError
from actprune.core.layers import runs_torch_forward
from actprune.core.operands import decomposed, is_composite
from actprune.core.stack import module_stack
from actprune.graph.rules import bind


@dataclass(frozen=True)
class Use:
    """One call of a layer."""

    path: str
    """Of the convolution, linear layer or batch norm."""
    input_shape: tuple[int, ...]
    """Of one sample."""
    batch_norm: str | None = None
    """Path of the batch norm that is part of it."""


@dataclass
class Node:
    """A tensor, and what it is computed from."""

    arguments: list[tuple[int, float]] = field(default_factory=list)
    """(node, Lipschitz constant in it); of a layer the constant is still to be multiplied by the layer's own."""
    joined: bool = False
    """Whether the arguments fill places of their own."""
    use: Use | None = None


@dataclass(frozen=True)
class Flow:
    """A network as nodes in order of execution; inputs come first."""

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    @property
    def uses(self) -> list[Use]:
        """The layers, in order of execution."""
        return [node.use for node in self.nodes if node.use is not None]

    def before(self, own: Mapping[Use, float]) -> list[float]:
        """For every node the constant of the map from the network's input to it, from every layer's own constant."""
        found: list[float] = []
        for node in self.nodes:
            parts = [found[k] * factor for k, factor in node.arguments]
            total = sum(part**2 for part in parts) ** 0.5 if node.joined else sum(parts)
            if not node.arguments and node.use is None:
                total = 1.0
            found.append(total * (1.0 if node.use is None else own[node.use]))
        return found

    def after(self, own: Mapping[Use, float]) -> list[float]:
        """For every node the constant of the map from it to the network's output."""
        found = [0.0] * len(self.nodes)
        for k in self.outputs:
            found[k] = 1.0
        for index in reversed(range(len(self.nodes))):
            node = self.nodes[index]
            onward = found[index] * (1.0 if node.use is None else own[node.use])
            for k, factor in node.arguments:
                found[k] += factor * onward
        return found


def follow(model: nn.Module, example: Example) -> Flow:
    """Run a model once in evaluation mode and note how it composes its layers; the model is left as it was.

    Args:
        model: any module made of what ``rules`` knows.
        example: what it takes, see ``trace``.

    Raises:
        TraceError: the model fails on the example, or an operator has no Lipschitz constant; names operator and module.
    """
    mode = _Follower(model)
    with undisturbed(model), module_stack(model) as frames, ExitStack() as hooks:
        mode.frames = frames
        for path, module in model.named_modules():
            if isinstance(module, LAYERS) and runs_torch_forward(module):
                hooks.callback(module.register_forward_pre_hook(mode.enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(mode.leaving(path), with_kwargs=True, always_call=True).remove)
        hooks.callback(model.register_forward_pre_hook(mode.begin, with_kwargs=True, prepend=True).remove)
        try:
            with mode:
                out = call(model, example)
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(f"the model failed on the example inputs: {type(error).__name__}: {error}") from error
    outputs = [mode.places[x] for x in tree_leaves(out) if isinstance(x, Tensor) and x in mode.places]
    if not outputs:
        raise TraceError("no output of the model depends on its inputs; pass example_inputs as the model takes them")
    return Flow(tuple(_folded(mode.nodes, outputs, model)), tuple(outputs))


class _Follower(TorchDispatchMode):
    """Makes a node of every tensor that depends on the inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.places = WeakTensorKeyDictionary()
        self.frames: list[Any] = []
        self.inside = 0

    def begin(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        """The model's inputs."""
        if not self.nodes:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and x.is_floating_point():
                    self._place(x, Node())

    def enter(self, *_: Any) -> None:
        """A layer begins; what it does inside is its own."""
        self.inside += 1

    def leaving(self, path: str) -> Any:
        """The hook that makes a layer's output a node."""

        def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self.inside -= 1
            x = args[0] if args else kwargs.get("input")
            if isinstance(out, Tensor) and self._live(x):
                use = Use(path, (x.shape[-1],) if isinstance(module, nn.Linear) else tuple(x.shape[1:]))
                self._place(out, Node([(self.places[x], 1.0)], use=use))

        return leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        out = decomposed(self, func, args, kwargs)
        if is_composite(func):
            return out  # its parts have been seen
        name = func.overloadpacket.__name__
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
        if outputs and any(self._live(x) for x in tree_leaves((args, kwargs))):
            self._compute(func, name, bind(func, args, kwargs), outputs)
        return out

    def _compute(self, func: Any, name: str, a: Any, outputs: Iterable[Tensor]) -> None:
        where = f"{name} in {self.frames[-1].path or 'the model'}"
        in_place = name.endswith("_") and not name.endswith("__")
        name = name[:-1] if in_place else name
        if name not in RULES:
            raise TraceError(
                f"{where} has no Lipschitz constant here; capacity knows networks of nn.Conv*, nn.Linear and nn.BatchNorm* "
                "modules that run PyTorch's forward, activation functions, pooling, padding, sums and concatenation"
            )
        a.name, a.is_live = name, self._live
        for out in outputs:
            try:
                pairs = RULES[name](a, out)
            except Unbounded as error:
                raise TraceError(f"{where} {error}, which has no Lipschitz constant") from error
            arguments = [(self.places[x], factor) for x, factor in pairs if self._live(x)]
            # what it is a view of keeps its own constant, which is enough only if this one is no larger
            if in_place and a.input._base is not None and sum(factor for _, factor in arguments) > 1:
                raise TraceError(f"{where} writes to a part of another tensor, which is not followed; write it out of place")
            self._place(out, Node(arguments, joined=name in JOINED))

    def _live(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x in self.places

    def _place(self, tensor: Tensor, node: Node) -> None:
        self.nodes.append(node)
        self.places[tensor] = len(self.nodes) - 1


def _folded(nodes: list[Node], outputs: list[int], model: nn.Module) -> list[Node]:
    """Batch norms that alone read a convolution or linear layer become part of it."""
    readers = [0] * len(nodes)
    for k in [k for node in nodes for k, _ in node.arguments] + outputs:
        readers[k] += 1
    for node in nodes:
        if node.use is None or not isinstance(model.get_submodule(node.use.path), NORMS):
            continue
        ((source, _),) = node.arguments
        before = nodes[source].use
        foldable = before is not None and isinstance(model.get_submodule(before.path), (*CONVOLUTIONS, nn.Linear))
        if before is not None and foldable and before.batch_norm is None and readers[source] == 1:
            nodes[source].use, node.use = Use(before.path, before.input_shape, node.use.path), None
    return nodes
