"""Initial weights of the convolutional networks: He et al. (2015), "Delving deep into rectifiers"."""

from __future__ import annotations

from torch import nn


def kaiming_(model: nn.Module) -> None:
    """Draw every convolution and linear weight from N(0, 2 / fan_in), in place; biases and norms stay as made."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
