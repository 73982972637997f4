import pytest
import torch
from torch.nn import functional as F

from actprune.core.errors import ConfigError
from actprune.models.resnet import CifarResNet, PadShortcut


def reference(state: dict, x: torch.Tensor, blocks: int) -> torch.Tensor:
    """The paper's network in eval mode, written with functions only."""

    def norm(x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{key}"] for key in keys))

    x = F.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = F.relu(norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            out = norm(F.conv2d(out, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if f"{name}.shortcut.0.weight" in state:
                x = norm(F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=2), f"{name}.shortcut.1")
            elif stride == 2:
                zeros = torch.zeros_like(x[:, : x.shape[1] // 2, ::2, ::2])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = F.relu(out + x)
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_forward_is_the_papers(shortcut):
    model = CifarResNet(depth=14, shortcut=shortcut).double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model(x)  # moves the running statistics away from 0 and 1
    model.eval()
    torch.testing.assert_close(model(x), reference(model.state_dict(), x, blocks=2))


def test_option_b_adds_two_projections():
    """272,474 for ResNet-20, the number usually given for option B."""
    a, b = (sum(p.numel() for p in CifarResNet(20, shortcut=s).parameters()) for s in "AB")
    assert b == 272_474
    assert b - a == (16 * 32 + 64) + (32 * 64 + 128)


def test_pad_shortcut_centres_the_channels():
    x = torch.randn(2, 3, 6, 6)
    shortcut = PadShortcut(3, 8)
    assert shortcut.pad == (0, 0, 0, 0, 2, 3)
    out = shortcut(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:5], x[:, :, ::2, ::2])
    assert out[:, :2].abs().sum() + out[:, 5:].abs().sum() == 0
    assert not list(shortcut.parameters())


def test_pad_shortcut_obeys_its_attribute():
    shortcut = PadShortcut(16, 32)
    shortcut.pad = (0, 0, 0, 0, 1, 2)
    assert shortcut(torch.randn(1, 5, 4, 4)).shape == (1, 8, 2, 2)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_impossible_depths_are_refused(depth):
    with pytest.raises(ConfigError, match=f"depth={depth} must be 6n \\+ 2"):
        CifarResNet(depth=depth)


def test_unknown_shortcut_is_refused():
    with pytest.raises(ConfigError, match="shortcut='C' must be one of A, B"):
        CifarResNet(shortcut="C")


def test_weights_of_another_depth_are_refused(tmp_path):
    torch.save(CifarResNet(20).state_dict(), tmp_path / "w.th")
    with pytest.raises(ConfigError, match="do not fit CifarResNet: .* missing: layer1.3.conv1.weight"):
        CifarResNet(32, weights=str(tmp_path / "w.th"))
