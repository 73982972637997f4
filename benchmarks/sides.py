"""Sides of the prunability table: one model pruned with actprune and checked, by what it does, and with Torch-Pruning."""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import actprune
from actprune import criteria
from actprune.compensation import LeastSquares, Mean
from actprune.core.calling import call
from actprune.core.plan import Plan
from actprune.graph import Graph
from actprune.pruning.plans import draft
from actprune.surgery import rehearsed
from masked import counted, difference, masked, outputs, random_units

EXACT = 1e-5
"""Largest relative difference in float32 that is taken for rounding; beyond, float64 decides what it is."""
_OF_DETECTORS = ("rpn.head", "roi_heads.box_predictor", "head")


def _floats(output: Any) -> list[Tensor]:
    """Floating-point tensors of an output that a loss could be made of."""
    leaves = tree_leaves(output if isinstance(output, (Tensor, tuple, list, dict)) else vars(output))
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]


def _targets(images: list[Tensor]) -> list[dict[str, Tensor]]:
    """One object per image, with everything that some detector trains on."""
    size = images[0].shape[-2:]
    one = {
        "boxes": torch.tensor([[8.0, 8.0, 72.0, 72.0]]),
        "labels": torch.ones(1, dtype=torch.int64),
        "masks": torch.ones(1, *size, dtype=torch.uint8),
        "keypoints": torch.full((1, 17, 3), 40.0),
    }
    return [one for _ in images]


def _training_example(example: Any) -> Any:
    """Two samples, for batch norms; targets for detectors."""
    if isinstance(example, list):
        images = [x.clone() for x in example * 2]
        return images, _targets(images)
    return tree_map_only(Tensor, lambda x: torch.cat([x, x]), example)


def works(model: nn.Module, example: Any) -> None:
    """Forward and backward, in evaluation and in training mode."""
    for training in (False, True):
        model.train(training)
        found = _floats(call(model, _training_example(example) if training else example))
        if found:
            sum(x.sum() for x in found).backward()
            model.zero_grad()


def _works_as(model: nn.Module, whole: nn.Module, example: Any) -> bool:
    """Run it so; False where the whole model fails at it, too."""
    try:
        works(model, example)
    except RuntimeError:
        try:
            works(whole, example)
        except RuntimeError:
            return False
        raise
    return True


def _compared(model: nn.Module, example: Any) -> list[Tensor]:
    """Outputs to compare: of a detector what comes before boxes are chosen, for near-equal scores change places freely."""
    if not isinstance(example, list):
        return outputs(model, example)
    seen: list[Tensor] = []
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(
            lambda _m, _a, out: seen.extend(x for x in tree_leaves(out) if isinstance(x, Tensor))
        )
        for name in _OF_DETECTORS
        if name in modules
    ]
    try:
        outputs(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _lively(model: nn.Module, example: Any) -> None:
    """Running statistics of one batch, and no weights at zero: what a fresh network says hardly depends on its input."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # heads that begin at zero hide what comes before them
            nn.init.normal_(parameter, std=0.02)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        call(model.train(), _training_example(example))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


class _Widened(TorchFunctionMode):
    """What the model's code asks for in float32 is made in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        if func is Tensor.float:
            return args[0].double()
        args, kwargs = tree_map_only(torch.dtype, lambda d: torch.float64 if d == torch.float32 else d, (args, kwargs or {}))
        return func(*args, **kwargs)


def in_float64(full: nn.Module, example: Any, plans: list[Plan], graph: Graph) -> float | None:
    """The largest difference once more without rounding to speak of; None where the model's code insists on float32."""
    model = copy.deepcopy(full).double()
    example = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, example)
    error = 0.0
    try:
        for plan in plans:
            reduced = masked(model, plan, graph)
            with rehearsed(model, plan), _Widened():
                error = max(error, difference(_compared(model, example), _compared(reduced, example)))
    except RuntimeError:
        return None
    return error


