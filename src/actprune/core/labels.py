"""Where the class labels of a batch are: asked of the batch, in one documented order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from actprune.core.errors import ObservationError

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Names under which a mapping holds its targets, in the order in which they are tried."""


def targets_of(batch: Any) -> Any:
    """What a mapping holds under the first of ``LABEL_KEYS`` that it has, or the last part of a pair; None for neither."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if batch.get(key) is not None), None)
    return batch[-1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None


def class_labels(batch: Any, n: int) -> Tensor | None:
    """The labels of the ``n`` samples of a batch, a vector of n integers; None where there is none.

    Tried in this order: of a mapping what ``LABEL_KEYS`` name; of a tuple or list every part from the second to the last,
    itself or, if it is a mapping, its entries; then the first part if it is a mapping.
    """
    return next((x for x in _candidates(batch) if is_class_vector(x, n)), None)


def unlabelled(batch: Any, n: int) -> str:
    """Why a criterion of classes cannot be told those of ``n`` samples of a batch; empty where it can."""
    if class_labels(batch, n) is not None:
        return ""
    return (
        f"the criterion needs labels, and a validation batch of type {type(batch).__name__} holds no vector of {n} "
        f"integers; let it be (inputs, labels), or a mapping with one of {', '.join(LABEL_KEYS)}"
    )


def is_class_vector(x: Any, n: int) -> bool:
    """Whether it is a tensor of ``n`` integers."""
    return isinstance(x, Tensor) and x.shape == (n,) and not (x.is_floating_point() or x.is_complex())


def check_class_vector(labels: Tensor | None, n: int) -> None:
    """Refuse labels that are not there, or are not ``n`` integers.

    Raises:
        ObservationError: says what was given.
    """
    if not is_class_vector(labels, n):
        given = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ObservationError(
            f"the criterion needs the class of each of {n} samples as a vector of integers, got {given}; "
            "data must yield (inputs, labels) or mappings with labels, begin_batch takes them as its second argument"
        )


def _candidates(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        yield from (batch[key] for key in LABEL_KEYS if key in batch)
    elif isinstance(batch, (tuple, list)):
        for part in batch[1:]:
            yield part
            if isinstance(part, Mapping):
                yield from _candidates(part)
        if batch and isinstance(batch[0], Mapping):
            yield from _candidates(batch[0])
