"""The picture of groups: every member of every group is drawn where it belongs."""

import pytest
import torch
from matplotlib.colors import to_rgb
from torch import nn
from torchvision.models import VisionTransformer

from actprune import trace
from actprune.graph.graph import Graph
from actprune.report import structure
from actprune.report.figure import FAINT


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.back = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.ConvTranspose2d(6, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.back(self.conv(x))).mean((2, 3)))


def marks(axes):
    """(line, column) -> whether the mark is filled."""
    dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
    xs = [(line.get_xdata()[0], line.get_ydata()[0], to_rgb(line.get_markerfacecolor()) != (1, 1, 1)) for line in dots]
    names = [text.get_text().split("  ")[0] for text in axes.get_yticklabels()]
    columns = [text.get_text() for text in axes.get_xticklabels()]
    return {(names[int(y)], columns[round(x)]): filled for x, y, filled in xs}


def test_who_writes_and_who_reads(tmp_path):
    graph = trace(Residual(), torch.randn(1, 3, 8, 8))
    (axes,) = structure(graph, tmp_path / "groups.png").axes
    assert (tmp_path / "groups.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert marks(axes) == {
        ("stem", "stem"): True,
        ("stem", "conv"): False,
        ("stem", "back"): True,
        ("stem", "head"): False,
        ("stem#2", "stem"): False,
        ("conv", "conv"): True,
        ("conv", "back"): False,
        ("head", "head"): True,
    }


def test_locked_groups_are_grey_and_say_why(tmp_path):
    graph = trace(Residual(), torch.randn(1, 3, 8, 8))
    (axes,) = structure(graph, tmp_path / "groups.svg", "a $name$").axes
    grey = {line.get_ydata()[0] for line in axes.get_lines() if to_rgb(line.get_color()) == to_rgb(FAINT)}
    assert grey == {number for number, group in enumerate(graph.groups) if group.locked}
    said = {text.get_text() for text in axes.texts}
    assert "reaches the model's output" in said
    assert "2 of 4 groups can be cut" in axes.get_title(loc="left")


def test_a_transformer_has_one_stream_that_is_written_and_read_by_all(tmp_path):
    net = VisionTransformer(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)
    graph = trace(net, torch.randn(1, 3, 8, 8))
    (axes,) = structure(graph, tmp_path / "groups.png").axes
    stream = {column: filled for (group, column), filled in marks(axes).items() if group == "conv_proj"}
    layers = [f"encoder.layers.encoder_layer_{n}" for n in range(2)]
    assert all(stream[f"{layer}.mlp.3"] and stream[f"{layer}.self_attention.out_proj"] for layer in layers)
    assert not any(stream[f"{layer}.mlp.0"] or stream[f"{layer}.self_attention"] for layer in layers)


def test_nothing_to_draw(tmp_path):
    graph = trace(nn.ReLU(), torch.randn(1, 3))
    assert isinstance(graph, Graph)
    with pytest.raises(ValueError, match="no groups"):
        structure(graph, tmp_path / "groups.png")
