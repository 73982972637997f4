"""What compensation does once the cut is made, where calibration data are at hand: sequential refit, then recalibration."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from actprune.compensation import Compensation, LeastSquares, recalibrate
from actprune.core.calling import Example, call, undisturbed
from actprune.core.plan import Plan
from actprune.graph import Graph
from actprune.pruning.sequential import refit
from actprune.surgery import Transaction

_LOG = logging.getLogger(__name__)


def has_finish(how: Compensation | None) -> TypeGuard[LeastSquares]:
    """Whether the compensation goes on after the cut and needs the data again."""
    return isinstance(how, LeastSquares) and (how.refit == "sequential" or _recalibrates(how))


def _recalibrates(how: LeastSquares) -> bool:
    return how.refit == "once" if how.recalibrate is None else how.recalibrate


def holding(
    pairs: Iterable[tuple[Example, Any]], model: nn.Module, how: Compensation | None, example: Example
) -> tuple[Iterator[tuple[Example, Any]], list[Example]]:
    """Pass batches on, and hold the inputs that ``finish`` will need; nothing else of the data stays in memory.

    Args:
        pairs: inputs and targets of every batch.
        model: the model that will read them.
        how: the compensation.
        example: a batch that the model is known to take.

    Returns:
        The same pairs, and a list that fills with inputs while they are read: all of them where batch norms are
        recalibrated, else as many as the sequential refit takes.
    """
    inputs: list[Example] = []
    if not has_finish(how):
        return iter(pairs), inputs
    limit = math.inf if _recalibrates(how) else _most(model, example, how.memory)

    def passing() -> Iterator[tuple[Example, Any]]:
        seen = 0
        for batch, targets in pairs:
            if seen <= limit:
                inputs.append(batch)
                seen += batch_size(batch)
            yield batch, targets

    return passing(), inputs


def _most(model: nn.Module, batch: Example, memory: int) -> int:
    """How many samples a sequential refit takes; 0 where batches cannot be joined, or the model insists on a number of them."""
    if not _joinable(batch):
        return 0
    try:
        return max(1, memory // bytes_per_sample(model, tree_map(lambda x: x[:2], batch)))
    except Exception:  # the model is known to take the batch: it insists on its number of samples
        return 0


def _joinable(batch: Example) -> bool:
    if callable(batch) or isinstance(batch, list):
        return False
    n = batch_size(batch)
    return all(isinstance(x, Tensor) and x.dim() > 0 and len(x) == n for x in tree_leaves(batch))


@contextmanager
def all_or_nothing(model: nn.Module, original: nn.Module, changes: Transaction) -> Iterator[None]:
    """Whatever the block raises, a model that was cut is as it was before.

    Args:
        model: the model after a plan was executed.
        original: a copy of it from before.
        changes: what takes the cut back.
    """
    try:
        yield
    except BaseException:
        changes.roll_back()
        with torch.inference_mode(False), torch.no_grad():
            kept = zip((*model.parameters(), *model.buffers()), (*original.parameters(), *original.buffers()), strict=True)
            for now, before in kept:
                now.copy_(before)
        raise


def finish(
    model: nn.Module, original: nn.Module, graph: Graph, plan: Plan, batches: Sequence[Example], how: LeastSquares
) -> None:
    """Refit and recalibrate a model that was just cut, in place.

    Args:
        model: the model after the plan was executed.
        original: a copy of it from before.
        graph: the graph of the cut model.
        plan: what was executed.
        batches: the calibration data, each batch as one call takes it.
        how: what to do.
    """
    if how.refit == "sequential":
        whole = together(model, batches, how.memory)
        if whole is None:
            _LOG.warning(
                "calibration batches are not tensors with one row per sample, all of one size and of any number: "
                "no sequential refit"
            )
        else:
            done = refit(model, original, graph, plan, whole, how)
            _LOG.info("refitted %d layers in execution order on %d samples", len(done.layers), done.n_samples)
    if _recalibrates(how):
        recalibrate(model, batches)


def together(model: nn.Module, batches: Sequence[Example], memory: int) -> Example | None:
    """As many samples as fit, as one batch; None where batches cannot be joined.

    Args:
        model: the model that will read them.
        batches: each as one call takes it.
        memory: bytes that the largest input of any layer may take.
    """
    if not all(_joinable(batch) for batch in batches):
        return None
    if len({_row(batch) for batch in batches}) > 1:
        return None
    limit = _most(model, batches[0], memory)
    if not limit:
        return None
    if limit < sum(batch_size(batch) for batch in batches):
        _LOG.warning("the sequential refit takes the first %d samples: more need over %d bytes", limit, memory)
    spec = tree_flatten(batches[0])[1]
    joined = [torch.cat(parts)[:limit] for parts in zip(*(tree_leaves(batch) for batch in batches), strict=True)]
    return tree_unflatten(joined, spec)


def _row(batch: Example) -> tuple[Any, ...]:
    """What batches agree in that can be joined: how they are nested, and the shape of a sample."""
    leaves, spec = tree_flatten(batch)
    return (str(spec), *(tuple(leaf.shape[1:]) for leaf in leaves))


def bytes_per_sample(model: nn.Module, batch: Example) -> int:
    """Largest input or output of any module, bytes per sample."""
    largest = 1

    def watch(_module: nn.Module, args: Any, out: Any) -> None:
        nonlocal largest
        for x in tree_leaves((args, out)):
            if isinstance(x, Tensor):
                largest = max(largest, x.numel() * x.element_size())

    handles = [module.register_forward_hook(watch) for module in model.modules()]
    try:
        with undisturbed(model):
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return -(-largest // max(1, batch_size(batch)))


def batch_size(inputs: Example) -> int:
    """How many samples: images in a list, else the length of the first tensor that has a dimension; 1 where there is none."""
    if isinstance(inputs, list):
        return len(inputs)
    return next((len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()), 1)
