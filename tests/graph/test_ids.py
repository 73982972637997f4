"""Ties between ids against a search through all of them."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch
from torch import nn

import actprune
from actprune.core.errors import TraceError
from actprune.graph.ids import FIXED, FREE, IdSpace


def classes(n: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The least id that can be reached from every id."""
    least = list(range(n))
    while any(least[a] != least[b] for a, b in pairs):
        for a, b in pairs:
            least[a] = least[b] = min(least[a], least[b])
    return least


@pytest.mark.parametrize("seed", range(20))
def test_ties_are_those_of_a_search_and_the_least_id_stands_for_all(seed: int) -> None:
    draw, n = random.Random(seed), 40
    space, pairs, met = IdSpace(), [], set()
    space.fresh(n)
    for _ in range(6):
        a, b = (np.array([draw.choice([FIXED, FREE, *range(n)]) for _ in range(12)]) for _ in range(2))
        space.tie(a, b, "meets a fixed width")
        pairs += [(int(x), int(y)) for x, y in zip(a, b, strict=True) if x >= 0 and y >= 0]
        met |= {int(max(x, y)) for x, y in zip(a, b, strict=True) if FIXED in (x, y)} - {FIXED, FREE}
    expected = classes(n, pairs)
    assert space.find(np.arange(n)).tolist() == expected
    assert set(space.reasons()) == {expected[i] for i in met}


def test_the_garbage_collector_is_as_it_was() -> None:
    during = []

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            during.append(gc.isenabled())
            raise ValueError("no")

    for on in (True, False):
        (gc.enable if on else gc.disable)()
        try:
            with pytest.raises(TraceError):
                actprune.trace(Fails(), torch.rand(1, 3))
            assert gc.isenabled() is on
        finally:
            gc.enable()
    assert during == [False, False]
