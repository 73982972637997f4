import pytest
import torch
from torch import nn

from actprune.core.errors import ConfigError
from actprune.models.vit import Attention, ViTTiny


def test_attention_is_pytorchs_multihead_attention():
    ours = Attention(dim=24, num_heads=3, head_dim=8).double()
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.proj.weight.data, ours.proj.bias.data
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_heads_can_leave_by_changing_num_heads_only():
    """A head whose output is not read can be cut out of qkv and proj."""
    attention = Attention(dim=24, num_heads=3, head_dim=8).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    attention.proj.weight.data[:, 8:16] = 0
    expected = attention(x)
    keep = torch.tensor([*range(8), *range(16, 24)])
    rows = torch.cat([keep, keep + 24, keep + 48])
    attention.qkv.weight = nn.Parameter(attention.qkv.weight[rows])
    attention.qkv.bias = nn.Parameter(attention.qkv.bias[rows])
    attention.proj.weight = nn.Parameter(attention.proj.weight[:, keep])
    attention.num_heads = 2
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize(("pool", "tokens"), [("mean", 16), ("cls", 17)])
def test_tokens_and_pools(pool, tokens):
    model = ViTTiny(image_size=16, dim=16, depth=1, num_heads=2, pool=pool)
    seen = []
    model.blocks.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert model(torch.randn(3, 3, 16, 16)).shape == (3, 10)
    assert seen == [(3, tokens, 16)]


def test_mean_pool_ignores_the_order_of_patches_without_positions():
    model = ViTTiny(image_size=8, patch_size=4, dim=16, depth=2, num_heads=2).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    swapped = torch.cat([x[..., 4:], x[..., :4]], dim=-1)
    assert not torch.allclose(model(x), model(swapped))
    model.positions.data.zero_()
    torch.testing.assert_close(model(x), model(swapped))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"image_size": 30}, "image_size=30 must be a multiple of patch_size=4"),
        ({"dim": 130}, "dim=130 must be a multiple of num_heads=4"),
        ({"pool": "max"}, "pool='max' must be one of mean, cls"),
        ({"depth": 0}, "depth=0 must be a whole number"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ConfigError, match=match):
        ViTTiny(**settings)
