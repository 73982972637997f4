"""Attributes of PyTorch's own layers that repeat a tensor's shape, and attributes that the graph says must follow."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from actprune.core import settings
from actprune.surgery.transaction import Transaction

_Conv = nn.modules.conv._ConvNd
_Transposed = nn.modules.conv._ConvTransposeNd
_Norm = nn.modules.batchnorm._NormBase


def assign(module: nn.Module, name: str, value: Any, changes: Transaction) -> None:
    """Set a plain attribute, or ``config.name`` in settings of its own, and remember how to take it back."""
    owner, _, leaf = name.partition(".")
    if leaf:
        others = settings.changed(getattr(module, owner), leaf, value)
        for attribute, follows in settings.following(module, owner, others).items():
            _set(module, attribute, follows, changes)
        return
    old = getattr(module, name)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if type(old) is not type(value) or old != value:
        _set(module, name, value, changes)


def _set(module: nn.Module, name: str, value: Any, changes: Transaction) -> None:
    old = getattr(module, name)
    setattr(module, name, value)
    changes.did(lambda: setattr(module, name, old))


def derived(module: nn.Module) -> dict[str, Any]:
    """Values of a layer's attributes that follow from its tensors.

    Args:
        module: a module whose tensors have been cut, with the attributes that it had before.

    Returns:
        Attribute -> value now; empty for modules that are not layers of PyTorch.
    """
    if isinstance(module, _Conv):
        outer, inner = module.weight.shape[:2]
        transposed = isinstance(module, _Transposed)
        groups = module.groups
        if groups > 1:  # only whole groups leave, so a group's own width is what it was
            groups = outer * groups // (module.in_channels if transposed else module.out_channels)
        if transposed:
            return {"in_channels": outer, "out_channels": inner * groups, "groups": groups}
        return {"in_channels": inner * groups, "out_channels": outer, "groups": groups}
    if isinstance(module, nn.MultiheadAttention):
        key, value = module.k_proj_weight, module.v_proj_weight
        widths = {"embed_dim": module.out_proj.weight.shape[0]}
        widths["kdim"] = widths["embed_dim"] if key is None else key.shape[1]
        widths["vdim"] = widths["embed_dim"] if value is None else value.shape[1]
        return widths
    if isinstance(module, nn.Linear):
        return {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
    if isinstance(module, nn.Bilinear):
        return dict(zip(("out_features", "in1_features", "in2_features"), module.weight.shape, strict=True))
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}
    if isinstance(module, nn.RNNBase):
        return _recurrent(module)
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if isinstance(module, _Norm):
        tensor = module.weight if module.weight is not None else module.running_mean
        return {} if tensor is None else {"num_features": tensor.shape[0]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
        return {"normalized_shape": tuple(module.weight.shape)}
    if isinstance(module, nn.GroupNorm) and module.weight is not None:
        return {"num_channels": module.weight.shape[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": module.weight.shape[0]}
    return {}


def _recurrent(module: nn.RNNBase) -> dict[str, Any]:
    widths = {"input_size": cast(Tensor, module.weight_ih_l0).shape[1]}
    widths["hidden_size"] = cast(Tensor, module.weight_hh_l0).shape[1]
    if module.proj_size:
        widths["proj_size"], widths["hidden_size"] = cast(Tensor, module.weight_hr_l0).shape
    return widths
