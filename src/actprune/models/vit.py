"""A small vision transformer for small images: Dosovitskiy et al. (2021), pre-norm blocks, learned position embedding.

Every size used in a forward pass is an attribute or comes from the input, so that heads, columns of the hidden layer
and channels of the residual stream can leave by changing tensors and attributes. The softmax then keeps its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actprune.core.errors import ConfigError
from actprune.models.checks import check_choice, check_positive
from actprune.models.weights import load_weights


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    Args:
        dim: width of the residual stream.
        num_heads: heads H.
        head_dim: width D of a head.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens x (B, T, dim) to (B, T, dim)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: width of the residual stream.
        num_heads: heads of the attention; each is ``dim / num_heads`` wide.
        hidden: width of the MLP's hidden layer.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, dim // num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens x (B, T, dim) to (B, T, dim)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViTTiny(nn.Module):
    """Patch embedding, blocks, LayerNorm, pool, Linear.

    Args:
        num_classes: outputs.
        in_channels: channels C of the images.
        image_size: height and width of the images, pixels; a multiple of ``patch_size``.
        patch_size: height and width of a patch, pixels.
        dim: width of the residual stream; a multiple of ``num_heads``.
        depth: number of blocks.
        num_heads: heads per block.
        mlp_ratio: width of the hidden layers over ``dim``.
        pool: ``"mean"`` over the patches, or ``"cls"`` for a class token.
        weights: file to load, see ``load_weights``.

    Raises:
        ConfigError: a value is outside what it may be, or the weights do not fit.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        patch_size: int = 4,
        dim: int = 128,
        depth: int = 6,
        num_heads: int = 4,
        mlp_ratio: int = 4,
        pool: str = "mean",
        weights: str | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, image_size=image_size, patch_size=patch_size)
        check_positive(dim=dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
        check_choice("pool", pool, ("mean", "cls"))
        if image_size % patch_size:
            raise ConfigError(f"image_size={image_size} must be a multiple of patch_size={patch_size}")
        if dim % num_heads:
            raise ConfigError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.patches = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "cls" else None
        tokens = (image_size // patch_size) ** 2 + (self.cls_token is not None)
        self.positions = nn.Parameter(torch.empty(1, tokens, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads, mlp_ratio * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        _init_(self)
        if weights is not None:
            load_weights(self, weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map images x (N, C, H, W) to logits (N, num_classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.positions))
        return self.head(x[:, 0] if self.cls_token is not None else x.mean(dim=1))


def _init_(model: ViTTiny) -> None:
    """The paper's initial weights: normal with deviation 0.02, cut at two units; zero biases."""
    nn.init.trunc_normal_(model.positions, std=0.02)
    if model.cls_token is not None:
        nn.init.trunc_normal_(model.cls_token, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
