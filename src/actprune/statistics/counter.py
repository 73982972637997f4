"""Random numbers that are a pure function of integer keys, so that batching, order and sharding cannot change them.

Formula: splitmix64 (Steele, Lea & Flood, OOPSLA 2014), chained over the keys: ``h <- mix(h xor key)``, h_0 = mix(seed).
Integer arithmetic modulo 2^64 in int64 tensors, hence the same bits on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)
_WORD = 64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) shift of int64."""
    return (x >> bits) & ((1 << (_WORD - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """Mix every int64 of ``x`` into 64 random bits (the output of splitmix64 for the state ``x``)."""
    z = x + _GAMMA
    z = (z ^ _shift_right(z, 30)) * _FIRST
    z = (z ^ _shift_right(z, 27)) * _SECOND
    return z ^ _shift_right(z, 31)


def hashed(seed: int, *keys: Tensor) -> Tensor:
    """64 random bits for every combination of keys; the int64 keys broadcast against each other."""
    bits: Tensor | int = _mixed(seed % (1 << _WORD))  # in Python: a tensor made of a number would stall a device
    for key in keys:
        bits = splitmix64(key ^ bits)
    assert isinstance(bits, Tensor)
    return bits


def _mixed(word: int) -> int:
    """``splitmix64`` of one unsigned word, as a signed one."""
    mask = (1 << _WORD) - 1
    z = (word + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return _signed(z ^ (z >> 31))


def uniform(seed: int, *keys: Tensor) -> Tensor:
    """Float64 numbers in [0, 1), multiples of 2^-53, one for every combination of keys."""
    return _shift_right(hashed(seed, *keys), 11).to(torch.float64) * 2.0**-53


def below(limit: Tensor | int, bits: Tensor) -> Tensor:
    """Int64 numbers in [0, limit), limit <= 2^31, of 64 random bits each; the bias of the reduction is under limit / 2^63."""
    return _shift_right(bits, 1) % limit


def signs(
    keys: Tensor,  # (...) int64, one key per sample
    replicates: int,
    seed: int,
    dtype: torch.dtype,
) -> Tensor:
    """Fair signs sigma = +-1: one 64-bit word of the counter serves 64 replicates.

    Returns:
        Tensor (..., replicates) of ``dtype``.
    """
    words = torch.arange(-(-replicates // _WORD), device=keys.device)
    bits = hashed(seed, keys.unsqueeze(-1), words)  # (..., words)
    places = torch.arange(min(replicates, _WORD), device=keys.device)  # one sign each would cost 64 otherwise
    drawn = ((bits.unsqueeze(-1) >> places) & 1).flatten(-2)[..., :replicates]
    return drawn.to(dtype).mul_(2).sub_(1)
