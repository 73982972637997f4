"""What groups of units contribute to the task: the effect of replacing some of them by their means, and what criteria said.

For every group: the parameters and MACs that leave with all of it, every criterion's score of every unit, and loss and accuracy
when the lowest and the highest share of it by each criterion, a random share, or one unit alone is replaced. A share of every
group at once gives the same for the whole network. Criteria observe one set of samples, the effect is measured on another.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from actprune.compensation import Compensation
from actprune.core.budget import Budget
from actprune.core.calling import Example, call, device_of, undisturbed
from actprune.core.errors import ConfigError, ObservationError
from actprune.core.tensors import listed
from actprune.core.views import Criterion
from actprune.criteria import Random
from actprune.graph import Group
from actprune.pruning.arguments import REFIT
from actprune.pruning.batches import Pair, as_fed, observe_pairs, pairs_of
from actprune.pruning.fingerprint import fingerprint
from actprune.pruning.judging import Judge, classification, judged
from actprune.pruning.panel import Panel
from actprune.pruning.pieces import Pieces
from actprune.pruning.pipeline import Pruner
from actprune.pruning.prefix import prefixed
from actprune.pruning.removals import ALONE, RANDOM, Removals, drawn_order, removal_rows
from actprune.pruning.replacement import Replacement, Units

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removal:
    """The network with a share of its units replaced."""

    criterion: str
    end: str
    """``lowest``, ``highest`` or ``random``."""
    share: float
    units: int
    """How many units were replaced."""
    loss: float
    accuracy: float
    """A random share: means over the draws."""


@dataclass(frozen=True)
class GroupInfluence:
    """One group."""

    name: str
    size: int
    params: int
    """Parameters that leave with all of its units."""
    macs: int
    """Multiply-adds of one call on the example that leave with all of its units."""
    scores: Mapping[str, Sequence[float]]
    """Criterion -> score of every unit; without the criteria that have nothing to go by here."""
    units: Sequence[int]
    """The units that were replaced alone."""
    unit_loss: Sequence[float]
    """Loss with each of them replaced, less the loss of the whole network."""
    unit_accuracy: Sequence[float]
    """Accuracy likewise."""
    removals: Sequence[Removal]
    unit_loss_halves: Sequence[Sequence[float]] = ()
    """(2, units): ``unit_loss`` on every other sample, and on those between; how far they differ is noise."""
    n_alone: int = 0
    """Samples on which these were measured."""


@dataclass(frozen=True)
class Influence:
    """What ``analyze`` measured."""

    params: int
    macs: int
    loss: float
    """Mean loss of the whole network on the samples on which shares are measured."""
    accuracy: float
    n_observed: int
    """Samples that the criteria saw."""
    n_measured: int
    """Samples on which the whole network and shares were measured."""
    criteria: Sequence[str]
    groups: Sequence[GroupInfluence]
    """The groups that can be cut and are read in evaluation mode, in execution order."""
    whole: Sequence[Removal]
    """The same share of every group replaced at once."""
    seconds_before: float = field(default=0.0, compare=False)
    """Wall time that earlier calls took for what was in ``folder``; without what was broken off half done."""


def analyze(
    model: nn.Module,
    example_inputs: Example,
    data: Iterable[Any],
    validation: Iterable[tuple[Any, Any]],
    *,
    criteria: Mapping[str, Criterion],
    removals: Removals | None = None,
    judge: Judge = classification,
    compensation: Compensation | None = REFIT,
    positions: int | Literal["auto"] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Influence:
    """Measure what every group and its units contribute, and what criteria say of them; the model stays as it is.

    Args:
        model: a trained module.
        example_inputs: what it takes, see ``trace``.
        data: batches that the criteria observe, as ``prune`` takes them; with targets where criteria need them.
        validation: batches of inputs and targets on which the effect is measured; other samples than ``data``.
        criteria: name -> criterion; ``random`` is the baseline ``Random`` and is added.
        removals: what is replaced.
        judge: loss and rightness of every sample; the default is that of a classifier.
        compensation: whose second moments criteria such as ``Reconstruction`` read; None: none, and these score nothing.
        positions: how many of each unit's positions in a sample criteria see; None: all, for what is measured takes much longer
            than observing, and with few the choice of units at the edge of a share is partly chance; "auto": as ``Pruner``.
        folder: where finished groups are kept, so that an analysis that was broken off goes on; None keeps nothing.
        progress: called with the pieces done, the pieces in all and what comes next.

    Returns:
        Everything that was measured.

    Raises:
        ConfigError: the folder holds another analysis, or ``random`` is another criterion.
        ActPruneError: as ``prune``.
    """
    removals = removals or Removals()
    if type(baseline := criteria.get(RANDOM, Random())) is not Random:
        raise ConfigError(
            f"criteria[{RANDOM!r}] is {type(baseline).__name__}: that name is of the baseline, whose removals are drawn; "
            "give it another name"
        )
    panel = Panel({**criteria, RANDOM: baseline})
    batches, pairs = list(data), list(validation)
    if not pairs or any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs):
        raise ObservationError("validation must yield 1 or more batches, each a pair of inputs and targets")
    pairs = [(as_fed(inputs, example_inputs), targets) for inputs, targets in pairs]
    panel.needs_readers &= compensation is not None  # else nobody observes them, and others of the panel score all the same
    pruner = Pruner(
        model, example_inputs, panel, Budget(units=0.999), compensation=compensation, seed=removals.seed, positions=positions
    )
    groups = [group for group in pruner.graph.unlocked if group.sites]
    made_from = (model, example_inputs, panel.criteria, removals, (batches, pairs), judge, compensation)
    # a fingerprint reads all of the data
    pieces = Pieces(folder, {} if folder is None else {**fingerprint(*made_from), "positions": positions})
    tell = progress or _say_nothing
    total = len(groups) + 2

    tell(0, total, "observing")
    replacement = Replacement(model, pruner.graph)
    observed = list(pairs_of(batches, example_inputs))
    scores = pieces.get("scores", partial(_scores, pruner, panel, observed, judge))
    with undisturbed(model):
        with replacement.observing():
            for inputs, _ in observed:
                call(model, inputs)
        with replacement.replacing():
            measure = _Measure(model, replacement, pairs, judge)
            found = []
            for number, group in enumerate(groups):
                tell(number + 1, total, group.name)
                make = partial(_group, group, scores["groups"][group.name], pruner, removals, measure)
                found.append(pieces.get(f"group{number:03d}", make))
            tell(total - 1, total, "whole network")
            whole = pieces.get("whole", partial(_whole, groups, scores["groups"], removals, measure))
    _tell_unscored(panel.criteria, groups, scores["groups"])
    tell(total, total, "done")
    return Influence(
        params=pruner.params,
        macs=pruner.macs,
        loss=whole["loss"],
        accuracy=whole["accuracy"],
        n_observed=scores["n_observed"],
        n_measured=whole["n_measured"],
        criteria=tuple(panel.criteria),
        groups=tuple(GroupInfluence(**{**g, "removals": [Removal(**r) for r in g["removals"]]}) for g in found),
        whole=tuple(Removal(**r) for r in whole["removals"]),
        seconds_before=pieces.seconds_before,
    )


def _say_nothing(done: int, total: int, name: str) -> None:
    """No progress is shown."""


def _tell_unscored(criteria: Mapping[str, Criterion], groups: Sequence[Group], scores: Mapping[str, Mapping[str, Any]]) -> None:
    for name, criterion in criteria.items():
        without = [group.name for group in groups if name not in scores[group.name]]
        if without:
            n, listed = len(groups) - len(without), f"{', '.join(without[:5])}{', ...' if len(without) > 5 else ''}"
            _LOG.warning("%s scores %s of %d groups: %s (not: %s)", name, n or "none", len(groups), criterion.unscored, listed)


def _scores(pruner: Pruner, panel: Panel, observed: Sequence[Pair], judge: Judge) -> dict[str, Any]:
    loss = None if judge is classification else lambda outputs, targets: judge(outputs, targets)[:, 0].mean()
    observation = observe_pairs(pruner, observed, loss)
    pruner.scores(observation)
    said = {group: {name: score.tolist() for name, score in by.items()} for group, by in panel.scores.items()}
    return {"n_observed": observation.n_samples, "groups": said}


class _Measure:
    """Loss and accuracy with units replaced; what several choices of one group have in common is computed once."""

    def __init__(self, model: nn.Module, replacement: Replacement, pairs: Sequence[Any], judge: Judge) -> None:
        self.model, self.replacement, self.pairs, self.judge = model, replacement, pairs, judge

    def __call__(self, choices: Sequence[Units], first: Iterable[str], limit: int | None = None) -> tuple[Tensor, Tensor, int]:
        """Mean loss and accuracy, of the whole network and then of every choice.

        Args:
            choices: what to replace, each in a forward of its own.
            first: the modules that read what the choices replace.
            limit: of samples, after which no further batch is measured.

        Returns:
            (choices + 1, 2) over all samples; (choices + 1, 2, 2) over every other sample and those between; their number.
        """
        sums, n = torch.zeros(len(choices) + 1, 2, 2, dtype=torch.float64, device="cpu"), 0
        for inputs, targets in self.pairs:
            if limit is not None and n >= limit:
                break
            self.replacement.choose({})
            with prefixed(self.model, list(first), partial(call, self.model, inputs)) as (plain, forward):
                whole = self._judged(plain, targets)
                half = (listed(range(len(whole))) + n) % 2
                n += len(whole)
                sums[0].index_add_(0, half, whole)
                for number, units in enumerate(choices, start=1):
                    self.replacement.choose(units)
                    sums[number].index_add_(0, half, self._judged(forward(), targets))
        self.replacement.choose({})
        return sums.sum(1) / n, sums / torch.tensor([n - n // 2, max(n // 2, 1)], device="cpu").view(2, 1), n

    def _judged(self, outputs: Any, targets: Any) -> Tensor:
        device = device_of(self.model)
        return judged(self.judge, outputs, tree_map_only(Tensor, lambda x: x.to(device), targets))


def _group(
    group: Group, scores: Mapping[str, Sequence[float]], pruner: Pruner, removals: Removals, measure: _Measure
) -> dict[str, Any]:
    alone = sorted(drawn_order([0] * group.size, removals.seed, ALONE, group)[: removals.n_units])
    rows = removal_rows({group.name: scores}, [group], removals)
    reads = measure.replacement.reads(group.name)
    single, halves, n_alone = measure([{group.name: [unit]} for unit in alone], reads)
    rise, halves = (single - single[0])[1:], (halves - halves[0])[1:]
    sets = sorted({choice[group.name] for _, choices in rows for choice in choices}, key=sorted)
    results, _, _ = measure([{group.name: units} for units in sets], reads, removals.samples)
    place = {units: k for k, units in enumerate(sets, start=1)}
    everything = pruner.graph.removed({group.name: range(group.size)})
    cost = pruner.graph.cost
    return {
        "name": group.name,
        "size": group.size,
        "params": cost.evaluate("params") - cost.evaluate("params", everything),
        "macs": cost.evaluate("macs") - cost.evaluate("macs", everything),
        "scores": dict(scores),
        "units": alone,
        "unit_loss": rise[:, 0].tolist(),
        "unit_accuracy": rise[:, 1].tolist(),
        "unit_loss_halves": halves[..., 0].T.tolist(),
        "n_alone": n_alone,
        "removals": [_removal(row, results[[place[choice[group.name]] for choice in choices]]) for row, choices in rows],
    }


def _whole(
    groups: Sequence[Group], scores: Mapping[str, Mapping[str, Sequence[float]]], removals: Removals, measure: _Measure
) -> dict[str, Any]:
    rows = removal_rows(scores, groups, removals)
    choices = [choice for _, several in rows for choice in several]
    first = {path for group in groups for path in measure.replacement.reads(group.name)}
    results, _, n = measure(choices, first, removals.samples)
    left = iter(results[1:])
    return {
        "loss": float(results[0][0]),
        "accuracy": float(results[0][1]),
        "n_measured": n,
        "removals": [_removal(row, torch.stack([next(left) for _ in several])) for row, several in rows],
    }


def _removal(row: tuple[str, str, float, int], results: Tensor) -> dict[str, Any]:
    loss, accuracy = results.mean(0).tolist()
    return asdict(Removal(*row, loss=loss, accuracy=accuracy))
