"""Cut shares of all groups, run the model, put everything back: where it fails, if it does, and how far it got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from actprune.core.calling import Example, call, undisturbed
from actprune.core.copied import original
from actprune.core.signals import held
from actprune.core.stack import module_stack
from actprune.graph import Graph, Group
from actprune.pruning.apart import keep_apart
from actprune.pruning.checker import Checker
from actprune.pruning.plans import draft
from actprune.pruning.shares import Shares
from actprune.pruning.telling import Tells
from actprune.surgery import rehearsed


@dataclass(frozen=True)
class Failure:
    """Where a cut model failed."""

    path: str
    """Path of the module that was running."""
    error: str
    progress: tuple[int, int, int, int]
    """Which cut failed, in which run, how many operators had run, and how many extents were right at the one that failed."""
    unseen: tuple[str, ...] = ()
    """Paths of what ran in that module past ``__call__``."""


@dataclass(frozen=True)
class Run:
    """One way to call the model."""

    example: Example
    training: bool = False

    def error(self, model: nn.Module, watched: AbstractContextManager[Any]) -> Exception | None:
        """What the model raises, inside of ``undisturbed``."""
        model.train(self.training)
        try:
            with watched:
                call(model, self.example)
        except Exception as error:
            return error
        return None


@dataclass(frozen=True)
class Trials:
    """The cuts and calls that a model has to survive."""

    model: nn.Module
    runs: Sequence[Run]
    shares: Shares

    def failure(self, graph: Graph, groups: Sequence[Group]) -> Failure | None:
        """The first failure when these groups are cut, or None."""
        kinds = {path: type(module) for path, module in self.model.named_modules()}
        for number in range(len(self.shares)):
            shares = {group.name: self.shares.of(number, group) for group in groups}
            taken = keep_apart(graph, shares, {name: len(units) for name, units in shares.items()})
            chosen = {name: shares[name][:n] for name, n in taken.items()}
            plan, gone = draft(self.model, graph, chosen), graph.removed(chosen)
            for second, run in enumerate(self.runs):
                tells: Tells | None = Tells.STAYS
                while tells is not None:
                    with held(), undisturbed(self.model), rehearsed(self.model, plan), module_stack(self.model) as stack:
                        counter = Checker(graph, gone, stack, self._others(kinds), not run.training, tells)
                        error = run.error(self.model, counter.watching())
                        error = counter.missing() if error is None else error
                    tells = counter.again(error)
                if error is not None:
                    path = original(stack[-1].path, graph.copies)
                    text = str(error).strip().partition("\n")[0]
                    mode = " in training mode" if run.training else ""
                    where = f"{type(error).__name__} in {path or 'the model'}{mode}"
                    progress = number, second, counter.n, counter.right
                    return Failure(path, f"{where}: {text}", progress, tuple(stack[-1].unseen))
        return None

    def _others(self, kinds: Mapping[str, type]) -> set[str]:
        """Paths of modules that have changed their class."""
        return {path for path, module in self.model.named_modules() if type(module) is not kinds.get(path)}
