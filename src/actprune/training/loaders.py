"""Draw from data loaders and leave them as if nobody had: what they hand out next is what they would have handed out."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from actprune.core.contents import Contents, inside

_FEW = 1024
"""Lists that hold more are data."""


@contextmanager
def spared(loaders: Sequence[Any]) -> Iterator[list[Any]]:
    """Loaders to draw from in place of these.

    Afterwards generators of random numbers are as they were, and so is what objects of the user's own classes hold, wherever in
    the loaders: data sets and those that these wrap, samplers, transforms, functions that collate. Workers that persist were
    not started.
    """
    held = _held(loaders)
    found = list(inside(held))
    fields = [value for each in found if hasattr(each, "__dict__") for value in vars(each).values()]
    items = [value for each in (*found, *fields) for value in _items(each)]
    contents = Contents(found)
    states = [setter for each in _once([*held, *fields, *items]) for setter in _state(each)]
    try:
        yield list(map(_twin, loaders))
    finally:
        contents.put_back()
        for setter in states:
            setter()


def _held(loaders: Sequence[Any]) -> list[Any]:
    """The loaders, and what those of PyTorch's classes hold, which ``inside`` does not look into."""
    values = [*loaders]
    for value in values:  # which grows
        parts = [part for field in vars(value).values() for part in (field, *_items(field))] if _deals_out(value) else []
        known = set(map(id, values))
        values += [part for part in _once(parts) if id(part) not in known]
    return values


def _deals_out(value: Any) -> bool:
    return isinstance(value, (DataLoader, Dataset, Sampler)) or "transforms" in getattr(value, "__dict__", ())  # ``Compose``


def _items(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)) and len(value) < _FEW:
        return list(value)
    return list(value.values()) if isinstance(value, dict) and len(value) < _FEW else []


def _once(values: Sequence[Any]) -> list[Any]:
    return list({id(value): value for value in values}.values())


def _state(value: Any) -> Iterator[Callable[[], object]]:
    """What sets a random number generator to the state that it has now."""
    if isinstance(value, torch.Generator):
        before = value.get_state()
        yield lambda: value.set_state(before)
    elif isinstance(value, random.Random):
        own = value.getstate()
        yield lambda: value.setstate(own)
    elif isinstance(value, np.random.RandomState):
        its = value.get_state()
        yield lambda: value.set_state(its)
    elif isinstance(value, np.random.Generator):
        bits = copy.deepcopy(value.bit_generator.state)
        yield lambda: setattr(value.bit_generator, "state", bits)


def _twin(loader: Any) -> Any:
    """A loader over the same data, whose iterator is its own."""
    if not (isinstance(loader, DataLoader) and loader.persistent_workers):
        return loader
    twin = copy.copy(loader)
    vars(twin).update(_iterator=None, persistent_workers=False)  # a loader refuses to have them set
    return twin
