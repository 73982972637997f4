"""The library call: observe, score, select, compensate and cut a model once, without training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from actprune.compensation import Compensation
from actprune.core.budget import Budget
from actprune.core.calling import Example
from actprune.core.errors import ObservationError
from actprune.core.record import SurgeryRecord
from actprune.core.views import Criterion
from actprune.core.wrappers import unwrapped
from actprune.pruning.arguments import REFIT, as_optimizers, check_arguments, check_data, check_wrapper, tell_strangers
from actprune.pruning.batches import expected_samples, observe_pairs, pairs_of
from actprune.pruning.finishing import all_or_nothing, finish, has_finish, holding
from actprune.pruning.gradients import Loss
from actprune.pruning.pipeline import Pruner
from actprune.pruning.select import Selection


def prune(
    model: nn.Module,
    example_inputs: Example,
    data: Iterable[Any] | None = None,
    *,
    criterion: Criterion,
    budget: Budget,
    selection: Selection | None = None,
    compensation: Compensation | None = REFIT,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    seed: int = 0,
    positions: int | Literal["auto"] | None = "auto",
    loss: Loss | None = None,
) -> SurgeryRecord:
    """Prune a model in place, in one step, without training.

    Args:
        model: any module; of one that is compiled or wrapped by ``DataParallel`` the module inside is pruned.
        example_inputs: what the model takes, see ``trace``.
        data: batches to observe, each as the model takes it, a pair of inputs and targets, or a mapping with targets under
            ``labels``, ``label``, ``targets``, ``target`` or ``y``; targets are for criteria of labels or of the loss. Not
            needed where neither the criterion nor the compensation looks at activations.
        criterion: scores units.
        budget: what is left.
        selection: how units of different groups compete.
        compensation: what is folded into the layers that stay; None: nothing; by default ``LeastSquares()`` if there are data.
        optimizers: those that train the model's parameters and shall go on.
        seed: of criteria that draw.
        positions: how many of each unit's positions in a sample criteria see, see ``Pruner``.
        loss: for criteria that differentiate it: of outputs and targets, the mean over the batch's samples; by default the
            ``loss`` that the model reports, else cross entropy with integer classes.

    Returns:
        The surgery record, which the model carries too.

    Raises:
        TraceError: the model fails on the example inputs.
        BudgetError: the budget is out of reach.
        ConfigError: the loss is needed, is not given and is no classification.
        ObservationError: data or labels are missing, or activations are NaN or infinite.
        SurgeryError: the cut model does not run.

    Whatever is raised, model and optimizers are as they were.
    """
    check_arguments(criterion=criterion, budget=budget, selection=selection, compensation=compensation, seed=seed)
    check_wrapper(model)
    model, trained = unwrapped(model), as_optimizers(optimizers)
    tell_strangers(model, trained)
    if data is None and compensation is not None and compensation is not REFIT:
        raise ObservationError(
            f"{type(compensation).__name__} compensation needs activations: pass data=, an iterable of input batches"
        )
    if data is None and criterion.statistics():
        raise ObservationError(f"{type(criterion).__name__} scores activations: pass data=, an iterable of input batches")
    how = compensation if data is not None else None
    pruner = Pruner(model, example_inputs, criterion, budget, selection, how, seed, positions)
    if data is None:
        plan, batches = pruner.plan(None), list[Example]()
    else:
        check_data(data)
        pairs, batches = holding(pairs_of(data, example_inputs), model, compensation, example_inputs)
        plan = pruner.plan(observe_pairs(pruner, pairs, loss, expected_samples(data, example_inputs)))
    if plan is not None:
        original = copy.deepcopy(model) if batches else None
        changes = pruner.execute(plan, trained)
        if original is not None and has_finish(compensation):
            with all_or_nothing(model, original, changes):
                finish(model, original, pruner.graph, plan, batches, compensation)
    return pruner.record
