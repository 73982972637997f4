"""The pipeline: observe, score, select, compensate, cut."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from actprune.compensation import Compensation, Mean
from actprune.core.budget import Budget
from actprune.core.calling import Example
from actprune.core.copied import Copies, checked
from actprune.core.errors import BudgetError, ConfigError, ObservationError
from actprune.core.plan import Plan
from actprune.core.record import SurgeryRecord, carry, parts_of, record_of, whole_record
from actprune.core.signals import held
from actprune.core.tensors import real
from actprune.core.views import Criterion, GroupView, Reader
from actprune.graph import Graph, Group
from actprune.pruning.arguments import as_optimizers, check_arguments, check_example, check_model, check_unchanged
from actprune.pruning.biases import with_room_for_biases
from actprune.pruning.ignoring import ignored
from actprune.pruning.observe import Observation
from actprune.pruning.plans import compensated, draft
from actprune.pruning.readers import readers_of
from actprune.pruning.scored import scored
from actprune.pruning.select import Selection, select, select_below
from actprune.pruning.verify import Repairs, rehearse, traced, with_locks
from actprune.pruning.weights import columns_of, norms_of, owned
from actprune.statistics import Density, check_positions, enough
from actprune.surgery import Transaction, cut
from actprune.surgery.tensors import lookup

_LOG = logging.getLogger(__name__)
_DEFAULT = Mean()


class Pruner:
    """Prunes one model in one or several steps.

    Args:
        model: any module; pruned in place.
        example_inputs: what the model takes: a tensor, a tuple of arguments, a dict of keyword arguments, a list as the one
            argument, or a callable that takes the model.
        criterion: scores units.
        budget: what is left at the end, as a share of the model as it was before any pruning.
        selection: how units of different groups compete.
        compensation: what is folded into the layers that stay; None cuts plainly.
        seed: of criteria that draw.
        positions: how many of each unit's positions in a sample criteria see; None: all; "auto": fewer if samples are many.
        known: what ``known`` of an earlier pruner of this model said, whose groups these shall be; nothing is rehearsed then.
        copies: dotted name of a part that averages another -> name of that one; it takes the same cuts and is not counted.

    Raises:
        TraceError: the model fails on the example inputs.
        BudgetError: no unit may leave, or the budget is out of reach.
        ConfigError: an argument is of another kind, or ``selection.ignore`` or ``copies`` names no module.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Example,
        criterion: Criterion,
        budget: Budget,
        selection: Selection | None = None,
        compensation: Compensation | None = _DEFAULT,
        seed: int = 0,
        positions: int | Literal["auto"] | None = "auto",
        known: Mapping[str, Any] | None = None,
        copies: Copies | None = None,
    ) -> None:
        check_model(model)
        check_example(example_inputs)
        check_arguments(criterion=criterion, budget=budget, selection=selection, compensation=compensation, seed=seed)
        self.model, self.example_inputs = model, example_inputs
        self.criterion, self.budget = criterion, budget
        self.selection = selection or Selection()
        self.compensation = compensation
        self.seed, self.positions = seed, positions
        check_positions(positions)
        self._copies = checked(model, copies or {})
        if known is None:
            self.graph, self._repairs = rehearse(model, example_inputs, self._copies)
        else:
            self._repairs = Repairs.from_dict(known["repairs"])
            self.graph = traced(model, example_inputs, self._repairs, self._copies)
        record = record_of(model)
        first = record.steps[0] if record.steps else None
        self.params_before = first["params_before"] if first else self.graph.params
        """Parameters of the model before any pruning."""
        self.macs_before = record.macs_before(self.graph.macs)
        """Multiply-adds of one call on the example before any pruning; in proportion where another example was used then."""
        self.graph = self._without_unseen(self.graph)
        widths = {g.name: record.widths.get(g.name, [g.size])[0] for g in self.graph.unlocked}
        self._original_widths: dict[str, int] = widths if known is None else dict(known["widths"])
        self.graph = self._without_strangers(self.graph)
        self.check_budget()

    def known(self) -> dict[str, Any]:
        """What the rehearsal found out, in plain containers: a trace of a cut model may see other groups."""
        return {"repairs": self._repairs.to_dict(), "widths": dict(self._original_widths)}

    def _traced(self) -> Graph:
        graph = traced(self.model, self.example_inputs, self._repairs, self._copies)
        return self._without_strangers(self._without_unseen(graph))

    def _now(self) -> dict[str, int]:
        """Width of every group that may be cut, by the record: a group of one unit may look like another one to a new trace."""
        widths = self.record.widths
        return {name: widths.get(name, [before, before])[1] for name, before in self._original_widths.items()}

    def _without_strangers(self, graph: Graph) -> Graph:
        """Lock groups that came into being by a cut, finer than those counted: ``max_ratio`` of the original would not hold."""
        expected = self._now()
        why = "its units are parts of the last unit of a group that was cut"
        return with_locks(graph, {g.name: why for g in graph.unlocked if expected.get(g.name) != g.size})

    def _without_unseen(self, graph: Graph) -> Graph:
        """Lock what is ignored, and what a criterion of activations cannot score: branches of training mode, for one."""
        graph = with_locks(graph, ignored(self.model, graph, self.selection.ignore))
        if not self.criterion.statistics():
            return graph
        why = f"no layer reads it in evaluation mode, so {type(self.criterion).__name__} has nothing to score it by"
        return with_locks(graph, {g.name: why for g in graph.unlocked if not g.sites})

    @property
    def record(self) -> SurgeryRecord:
        """The surgery record that the model carries."""
        return record_of(self.model)

    @property
    def params(self) -> int:
        """Parameters now."""
        return self.graph.params

    @property
    def macs(self) -> int:
        """Multiply-adds of one call on the example now."""
        return self.graph.macs

    @property
    def units(self) -> int:
        """Units of all groups that may be cut, now."""
        return sum(self._now().values())

    @property
    def units_before(self) -> int:
        """Units of all groups that may be cut, before any pruning."""
        return sum(self._original_widths.values())

    def widths(self) -> list[tuple[str, int, int]]:
        """(group, width before any pruning, width now) of every group that may be cut."""
        now = self._now()
        return [(name, before, now[name]) for name, before in self._original_widths.items()]

    def target(self, due: float) -> float:
        """Parameters, MACs or units that may be left when ``due`` in [0, 1] of the whole reduction is due."""
        left = self.budget.due(due) * float(getattr(self, f"{self.budget.unit}_before"))
        return math.floor(left + 1e-6) if self.budget.unit == "units" else left

    def _target_now(self, due: float) -> float:
        """The target of what the graph counts: units of a group that can no longer be cut are left anyway."""
        return self.target(due) - (self.units - self.graph.units if self.budget.unit == "units" else 0)

    def check_budget(self) -> None:
        """Fail now if the whole budget cannot be reached; where it is only a limit, if no unit may leave.

        Raises:
            BudgetError: locked groups and ``max_ratio`` keep more than the budget.
            ObservationError: the criterion has nothing to score any group by.
        """
        if not self.graph.unlocked:
            reasons = "; ".join(f"{g.name}: {g.locked}" for g in self.graph.groups[:5])
            raise BudgetError(
                f"{type(self.model).__name__} has no group whose units may leave ({reasons or 'no layers found'}); "
                "print(actprune.trace(model, example_inputs)) shows every lock"
            )
        if self.criterion.threshold is not None:
            return
        may = [group for group in self.graph.unlocked if self._may_score(group)]
        if not may:
            self._tell_unscored([group.name for group in self.graph.unlocked])
        anything = {g.name: torch.arange(g.size, dtype=torch.float64, device="cpu") for g in may}
        select(self.graph, anything, self.budget.unit, self._target_now(1.0), self.selection, self._original_widths)

    def _may_score(self, group: Group) -> bool:
        """Whether the criterion may have a score for a group, as far as it is known before anything is observed."""
        if self.criterion.needs_readers and self.compensation is None and not self.criterion.statistics():
            return False  # it has nothing else to go by
        return self.criterion.may_score(self._view(group, None))

    @contextmanager
    def observe(self, expected: int | None = None) -> Iterator[Observation]:
        """Accumulate statistics of what flows through the model inside the block; hooks are gone after it."""
        observation = self.observation(expected)
        with observation.recording():
            yield observation

    def observation(self, expected: int | None = None) -> Observation:
        """An observation of the model as it is now, of about so many samples; ``with observation.recording():`` records."""
        density = enough(expected) if isinstance(self.positions, str) else Density(self.positions)
        return Observation(self.model, self.graph, self.criterion, self.compensation, density)

    def scores(self, observation: Observation | None) -> dict[str, Tensor]:
        """Group name -> (U,) float64 scores of every unlocked group; groups that the criterion cannot score are left out.

        Raises:
            ObservationError: the criterion needs activations that were not observed, scores are not finite, or there are none.
        """
        if observation is not None:
            observation.check(self.graph)
        elif self.criterion.statistics():
            raise ObservationError(f"{type(self.criterion).__name__} scores activations; observe validation batches first")
        found = {}
        own = cache(partial(owned, self.model, self.graph))
        for group in self.graph.unlocked:
            score = scored(self.criterion, self._view(group, observation, own))
            if score is not None:
                found[group.name] = score
        self._tell_unscored([g.name for g in self.graph.unlocked if g.name not in found])
        return found

    def _view(
        self, group: Group, observation: Observation | None, own: Callable[[], dict[str, list[Tensor]]] = dict
    ) -> GroupView:
        """A group as the criterion sees it; ``own``: what the units of every group own."""
        return GroupView(
            name=group.name,
            size=group.size,
            statistics=observation.scores.get(group.name, {}) if observation is not None else {},
            slices=partial(self._slices, group),
            seed=self.seed + len(self.record.steps),
            readers=partial(self._readers, observation, group),
            frees=partial(self._freed, group),
            columns=partial(columns_of, self.model, self.graph, group),
            norms=partial(norms_of, self.model, group),
            own=lambda: own().get(group.name, []),
        )

    def _freed(self, group: Group) -> float:
        """Share of the budgeted quantity that one unit frees."""
        whole = self.graph.left(self.budget.unit)
        return max(whole - self.graph.left(self.budget.unit, self.graph.removed({group.name: [0]})), 1) / whole

    def _tell_unscored(self, names: list[str]) -> None:
        if not names:
            return
        listed = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        what = f"{type(self.criterion).__name__} scores {{}} of {len(self.graph.unlocked)} groups: {self.criterion.unscored}"
        if len(names) == len(self.graph.unlocked):
            raise ObservationError(f"{what.format('none')} (groups: {listed})")
        _LOG.warning("%s; these stay whole: %s", what.format(len(self.graph.unlocked) - len(names)), listed)

    def _readers(self, observation: Observation | None, group: Group) -> list[Reader]:
        return readers_of(self.model, self.graph, observation, group) if observation is not None else []

    def _slices(self, group: Group) -> list[Tensor]:
        """Everything that leaves with a unit: (U, n_elements) per parameter dimension."""
        slices = []
        parameters = dict(self.model.named_parameters())
        for (name, dim), positions in group.members.items():
            if name in parameters:
                tensor = parameters[name].detach().movedim(dim, 0)
                index = torch.from_numpy(positions).flatten().to(tensor.device)
                slices.append(real(tensor[index].reshape(group.size, -1)))
        return slices

    def plan(self, observation: Observation | None, due: float = 1.0) -> Plan | None:
        """Decide what leaves now.

        Args:
            observation: statistics of the model as it is; None suffices for criteria and compensations that need none.
            due: share of the whole reduction that is due now, in [0, 1]; no matter to a criterion with a threshold.

        Returns:
            The plan, or None where the target is met already or no unit scores below the threshold.

        Raises:
            BudgetError: the target is out of reach.
            ConfigError: ``due`` is outside [0, 1].
            ObservationError: activations are missing or not finite.
            SurgeryError: the model was changed since it was traced.
        """
        if not 0 <= due <= 1:
            raise ConfigError(f"due={due!r} must be the share of the whole reduction that is due now, in [0, 1]")
        check_unchanged(self.model, self.graph)
        if self.compensation is not None and observation is None:
            raise ObservationError(
                f"{type(self.compensation).__name__} compensation needs activations; observe validation batches first, "
                "or pass compensation=None"
            )
        scores = self.scores(observation)
        units = self._units(scores, due)
        counts = self.budget.unit == "params" and self.criterion.threshold is None
        if counts and self.compensation is not None and observation is not None:
            fewer = partial(self._units, scores, due)
            units = with_room_for_biases(units, fewer, self._target_now(due), self.model, self.graph, observation.folds)
        if not units:
            return None
        plan = draft(self.model, self.graph, units)
        if self.compensation is not None and observation is not None:
            plan = compensated(plan, self.model, self.graph, units, observation, self.compensation)
        return plan

    def _units(self, scores: dict[str, Tensor], due: float, room: int = 0) -> dict[str, list[int]]:
        unit, originals, threshold = self.budget.unit, self._original_widths, self.criterion.threshold
        if threshold is not None:
            return select_below(self.graph, scores, threshold, unit, self._target_now(1.0), self.selection, originals)
        selection = self.selection
        if selection.normalise is None and self.criterion.comparable:
            selection = dataclasses.replace(selection, normalise="none")
        return select(self.graph, scores, unit, self._target_now(due) - room, selection, originals)

    def execute(self, plan: Plan, optimizers: Optimizer | Iterable[Optimizer] = ()) -> Transaction:
        """Cut the model and the optimizers' state; extend the record; trace anew.

        Returns:
            What takes the cut back, as long as nothing else was done to the model; this pruner is of no use after that.

        Raises:
            SurgeryError: the cut model does not run; model and optimizers are as they were. Or the model was changed since it
                was traced.
        """
        check_unchanged(self.model, self.graph)
        shapes = {name: tuple(lookup(self.model, name).shape) for name in plan.removed}
        sizes, record = {g.name: g.size for g in self.graph.groups}, whole_record(self.model)
        with held():  # tensors and record change together
            changes = cut(self.model, plan, self.example_inputs, as_optimizers(optimizers))
            try:
                for path, part in parts_of(self.model).items():
                    changes.did(partial(carry, self.model.get_submodule(path), part))
                changes.did(partial(carry, self.model, self.record if self.record.steps else None))
                record.extend(plan, shapes, sizes)
                carry(self.model, record)
                self.graph = self._traced()
            except BaseException:
                changes.roll_back()
                raise
        return changes
