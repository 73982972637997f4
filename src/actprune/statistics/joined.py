"""Update the statistics of several sites as one: a few large operations in place of many small ones.

The states of the whole hold those of its parts one after the other; from then on the parts' states are views into them, so
that what is added to the whole is in the parts at once, and the other way round. A part is read, merged and checked as if it
stood alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from actprune.statistics.base import Accumulator


def join(parts: Sequence[Accumulator], make: Callable[[int], Accumulator], device: torch.device) -> Accumulator:
    """Make one statistic of the units of several, whose states become views into its own.

    Args:
        parts: statistics with the same settings that are ``joinable`` and of which none was joined before.
        make: makes such a statistic for a number of units.
        device: where the activations are.

    Returns:
        The whole: its units are those of the parts, in order.
    """
    with torch.inference_mode(False):
        for part in parts:
            if part.device != device:
                part.to(device)
        whole = make(sum(part.n_units for part in parts)).to(device)
        for name in whole.metric_state:
            own = [getattr(part, name).view(-1) if getattr(part, name).dim() == 0 else getattr(part, name) for part in parts]
            states = torch.cat(own)
            setattr(whole, name, states)
            for part, state in zip(parts, states.split([len(one) for one in own]), strict=True):
                setattr(part, name, state.view(getattr(part, name).shape))
        whole._update_count = max(part._update_count for part in parts)
        whole.joined([part.n_units for part in parts])
    return whole
