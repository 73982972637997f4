"""Ranks of maps in their own extents, against NumPy map by map."""

import numpy as np
import pytest
import torch

from actprune.statistics import MapRank, merge_shards

N, U = 7, 3


def low_rank_maps(*shape):
    """(N, U, M, *shape) whole numbers of any rank that fits, some maps zero."""
    generator = np.random.default_rng(0)
    maps = generator.integers(-3, 4, (N, U, 4, *shape)).astype(np.float32)
    maps[generator.random((N, U, 4)) < np.array([0.2, 0.4, 0.6])[:, None]] = 0
    if len(shape) > 1:
        maps[generator.random((N, U, 4)) < 0.5, ..., 1:, :] = 1
    return torch.from_numpy(maps)


def rank_of(a):
    """Of one map in float64: a number and a vector are matrices of one column, what precedes H x W is other maps."""
    if a.ndim < 2:
        return np.linalg.matrix_rank(a.astype(np.float64).reshape(-1, 1))
    return np.mean([np.linalg.matrix_rank(frame.astype(np.float64)) for frame in a.reshape(-1, *a.shape[-2:])])


@pytest.mark.parametrize("extents", [(), (9,), (1, 9), (4, 16), (8, 12), (12, 8), (5, 4, 6), (2, 3, 4, 5)])
def test_ranks_are_those_of_each_map_in_its_own_extents(extents):
    x = low_rank_maps(*extents)
    expected = [np.mean([rank_of(a) for a in x[:, u].numpy().reshape(-1, *extents)]) for u in range(U)]
    shards = []
    for part in x.split([2, 4, 1]):
        shards.append([MapRank(U)])
        shards[-1][0].update(part, torch.arange(len(part)))
    ranks = merge_shards(shards)[0].compute()
    assert ranks.min() < ranks.max()
    assert np.allclose(ranks, expected, rtol=1e-12)


def test_rank_of_known_maps():
    half = torch.diag(torch.tensor([1.0, 2, 3, 0, 0, 0]))
    maps = torch.stack([torch.zeros(6, 6), torch.ones(6, 6), torch.eye(6), half])
    statistic = MapRank(4)
    statistic.update(maps.view(1, 4, 1, 6, 6), torch.tensor([0]))
    assert statistic.compute().tolist() == [0, 1, 6, 3]


def test_maps_count_alike_whatever_their_extents():
    statistic = MapRank(1)
    statistic.update(torch.eye(4).expand(1, 1, 3, 4, 4), torch.tensor([0]))
    statistic.update(torch.eye(2, 6).expand(1, 1, 1, 2, 6), torch.tensor([1]))
    assert statistic.compute().tolist() == [(3 * 4 + 2) / 4]
