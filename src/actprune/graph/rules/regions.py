"""Regions of a feature map: channels pass, positions are fixed."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from actprune.graph.rules.registry import rule
from actprune.graph.state import TraceState


@rule("roi_align", "roi_pool")
def pool_regions(t: TraceState, a: SimpleNamespace, out: Tensor | tuple[Tensor, ...]) -> None:
    """``(N, C, H, W), (K, 5) -> (K, C, h, w)``."""
    channels = t.ids(a.input)[1]
    for dim in (*t.ids(a.input)[2:], *t.ids(a.rois)):
        t.lock(dim, "position of a region")
    for tensor in out if isinstance(out, tuple) else (out,):
        t.set(tensor, [None, channels, None, None])
