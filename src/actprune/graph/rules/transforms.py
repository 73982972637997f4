"""Fourier transforms, complex numbers as pairs, distances: channels beside pass, channels that meet are tied."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from actprune.graph.ids import Ids
from actprune.graph.rules.pointwise import pointwise
from actprune.graph.rules.registry import rule
from actprune.graph.state import TraceState


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Every frequency mixes all positions of the transformed dimensions; the others pass."""
    ids: list[Ids] = list(t.ids(a.input))
    t.fix(ids, a.dim, "Fourier transform of this dimension")
    t.set(out, ids)


@rule("view_as_complex")
def to_complex(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """The last dimension holds real and imaginary part; where a head's width was paired up, heads are what may leave."""
    *ids, pair = t.ids(a.input)
    if pair is not None:
        t.scored.add(t.frames[-1].path)
    t.lock(pair, "real and imaginary part")
    t.set(out, ids)


@rule("view_as_real")
def to_real(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """A new last dimension of two."""
    t.set(out, [*t.ids(a.input), None])


@rule("complex", "polar")
def from_parts(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Two numbers make a complex one, position by position."""
    pointwise(t, [a.real, a.imag] if hasattr(a, "real") else [a.abs, a.angle], [out])


@rule("_euclidean_dist", "_cdist_forward")
def distances(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """``(..., P, C), (..., R, C) -> (..., P, R)``: differences are summed over channels, which meet one by one."""
    x, y = t.ids(a.x1), t.ids(a.x2)
    t.tie(x[-1], y[-1])
    batch = [
        t.meet([t.ids(z)[d] for z in (a.x1, a.x2) if z.dim() >= -d and z.shape[d] == out.shape[d] > 1])
        for d in range(-out.dim(), -2)
    ]
    t.set(out, [*batch, x[-2], y[-2]])
