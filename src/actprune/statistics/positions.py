"""A fixed number of positions per map, in all samples or in every second one: the same ones whatever the batch, order or rank.

Formula: the map's P positions are cut into k strata of P // k or P // k + 1 neighbours, one position is drawn in each,
and all are rotated by one uniform offset per sample, so that every position is taken with probability k / P exactly.
Cheaper (k draws, not P) and of lower variance than drawing without strata.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.statistics.counter import below, hashed

VALUES = 3 << 13
"""Values per unit from which a ranking hardly changes with more: see docs/criteria.md."""
FEW, LEAST, USUAL = 4, 2, 8
"""Positions per map: so few stand for many samples, where LEAST will do; and where nobody knows how many samples will come."""

_ROTATION, _SAMPLE = -1, -2
"""Stratum indices that no stratum has: the rotation, and whether a sample is read, are drawn independently of the strata."""


@dataclass(frozen=True)
class Density:
    """How much of large maps is read."""

    positions: int | None
    """Of each unit in a sample; None: all."""
    halved: bool = False
    """Whether only every second sample is read, drawn by its id."""


EVERYTHING = Density(None)


def enough(n_samples: int | None) -> Density:
    """What to read so that every unit gives about ``VALUES`` values; 8 positions where the number of samples is unknown.

    The nearest power of two, so that numbers that differ a little, as those of two ways to deal out 2,048 samples do, mean
    the same. Values of different samples say more than values of one map: where that would be 4 or fewer, from 4,345 samples
    on, it is 2, and that in every second sample.
    """
    if n_samples is None:
        return Density(USUAL)
    wanted = 2 ** round(math.log2(VALUES / max(1, n_samples)))
    return Density(wanted) if wanted > FEW else Density(LEAST, halved=True)


def every_second(
    sample_ids: Tensor,  # (N,) int64
    seed: int,
) -> Tensor:
    """Which samples are read where every second one is, as ascending rows: a fair coin for every id."""
    return (hashed(seed, sample_ids, torch.full_like(sample_ids[:1], _SAMPLE)) >= 0).nonzero().flatten()


def check_positions(positions: object) -> None:
    """Raise ConfigError unless this is ``"auto"``, None (all) or a number of positions."""
    number = isinstance(positions, int) and not isinstance(positions, bool) and positions >= 1
    if not (number or positions is None or positions == "auto"):
        raise ConfigError(f'positions={positions!r} must be "auto", a number of at least 1, or null (None) for all')


def sample_positions(
    sample_ids: Tensor,  # (N,) int64
    n_positions: int,
    k: int,
    seed: int,
    bits: Tensor | None = None,
) -> Tensor:
    """Draw ``min(k, n_positions)`` distinct positions for every sample.

    Args:
        sample_ids: on them, and on nothing else that differs within a map's size, depends what is drawn.
        n_positions: of a map.
        k: how many are drawn.
        seed: of the draw.
        bits: ``position_bits(sample_ids, k, seed)``, where maps of several sizes are drawn from.

    Returns:
        Int64 tensor (N, min(k, n_positions)), different in each row; all positions in order when k >= n_positions.

    Raises:
        ConfigError: ``k`` or ``n_positions`` is below 1.
    """
    if k < 1 or n_positions < 1:
        raise ConfigError(f"sample_positions needs k >= 1 of n_positions >= 1, got k={k}, n_positions={n_positions}")
    device = sample_ids.device
    if k >= n_positions:
        return torch.arange(n_positions, device=device).expand(len(sample_ids), n_positions)
    edges = torch.arange(k + 1, device=device) * n_positions // k
    bits = position_bits(sample_ids, k, seed) if bits is None else bits
    drawn = edges[:-1] + below(edges[1:] - edges[:-1], bits[:, :k])
    return drawn.add_(below(n_positions, bits[:, k:])).remainder_(n_positions)


def position_bits(
    sample_ids: Tensor,  # (N,) int64
    k: int,
    seed: int,
) -> Tensor:
    """Random bits of every sample for k strata and the rotation, int64 (N, k + 1): the same for maps of all sizes."""
    strata = torch.arange(k + 1, device=sample_ids.device)
    strata[k] = _ROTATION
    return hashed(seed, sample_ids.unsqueeze(1), strata)


def at_positions(
    x: Tensor,  # (N, C, P)
    drawn: Tensor,  # (n, k) of the P positions; of a unit's width P, where ``channels`` is given
    channels: Tensor | None = None,  # (U, width) of every unit; None: unit i is channel i
    rows: Tensor | None = None,  # (n, 1) which samples were drawn; None: all N
    out: Tensor | None = None,  # (n, k, C) to write to, without ``channels`` and gradients
) -> Tensor:
    """What samples have at the positions that were drawn for them, (n, U, k), a tensor of its own, or a view of ``out``."""
    rows = torch.arange(len(x), device=x.device).unsqueeze(1) if rows is None else rows
    if channels is not None:
        places = channels[:, drawn // x.shape[2]].transpose(0, 1)  # (n, U, k)
        return x[rows.unsqueeze(2), places, (drawn % x.shape[2]).unsqueeze(1)]
    if out is None:
        return x[rows, :, drawn].transpose(1, 2)
    return torch.ops.aten.index.Tensor_out(x, [rows, None, drawn], out=out).transpose(1, 2)
