"""The layers into which what leaves is folded."""

from __future__ import annotations

from torch import nn

from actprune.compensation import Compensation, Layer
from actprune.core.layers import runs_torch_forward
from actprune.core.views import Statistic
from actprune.graph import Consumer


def layer_of(model: nn.Module, consumer: Consumer, runs: int = 1) -> Layer:
    """A consumer with its tensors as they are now; ``runs``: how many contractions use its weight."""
    path, _, leaf = consumer.weight.rpartition(".")
    weight = getattr(model.get_submodule(path), leaf)
    intercept = consumer.bias is not None or consumer.batch_norm is not None or takes_bias(model, consumer)
    return Layer(consumer.module, model.get_submodule(consumer.module), weight, consumer.reads_dim, runs, intercept=intercept)


def statistic_of(compensation: Compensation, means_do: bool, layer: Layer, n_channels: int) -> Statistic | None:
    """What compensation accumulates of a layer's input, told whether it sees means of maps alone; None: nothing."""
    statistic = compensation.statistic(layer, n_channels)
    if statistic is not None:
        statistic.means_do = means_do
    return statistic


def takes_bias(model: nn.Module, consumer: Consumer) -> bool:
    """Whether a layer is given a bias: nothing else takes a shift, and it adds one, which a forward of its own may not do."""
    if consumer.bias is not None or consumer.batch_norm is not None:
        return False
    module = model.get_submodule(consumer.module)
    own = consumer.reads_own_weight and runs_torch_forward(module)
    return own and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.bias is None
