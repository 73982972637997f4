"""Find the networks of a LightningModule: before training where validation can be run outside the loop, else while it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning import LightningModule, Trainer

from actprune.core.errors import BudgetError, ConfigError, ObservationError
from actprune.pruning import Pruner
from actprune.pruning.ignoring import for_each
from actprune.training.copies import check_apart, check_copies, copies_within, stand_ins
from actprune.training.events import say
from actprune.training.example import Network, Watcher, check_alone, check_wanted, from_example_input_array
from actprune.training.probe import validation_networks
from actprune.training.replay import is_network_part
from actprune.training.resume import CheckpointHooks


def names(modules: Sequence[str] | None) -> tuple[str, ...]:
    """The names of modules that a user gave.

    Raises:
        ConfigError: it is one string, which would be taken letter by letter; or names nothing.
    """
    if isinstance(modules, str):
        raise ConfigError(f"modules={modules!r} must be a list of names, e.g. [{modules!r}]")
    if modules is not None and not modules:
        raise ConfigError(f"modules={modules!r} names nothing to prune; leave it at null (None) for the whole network")
    return tuple(modules or ())


class Finder:
    """Looks for the networks until it knows all of them.

    Args:
        task: the LightningModule.
        hooks: its checkpoint hooks, which are told where the networks are.
        modules: dotted names of the networks; empty: what validation runs.
        copies: dotted name of a copy -> of what it is one.

    """

    def __init__(
        self, task: LightningModule, hooks: CheckpointHooks, modules: Sequence[str], copies: Mapping[str, str]
    ) -> None:
        self.networks: dict[str, Network] = {}
        """Dotted name -> network; empty until all are known."""
        self._task, self._hooks, self._modules, self._copies = task, hooks, modules, copies
        hooks.known = {}  # of another run; a checkpoint that is resumed brings that of its own
        self._watcher: Watcher | None = None

    def check_names(self) -> None:
        """Every module is there, also those that ``setup`` and ``configure_model`` build.

        Raises:
            ConfigError: a name is wrong.
        """
        check_wanted(self._task, self._modules)
        check_copies(self._task, self._copies)

    def probe(self, trainer: Trainer) -> bool:
        """Run one validation batch outside the loop; whether the networks are known now, and were not before.

        Raises:
            ActPruneError: validation has no batch or runs no network, or a network cannot be pruned by itself.
        """
        if self.networks:
            return False
        found = validation_networks(trainer, self._task, self._modules, self._copies)
        if found is None and not self._modules:
            network = from_example_input_array(self._task)
            found = None if network is None else [network]
        return self._take(found)

    def begin(self, batch: Any, dataloader_idx: int) -> None:
        """A validation batch comes: watch it, unless the networks are known."""
        if not self.networks:
            self._watcher = self._watcher or Watcher(self._task, self._modules, self._copies)
            self._watcher.start(batch, dataloader_idx)

    def end(self, batch: Any, dataloader_idx: int) -> bool:
        """A validation batch is done; whether the networks are known now, and were not before.

        Raises:
            ActPruneError: the step ran no network, or a network cannot be pruned by itself.
        """
        if self._watcher is None:
            return False
        self._watcher.stop()
        return self._take(self._watcher.networks(batch, dataloader_idx))

    def check(self) -> None:
        """Validation is over.

        Raises:
            ConfigError: a module that is to be pruned took no part in it.
        """
        if self._watcher is not None:
            missing = self._watcher.missing
            others = {path: stand_ins(self._task, path, self._copies) for path in missing}
            way_out = "take it out of modules, or run it in validation_step"
            if others and all(others.values()):
                instead = list(dict.fromkeys(others[path][0] if path in missing else path for path in self._modules))
                runs = ", ".join(" or ".join(names) for names in others.values())
                way_out = f"if it runs {runs} instead, name that: modules={instead}; the other takes the same cuts"
            raise ConfigError(
                f"validation never ran {', '.join(map(repr, missing))}, so nothing can be observed there; {way_out}"
            )

    def pruners(self, **settings: Any) -> dict[str, Pruner]:
        """Trace every network; arguments go to ``Pruner``.

        Raises:
            ActPruneError: a network cannot be traced, or the budget cannot be reached.
        """
        seed, made = int(os.environ.get("PL_GLOBAL_SEED", 0)), {}
        selections = for_each(settings.pop("selection"), [network.module for network in self.networks.values()])
        needs_labels = any(make(1).needs_labels for make in settings["criterion"].statistics().values())
        for network, chosen in zip(self.networks.values(), selections, strict=True):
            if needs_labels and network.unlabelled:
                raise ObservationError(network.unlabelled)
            try:
                settings["copies"] = copies_within(self._task, network.path, self._copies)
                known = self._hooks.known.get(network.path)
                pruner = Pruner(network.module, network.example_inputs, selection=chosen, seed=seed, known=known, **settings)
            except BudgetError as error:
                raise BudgetError(f"{error}{self._advice(network)}") from error
            self._hooks.known[network.path] = pruner.known()
            made[network.path] = pruner
        return made

    def stop(self) -> None:
        """Remove hooks; harmless when there are none."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None

    def _advice(self, network: Network) -> str:
        parts = [name for name, child in self._task.named_children() if is_network_part(child)]
        if network.module is not self._task or len(parts) < 2:
            return ""
        some = ", ".join([*parts[:8], *(["..."] if len(parts) > 8 else [])])
        return f"; if not all of {type(self._task).__name__} is to be pruned, modules=[...] names what is, of {some}"

    def _take(self, found: Sequence[Network] | None) -> bool:
        if found is None:
            return False
        for network in found:
            check_alone(self._task, network)
        check_apart(self._task, [network.path for network in found], self._copies)
        self._watcher = None
        self.networks = {network.path: network for network in found}
        self._hooks.paths = list(self.networks)
        self._tell_frozen()
        return True

    def _tell_frozen(self) -> None:
        """Say so where a whole LightningModule is pruned and a part of it is frozen: it may be a teacher, or a loss."""
        if "" not in self.networks:
            return
        parts = {name: child for name, child in self._task.named_children() if is_network_part(child)}
        for copy in copies_within(self._task, "", self._copies):
            parts = {name: child for name, child in parts.items() if copy not in (name, f"{name}.module")}
        frozen = [name for name, child in parts.items() if not any(p.requires_grad for p in child.parameters())]
        if frozen and len(frozen) < len(parts):
            rest = [name for name in parts if name not in frozen]
            say(
                self._task,
                f"all of {type(self._task).__name__} is pruned, also what is frozen ({', '.join(frozen)}); "
                f"if that is a teacher or a loss, name what is to be pruned: modules={rest}",
            )
