"""What a trace knows while it runs: ids of tensors, what made them, what was tied and locked, and what it has noted down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import is_not
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actprune.core.copied import Copies
from actprune.graph.ids import FIXED, Ids, IdSpace, Joined, first
from actprune.graph.made import Made, made
from actprune.graph.naming import Naming
from actprune.graph.records import Binding, Contraction
from actprune.graph.splits import Splits
from actprune.graph.told import Reads
from actprune.graph.weak import ByTensor

if TYPE_CHECKING:
    from actprune.graph.remains import Constant, Sum


Column: TypeAlias = "NDArray[np.int64] | tuple[str, int]"
"""Ids along a dimension; of a parameter or buffer that no operator has met yet, its name and which dimension."""

_MOST_LAYERS = 64
"""A longer list has other numbers than widths of layers, and what holds no layers has none."""


@dataclass(kw_only=True)
class TraceState(Naming, Splits):
    """Mutable state of one trace; rules see only this."""

    names: dict[int, str]
    """``id(tensor)`` -> name of a parameter, buffer or plain tensor attribute; in a copy, the name of the original."""
    copies: Copies = field(default_factory=dict)
    """Parts that copy other parts: their tensors are taken for those of the originals, and nothing else is noted of them."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Parameters and buffers met so far, in order of first use."""
    tensor_ids: dict[str, list[NDArray[np.int64]]] = field(default_factory=dict)
    space: IdSpace = field(default_factory=IdSpace)
    contractions: list[Contraction] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    """How often each module was called in evaluation mode."""
    bindings: list[Binding] = field(default_factory=list)
    possible: list[Binding] = field(default_factory=list)
    """Attributes that equal a cuttable extent: they follow only where the cut model fails without it."""
    asked: list[Binding] = field(default_factory=list)
    """Attributes that equal an extent of what their module is given: tried after those of ``possible``."""
    coincidences: dict[str, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = field(default_factory=dict)
    """Module path -> pairs of ids: what a view there produced, and an input of that module of the same extent."""
    training: bool = False
    """What runs now, runs in training mode only."""
    produced_ids: dict[tuple[str, int, int], tuple[str, list[list[Ids]]]] = field(default_factory=dict)
    """(module, call, operator) -> the operator's name, and for each of its outputs the ids of every dimension."""
    numbers: dict[tuple[str, int, int], tuple[float | complex, ...]] = field(default_factory=dict)
    """(module, call, operator) -> the numbers that it was given, if any."""
    lengths: dict[tuple[str, int, int], tuple[tuple[int, ...] | None, ...]] = field(default_factory=dict)
    """(module, call, operator) -> shapes of its outputs, None where no rule said what they are."""
    skipped: dict[tuple[str, int, int], Ids] = field(default_factory=dict)
    """(module, call, operator) -> ids before a window along what may be cut; None where the numbers follow otherwise."""
    means: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """(module, call, operator) -> how many were summed in what the operator divides by a number that has to follow."""
    reads: Reads = field(default_factory=lambda: Reads(keeps=False))
    refused: list[tuple[str, NDArray[np.int64]]] = field(default_factory=list)
    """Operators without a rule, with the ids they met."""
    unequal: list[tuple[str, Column, Column | int]] = field(default_factory=list)
    """(module, extent, extent) that the code compared and found different."""
    joined: Joined | None = None
    """The last concatenation."""
    storages: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = field(default_factory=dict)
    where: str = ""
    """The running operator and module, for reasons."""
    _ids: ByTensor[list[Ids]] = field(default_factory=ByTensor)
    _unmet: ByTensor[bool] = field(default_factory=ByTensor)  # fixed, for nothing is known of them
    _origins: ByTensor[str] = field(default_factory=ByTensor)
    _producers: ByTensor[Contraction] = field(default_factory=ByTensor)
    _computed: ByTensor[Made] = field(default_factory=ByTensor)
    remains: ByTensor[bool] = field(default_factory=ByTensor)  # False: what has left is not zero there (``remains.py``)
    constants: ByTensor[Constant] = field(default_factory=ByTensor)
    sums: ByTensor[Sum] = field(default_factory=ByTensor)
    flattened: dict[int, tuple[NDArray[np.int64], tuple[int, ...]]] = field(default_factory=dict)
    """``id(ids)`` -> ids of a dimension that others were flattened to, and their extents, -1 for what may be cut."""
    filled: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    """``id(ids)`` -> ids of the dimensions of constants, samples among them."""
    _pending: ByTensor[tuple[NDArray[np.int64], str]] = field(default_factory=ByTensor)

    def skips(self, ids: Ids) -> None:
        """What runs begins behind these positions of what may be cut; None: its numbers follow otherwise."""
        if not self.training:  # whose operators are not numbered
            self.skipped[self.frames[-1].place] = ids

    def divides(self, count: int, summed: Sequence[NDArray[np.int64]]) -> None:
        """What runs makes a mean of a sum of so many: by a number of the module, perhaps."""
        if not self.training:
            self.means[self.frames[-1].place] = count
            for ids in summed:
                self.may_count(ids)

    def ids(self, tensor: Tensor, meets: tuple[int, NDArray[np.int64]] | None = None) -> list[Ids]:
        """Ids of every dimension; a parameter or buffer gets fresh ones when first met, anything else unknown is fixed.

        ``meets``: a dimension and the ids that it meets, which it takes instead of fresh ones.
        """
        known = self._ids.get(tensor)
        if known is not None:
            return known
        name = self.names.get(id(tensor)) or self._stored(tensor)
        if name is None:
            self._ids[tensor] = known = [None] * tensor.dim()
            self._unmet[tensor] = True
            return known
        if name not in self.tensor_ids:
            self.tensors[name] = tensor
            met = dict([meets] if meets else ())
            self.tensor_ids[name] = [
                self._taken(met[dim]) if dim in met else self.space.fresh(n) for dim, n in enumerate(tensor.shape)
            ]
            if why := self._out_of_reach(name.rpartition(".")[0]):
                for ids in self.tensor_ids[name]:
                    self.space.lock(ids, why)
        self._ids[tensor] = known = list(self.tensor_ids[name])
        self._origins[tensor] = name
        return known

    def tied(self, tensor: Tensor, dim: int, ids: Ids) -> list[Ids]:
        """Ids of every dimension of a tensor, one of which is tied to these ids: a new parameter takes them as they are."""
        name = self.names.get(id(tensor))
        if ids is None or tensor in self._ids or name is None or name in self.tensor_ids:
            own = self.ids(tensor)
            self.tie(ids, own[dim])
            return own
        return self.ids(tensor, (dim, ids))

    def _taken(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """These ids, and fresh ones where there are none: locked where the width is fixed."""
        missing = ids < 0
        if not missing.any():
            return ids
        own = ids.copy()
        own[missing] = self.space.fresh(int(missing.sum()))
        self.lock(own[ids == FIXED], "meets a fixed width")
        return own

    def _out_of_reach(self, path: str) -> str | None:
        """Why nothing can take the place of what a module holds."""
        if isinstance(self.modules.get(path), torch.jit.ScriptModule):
            return "held by a scripted module"
        parts = path.split(".") if path else []
        for n, leaf in enumerate(parts):  # ``self.parameters = nn.ParameterList(self.parameters)``
            if hasattr(type(self.modules[".".join(parts[:n])]), leaf):
                return f"held by {path}, which a method of that name hides"
        return None

    def ids_of(self, tensors: Sequence[Tensor]) -> list[list[Ids]]:
        """The same of many tensors: a concatenation of hundreds is mostly questions."""
        known = list(self._ids.each(tensors))
        return known if all(known) else [self.ids(tensor) for tensor in tensors]  # type: ignore[return-value]

    def known(self, tensor: Tensor) -> bool:
        """Whether a rule has said what a tensor is."""
        return tensor in self._ids and tensor not in self._unmet

    def told(self, tensor: Tensor) -> Sequence[Column | None]:
        """What a comparison may say of a tensor's extents; to ask for a shape meets no parameter."""
        known = self._ids.get(tensor)
        name = self.names.get(id(tensor)) if known is None else None
        return known or ([] if name is None else [(name, dim) for dim in range(tensor.dim())])

    def _stored(self, tensor: Tensor) -> str | None:
        # `parameter.data` is another tensor over the same storage, made without an operator
        if not self.storages or tensor.layout.__str__() != "torch.strided":
            return None
        try:
            return self.storages.get((tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())))
        except RuntimeError:  # a tensor of ``torch.func``, as a module inside ``vmap`` is given
            return None

    def set(self, tensor: Tensor, ids: Sequence[Ids]) -> None:
        """Remember the ids of an operator's output; a tensor written in place is no longer what it was."""
        if tensor in self._ids:
            self.joined = None
        self._ids[tensor] = list(ids)
        self._unmet.pop(tensor)
        self._producers.pop(tensor)
        self._origins.pop(tensor)

    def origin(self, tensor: Tensor) -> str | None:
        """Name of the parameter that ``tensor`` is, possibly transposed, cast or viewed whole."""
        self.ids(tensor)
        return self._origins.get(tensor)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer, or computed from such alone: a scaled, normalised or masked weight."""
        return self._made(tensor) is Made.SCALED

    def is_kernel(self, tensor: Tensor, batched: bool) -> bool:
        """Whether a tensor is such a weight, or takes the place of one: an expert's matrix, in batches too, or an adapter.

        A product of parameters by which batches are multiplied may be queries that are learned, split into heads.
        """
        how = self._made(tensor)
        return how is not None and (how is not Made.PRODUCT or not batched)

    def _made(self, tensor: Tensor) -> Made | None:
        return Made.SCALED if self.origin(tensor) is not None else self._computed.get(tensor)

    def compute(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Remember whether an operator computed its outputs from weights alone, and how."""
        how, sources = made(name, inputs)
        weights = bool(sources) and all(self._made(x) is not None for x in sources)
        for tensor in outputs:
            if weights:
                self._computed[tensor] = max(how, *(self._computed.get(x) or how for x in sources))
            else:
                self._computed.pop(tensor)

    def inherit(self, source: Tensor, target: Tensor) -> None:
        """The target is a whole view or copy of the source: parameter origin and producer pass on."""
        if (name := self.origin(source)) is not None:
            self._origins[target] = name
        if (producer := self._producers.get(source)) is not None and target is not source:
            self._producers[target] = producer
            producer.readers -= 1

    def produced(self, tensor: Tensor, contraction: Contraction) -> None:
        """Remember which contraction made this tensor."""
        self._producers[tensor] = contraction

    def producers(self, tensors: Sequence[Tensor]) -> list[Contraction]:
        """The contractions whose outputs are among these tensors."""
        return list(filter(None, self._producers.each(tensors))) if self._producers else []

    def producer(self, tensor: Tensor) -> Contraction | None:
        """The contraction whose output this is, if it is one."""
        return self._producers.get(tensor)

    def tie(self, a: Ids, b: Ids, why: str = "meets a fixed width") -> None:
        """Tie ids; the reason names the operator and module."""
        if a is b:
            return
        self.space.tie(a, b, f"{why} ({self.where})")

    def tie_all(self, leaders: NDArray[np.int64], grid: NDArray[np.int64], why: str = "meets a fixed width") -> None:
        """Tie every id of a grid to its leader, which is broadcast over the grid."""
        self.tie(np.broadcast_to(leaders, grid.shape).ravel(), grid.ravel(), why)

    def meet(self, columns: Sequence[Ids]) -> Ids:
        """Tie ids that describe the same positions, and return them; None where there are none."""
        head = columns[0] if columns else None
        if not any(map(is_not, columns, repeat(head))):
            return head
        for other in columns[1:]:
            self.tie(head, other)
        return first(columns)

    def fix(self, ids: list[Ids], dims: Iterable[int], why: str) -> None:
        """Lock dimensions of a tensor, and take them out of its ids."""
        for dim in dims:
            self.lock(ids[dim], why)
            ids[dim] = None

    def lock(self, ids: Ids, why: str) -> None:
        """Lock ids; the reason names the operator and module."""
        self.space.lock(ids, f"{why} ({self.where})")

    def lock_once_read(self, tensor: Tensor, ids: Ids, why: str) -> None:
        """Lock ids as soon as an operator or the output reads a tensor's values; asking for its shape alone does no harm."""
        if ids is not None:
            self._pending[tensor] = (ids, f"{why} ({self.where})")

    def read(self, tensors: Sequence[Tensor]) -> None:
        """Values of these tensors are used."""
        for tensor in tensors if self._pending else ():
            if (pending := self._pending.pop(tensor)) is not None:
                self.space.lock(*pending)

    def may_count(self, ids: NDArray[np.int64]) -> None:
        """Integers of the running modules that equal an extent, in lists too, may follow it: a rehearsal tells."""
        for path, name, value in self.called():
            if type(value) is int:
                if value == len(ids) and not self.of_torch(path):
                    self.possible.append(Binding(path, name, None, ids))
            elif isinstance(value, (list, tuple)) and len(value) <= _MOST_LAYERS and self.modules[path]._modules:
                same = (index for index, n in enumerate(value) if type(n) is int and n == len(ids))
                self.possible += [Binding(path, name, index, ids, alone=True) for index in same]
        for path in (self.stack[-1], *self.beside()):
            self.possible += [Binding(path, name, None, ids) for name, n in self.settings(path) if n == len(ids)]

    def contract(
        self,
        output: Tensor,
        operand: tuple[int, int, Ids],
        writes: Ids,
        sizes: Sequence[tuple[int, Ids]],
        constant: int = 1,
        weight: Tensor | None = None,
        weight_reads: Ids = None,
        bias: Tensor | None = None,
        observed: bool = True,
    ) -> None:
        """Record a contraction.

        Args:
            output: what the operator returned.
            operand: (argument position, dimension from the end, ids) of the activation that is summed over.
            writes: ids of the output channels.
            sizes: (extent, ids) of every factor of the multiply-add count.
            constant: further factor.
            weight: the other operand.
            weight_reads: the weight's ids along the summed dimension.
            bias: added to the output channels.
            observed: whether what it reads can be watched.
        """
        macs, widths = constant, []
        for extent, ids in sizes:
            if ids is None:
                macs *= extent
            else:
                widths.append(ids)
        name = self.origin(weight) if weight is not None else None
        dims = self.tensor_ids[name] if name is not None else []
        reads_dim = next((d for d, ids in enumerate(dims) if ids is weight_reads), None)
        argument, dim, reads = operand
        contraction = Contraction(
            module=self.stack[-1],
            call=self.frames[-1].call,
            ordinal=self.frames[-1].contractions,
            operand=argument,
            dim=dim,
            reads=reads,
            writes=writes,
            macs=macs,
            widths=widths,
            weight=name if reads_dim is not None else None,
            weight_reads=reads_dim if reads_dim is not None else 1,
            bias=self.origin(bias) if bias is not None else None,
            training=self.training,
            observed=observed,
        )
        self.frames[-1].contractions += 1
        self.contractions.append(contraction)
        self.produced(output, contraction)
