"""Means, variances and extremes over channels, in the full-size reference: taken over the channels that stay.

A removed channel is zero in the reference. That adds nothing to a sum, but a mean still divides by it, a variance counts it,
and among negative values it is the largest. The reference therefore hands such a reduction only what stays along the
dimensions that it reduces, and touches no other operator. Which positions have left is the plan's word on parameters and
buffers; the channel graph only says where along an activation those channels stand. Where it is wrong about that, channels
that stay are missing from the reduction, or zeros are not, and cut and reference differ.

Sums and 2-norms are left alone, and so is what the code divides by a number of its own: ``x.sum(1) / x.shape[1]``.
"""

from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actprune.core.operands import decomposed, is_composite
from actprune.core.stack import module_stack
from actprune.graph.weak import ByTensor

NOT_NEUTRAL = frozenset({"mean", "var", "std", "var_mean", "std_mean", "max", "min", "amax", "amin", "prod", "logsumexp"})
"""Reductions that a zero more changes."""


class OverKept(TorchDispatchMode):
    """Follows where channels stand, operator by operator as traced, and narrows reductions to those that stay."""

    def __init__(self, graph, plan, stack):
        super().__init__()
        self._gone = np.zeros(graph.n_classes + 1, dtype=bool)
        for name, dims in plan.removed.items():
            for dim, positions in dims.items():
                self._gone[graph.columns[name, dim][positions]] = True
        self._gone[-1] = False  # positions without a class
        self._stack, self._ran, self._astray, self._columns = stack, Counter(), set(), ByTensor()
        self._traced = defaultdict(list)
        for (path, call, _), operator in sorted(graph.extents.items(), key=lambda item: item[0]):
            if operator[0] != "_to_copy":  # casts depend on the number type, which need not be the traced one
                self._traced[path, call].append(operator)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        composite = is_composite(func)
        if name in NOT_NEUTRAL and not composite:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            args = (self._kept(args[0], named.get("dim")), *args[1:])
        if name == "native_layer_norm" and len(args[1]) == 1 and self._kept(args[0], -1) is not args[0]:
            out = self._normalised(func, *args)
            self._follow(name, args, list(out))
            return out
        out = decomposed(self, func, args, kwargs)
        if not composite:
            self._follow(name, args, [x for x in tree_leaves(out) if isinstance(x, Tensor)])
        return out

    def _kept(self, x, dims):
        """What stays of a tensor along the dimensions that are reduced (None or empty: all)."""
        columns = self._columns.get(x)
        dims = [dims] if isinstance(dims, int) else dims or range(x.dim())
        for dim in dims if columns is not None else ():
            column = columns[dim]
            if column is not None and len(column) == x.shape[dim] and self._gone[column].any():
                x = x.index_select(dim, torch.from_numpy(np.flatnonzero(~self._gone[column])))
        return x

    def _normalised(self, func, x, shape, weight, bias, eps):
        """A norm that no module of PyTorch runs, over what stays; what has left comes out as zero."""
        stays = torch.from_numpy(np.flatnonzero(~self._gone[self._columns.get(x)[-1]]))
        weight, bias = (p if p is None else p[stays] for p in (weight, bias))
        y, *rest = func(x.index_select(-1, stays), [len(stays)], weight, bias, eps)
        return torch.zeros_like(x).index_copy(-1, stays, y), *rest

    def _follow(self, name, args, outputs):
        if name == "_to_copy":
            self._note(outputs, [self._columns.get(args[0])])
            return
        running = self._stack[-1].path, self._stack[-1].call
        traced, number = self._traced[running], self._ran[running]
        self._ran[running] += 1
        if number >= len(traced) or traced[number][0] != name:
            self._astray.add(running)  # data decided otherwise, or the reference computes this module in its own way
        self._note(outputs, [None] * len(outputs) if running in self._astray else traced[number][1])

    def left(self, path, call, out):
        """A module that the reference replaced has returned: its output stands for what was traced last there."""
        if traced := self._traced[path, call]:
            self._note([out[0] if isinstance(out, tuple) else out], traced[-1][1])

    def _note(self, tensors, columns):
        for tensor, dims in zip(tensors, columns, strict=False):
            self._columns.pop(tensor)
            if dims is not None and len(dims) == tensor.dim():
                self._columns[tensor] = dims


@contextmanager
def over_kept(model, graph, plan, replaced):
    """Inside the block the masked ``model`` reduces over channels that stay; ``replaced``: paths that it computes anew."""
    with ExitStack() as exits:
        calls, modes = Counter(), []

        def returned(path, out):
            modes[0].left(path, calls[path], out)
            calls[path] += 1

        for path in replaced:
            module = model.get_submodule(path)
            exits.callback(module.register_forward_hook(lambda _m, _a, out, path=path: returned(path, out)).remove)
        stack = exits.enter_context(module_stack(model))
        exits.enter_context(sdpa_kernel(SDPBackend.MATH))  # as it was traced
        modes.append(exits.enter_context(OverKept(graph, plan, stack)))
        yield
