"""Batches of data, taken apart into what the model is fed and what it is compared with, and the pass that observes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from actprune.core.calling import Example, call, device_of, evaluating
from actprune.core.errors import ActPruneError, ObservationError, TraceError
from actprune.core.labels import LABEL_KEYS, class_labels, targets_of
from actprune.pruning.finishing import batch_size
from actprune.pruning.gradients import Loss, default_loss
from actprune.pruning.observe import Observation

if TYPE_CHECKING:
    from actprune.pruning.pipeline import Pruner

Pair = tuple[Example, Any]
"""What the model is fed, and the targets; None where there are none."""


def pairs_of(data: Iterable[Any], example: Example) -> Iterator[Pair]:
    """Inputs and targets of every batch.

    Args:
        data: batches as the model takes them, pairs of inputs and targets, or mappings. Of a mapping, targets are what
            ``LABEL_KEYS`` name; they are fed to the model only where the example has that key too.
        example: what the model takes; a pair is one of inputs and targets if its first part alone is of this kind.
    """
    kind: Any = Tensor
    if isinstance(example, (list, Mapping)):
        kind = list if isinstance(example, list) else Mapping
    elif isinstance(example, tuple) and len(example) > 1:
        kind = (tuple, list)
    for batch in data:
        targets = None
        if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], kind):
            batch, targets = batch
        elif isinstance(batch, Mapping):
            targets = targets_of(batch)
            if isinstance(example, Mapping):
                batch = {key: value for key, value in batch.items() if key in example or key not in LABEL_KEYS}
        if isinstance(batch, Tensor) and isinstance(example, Tensor) and batch.shape == example.shape[1:]:
            raise ObservationError(
                f"data yields {tuple(batch.shape)}, one sample of the example's {tuple(example.shape)}; batch them, e.g. "
                "torch.utils.data.DataLoader(dataset, batch_size=64)"
            )
        yield as_fed(batch, example), targets


def as_fed(batch: Any, example: Example) -> Example:
    """What the model is fed as it takes it: a loader makes lists of tuples."""
    return tuple(batch) if isinstance(batch, list) and not isinstance(example, list) else batch


def expected_samples(data: Iterable[Any], example: Example) -> int | None:
    """About how many samples batches hold; None where only running through them would tell."""
    if isinstance(data, Sequence):
        return sum(batch_size(inputs) for inputs, _ in pairs_of(data, example))
    size = getattr(data, "batch_size", None)
    if not isinstance(size, int) or not isinstance(data, Sized):
        return None
    try:
        return len(data) * size
    except TypeError:  # a loader of an iterable data set has a length only if the data set does
        return None


def observe_pairs(pruner: Pruner, pairs: Iterable[Pair], loss: Loss | None = None, expected: int | None = None) -> Observation:
    """Run the model on batches, in evaluation mode, and observe; once more with gradients where the criterion needs them.

    Args:
        pruner: its model is run, its criterion and compensation observe.
        pairs: inputs and targets of every batch.
        loss: of outputs and targets, the mean over a batch's samples; by default what the model reports as its ``loss``, else
            cross entropy.
        expected: about how many samples there are; None: as many as a list of pairs holds, else unknown.

    Raises:
        TraceError: the model fails on a batch.
        ConfigError: the loss is needed, is not given and is no classification.
        ObservationError: there are no batches, or no labels where the criterion needs them.
    """
    model = pruner.model
    measure = loss or default_loss
    if expected is None and isinstance(pairs, Sequence):
        expected = sum(batch_size(inputs) for inputs, _ in pairs)
    with evaluating(model), pruner.observe(expected) as observation, torch.no_grad():
        for batch, answers in pairs:
            inputs, targets = _usable(pruner, batch, answers) if observation.differentiates else (batch, answers)
            start, n = observation.n_samples, batch_size(inputs)
            observation.begin_batch(range(start, start + n), class_labels((None, targets), n))
            try:
                if observation.watches:
                    call(model, inputs)
                outputs = partial(call, model, inputs)
                observation.differentiate(outputs, partial(_loss, measure, outputs, targets))
            except ActPruneError:
                raise
            except Exception as error:
                raise TraceError(
                    f"the model failed on a batch of data: {type(error).__name__}: {error}; data must yield what the "
                    "model takes, or (inputs, targets)"
                ) from error
    if observation.n_samples == 0:
        raise ObservationError("data yielded 0 batches, at least 1 is needed; a generator can be used only once")
    return observation


def _loss(measure: Loss, outputs: Callable[[], Any], targets: Any) -> Tensor:
    return measure(outputs(), targets)


def _usable(pruner: Pruner, inputs: Example, targets: Any) -> Pair:
    """Tensors that autograd may keep, also where the caller is under inference mode; targets where the model is."""
    device = device_of(pruner.model)
    with torch.inference_mode(False):
        ordinary = tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, (inputs, targets))
        return ordinary[0], tree_map_only(Tensor, lambda x: x.to(device), ordinary[1])
