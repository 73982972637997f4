"""Any classification model of torchvision, by name, with or without its published weights."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from actprune.core.errors import ConfigError, DataError
from actprune.models.checks import check_positive


def torchvision_model(
    name: str = "resnet18",
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    weights: str | None = None,
) -> nn.Module:
    """Build a torchvision classifier.

    Heads that only help training (GoogLeNet, Inception) are left out: every model returns logits (N, num_classes).

    Args:
        name: as in ``torchvision.models.list_models(module=torchvision.models)``.
        num_classes: outputs; with ``weights``, the number they were trained for.
        in_channels: must be 3.
        image_size: height and width of the images, pixels; the models with position tables are made for it.
        weights: name of published weights, e.g. ``"DEFAULT"``; fetched by torch hub unless they are in its folder.

    Raises:
        ConfigError: an unknown name (close ones are listed), unknown weights, or a number or size that does not fit.
        DataError: the weights are neither there nor can be fetched; the message says where they belong.
    """
    check_positive(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=5, cutoff=0.4) or known[:5]
        raise ConfigError(f"torchvision has no classification model {name!r}; close names: {', '.join(close)}")
    if in_channels != 3:
        raise ConfigError(f"in_channels={in_channels} but torchvision's models take 3; set data.in_channels=3")
    chosen = None if weights is None else _weights(name, weights, num_classes)
    try:
        options = _options(name, image_size, pretrained=chosen is not None)
        model = models.get_model(name, weights=chosen, num_classes=num_classes, **options)
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"torchvision's {name} cannot be made for image_size={image_size}: {reason}") from error
    except (OSError, RuntimeError) as error:
        if chosen is None:
            raise
        place = Path(torch.hub.get_dir(), "checkpoints", Path(chosen.url).name).resolve()
        raise DataError(
            f"weights {weights} of {name} are not there and cannot be fetched ({error}); "
            f"put the file from {chosen.url} at {place}, or set weights=null"
        ) from error
    if isinstance(model, models.Inception3):
        model.aux_logits, model.AuxLogits = False, None
    return model


def _weights(name: str, weights: str, num_classes: int) -> Any:
    known = models.get_model_weights(name).__members__
    if weights not in known:
        raise ConfigError(f"torchvision's {name} has no weights {weights!r}; it has {', '.join(known)}, or weights=null")
    chosen = known[weights]
    classes = len(chosen.meta["categories"])
    if classes != num_classes:
        raise ConfigError(
            f"weights {weights} of {name} are for {classes} classes, num_classes={num_classes}; "
            f"use data with {classes} classes or weights=null"
        )
    return chosen


def _options(name: str, image_size: int, pretrained: bool) -> dict[str, Any]:
    """What a family has to be told, beyond what all models take."""
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name.startswith("maxvit"):
        return {"input_size": (image_size, image_size)}
    if name in ("googlenet", "inception_v3") and not pretrained:
        # torchvision warns unless it is told how to draw initial weights; with published ones it must not be told.
        return {"aux_logits": False, "init_weights": True}
    return {}
