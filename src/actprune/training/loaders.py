"""Draw from data loaders and leave them as if nobody had: what they hand out next is what they would have handed out."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from actprune.core.contents import Contents, inside

_PARTS = ("dataset", "sampler", "batch_sampler")


@contextmanager
def spared(loaders: Sequence[Any]) -> Iterator[list[Any]]:
    """Loaders to draw from in place of these.

    Afterwards the generators of the loaders and their samplers, and what samplers and data sets of the user's own classes hold,
    are as they were; workers that persist were not started.
    """
    parts = [part for loader in loaders if isinstance(loader, DataLoader) for part in _parts(loader)]
    found = list(inside(parts))
    # objects of libraries are not looked into, but for what deals out samples
    held = [each for part in (*parts, *found) if hasattr(part, "__dict__") for each in vars(part).values()]
    contents, states = Contents(found), [setter for each in {id(x): x for x in held}.values() for setter in _state(each)]
    try:
        yield list(map(_twin, loaders))
    finally:
        contents.put_back()
        for setter in states:
            setter()


def _parts(loader: DataLoader) -> list[Any]:
    parts: list[Any] = [loader]
    for part in parts:  # which grows: a subset has a data set, a batch sampler has a sampler
        found = (getattr(part, "__dict__", {}).get(name) for name in _PARTS)
        parts += [each for each in found if each is not None and not any(each is other for other in parts)]
    return parts


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
