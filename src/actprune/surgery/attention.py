"""``nn.MultiheadAttention`` after surgery: as many heads as stayed, any width of the stream.

PyTorch's forward insists that heads times head width equals the width of the stream. A pruned module changes its class to
one whose forward reads every width from the weights; parameters and state dict keys stay what they were.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actprune.surgery.transaction import Transaction


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention whose stream width and number of heads are independent of each other."""

    scale: float
    """Of the scores: 1 / sqrt(width of a head before any cut), so that softmax keeps its temperature."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,  # (B, T, E) if batch_first, else (T, B, E); or (T, E)
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = self._mask(key_padding_mask, attn_mask, q, k.shape[1])
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[1] - mask.shape[-1]))
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scale
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            heads = F.dropout(weights, dropout) @ v
        else:
            weights = None
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        out = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _mask(self, padding: Tensor | None, attention: Tensor | None, q: Tensor, n_keys: int) -> Tensor | None:
        """One additive mask (B or 1, H or 1, T, S), or None."""
        parts = []
        if attention is not None:
            part = attention if attention.dim() == 3 else attention.unsqueeze(0)
            # (B * H, T, S) masks count the heads there were; they cannot name those that stayed
            heads = len(part) // len(q) if len(part) > 1 else 1
            parts.append(_additive(part, q.dtype).view(-1, heads, *part.shape[-2:]))
        if padding is not None:
            parts.append(_additive(padding, q.dtype).view(-1, 1, 1, n_keys))
        return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


def adopt(module: nn.MultiheadAttention, changes: Transaction) -> None:
    """Give an attention module that was cut the class whose forward takes any width."""
    if isinstance(module, PrunedMultiheadAttention):
        return
    if type(module) is not nn.MultiheadAttention:
        return
    module.scale = 1 / math.sqrt(module.head_dim)  # type: ignore[assignment]
    changes.did(lambda: delattr(module, "scale"))
    module.__class__ = PrunedMultiheadAttention
    changes.did(lambda: setattr(module, "__class__", nn.MultiheadAttention))
    # encoder layers ask this before they call a fused kernel that knows one width only
    same = module._qkv_same_embed_dim
    module._qkv_same_embed_dim = False
    changes.did(lambda: setattr(module, "_qkv_same_embed_dim", same))


def unnest(model: nn.Module, changes: Transaction) -> None:
    """Let encoders hand plain batches to layers whose attention was cut; nested ones are for PyTorch's fused kernel alone."""
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoder) or not encoder.use_nested_tensor:
            continue
        if any(isinstance(module, PrunedMultiheadAttention) for module in encoder.modules()):
            encoder.use_nested_tensor = False
            changes.did(partial(setattr, encoder, "use_nested_tensor", True))