def ours(build: Any, example: Any, plans: int) -> dict[str, Any]:
    """Prune with actprune; cut, run, count, store and compare with the masked full-size network."""
    torch.manual_seed(0)
    model = build().eval()
    size = sum(p.numel() for p in model.parameters())
    _lively(model, example)
    fresh, full = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        call(model, example)
        start = time.perf_counter()
        call(model, example)
        forward = time.perf_counter() - start
    start = time.perf_counter()
    actprune.trace(model, example)
    traced = time.perf_counter() - start
    start = time.perf_counter()
    pruner = actprune.Pruner(model, example, actprune.criteria.Random(), actprune.Budget(params=1.0), compensation=None)
    rehearsal = time.perf_counter() - start
    graph = pruner.graph
    cuttable = {tensor for group in graph.unlocked if group.size > 1 for tensor, _ in group.members}
    whole = _compared(full, example)
    error = off = 0.0
    drawn = [draft(model, graph, random_units(graph, seed)) for seed in range(plans)]
    for plan in drawn:
        with rehearsed(model, plan):
            error = max(error, difference(_compared(model, example), _compared(masked(full, plan, graph), example)))
            if not isinstance(example, list):
                params, macs = counted(model, example)
                off = max(off, abs(params - plan.params_after), abs(macs - plan.macs_after))
    half = {g.name: torch.randperm(g.size)[: g.size // 2].tolist() for g in graph.unlocked}
    plan = draft(model, graph, half)
    start = time.perf_counter()
    pruner.execute(plan)
    cut = time.perf_counter() - start
    reference = _compared(masked(full, plan, graph), example)
    error = max(error, difference(_compared(model, example), reference))
    effect = difference(reference, whole)
    precise = {} if error <= EXACT else {"error64": in_float64(full, example, [*drawn, plan], graph)}
    with tempfile.TemporaryDirectory() as folder:
        actprune.save_pruned(model, Path(folder) / "pruned.pt")
        actprune.load_pruned(fresh, Path(folder) / "pruned.pt")
    same = difference(_compared(fresh, example), _compared(model, example)) == 0.0
    trains = _works_as(model, full, example)
    locks = Counter(g.locked for g in graph.groups if g.locked is not None and g.size > 1)
    return {
        "prunes": same,
        "trains": trains,
        "covered": sum(p.numel() for name, p in full.named_parameters() if name in cuttable) / size,
        "error": error,
        **precise,
        "effect": effect,
        "count_off": off,
        "left": pruner.params / size,
        "forward_seconds": forward,
        "trace_seconds": traced,
        "rehearsal_seconds": rehearsal,
        "cut_seconds": cut,
        "locks": dict(locks),
    }


def observed(build: Any, example: Any, _plans: int) -> dict[str, Any]:
    """Observe three batches and prune by what was seen: by entropy with means folded, by RMS with layers refitted."""
    torch.manual_seed(0)
    original = build().eval()
    inputs = example if isinstance(example, list) else _training_example(example)
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    n = len(inputs) if isinstance(inputs, list) else len(tensors[0])
    left, finite = [], True
    for criterion, compensation in ((criteria.Entropy(), Mean()), (criteria.RMS(), LeastSquares())):
        model = copy.deepcopy(original)
        pruner = actprune.Pruner(model, inputs, criterion, actprune.Budget(params=0.8), compensation=compensation)
        with pruner.observe() as observation, torch.no_grad():
            for batch in range(3):
                observation.begin_batch(range(n * batch, n * batch + n))
                call(model, inputs)
        plan = pruner.plan(observation)
        if plan is not None:
            pruner.execute(plan)
        said = outputs(model, inputs)
        finite &= all(bool(x.isfinite().all()) for x in said if x.is_floating_point())
        left.append(pruner.params / pruner.params_before)
    return {"prunes": finite and max(left) <= 0.8, "left": left}


def peer(build: Any, example: Any, _plans: int) -> dict[str, Any]:
    """Prune with Torch-Pruning as it comes: half of every layer it finds, the last layer named to it."""
    import torch_pruning as tp

    torch.manual_seed(0)
    model = build().eval()
    size = sum(p.numel() for p in model.parameters())
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1:]
    pruner = tp.pruner.MetaPruner(
        model,
        (example,) if isinstance(example, list) else example,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=last,
    )
    pruner.step()
    works(model, example)
    left = sum(p.numel() for p in model.parameters()) / size
    return {"prunes": left < 1, "left": left}
