"""What compensation does once the cut is made, where calibration data are at hand: sequential refit, then recalibration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from actprune.compensation import Compensation, LeastSquares, recalibrate
from actprune.core.calling import Example, call, undisturbed
from actprune.core.plan import Plan
from actprune.graph import Graph
from actprune.pruning.sequential import refit

_LOG = logging.getLogger(__name__)


def has_finish(how: Compensation | None) -> bool:
    """Whether the compensation goes on after the cut and needs the data again."""
    return isinstance(how, LeastSquares) and (how.refit == "sequential" or _recalibrates(how))


def _recalibrates(how: LeastSquares) -> bool:
    return how.refit == "once" if how.recalibrate is None else how.recalibrate


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
            _LOG.warning("calibration batches are not tensors with one row per sample: no sequential refit")
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
    sizes = [batch_size(batch) for batch in batches]
    leaves, spec = tree_flatten(batches[0])
    if callable(batches[0]) or isinstance(batches[0], list) or not all(isinstance(x, Tensor) for x in leaves):
        return None
    flat = [tree_leaves(batch) for batch in batches]
    if any(x.dim() == 0 or len(x) != n for part, n in zip(flat, sizes, strict=True) for x in part):
        return None
    limit = max(1, memory // bytes_per_sample(model, tree_map(lambda x: x[:2], batches[0])))
    if limit < sum(sizes):
        _LOG.warning("the sequential refit takes %d of %d samples: more need over %d bytes", limit, sum(sizes), memory)
    joined = [torch.cat(parts)[:limit] for parts in zip(*flat, strict=True)]
    return tree_unflatten(joined, spec)


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
    return -(-largest // batch_size(batch))


def batch_size(inputs: Example) -> int:
    """How many samples: images in a list, else the length of the first tensor that has a dimension; 1 where there is none."""
    if isinstance(inputs, list):
        return len(inputs)
    return next((len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()), 1)
