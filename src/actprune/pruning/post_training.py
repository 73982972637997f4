"""Post-training pruning: observe, cut, compensate and measure a trained model, with no gradient step."""

from __future__ import annotations

import copy
import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actprune.compensation import Compensation
from actprune.core.budget import Budget
from actprune.core.calling import Example, device_of, evaluating, undisturbed
from actprune.core.record import SurgeryRecord
from actprune.core.views import Criterion
from actprune.core.wrappers import unwrapped
from actprune.pruning.arguments import REFIT, check_arguments, check_data, check_wrapper
from actprune.pruning.batches import observe_pairs, pairs_of
from actprune.pruning.finishing import all_or_nothing, finish, has_finish
from actprune.pruning.gradients import Loss
from actprune.pruning.pipeline import Pruner
from actprune.pruning.select import Selection
from actprune.surgery import cut

_LOG = logging.getLogger(__name__)
LATENCY_BATCHES = (1, 64)
_REPEATS = 9


@dataclass(frozen=True)
class PostTraining:
    """What post-training pruning did."""

    record: SurgeryRecord
    """What was removed; the model carries it too."""
    score_before: float
    """What ``evaluate`` said of the trained model."""
    score_cut: float
    """The same with the same units gone and nothing folded."""
    score_after: float
    """The same of the finished model."""
    seconds: float
    """Observing, scoring, cutting and compensating; without evaluations and latencies."""
    params: tuple[int, int]
    """Before, after."""
    macs: tuple[int, int]
    """Multiply-adds of one call on the example, before and after."""
    latency: dict[int, tuple[float, float]]
    """Samples per batch -> milliseconds per batch before and after; without what the model does not take, so empty where the
    example is no single tensor."""


def prune_trained(
    model: nn.Module,
    example_inputs: Example,
    data: Iterable[Any],
    *,
    criterion: Criterion,
    budget: Budget,
    evaluate: Callable[[nn.Module], float],
    selection: Selection | None = None,
    compensation: Compensation | None = REFIT,
    seed: int = 0,
    positions: int | Literal["auto"] | None = "auto",
    loss: Loss | None = None,
) -> PostTraining:
    """Prune a trained model in place, without training, and measure what it did.

    Args:
        model: a trained module.
        example_inputs: what it takes, see ``trace``.
        data: calibration batches, as ``prune`` takes them.
        criterion: scores units.
        budget: what is left.
        evaluate: the model's quality, e.g. its accuracy; called three times at most, on the model in evaluation mode.
        selection: how units of different groups compete.
        compensation: what is folded into the layers that stay; None: nothing.
        seed: seed of criteria that draw.
        positions: how many of each unit's positions in a sample criteria see, see ``Pruner``.
        loss: for criteria that differentiate it, see ``prune``.

    Returns:
        Scores, seconds and sizes.

    Raises:
        ActPruneError: as ``prune``.

    Whatever is raised, the model is as it was.
    """
    check_data(data)
    check_arguments(criterion=criterion, budget=budget, selection=selection, compensation=compensation, seed=seed)
    check_wrapper(model)
    model = unwrapped(model)
    pairs = list(pairs_of(data, example_inputs))
    before = _evaluated(model, evaluate)
    original = copy.deepcopy(model)
    began = time.monotonic()
    pruner = Pruner(model, example_inputs, criterion, budget, selection, compensation, seed, positions)
    plan = pruner.plan(observe_pairs(pruner, pairs, loss))
    seconds = time.monotonic() - began
    sizes = (pruner.params, pruner.macs)
    plain = after = before
    if plan is not None:
        uncompensated = copy.deepcopy(model)
        cut(uncompensated, dataclasses.replace(plan, shifts={}, new_biases={}), example_inputs)
        plain = _evaluated(uncompensated, evaluate)
        began = time.monotonic()
        with all_or_nothing(model, original, pruner.execute(plan)):
            if has_finish(compensation):
                finish(model, original, pruner.graph, plan, [x for x, _ in pairs], compensation)
            seconds += time.monotonic() - began
            after = _evaluated(model, evaluate)
    return PostTraining(
        record=pruner.record,
        score_before=before,
        score_cut=plain,
        score_after=after,
        seconds=seconds,
        params=(sizes[0], pruner.params),
        macs=(sizes[1], pruner.macs),
        latency=_latency(original, model, example_inputs),
    )


def _evaluated(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    with evaluating(model), torch.no_grad():
        return float(evaluate(model))


def _latency(before: nn.Module, after: nn.Module, example: Example) -> dict[int, tuple[float, float]]:
    """Medians of interleaved calls, so that what else the machine does weighs on both alike."""
    if not isinstance(example, Tensor):
        return {}
    found = {}
    for size in LATENCY_BATCHES:
        batch = example[:1].expand(size, *example.shape[1:]).contiguous()
        times: tuple[list[float], list[float]] = ([], [])
        try:
            for _ in range(_REPEATS):
                for model, taken in zip((before, after), times, strict=True):
                    taken.append(_milliseconds(model, batch))
        except Exception as error:  # the work is done: what was measured of it is no reason to lose it
            _LOG.warning("no latency with %d samples: %s: %s", size, type(error).__name__, error)
            continue
        found[size] = (statistics.median(times[0]), statistics.median(times[1]))
    return found


def _milliseconds(model: nn.Module, batch: Tensor) -> float:
    device = device_of(model)
    batch = batch.to(device)
    with undisturbed(model):
        _wait(device)
        began = time.perf_counter()
        model(batch)
        _wait(device)
        return 1e3 * (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
