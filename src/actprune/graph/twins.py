"""Parts that the example did not reach: an expert to which no sample was sent is cut like one that ran.

Which experts run, data decide: one that the trace has not seen may run tomorrow, and then has to read the widths there are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from actprune.graph.state import TraceState


def follow_twins(model: nn.Module, state: TraceState) -> None:
    """Tie what an unseen member of a ``ModuleList`` or ``ModuleDict`` shares with the outside to what a member alike shares.

    Its inner widths stay: nothing was seen to read them.
    """
    for path, held in model.named_modules():
        if not isinstance(held, (nn.ModuleList, nn.ModuleDict)):
            continue
        members = {f"{path}.{name}" if path else name: module for name, module in held.named_children()}
        kinds = {key: (type(module), _shapes(module)) for key, module in members.items()}
        reached = {key: [f"{key}.{name}" in state.tensor_ids for name, _ in kinds[key][1]] for key in members}
        whole = [key for key, tensors in reached.items() if tensors and all(tensors)]
        for key, tensors in reached.items():
            twin = next((other for other in whole if kinds[other] == kinds[key]), None)
            if twin is not None and not any(tensors):
                _follow(state, members[key], twin)


def _shapes(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters())


def _follow(state: TraceState, module: nn.Module, twin: str) -> None:
    state.where = f"not reached, like {twin}"
    outside = _roots(state, twin)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        for mine, theirs in zip(state.ids(tensor), state.tensor_ids.get(f"{twin}.{name}", ()), strict=False):
            if mine is not None:
                shared = np.isin(state.space.find(theirs), outside)
                state.tie(mine[shared], theirs[shared])


def _roots(state: TraceState, without: str) -> NDArray[np.int64]:
    """Classes of everything that is not inside of a module."""
    kept = [ids for name, dims in state.tensor_ids.items() if not name.startswith(f"{without}.") for ids in dims]
    return np.unique(state.space.find(np.concatenate([np.empty(0, np.int64), *kept])))
