"""Regions of a feature map, and writing by index: channels pass, positions are fixed."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from actprune.graph.ids import Ids
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


@rule("index_put", "_index_put_impl_", "index_put_")
def index_put(t: TraceState, a: SimpleNamespace, out: Tensor) -> None:
    """Dimensions that are written by index cannot be cut; the trailing others are tied to the values."""
    ids: list[Ids] = list(t.ids(a.input))
    indexed = [d for d, i in enumerate(a.indices) if i is not None]
    for d in indexed:
        t.lock(ids[d], "written by position")
        ids[d] = None
    values = t.ids(a.values)
    for d in range(1, a.values.dim() + 1):
        if a.values.shape[-d] == a.input.shape[-d] and a.values.shape[-d] > 1 and a.input.dim() - d not in indexed:
            t.tie(ids[-d], values[-d])
        else:
            t.lock(values[-d], "written by position")
    t.set(out, ids)
