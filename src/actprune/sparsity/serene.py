"""SeReNe: units that the outputs do not notice decay, and those that became small leave while the loss allows it.

Formula, after every optimizer step: w <- w - lam * w * max(0, 1 - S(u)) for all weights w that a unit u owns, S its sensitivity
(``preactivations.py``). The pruning stage looks for the largest threshold T such that without the units below it the loss on
validation data is at most (1 + tolerance) times what it was.
Source: Tartaglione et al., arXiv:2102.03773. As there: the decay is not scaled by the learning rate, biases do not decay, the
threshold is found by bisection.
Deviations: what decays is the whole unit of the channel graph (filter, norm scale, and the weights that read it where what
they produce may not be cut), in all layers that write it, by the largest sensitivity among them: a unit leaves a residual
stream only if all of its writers are small. The threshold is for units, on the root mean square of what they own, not for
single weights: no weight inside a unit that stays becomes zero. The sensitivity is that before the step, as in the paper's
text; its published code takes it afterwards, from weights that have changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from actprune.core.errors import ConfigError
from actprune.graph import Graph
from actprune.sparsity.groups import Piece, unit_groups
from actprune.sparsity.preactivations import Reduce, Sensitivities


def insensitivity(sensitivity: Tensor) -> Tensor:
    """max(0, 1 - S)."""
    return (1 - sensitivity).clamp(min=0)


def decay_(piece: Piece, factor: Tensor) -> None:
    """Multiply what belongs to each unit in one parameter by the unit's factor, (U,), in place."""
    with torch.no_grad():
        factor = factor.to(piece.param.device)
        if piece.whole:
            shape = [1] * piece.param.ndim
            shape[piece.dim] = -1
            piece.param.mul_(factor.repeat_interleave(piece.positions.shape[1]).view(shape))
        else:
            values = piece.of(piece.param)
            piece.put_(values * factor.view(-1, *[1] * (values.ndim - 1)))


class InsensitivityDecay:
    """Decays the units of one network by their insensitivity.

        decay = InsensitivityDecay(model, graph, lam=1e-3)
        with decay.watching():
            loss = loss_function(model(x), y)
        loss.backward()
        optimizer.step()
        decay.step()

    Make a new one after surgery. Units without a pre-activation that can be watched, and parameters without gradient, stay.

    Args:
        model: the network, whose forward returns the outputs.
        graph: its channel graph.
        lam: share of an insensitive unit's weights that goes in one step, in [0, 1].
        mode: how the sensitivity is taken: ``"full"``, ``"lower_bound"`` or ``"local"``.

    Raises:
        ConfigError: an argument is out of range, or no unit has a pre-activation.
    """

    def __init__(self, model: nn.Module, graph: Graph, lam: float = 1e-4, mode: str = "full") -> None:
        check_decay(lam)
        self.lam = lam
        self._sensitivities = Sensitivities(model, graph, mode)
        biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
        self._weights = {
            rows.name: [piece for piece in rows.pieces if id(piece.param) not in biases] for rows in unit_groups(model, graph)
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block, forward passes of the network with gradients say how sensitive it is."""
        with self._sensitivities.watching():
            yield

    def step(self, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """Decay by the mean sensitivity since the last step.

        Args:
            reduce: adds up a tensor over processes, where there are several.

        Returns:
            Group -> (U,) sensitivity that was used.

        Raises:
            ObservationError: no forward pass was seen.
        """
        found = self._sensitivities.take(reduce)
        for name, sensitivity in found.items():
            factor = 1 - self.lam * insensitivity(sensitivity)
            for piece in self._weights.get(name, ()):
                decay_(piece, factor)
        return found


def check_decay(lam: float) -> None:
    """Raise ConfigError unless ``lam`` is a share."""
    if not 0 <= lam <= 1:
        raise ConfigError(f"decay={lam!r} must lie in [0, 1]: the share of an insensitive unit that goes in one step")


def tolerated(loss: float, before: float, tolerance: float) -> bool:
    """Whether a loss is at most ``tolerance`` times |before| above ``before``; NaN is not."""
    return loss <= before + tolerance * abs(before)


def largest_accepted(thresholds: Sequence[float], accepts: Callable[[float], bool]) -> float | None:
    """The largest threshold that is accepted, by bisection: exact where everything below an accepted one is accepted too.

    Args:
        thresholds: ascending candidates.
        accepts: called at most ceil(log2(n + 1)) times.

    Returns:
        An accepted threshold such that the next larger candidate was refused; None if none was accepted.
    """
    low, high = -1, len(thresholds)  # accepted, refused
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if accepts(thresholds[middle]) else (low, middle)
    return thresholds[low] if low >= 0 else None
