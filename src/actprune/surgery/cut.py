"""Execute a plan: parameters, buffers, attributes and optimizer state shrink together, or nothing changes.

New ``nn.Parameter`` objects take the place of the old ones: in-place resizing would break a backward pass that is still
pending and leave optimizer state of the old shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from actprune.core.calling import Example, call, undisturbed
from actprune.core.errors import SurgeryError
from actprune.core.plan import Plan
from actprune.core.signals import held
from actprune.surgery import optimizer as optimizers_
from actprune.surgery.attention import adopt, unnest
from actprune.surgery.attributes import assign, derived
from actprune.surgery.tensors import Holders, keep_indices, lookup, sliced, smaller
from actprune.surgery.transaction import Transaction, transaction


def cut(model: nn.Module, plan: Plan, example: Example | None = None, optimizers: Iterable[Optimizer] = ()) -> Transaction:
    """Execute a plan in place.

    Args:
        model: the model the plan was made for.
        plan: what leaves.
        example: example inputs for one forward that proves the cut model runs; None skips it.
        optimizers: optimizers that train the model's parameters.

    Returns:
        What takes the cut back; values that are written to later stay written.

    Raises:
        SurgeryError: the plan does not fit, or the cut model does not run; model and optimizers are as they were.
    """
    with held(), transaction() as changes:
        _apply(model, plan, optimizers_.with_wrapped(optimizers), changes)
        if example is not None:
            _prove(model, example)
    return changes


@contextmanager
def rehearsed(model: nn.Module, plan: Plan) -> Iterator[None]:
    """The model is cut inside the block, and as it was after it."""
    changes = Transaction()
    try:
        with held():
            _apply(model, plan, [], changes)
        yield
    finally:
        changes.roll_back()


def _apply(model: nn.Module, plan: Plan, optimizers: list[Optimizer], changes: Transaction) -> None:
    touched: dict[str, None] = {}
    names = list(dict.fromkeys([*plan.removed, *plan.shifts]))
    keeps: dict[str, dict[int, Tensor]] = {}
    for name in names:
        old = lookup(model, name)
        keeps[name] = _keep(name, old, plan.removed.get(name, {}))
        shift = plan.shifts.get(name)
        if shift is not None and shift.shape != old.shape:
            raise SurgeryError(
                f"compensation shifts {name} by a tensor of shape {tuple(shift.shape)}, it has {tuple(old.shape)}; "
                "execute a plan on the model it was made for"
            )
        for optimizer in optimizers:
            optimizers_.check(optimizer, old)
    widths = {path: lookup(model, f"{path}.weight" if path else "weight") for path in plan.new_biases}
    for path, values in plan.new_biases.items():
        _new_bias(model, path, values, plan, widths[path], optimizers, changes)
    holders = Holders(model)
    for name in names:
        old = lookup(model, name)
        new = smaller(old, keeps[name], plan.shifts.get(name))
        paths = holders.replace(old, new, changes)
        for optimizer in optimizers:
            optimizers_.follow(optimizer, old, new, keeps[name], changes)
        if name in plan.removed:
            # what a parametrization computes belongs to the layer around it
            touched |= dict.fromkeys(path.partition(".parametrizations.")[0] for path in paths)
    for path in touched:
        module = model.get_submodule(path)
        if isinstance(module, nn.MultiheadAttention):
            adopt(module, changes)
        for attribute, value in derived(module).items():
            assign(module, attribute, value, changes)
    unnest(model, changes)
    for path, attributes in plan.attributes.items():
        for attribute, kept in attributes.items():
            assign(model.get_submodule(path), attribute, kept, changes)


def _keep(name: str, tensor: Tensor, dims: Mapping[int, list[int]]) -> dict[int, Tensor]:
    keeps = {}
    for dim, gone in dims.items():
        size = tensor.shape[dim] if dim < tensor.dim() else 0
        if not gone or gone[-1] >= size or len(gone) >= size:
            last = gone[-1] if gone else None
            raise SurgeryError(
                f"the plan removes {len(gone)} positions up to {last} of dimension {dim} of {name}, which has {size}; "
                "at least one must stay: execute a plan once, on the model it was made for"
            )
        keeps[dim] = keep_indices(size, gone)
    return keeps


def _new_bias(
    model: nn.Module,
    path: str,
    values: Tensor,
    plan: Plan,
    weight: Tensor,
    optimizers: list[Optimizer],
    changes: Transaction,
) -> None:
    module = model.get_submodule(path)
    name = f"{path}.weight" if path else "weight"
    out_dim = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
    gone = plan.removed.get(name, {}).get(out_dim, [])
    with torch.inference_mode(False), torch.no_grad():
        data = sliced(values, {0: keep_indices(len(values), gone)} if gone else {})
        bias = nn.Parameter(data.to(weight.device, weight.dtype), requires_grad=weight.requires_grad)
    module._parameters["bias"] = bias
    changes.did(lambda: module._parameters.__setitem__("bias", None))
    for optimizer in optimizers:
        optimizers_.add(optimizer, weight, bias, changes)


def _prove(model: nn.Module, example: Example) -> None:
    with undisturbed(model):
        try:
            call(model, example)
        except Exception as error:
            raise SurgeryError(
                f"the cut model does not run on the example inputs ({type(error).__name__}: {error}); it was put back as it was"
            ) from error
