"""A rehearsed cut is told the values that the trace has read: what it does otherwise then, it does for a width."""

from __future__ import annotations

import enum
import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from actprune.core.numbers import LIFTED
from actprune.graph.extents import Extents
from actprune.graph.told import Read
from actprune.graph.weak import ByTensor


class Tells(enum.Enum):
    """What code is told that reads values.

    A list of what stays has another second largest than the whole list; but the whole one hides how long it is now.
    """

    STAYS = enum.auto()
    WHOLE = enum.auto()
    NOTHING = enum.auto()


class Telling:
    """Hands over what the trace has read, read by read.

    Args:
        extents: what the trace knows.
        stays: (n_classes + 1,) which classes stay.
        tells: what is handed over.
    """

    def __init__(self, extents: Extents, stays: NDArray[np.bool_], tells: Tells) -> None:
        self.dataless = _Dataless()
        self._extents, self._stays, self._tells = extents, stays, tells
        self._other = self._shorter = False

    def values(
        self, number: Read, read: list[Tensor], as_it_is: bool, listed: bool, results: bool
    ) -> tuple[list[Tensor], bool]:
        """What is told in place of what is read; and whether no data can make a difference now.

        Args:
            number: which read it is.
            read: what is read; sizes alone may have made it, then it is read as it is.
            as_it_is: whether that is known.
            listed: whether a list or an array is made of it.
            results: whether these are results that may be as long as data say: then it is their extents that count.
        """
        whole = listed and self._tells is Tells.WHOLE
        if as_it_is or all(map(self.dataless, read)):
            return read, True
        told, leaves = self._extents.told(number, np.ones_like(self._stays) if whole else self._stays)
        fits = len(told) == len(read) and all(x.dtype == t.dtype for x, t in zip(read, told, strict=True))
        alike = fits and all(x.shape == t.shape for x, t in zip(read, told, strict=True))
        self._shorter |= leaves and listed
        if alike and (results or all(map(torch.equal, read, told))):
            return read, listed or not leaves
        if results:
            fits = fits and not any(t.is_meta for t in told)
        if not fits or not (alike or results or whole) or self._tells is Tells.NOTHING:
            return read, False
        self._other = True
        return [value.clone() for value in told], listed or not leaves

    def then(self, surely: bool) -> Tells | None:
        """What is told in another run after one that failed.

        Args:
            surely: whether nothing but a width can have made it fail; else what was told may not fit to what is computed.
        """
        if self._tells is Tells.STAYS and self._shorter:
            return Tells.WHOLE
        return Tells.NOTHING if self._other and not surely and self._tells is not Tells.NOTHING else None


class _Dataless:
    """Follows, operator by operator, what sizes alone have made: nothing of inputs, weights and chance is in it."""

    def __init__(self) -> None:
        self._made: ByTensor[bool] = ByTensor()
        self._written: set[int] = set()

    def __call__(self, tensor: Tensor) -> bool:
        """Whether sizes alone have made a tensor, and nothing else was written there since."""
        if tensor not in self._made or tensor.layout != torch.strided:
            return False
        return tensor.untyped_storage().data_ptr() not in self._written

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operator has run."""
        asks_shapes, random, writes = _kind(func)
        first = args[0] if args else None
        if isinstance(first, Tensor) and first not in self._made and not (asks_shapes or writes):
            return  # most operators: nothing else needs to be asked
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not random and (asks_shapes or all(map(self, inputs))):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    self._made[tensor] = True
                    self._written.discard(tensor.untyped_storage().data_ptr())  # of a storage that was there before
        elif writes:
            for argument, x in zip(func._schema.arguments, args, strict=False):
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                if is_written and isinstance(x, Tensor) and x.layout == torch.strided:
                    self._written.add(x.untyped_storage().data_ptr())


@functools.cache
def _kind(func: Any) -> tuple[bool, bool, bool]:
    """Whether an operator reads no values, draws random numbers, and writes to what it is given."""
    name = func.overloadpacket.__name__
    asks_shapes = name.endswith("_like") or name.startswith("new_") or name in LIFTED
    return asks_shapes, torch.Tag.nondeterministic_seeded in func.tags, bool(func._schema.is_mutable)
