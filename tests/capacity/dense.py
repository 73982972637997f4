"""The explicit matrix of a linear map, as an independent reference."""

import math

import torch


def matrix(function, shape):
    """(outputs, inputs) in float64, one column per unit vector."""
    units = torch.eye(math.prod(shape), dtype=torch.float64)
    with torch.no_grad():
        return torch.stack([function(unit.reshape(shape)).flatten() for unit in units], 1)


def constant(function, shape):
    return float(torch.linalg.svdvals(matrix(function, shape))[0])


def of_module(module, shape):
    """Constant of a module in evaluation mode, its bias taken off."""
    module = module.double().eval()
    with torch.no_grad():
        origin = module(torch.zeros(1, *shape, dtype=torch.float64))
    return constant(lambda x: module(x[None]) - origin, shape)
