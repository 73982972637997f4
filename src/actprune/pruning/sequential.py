"""Sequential refit: front to back, every layer of the cut network is refitted to what the original said.

Two passes of all calibration samples as one batch. The first, through the original, keeps each layer's target at sampled
positions. The second, through the cut network, stops at every layer in execution order, refits it on what the layers
before it now deliver, and goes on with the new weights: errors are seen by later layers and corrected, not piled up, and
the number of passes does not grow with depth.

Targets: the layer's own output; where the output, or the batch norm that alone reads it, is added to another tensor and
read by nothing else (a branch that begins at it would see another one than it was added to), the sum. A residual branch so
corrects what its whole stream has lost so far (He et al., arXiv:1707.06168, section 3.3, for each branch in isolation).
Measured on ResNet-56 / CIFAR-10 (JPEG copy): docs/compensation.md.

Layers that run once, are linear or convolutions, neither transposed nor grouped nor complex, are refitted; others keep what
the plan folded into them, and are named in the log. Of a layer with a forward of its own, numbers tell: it is refitted if the
original says its weight times what it reads, plus its bias.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from actprune.compensation import LeastSquares
from actprune.compensation.patches import Conv, n_positions, patches_at, reads_patches
from actprune.compensation.residual import before_norm, correction
from actprune.core.calling import Example, call, evaluating
from actprune.core.plan import Plan
from actprune.graph import Consumer, Graph
from actprune.pruning.own_forward import channels_second, has_own_forward, is_affine, read_by, rows_at
from actprune.statistics import sample_positions
from actprune.surgery.tensors import keep_indices

_LOG = logging.getLogger(__name__)
_ROWS_PER_INPUT = 8


@dataclass
class _Layer:
    """A layer that is refitted."""

    path: str
    norm: str | None
    """Path of the batch norm that alone reads the output."""
    kept: Tensor | None
    """Outputs of the original that are still there; None: all."""
    width: int
    """How many numbers it reads together."""
    order: int
    own: bool
    """Whether its forward is not PyTorch's."""

    def read(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the layer's weight reads where the layer is given x."""
        return read_by(module, x) if self.own else x


@dataclass
class _Targets:
    """What the original said at sampled positions."""

    values: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> (R, outputs of the original)."""
    joined: set[str] = field(default_factory=set)
    """Layers whose target is the sum that the output goes into."""
    layouts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Layer -> rows it ran on, positions per row."""


@dataclass(frozen=True)
class Refit:
    """What a sequential refit did."""

    n_samples: int
    """Calibration samples used."""
    layers: dict[str, tuple[float, float]]
    """Layer -> mean square of what it missed before and after, in the units of its output."""


def refit(model: nn.Module, original: nn.Module, graph: Graph, plan: Plan, batch: Example, how: LeastSquares) -> Refit:
    """Refit the layers of a cut model, in place.

    Args:
        model: the model after the plan was executed.
        original: a copy of it from before.
        graph: the graph of the cut model.
        plan: what was executed.
        batch: all calibration samples, as one call takes them.
        how: ridge and sampled positions.
    """
    layers = {layer.path: layer for layer in _layers(model, graph, plan)}
    targets = _Targets()
    with evaluating(original), torch.no_grad(), _Reference(original, layers, how, targets):
        call(original, batch)
    layers = {path: layer for path, layer in layers.items() if path in targets.layouts or not layer.own}
    others = dict.fromkeys(c.weight for c in graph.consumers if c.module not in layers)
    if others:
        listed = f"{', '.join(list(others)[:5])}{', ...' if len(others) > 5 else ''}"
        _LOG.warning("%d weights keep what was folded into them once, their layers cannot be refitted: %s", len(others), listed)
    with evaluating(model), torch.no_grad(), _Refitting(model, layers, how, targets) as walk:
        call(model, batch)
    return Refit(walk.n_samples, walk.errors)


def _layers(model: nn.Module, graph: Graph, plan: Plan) -> Iterator[_Layer]:
    runs = Counter(consumer.weight for consumer in graph.consumers)
    modules = dict(model.named_modules())
    for order, consumer in enumerate(graph.consumers):
        module = modules[consumer.module]
        plain = isinstance(module, nn.Linear) or (isinstance(module, Conv) and reads_patches(module, module.weight))
        plain = plain and not module.weight.is_complex()
        if plain and consumer.ordinal in (None, 0) and consumer.reads_own_weight and runs[consumer.weight] == 1:
            yield _Layer(
                consumer.module,
                _norm(modules, consumer),
                _kept(module.weight, consumer, plan),
                module.weight[0].numel(),
                order,
                has_own_forward(module),
            )


def _norm(modules: dict[str, nn.Module], consumer: Consumer) -> str | None:
    path = consumer.batch_norm
    return path if path is not None and getattr(modules[path], "running_mean", None) is not None else None


def _kept(weight: Tensor, consumer: Consumer, plan: Plan) -> Tensor | None:
    gone = plan.removed.get(consumer.weight, {}).get(0, [])
    if not gone:
        return None
    return keep_indices(len(weight) + len(gone), gone)


class _Walk(TorchDispatchMode):
    """Follows outputs of layers through their batch norm into sums, while a model runs."""

    def __init__(self, model: nn.Module, layers: dict[str, _Layer], how: LeastSquares) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.how = how
        self._outputs = WeakTensorKeyDictionary()  # of layers, as long as nothing has read them
        self._entering: _Layer | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> Any:  # noqa: D105
        norms = {layer.norm for layer in self.layers.values() if layer.norm is not None}
        for path in self.layers:
            module = self.model.get_submodule(path)
            self._hooks.callback(module.register_forward_pre_hook(self._pre(self.layers[path])).remove)
            self._hooks.callback(module.register_forward_hook(self._post(self.layers[path])).remove)
        for path in norms:
            norm = self.model.get_submodule(path)
            self._hooks.callback(norm.register_forward_pre_hook(self._into_norm(path)).remove)
            self._hooks.callback(norm.register_forward_hook(self._through_norm).remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:  # noqa: D105
        super().__exit__(*error)
        self._hooks.close()

    def _pre(self, layer: _Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if len(args) == 1:
                self.reached(layer, module, args[0])

        return hook

    def _post(self, layer: _Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if len(args) == 1 and self.left(layer, module, args[0], out):
                self._outputs[out] = layer

        return hook

    def _into_norm(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            layer = self._outputs.pop(args[0], None) if args else None
            self._entering = layer if layer is not None and layer.norm == path else None

        return hook

    def _through_norm(self, _module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
        if self._entering is not None:
            self._outputs[out], self._entering = self._entering, None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if (
            name in ("add", "add_")
            and not kwargs
            and all(isinstance(a, Tensor) for a in args)
            and args[0].shape == args[1].shape
        ):
            known = [(side, self._outputs[a]) for side, a in enumerate(args) if a in self._outputs]
            for a in args:
                self._outputs.pop(a, None)
            if known:
                return self.summed(func, args, known)
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.read(x)
        return func(*args, **kwargs)

    def read(self, x: Tensor) -> None:
        """An operator reads a tensor: a branch, which would see another one were its layer refitted at a later sum."""
        self._outputs.pop(x, None)

    def sampled(self, layer: _Layer, x: Tensor, n: int) -> Tensor:
        """(N, P) flat positions, the same in both passes; more where few samples have to fix many weights."""
        wanted = max(self.how.positions, -(-_ROWS_PER_INPUT * layer.width // len(x)))
        return sample_positions(torch.arange(len(x), device=x.device), n, wanted, self.how.seed)

    def reached(self, layer: _Layer, module: nn.Module, x: Tensor) -> None:
        """A layer is about to run."""

    def left(self, layer: _Layer, module: nn.Module, x: Tensor, out: Tensor) -> bool:
        """A layer has run; whether its output is to be followed."""
        return True

    def summed(self, func: Any, args: tuple[Tensor, Tensor], known: list[tuple[int, _Layer]]) -> Tensor:
        """Outputs of layers are about to be added to something."""
        raise NotImplementedError


class _Reference(_Walk):
    """The pass through the original: keeps targets."""

    def __init__(self, model: nn.Module, layers: dict[str, _Layer], how: LeastSquares, targets: _Targets) -> None:
        super().__init__(model, layers, how)
        self.targets = targets
        self._positions: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}  # what layers said whose target is a sum
        self._summed = WeakTensorKeyDictionary()

    def left(self, layer: _Layer, module: nn.Module, x: Tensor, out: Tensor) -> bool:
        """Keep the layer's own output, unless it has a forward of its own which says something else than its weight does."""
        x, out = channels_second(module, layer.read(module, x)), channels_second(module, out)
        n = n_positions(x, module)
        positions = self.sampled(layer, x, n)
        if layer.own and not is_affine(module, x, out, positions):
            return False
        self.targets.layouts[layer.path] = (len(x), n)
        self._positions[layer.path] = positions
        self.targets.values[layer.path] = rows_at(out, positions)
        return True

    def summed(self, func: Any, args: tuple[Tensor, Tensor], known: list[tuple[int, _Layer]]) -> Tensor:
        """Keep the sum instead, for the layer that has the most inputs to correct it with."""
        side, layer = max(known, key=lambda entry: (entry[1].width, -entry[1].order))
        out = func(*args)
        for x in args:
            self.read(x)
        if out is not args[side]:
            self._summed[args[side]] = layer
        module = self.model.get_submodule(layer.path)
        self._own[layer.path] = self.targets.values[layer.path]
        self.targets.values[layer.path] = rows_at(channels_second(module, out), self._positions[layer.path])
        self.targets.joined.add(layer.path)
        return out

    def read(self, x: Tensor) -> None:
        """What is read once more after its sum keeps its layer's own target."""
        super().read(x)
        layer = self._summed.pop(x, None) if len(self._summed) else None
        if layer is not None:
            self.targets.joined.discard(layer.path)
            self.targets.values[layer.path] = self._own.pop(layer.path)


class _Refitting(_Walk):
    """The pass through the cut network: refits every layer once what it reads is final."""

    def __init__(self, model: nn.Module, layers: dict[str, _Layer], how: LeastSquares, targets: _Targets) -> None:
        super().__init__(model, layers, how)
        self.targets = targets
        self.errors: dict[str, tuple[float, float]] = {}
        self.n_samples = 0
        self._inputs: dict[str, Tensor] = {}

    def reached(self, layer: _Layer, module: nn.Module, x: Tensor) -> None:
        """Refit to the layer's own output, or wait for the sum it goes into."""
        self.n_samples = self.n_samples or len(x)
        read = layer.read(module, x)
        seen = channels_second(module, read)
        if self.targets.layouts.get(layer.path) != (len(seen), n_positions(seen, module)):
            # it runs over something that was cut: over channels as if they were positions
            _LOG.warning("%s: runs on other positions than before the cut, it is not refitted", layer.path)
        elif layer.path in self.targets.joined:
            self._inputs[layer.path] = x
        else:
            self._fit(layer, module, read, None)

    def summed(self, func: Any, args: tuple[Tensor, Tensor], known: list[tuple[int, _Layer]]) -> Tensor:
        """Refit the layer so that the sum is what it was, and sum again."""
        side, layer = next(((s, k) for s, k in known if k.path in self._inputs), (0, None))
        if layer is None:
            return func(*args)
        module = self.model.get_submodule(layer.path)
        x = self._inputs.pop(layer.path)
        self._fit(layer, module, layer.read(module, x), args[0] + args[1])
        again = module.forward(x)
        if layer.norm is not None:
            again = self.model.get_submodule(layer.norm).forward(again)
        if func.overloadpacket.__name__ == "add_" and side == 0:
            args[0].copy_(again)
            return func(*args)
        return func(*[again if i == side else a for i, a in enumerate(args)])

    def _fit(self, layer: _Layer, module: Any, x: Tensor, total: Tensor | None) -> None:
        x = channels_second(module, x)
        positions = self.sampled(layer, x, n_positions(x, module))
        rows = patches_at(x, module, positions).flatten(0, 1)
        target = self.targets.values.pop(layer.path)
        if layer.kept is not None:
            target = target[:, layer.kept.to(target.device)]
        norm: Any = self.model.get_submodule(layer.norm) if layer.norm is not None else None
        weight = module.weight.detach()
        if total is None:
            said = rows @ weight.flatten(1).T
            missed = target - (said if module.bias is None else said + module.bias.detach())
        else:
            missed = target - rows_at(channels_second(module, total), positions)
            if norm is not None:
                missed = before_norm(norm, missed)
        found = correction(rows, missed, self.how.ridge, intercept=module.bias is not None or norm is not None)
        self.errors[layer.path] = (found.before, found.after)
        if not found.after < found.before:
            _LOG.info("%s: a refit gains nothing, it stays as it is", layer.path)
            return
        weight.copy_(weight.double() + found.weight.view(weight.shape))
        if module.bias is not None:
            module.bias.detach().copy_(module.bias.double() + found.bias)
        elif norm is not None:
            norm.running_mean.copy_(norm.running_mean.double() - found.bias)
