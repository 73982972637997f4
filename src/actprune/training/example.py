"""What validation really feeds the network: found by watching one ``validation_step``, not asked of the user.

Three ways a LightningModule may run its network, tried in this order:

1. it calls its own ``forward``: the network is the LightningModule, the example is what ``forward`` was given;
2. it calls exactly one module that has parameters (``self.net(x)``): the network is that module;
3. it calls several (``self.decoder(self.encoder(x))``): the network is the LightningModule and the example replays the
   whole ``validation_step``, with everything that the step writes (logs, metrics, lists) put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric

from actprune.core.errors import TraceError

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments
OnCall = Callable[[tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True)
class Network:
    """The part of a LightningModule that is pruned, and how to run it once."""

    module: nn.Module
    """The LightningModule itself or one of its submodules."""
    path: str
    """Its dotted name in the LightningModule; empty for the LightningModule itself."""
    example_inputs: Any
    """A tuple of arguments, a dict of keyword arguments, or a callable that runs the module."""
    replays: bool = False
    """True if the example replays ``validation_step`` (way 3)."""

    @contextmanager
    def calls(self, on_call: OnCall) -> Iterator[None]:
        """Inside the block, call ``on_call(args, kwargs)`` before every call of the network (not in way 3)."""
        if self.replays:
            yield
        elif isinstance(self.module, LightningModule):
            with _watch_forward(self.module, on_call):
                yield
        else:
            handle = self.module.register_forward_pre_hook(lambda _, a, k: on_call(a, k), with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()


@dataclass
class Watcher:
    """Watches one ``validation_step``: between ``start`` and ``stop`` it notes the outermost calls."""

    task: LightningModule
    own_forward: list[Call] = field(default_factory=list)
    """Calls of the LightningModule's own forward."""
    outermost: dict[nn.Module, list[Call]] = field(default_factory=dict)
    """Calls of modules with parameters that were not made inside another such module."""
    _depth: int = 0
    _stack: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        """Attach the hooks."""
        self._stack.enter_context(_watch_forward(self.task, lambda a, k: self.own_forward.append((a, k))))
        for module in self.task.modules():
            if module is self.task or not _is_network_part(module):
                continue
            self._stack.callback(module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            self._stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)

    def stop(self) -> None:
        """Remove the hooks; harmless when there are none."""
        self._stack.close()
        self._depth = 0

    def network(self, batch: Any) -> Network:
        """Say what is to be pruned, from the calls seen while ``batch`` was validated.

        Raises:
            TraceError: no module with parameters was called.
        """
        if self.own_forward:
            return Network(self.task, "", _as_example(self.own_forward[0]))
        if not self.outermost:
            raise TraceError(
                f"validation_step of {type(self.task).__name__} called no module that has parameters; "
                "call the network in validation_step, or set example_input_array"
            )
        if len(self.outermost) == 1:
            ((module, calls),) = self.outermost.items()
            path = next(name for name, candidate in self.task.named_modules() if candidate is module)
            return Network(module, path, _as_example(calls[0]))
        return Network(self.task, "", _Replay(first_sample(batch)), replays=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth == 0:
            self.outermost.setdefault(module, []).append((args, kwargs))
        self._depth += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1


def from_example_input_array(task: LightningModule) -> Network | None:
    """The network of a LightningModule that carries ``example_input_array``; None if it carries none."""
    example = task.example_input_array
    if example is None:
        return None
    example = tree_map(lambda leaf: leaf.to(task.device) if isinstance(leaf, Tensor) else leaf, example)
    if isinstance(example, dict):
        return Network(task, "", first_sample(example))
    return Network(task, "", first_sample(example if isinstance(example, tuple) else (example,)))


def first_sample(value: Any) -> Any:
    """Copy of a nested structure with every tensor cut to one sample.

    Tensors are cut only if all of them have the same first dimension; otherwise the first dimension is not the batch
    for all, and they are copied whole.
    """
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    alike = len({tensor.shape[:1] for tensor in tensors}) == 1 and tensors[0].dim() > 0
    return tree_map(lambda leaf: _copy(leaf[:1] if alike else leaf) if isinstance(leaf, Tensor) else leaf, value)


def n_samples(value: Any) -> int:
    """First dimension of the first tensor in a nested structure that has dimensions; 0 if there is none."""
    return next((len(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim()), 0)


@dataclass(frozen=True)
class _Replay:
    """Run ``validation_step`` on a kept batch and leave no trace of it."""

    batch: Any

    def __call__(self, task: LightningModule) -> Any:
        results: list[Any] = []

        def keep_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            results[:] = [output]

        with harmless(task), ExitStack() as stack:
            for child in task.children():
                if _is_network_part(child):
                    stack.callback(child.register_forward_hook(keep_last).remove)
            result = task.validation_step(self.batch, 0)
        return [leaf for leaf in tree_leaves([result, results]) if isinstance(leaf, Tensor)]


@contextmanager
def harmless(task: LightningModule) -> Iterator[None]:
    """Let ``validation_step`` run outside the loop: no logging, and lists, dicts, sets and metrics are put back."""
    logs = {name: vars(task).get(name) for name in ("log", "log_dict")}
    held = [value for name, value in vars(task).items() if type(value) in _CONTAINERS and not name.startswith("_")]
    kept = [type(value)(value) for value in held]
    metrics = [(module, dict(vars(module)), _states(module)) for module in task.modules() if isinstance(module, Metric)]
    for name in logs:
        object.__setattr__(task, name, _ignore)
    try:
        yield
    finally:
        for name, value in logs.items():
            _put_back(task, name, value)
        for value, content in zip(held, kept, strict=True):
            _refill(value, content)
        for metric, attributes, states in metrics:
            vars(metric).update(attributes)
            for name, content in states.items():
                _refill(getattr(metric, name), content)


_CONTAINERS = (list, dict, set)


def _states(metric: Metric) -> dict[str, Any]:
    return {name: _clone(getattr(metric, name)) for name in metric._defaults}


def _refill(value: Any, content: Any) -> None:
    # In place: a metric collection shares one state among several metrics, and users keep references.
    if isinstance(value, Tensor):
        value.copy_(content)
    elif isinstance(value, list):
        value[:] = content
    else:
        value.clear()
        value.update(content)


@contextmanager
def _watch_forward(task: LightningModule, on_call: OnCall) -> Iterator[None]:
    # Hooks would also fire on the call by which DDP reaches validation_step; replacing ``forward`` sees real calls
    # only.
    before, forward, depth = vars(task).get("forward"), task.forward, 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        if depth == 0:
            on_call(args, kwargs)
        depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            depth -= 1

    object.__setattr__(task, "forward", watched)
    try:
        yield
    finally:
        _put_back(task, "forward", before)


def _put_back(task: LightningModule, name: str, value: Any) -> None:
    if value is None:
        vars(task).pop(name, None)
    else:
        object.__setattr__(task, name, value)


def _is_network_part(module: nn.Module) -> bool:
    return not isinstance(module, Metric) and any(True for _ in module.parameters())


def _as_example(call: Call) -> Any:
    args, kwargs = first_sample(call)
    if not kwargs:
        return args
    return (lambda module: module(*args, **kwargs)) if args else kwargs


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _clone(value: Any) -> Any:
    return [_copy(item) for item in value] if isinstance(value, list) else _copy(value)


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None
