"""What validation really feeds the networks: found by watching ``validation_step``, not asked of the user.

Three ways a LightningModule may run its network, tried in this order:

1. it calls its own ``forward``: the network is the LightningModule, the example is what ``forward`` was given;
2. it calls exactly one module that has parameters (``self.net(x)``): the network is that module;
3. it calls several (``self.decoder(self.encoder(x))``): the network is the LightningModule and the example replays the
   whole ``validation_step``, with everything that the step writes (logs, metrics, lists) put back afterwards.

A copy, an average for one, that is called beside its original is not one of them.

Where the user names modules, each of them is a network: the example is what it was called with, or, where the step calls
not the module but a method of it, the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from actprune.core.calling import call, undisturbed
from actprune.core.copied import Copies, lies_in
from actprune.core.errors import ConfigError, TraceError
from actprune.core.hooks import Live, put_back, uncompiled
from actprune.core.labels import unlabelled
from actprune.training.copies import holds, pairs, submodule
from actprune.training.replay import Replay, copied, is_network_part, mapped

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
    unlabelled: str = ""
    """Why a criterion of classes cannot be told them, where the batch that the example is of lacks them."""

    @property
    def replays(self) -> bool:
        """Whether the example replays ``validation_step``."""
        return isinstance(self.example_inputs, Replay)

    @contextmanager
    def calls(self, on_call: OnCall) -> Iterator[None]:
        """Inside the block, call ``on_call(args, kwargs)`` before every call of the network, unless the example replays."""
        if self.replays:
            yield
        elif isinstance(self.module, LightningModule):
            with _watch_forward(self.module, on_call):
                yield
        else:
            handle = self.module.register_forward_pre_hook(Live(lambda _, a, k: on_call(a, k)), with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()


@dataclass
class Watcher:
    """Watches validation steps: between ``start`` and ``stop`` it notes the first outermost call of every module."""

    task: LightningModule
    wanted: Sequence[str] = ()
    """Dotted names of the networks, where the user gave them."""
    copies: Copies = field(default_factory=dict)
    """Dotted name of a copy -> of what it is one, where the user said so."""
    own_forward: Call | None = None
    """The first call of the LightningModule's own forward."""
    called: dict[nn.Module, Call] = field(default_factory=dict)
    """First call of every module with parameters that was not made inside another such module; of every wanted module."""
    inside: dict[str, tuple[Any, int]] = field(default_factory=dict)
    """Name of a wanted module of which some part was called -> the batch, and its loader."""
    _unlabelled: dict[int, str] = field(default_factory=dict)  # by the module's identity
    _batch: Any = None
    _depth: int = 0
    _stack: ExitStack = field(default_factory=ExitStack)

    def start(self, batch: Any, dataloader_idx: int = 0) -> None:
        """Attach the hooks for one step."""
        self._batch = batch
        self._stack.enter_context(uncompiled())
        if self.wanted:
            for path in self.wanted:
                self._watch(path, (batch, dataloader_idx))
            return
        self._stack.enter_context(_watch_forward(self.task, self._forward))
        measuring = {id(part) for metric in self.task.modules() if isinstance(metric, Metric) for part in metric.modules()}
        for module in self.task.modules():
            if module is self.task or id(module) in measuring or not is_network_part(module):
                continue
            self._stack.callback(module.register_forward_pre_hook(Live(self._enter), with_kwargs=True).remove)
            self._stack.callback(module.register_forward_hook(Live(self._leave), always_call=True).remove)

    def stop(self) -> None:
        """Remove the hooks; harmless when there are none."""
        self._stack.close()
        self._depth, self._batch = 0, None

    def networks(self, batch: Any, dataloader_idx: int = 0) -> list[Network] | None:
        """What is to be pruned, from the calls seen so far, the last of them for ``batch`` of that loader.

        Returns:
            The networks; None where a wanted one was not seen yet.

        Raises:
            TraceError: no module with parameters was called.
        """
        if self.wanted:
            return None if self.missing else [self._named(path) for path in self.wanted]
        if self.own_forward is not None:
            return [self._network(self.task, "", self.own_forward)]
        if not self.called:
            raise TraceError(
                f"validation_step of {type(self.task).__name__} called no module that has parameters; "
                "call the network in validation_step, or set example_input_array"
            )
        trained = self._trained()
        if len(trained) == 1:
            ((path, module),) = trained.items()
            return [self._network(module, path, self.called[module])]
        return [self._replayed(self.task, "", batch, dataloader_idx)]

    @property
    def missing(self) -> list[str]:
        """Wanted modules that were not called, in whole or in part."""
        return [path for path in self.wanted if path not in self.inside]

    def _trained(self) -> dict[str, nn.Module]:
        """What was called by its dotted name, without copies of what was called too: these follow it."""
        found = {name: module for name, module in self.task.named_modules() if module in self.called}
        for copy, source in pairs(self.task, self.copies).items():
            averages = [name for name in found if lies_in(name, copy) or copy == f"{name}.module"]
            rest = {name: module for name, module in found.items() if name not in averages}
            if any(lies_in(name, source) or lies_in(source, name) for name in rest):
                found = rest
        return found

    def _named(self, path: str) -> Network:
        module = self.task.get_submodule(path)
        if module in self.called:
            return self._network(module, path, self.called[module])
        return self._replayed(module, path, *self.inside[path])

    def _network(self, module: nn.Module, path: str, call: Call) -> Network:
        return Network(module, path, _as_example(module, call), self._unlabelled[id(module)])

    def _replayed(self, module: nn.Module, path: str, batch: Any, loader: int) -> Network:
        return Network(module, path, _replay(self.task, module, batch, loader), unlabelled(batch, n_samples(batch)))

    def _watch(self, path: str, batch: tuple[Any, int]) -> None:
        module = self.task.get_submodule(path)

        def seen(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inside.setdefault(path, batch)
            if part is module:
                self._note(module, (args, kwargs))

        for part in module.modules():
            if is_network_part(part):
                self._stack.callback(part.register_forward_pre_hook(Live(seen), with_kwargs=True).remove)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.own_forward = self.own_forward or (args, kwargs)
        self._label(self.task, (args, kwargs))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth == 0:
            self._note(module, (args, kwargs))
        self._depth += 1

    def _note(self, module: nn.Module, call: Call) -> None:
        self.called.setdefault(module, call)
        self._label(module, call)

    def _label(self, module: nn.Module, call: Call) -> None:
        if id(module) not in self._unlabelled:
            self._unlabelled[id(module)] = unlabelled(self._batch, n_samples(call))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1


def check_wanted(task: LightningModule, wanted: Sequence[str]) -> None:
    """Refuse names of modules that do not exist, have no parameters, or lie inside one another.

    Raises:
        ConfigError: says which.
    """
    for path in wanted:
        if not is_network_part(submodule(task, path, "modules")):
            raise ConfigError(f"modules names {path!r}, which has no parameters; name a network")
    for path in wanted:
        outer = [other for other in wanted if other != path and holds(task, other, path)]
        if outer or list(wanted).count(path) > 1:
            raise ConfigError(f"modules names {path!r} and {(outer or [path])[0]!r}, which holds it; name one of the two")


def check_alone(task: LightningModule, network: Network) -> None:
    """Refuse a network that shares parameters with what lies outside it: these would not follow a cut.

    Further names for the network, or for its parts beside it (``self.head`` next to a ``Sequential`` with it), are no others;
    nor is a module beside it that holds nothing else.

    Raises:
        ConfigError: names one of them.
    """
    if not network.path:
        return
    parameters = {id(p): name for name, p in network.module.named_parameters()}
    parts = {id(part) for part in network.module.modules()}
    around = {id(task.get_submodule(path)) for path in ("", *accumulate(network.path.split("."), "{}.{}".format))}
    waiting: list[tuple[str, nn.Module]] = [("", task)]
    seen = {id(network.module)}
    while waiting:  # named_modules() knows a shared module by its first name alone
        path, module = waiting.pop(0)
        if id(module) in seen:
            continue
        seen.add(id(module))
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in parameters:
                raise ConfigError(
                    f"{network.path}.{parameters[id(parameter)]} is also {f'{path}.{leaf}'.lstrip('.')}, outside "
                    f"{network.path}, which would not follow a cut; prune a module that holds both (modules=[...]), or call "
                    "forward in validation_step"
                )
        for name, child in module._modules.items():
            if child is None or (id(module) in around and _holds_only(child, parts)):
                continue
            waiting.append((f"{path}.{name}".lstrip("."), child))


def _holds_only(module: nn.Module, parts: Set[int]) -> bool:
    """Whether nothing but these parts has parameters in it: it may name, compile or penalise them, and reads no width."""
    return not any(True for one in module.modules() if id(one) not in parts for _ in one.named_parameters(recurse=False))


def from_example_input_array(task: LightningModule) -> Network | None:
    """The network of a LightningModule that carries ``example_input_array``; None if it carries none."""
    example = task.example_input_array
    if example is None:
        return None
    example = mapped(example, lambda tensor: tensor.to(task.device))
    if isinstance(example, dict):
        return Network(task, "", first_sample(example))
    return Network(task, "", first_sample(example if isinstance(example, tuple) else (example,)))


def first_sample(value: Any) -> Any:
    """Copy of a nested structure, dataclasses too, with every tensor cut to one sample.

    Tensors are cut only if all of them have the same first dimension; otherwise the first dimension is not the batch
    for all, and they are copied whole.
    """
    tensors = _tensors(value)
    alike = len({tensor.shape[:1] for tensor in tensors}) == 1 and tensors[0].dim() > 0
    return copied(mapped(value, lambda tensor: tensor[:1]) if alike else value)


def n_samples(value: Any) -> int:
    """First dimension of the first tensor in a nested structure that has dimensions; 0 if there is none."""
    first = value
    while type(first) in (tuple, list) and first:
        first = first[0]
    if type(first) is Tensor and first.dim():  # as nearly always, and asked with every batch
        return len(first)
    return next((len(tensor) for tensor in _tensors(value) if tensor.dim()), 0)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(value, found.append)
    return found


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
        put_back(task, "forward", before)


def _as_example(module: nn.Module, called: Call) -> Any:
    def example(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs:
            return args
        return partial(_call, args, kwargs) if args else kwargs

    return _smallest(module, example(*first_sample(called)), lambda: example(*copied(called)))


def _replay(task: LightningModule, module: nn.Module, batch: Any, loader: int) -> Replay:
    if is_param_in_hook_signature(task.validation_step, "dataloader_iter", explicit=True):
        raise ConfigError(
            f"validation_step of {type(task).__name__} takes dataloader_iter and draws its batches itself, so it cannot be run "
            "on a kept one; let it take batch, or name the networks that it calls: modules=[...]"
        )
    return _smallest(module, Replay(task, first_sample(batch), loader), lambda: Replay(task, copied(batch), loader))


def _smallest(module: nn.Module, example: Any, whole: Callable[[], Any]) -> Any:
    """The example of one sample, or of the whole batch where the module does not run on one (as with a list of images)."""
    with undisturbed(module):
        try:
            call(module, example)
        except Exception:
            return whole()
    return example


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module) -> Any:
    return module(*args, **kwargs)
