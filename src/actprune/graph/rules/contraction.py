"""Convolutions and matrix products: the summed dimension is tied, the output takes the other operand's ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from torch import Tensor

from actprune.graph.ids import FREE, Ids, first
from actprune.graph.rules.registry import rule
from actprune.graph.state import TraceState


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Ordinary, grouped, depthwise and transposed convolutions in 1 to 3 dimensions.

    Grouped: the unit is a whole group, its inputs and its outputs. Transposed: the weight is (in, out / groups, ...).
    """
    x, transposed = t.ids(a.input), bool(getattr(a, "transposed", False))
    weight = t.tied(a.weight, 1 - transposed, x[1]) if a.groups == 1 else t.ids(a.weight)
    for kernel in weight[2:]:
        t.lock(kernel, "kernel position")
    mixed = _mixed(a)
    positions = [None if mixes else ids for mixes, ids in zip(mixed, x[2:], strict=True)]
    for mixes, ids in zip(mixed, x[2:], strict=True):
        if mixes:
            t.lock(ids, "convolved dimension")
    outer, inner = weight[0], weight[1]
    operand: Ids
    reads: Ids
    apart = not transposed and a.groups > 1 and _repeated(x[1], a.groups) and _repeated(outer, a.groups)
    if apart:  # every sample has a kernel of its own, and samples stand among the channels
        assert x[1] is not None
        operand = reads = x[1][: len(x[1]) // a.groups]
        writes = outer
        t.tie(reads, inner)
        sizes = [(a.weight.shape[0], outer), (a.weight.shape[1], reads)]
    elif a.groups == 1:
        reads, writes = (outer, inner) if transposed else (inner, outer)
        operand = known(x[1], reads)
        sizes = [(a.weight.shape[0], outer), (a.weight.shape[1], inner)]
    else:
        operand, reads = x[1], None
        if outer is not None and (outer == FREE).all() and len(outer) == a.input.shape[1]:
            outer = x[1]  # one kernel, expanded over the channels
        if transposed:
            writes = _whole_groups(t, x[1], outer, inner, a.groups, out.shape[1])
        else:
            _tie_groups(t, x[1], outer, a.groups)
            t.lock(inner, "inside a group of a grouped convolution")
            writes = outer
        sizes = [(a.weight.shape[0], outer), (a.weight.shape[1], None)]
    if a.bias is not None:
        t.tie(writes, t.ids(a.bias)[0])
    sizes.append((out.shape[0], x[0]))  # heads may be among the samples
    sizes += zip((a.input if transposed else out).shape[2:], positions, strict=True)
    constant = math.prod(a.weight.shape[2:])
    t.set(out, [x[0], writes, *positions])
    t.contract(out, (0, 1 - a.input.dim(), operand), writes, sizes, constant, a.weight, reads, a.bias, observed=not apart)


def _repeated(ids: Ids, groups: int) -> bool:
    """Whether every group holds the same ids, more than one of them."""
    if ids is None or len(ids) == groups or (ids < 0).any():
        return False
    rows = ids.reshape(groups, -1)
    return bool((rows == rows[:1]).all())


def _mixed(a: SimpleNamespace) -> list[bool]:
    """Whether a convolution mixes or moves positions, along every dimension: a kernel of 1 need not."""

    def along(values: Sequence[int], d: int) -> int:
        return values[d] if len(values) > 1 else values[0]

    def stays(d: int, kernel: int) -> bool:
        return kernel == 1 and along(a.stride, d) == 1 and along(a.padding, d) == 0

    settled = hasattr(a, "stride") and not any(getattr(a, "output_padding", ()))
    return [not (settled and stays(d, kernel)) for d, kernel in enumerate(a.weight.shape[2:])]


@rule("deform_conv2d")
def deformable(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Torchvision's convolution at displaced positions: offsets and masks count kernel taps, channels are those of any other.

    What an input's mean contributes depends on the masks, so nothing is observed that could be folded into a bias.
    """
    for counted in (a.offset, a.mask) if a.use_mask else (a.offset,):
        t.lock(t.ids(counted)[1], "displacements of a convolution")
    if a.offset_groups > 1:
        t.lock(t.ids(a.input)[1], "channels that share displacements")
    convolution(t, SimpleNamespace(input=a.input, weight=a.weight, bias=a.bias, groups=a.groups), out)
    t.contractions[-1].observed = False


def known(a: Ids, b: Ids) -> Ids:
    """What is known of the same positions: ids before ones that were broadcast, and either before none."""
    return first([ids for ids in (a, b) if ids is not None])


def _tie_groups(t: TraceState, x: Ids, outer: Ids, groups: int) -> None:
    """Tie all inputs and outputs of each group to the group's first output."""
    if outer is None:
        t.lock(x, "grouped convolution of a fixed width")
        return
    rows = outer.reshape(groups, -1)
    leader = rows[:, :1]
    t.tie_all(leader, rows)
    if x is None:
        t.lock(outer, "grouped convolution of a fixed width")
    else:
        columns = x.reshape(groups, -1)
        t.tie_all(leader, columns)


def _whole_groups(t: TraceState, x: Ids, outer: Ids, inner: Ids, groups: int, width: int) -> Ids:
    _tie_groups(t, x, outer, groups)
    t.lock(inner, "inside a group of a grouped convolution")
    return None if outer is None else np.repeat(outer.reshape(groups, -1)[:, 0], width // groups)


def _product(t: TraceState, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """``out = a @ b`` for the last two dimensions; batch dimensions meet position by position."""
    left, right = t.ids(a), t.ids(b)
    t.tie(left[-1], right[-2])
    batch: list[Ids] = []
    for da, db in zip(left[:-2], right[:-2], strict=True):
        t.tie(da, db)
        batch.append(known(da, db))
    writes = right[-1]
    ids = [*batch, left[-2], writes]
    t.set(out, ids)
    sizes = [
        *zip(out.shape[:-2], batch, strict=True),
        (a.shape[-2], left[-2]),
        (a.shape[-1], known(left[-1], right[-2])),
        (b.shape[-1], writes),
    ]
    reads = known(left[-1], right[-2])
    batched = math.prod(out.shape[:-2]) > 1
    if not (t.is_kernel(a, batched) or t.is_kernel(b, batched)) and reads is not None:
        # the width of a head sets the scale of its softmax, so it stays; so do tokens that are learned, beside those given
        if (reads >= 0).all():
            t.scored.add(t.frames[-1].path)
        t.lock(reads, "summed over between two activations")
    if t.origin(a) is not None and t.origin(b) is None:
        # weight @ activation: the activation is the second operand, the output channels are the rows
        t.contract(out, (1, -2, reads), left[-2], sizes, 1, a, left[-1], None)
        return
    t.contract(out, (0, -1, reads), writes, sizes, 1, b, right[-2], bias)


@rule("mm", "bmm")
def matrix_product(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """``input @ mat2``, with or without a batch dimension."""
    _product(t, a.input, a.mat2, out)


@rule("addmm", "_sparse_addmm")
def affine(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """``beta * input + alpha * mat1 @ mat2``: a linear layer with bias; ``torch.sparse.mm`` where nothing is added."""
    is_bias = a.input.dim() == 1 and a.alpha == a.beta == 1
    _product(t, a.mat1, a.mat2, out, a.input if is_bias else None)
    _add(t, a.input, out)


@rule("baddbmm")
def batched_affine(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """``input + batch1 @ batch2``."""
    _product(t, a.batch1, a.batch2, out)
    _add(t, a.input, out)


def _add(t: TraceState, addend: Tensor, out: Tensor) -> None:
    for dim in range(1, addend.dim() + 1):
        if addend.shape[-dim] == out.shape[-dim] != 1:
            t.tie(t.ids(addend)[-dim], t.ids(out)[-dim])


@rule("_grouped_mm")
def grouped_product(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Rows of the input sorted by expert, each times its expert's matrix: ``(N, in), (E, in, out) -> (N, out)``.

    The kernel wants rows of whole 16 bytes: channels leave by eights, which is enough for two-byte numbers too.
    """
    left, right = t.ids(a.input), t.ids(a.mat2)
    if a.input.dim() != 2 or a.mat2.dim() != 3:
        for ids in (*left, *right):
            t.lock(ids, "products of ragged groups")
        t.set(out, [None] * out.dim())
        return
    t.lock(right[0], "experts by number")
    t.lock(left[0], "rows by expert")
    t.tie(left[1], right[1])
    if a.bias is not None:
        t.tie(right[2], t.ids(a.bias)[-1])
    reads = known(left[1], right[1])
    for width in (reads, right[2]):
        if width is not None and len(width) % 8 == 0:
            eights = width.reshape(-1, 8)
            t.tie_all(eights[:, :1], eights, "rows of whole 16 bytes")
        else:
            t.lock(width, "rows of whole 16 bytes")
    t.set(out, [None, right[2]])
    sizes = [(a.input.shape[0], None), (a.input.shape[1], reads), (a.mat2.shape[2], right[2])]
    t.contract(out, (0, -1, reads), right[2], sizes, 1, a.mat2, right[1], a.bias)


@rule("mv", "dot", "vdot")
def vector_product(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Matrix times vector, vector times vector."""
    other = a.vec if hasattr(a, "vec") else a.tensor if hasattr(a, "tensor") else a.other
    left = t.ids(a.input)
    t.tie(left[-1], t.ids(other)[0])
    reads = known(left[-1], t.ids(other)[0])
    t.set(out, left[:-1])
    sizes = list(zip(a.input.shape, [*left[:-1], reads], strict=True))
    # a norm of a weight is no activation; what matrices give may be, of queries that are learned
    t.contract(out, (0, -1, reads), None, sizes, observed=not (t.is_weight(a.input) and t.is_weight(other)))


@rule("_trilinear")
def bilinear_form(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """``nn.Bilinear``: two inputs and a weight, each with dimensions of one, are multiplied and summed over some dimensions.

    PyTorch counts no multiply-adds for it.
    """
    columns = []
    for tensor, expanded in ((a.i1, a.expand1), (a.i2, a.expand2), (a.i3, a.expand3)):
        ids = list(t.ids(tensor))
        for d in sorted(expanded):
            ids.insert(d, None)
        columns.append((ids, set(expanded)))
    rank = len(columns[0][0])
    met = [t.meet([ids[d] for ids, expanded in columns if d not in expanded]) for d in range(rank)]
    t.set(out, [ids for d, ids in enumerate(met) if d not in a.sumdim])
    writes = met[min(columns[0][1])] if columns[0][1] else None
    for d in a.sumdim:
        t.contract(out, (0, -1, met[d]), writes, [(0, None)], observed=False)
