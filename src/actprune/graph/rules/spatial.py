"""Pooling and resampling: batch and channels pass, positions are fixed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from actprune.graph.rules.registry import Rule, rule
from actprune.graph.state import TraceState

_SPATIAL = {  # number of trailing spatial dimensions -> operators
    1: ["avg_pool1d", "adaptive_avg_pool1d", "upsample_nearest1d", "upsample_linear1d", "_upsample_nearest_exact1d"],
    2: [
        "avg_pool2d",
        "_adaptive_avg_pool2d",
        "max_pool2d_with_indices",
        "adaptive_max_pool2d",
        "fractional_max_pool2d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "_upsample_nearest_exact2d",
        "grid_sampler_2d",
    ],
    3: [
        "avg_pool3d",
        "_adaptive_avg_pool3d",
        "max_pool3d_with_indices",
        "adaptive_max_pool3d",
        "fractional_max_pool3d",
        "upsample_nearest3d",
        "upsample_trilinear3d",
        "_upsample_nearest_exact3d",
        "grid_sampler_3d",
    ],
}
for _n in (1, 2, 3):
    _SPATIAL[_n] += [f"{kind}_pad{_n}d" for kind in ("reflection", "replication")]


_UNPOOLS = {2: "max_unpool2d", 3: "max_unpool3d"}


def _resample(spatial: int) -> Rule:
    def resample(t: TraceState, a: SimpleNamespace, out: Any) -> None:
        """Channels pass; a cuttable dimension that is pooled over is locked."""
        x = t.ids(a.input)
        for ids in x[-spatial:]:
            t.lock(ids, "pooled dimension")
        for ids in t.ids(a.grid)[1:] if hasattr(a, "grid") else ():
            t.lock(ids, "positions to sample at")
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            t.set(tensor, [*x[:-spatial], *[None] * spatial])

    return resample


for _n, _operators in _SPATIAL.items():
    rule(*_operators)(_resample(_n))
for _n, _operator in _UNPOOLS.items():
    rule(_operator)(_resample(_n))
