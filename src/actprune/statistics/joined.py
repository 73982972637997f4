"""Update the statistics of several sites as one: a few large operations in place of many small ones.

The states of the whole hold those of its parts one after the other; from then on the parts' states are views into them, so
that what is added to the whole is in the parts at once, and the other way round. A part is read, merged and checked as if it
stood alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from actprune.statistics.base import Accumulator


def join(parts: Sequence[Accumulator], device: torch.device) -> Accumulator:
    """Make one statistic of the units of several, whose states become views into its own.

    Args:
        parts: statistics with the same settings that are ``joinable``; what any of them was joined to before is given up.
        device: where the activations are.

    Returns:
        The whole: its units are those of the parts, in order.
    """
    is_new = not any(part.update_called for part in parts)
    with torch.inference_mode(False):
        for part in () if is_new else parts:
            if part.device != device:
                part.to(device)
        whole = parts[0].another()
        own = vars(whole)
        own.update(n_units=sum(part.n_units for part in parts), _device=device, _is_bare=False)
        for name in parts[0].metric_state:
            first: Tensor = getattr(parts[0], name)
            sizes = [len(state) if state.dim() else 1 for part in parts for state in (getattr(part, name),)]
            value = parts[0].constant(name) if is_new else None
            if value is None:
                states = torch.cat([getattr(part, name).reshape(-1, *first.shape[1:]) for part in parts]).to(device)
            else:  # rather than moving each to the device
                states = torch.full((sum(sizes), *first.shape[1:]), value, dtype=first.dtype, device=device)
            own[name] = states  # torch would take longer to look what kind of attribute it is than to make it
            for part, state in zip(parts, states.split(sizes), strict=True):
                vars(part)[name] = state if first.dim() else state.view(())
        own["_update_count"] = max(part._update_count for part in parts)
        for part in parts:  # from now on it has what the whole has seen: it is not a new one if it is joined again
            vars(part).update(_device=device, _is_bare=False, _update_count=max(part._update_count, 1))
        whole.joined([part.n_units for part in parts])
    return whole
