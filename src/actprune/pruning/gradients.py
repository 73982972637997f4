"""One more run of a batch with gradients enabled, and what statistics of gradients make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from actprune.core.calling import undisturbed
from actprune.core.errors import ConfigError, ObservationError
from actprune.core.gates import Gates, Place, Reading
from actprune.core.labels import is_class_vector, targets_of
from actprune.core.outputs import logits_of
from actprune.statistics.sensitivity import mean_gradients

_MODES = {"outputs": "full", "output_sum": "lower_bound"}

Loss = Callable[[Any, Any], Tensor]
"""Outputs and targets of a batch -> the mean of its samples' losses."""


def differentiated(
    model: nn.Module, places: Sequence[Place], kind: str, run: Callable[[], Any], n: int
) -> Iterator[tuple[Reading, Tensor]]:
    """Run a batch and yield what was read with its float32 values.

    Args:
        model: the network.
        places: what is to be read.
        kind: ``loss``: a times N dL/da, the loss being a mean over samples; ``outputs`` and ``output_sum``: mean gradients.
        run: runs the network and returns the loss or the outputs.
        n: samples in the batch (N).

    Raises:
        ObservationError: what ``run`` returns has no gradient, or an activation was overwritten before it was used.
    """
    gates = Gates(model, places)
    with _graph(model):
        with gates.recording():
            said = _run(run)
        if kind == "loss":
            loss = _checked_loss(said)
            gates.connect(loss)
            found = gates.gradients(loss.float() * n, False)
        else:
            outputs = logits_of(said, n)
            gates.connect(outputs)
            found = mean_gradients(outputs, gates.gradients, _MODES[kind])
    if found and all(g is None for g in found):
        what = "loss does" if kind == "loss" else "outputs do"
        raise ObservationError(f"the {what} not depend on any activation that the criterion observes")
    for number, (reading, gradient) in enumerate(zip(gates.readings, found, strict=True)):
        found[number] = None
        if gradient is None:
            gradient = torch.zeros_like(reading.value)
        if kind == "loss":
            if not reading.is_intact:
                raise ObservationError(
                    f"what {reading.place[0] or 'the network'!r} reads is overwritten in place after it was read; switch "
                    "inplace off there"
                )
            value = reading.value
            real = (value * gradient.conj()).real.float() if value.is_complex() else value.float() * gradient.float()
            yield reading, real
        else:
            yield reading, gradient


def _run(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise ObservationError(
            f"the batch was made under torch.inference_mode, gradients need ordinary tensors: {error}; clone() it outside of "
            "inference mode, or use torch.no_grad"
        ) from error


@contextmanager
def _graph(model: nn.Module) -> Iterator[None]:
    """Gradients are enabled, autocast is as the caller has it, and the model is in evaluation mode and comes out unchanged."""
    kinds = sorted({p.device.type for p in model.parameters()} | {"cpu"})
    casts = {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    torch.clear_autocast_cache()  # casts of weights that were made without gradients, or under inference mode
    try:
        with undisturbed(model), torch.enable_grad(), ExitStack() as stack:
            for kind, dtype in casts.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield
    finally:
        torch.clear_autocast_cache()


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        graph = " without a gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise ObservationError(f"the loss must be one number with a gradient, the mean over the batch; got {given}{graph}")
    return loss.reshape(())


def default_loss(outputs: Any, targets: Any) -> Tensor:
    """The loss that the network reports itself, else the cross entropy of its logits.

    Raises:
        ConfigError: there is neither; the targets are not classes.
    """
    own = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if isinstance(own, Tensor):
        return own
    if isinstance(targets, Mapping):
        targets = targets_of(targets)
    if isinstance(targets, Tensor) and targets.dim() > 0:
        logits = logits_of(outputs, len(targets))
        classes = logits.dim() > 1 and targets.shape == (len(logits), *logits.shape[2:])
        if classes and (targets.dim() > 1 or is_class_vector(targets, len(logits))) and not targets.is_floating_point():
            return nn.functional.cross_entropy(logits, targets.long())
        given = f"{targets.dtype} targets of shape {tuple(targets.shape)} for outputs of shape {tuple(logits.shape)}"
    else:
        given = "no targets" if targets is None else f"targets of type {type(targets).__name__}"
    raise ConfigError(
        "the criterion differentiates the loss, by default the cross entropy of (N, classes) outputs with integer classes; got "
        f"{given}: pass loss=, a function of outputs and targets, and data that yield (inputs, targets)"
    )
