"""Exported networks compute what the pruned network computes, for batches of any size."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

import actprune
from actprune.core.budget import Budget
from actprune.core.errors import ConfigError, ExportError
from actprune.criteria import Magnitude
from actprune.models.mlp import MLP
from actprune.models.resnet import CifarResNet
from actprune.models.vit import ViTTiny
from actprune.surgery import load_pruned
from actprune.training.exporting import export, load_exported
from foreign import network
from paths import needs_onnx


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(5, 12), nn.Linear(3, 12), nn.Linear(12, 2)

    def forward(self, a, b):
        h = torch.relu(self.left(a) + self.right(b))
        return {"logits": self.head(h), "mean": h.mean(1)}


CASES = {
    "convolutions": (network, (torch.randn(1, 3, 8, 8),)),
    "perceptron": (lambda: MLP(10, in_channels=1, image_size=8, hidden=[32, 16]), (torch.randn(3, 1, 8, 8),)),
    "residual": (lambda: CifarResNet(depth=8, num_classes=10), (torch.randn(2, 3, 32, 32),)),
    "attention": (
        lambda: ViTTiny(num_classes=10, in_channels=1, image_size=8, patch_size=4, dim=32, depth=2, num_heads=4),
        (torch.randn(2, 1, 8, 8),),
    ),
    "two inputs": (TwoInputs, (torch.randn(4, 5), torch.randn(4, 3))),
}


@pytest.fixture(scope="module", params=CASES)
def pruned(request):
    torch.manual_seed(0)
    make, example = CASES[request.param]
    net = make()
    actprune.prune(net, example, criterion=Magnitude(), budget=Budget(params=0.6), compensation=None)
    return net.train(), make, example


def leaves(value):
    return list(value.values()) if isinstance(value, dict) else [value]


def larger(example, n=7):
    torch.manual_seed(1)
    return tuple(torch.randn(n, *x.shape[1:]) for x in example)


def expected(net, batch):
    net.eval()
    with torch.no_grad():
        found = leaves(net(*batch))
    net.train()
    return found


def test_torch_export(pruned, tmp_path):
    net, _, example = pruned
    files = export(net, example, tmp_path, ["torch_export"])
    assert net.training
    batch = larger(example)
    found = leaves(load_exported(files["torch_export"])(*batch))
    for ours, theirs in zip(expected(net, batch), found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


@needs_onnx
def test_onnx(pruned, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, _, example = pruned
    files = export(net, example, tmp_path, ["onnx"])
    session = onnxruntime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    batch = larger(example)
    found = session.run(None, {put.name: x.numpy() for put, x in zip(session.get_inputs(), batch, strict=True)})
    for ours, theirs in zip(expected(net, batch), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-3, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]


def test_state_dict(pruned, tmp_path):
    net, make, example = pruned
    files = export(net, example, tmp_path, ["state_dict"])
    again = load_pruned(make(), files["state_dict"])
    batch = larger(example)
    for ours, theirs in zip(expected(net, batch), expected(again, batch), strict=True):
        assert torch.equal(ours, theirs)


def test_a_program_needs_no_code_of_the_model_and_no_other_package(tmp_path):
    """In a process in which Lightning, Hydra and the tests' own modules cannot be imported."""
    torch.manual_seed(0)
    net, x = network(), torch.randn(2, 3, 8, 8)
    actprune.prune(net, x, criterion=Magnitude(), budget=Budget(params=0.5), compensation=None)
    path = export(net, x, tmp_path, ["torch_export"])["torch_export"]
    torch.save((x, expected(net, (x,))[0]), tmp_path / "expected.pt")
    code = f"""
import sys, torch
for name in ("lightning", "hydra", "foreign", "onnx"):
    sys.modules[name] = None
x, y = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.allclose(torch.export.load({str(path)!r}).module()(x), y, atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) if float(x.sum()) > 0 else x


def test_what_cannot_be_exported_says_so_and_leaves_nothing(tmp_path):
    with pytest.raises(ExportError, match="Branching cannot be exported as torch_export .*state_dict always works"):
        export(Branching(), torch.ones(2, 3), tmp_path, ["torch_export"])
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_an_error(tmp_path, monkeypatch):
    wrong = nn.Linear(3, 2)
    monkeypatch.setattr("actprune.training.exporting.load_exported", lambda path: wrong)
    with pytest.raises(ExportError, match="network.pt2 computes something else than the network: it differs by"):
        export(nn.Linear(3, 2), torch.ones(2, 3), tmp_path, ["torch_export"])
    assert not list(tmp_path.iterdir())


def test_settings_are_checked(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="export: 'onx' is not known; choose from onnx, torch_export, state_dict"):
        export(nn.Linear(3, 2), torch.ones(2, 3), tmp_path, ["onx"])
    with pytest.raises(ConfigError, match=r"export='onnx' must be a list of formats, e.g. \[onnx\]"):
        export(nn.Linear(3, 2), torch.ones(2, 3), tmp_path, "onnx")
    with pytest.raises(ConfigError, match="is no torch_export file"):
        load_exported(tmp_path / "network.onnx")
    with monkeypatch.context() as older:
        older.setattr(torch, "__version__", TorchVersion("2.6.0+cu124"))
        with pytest.raises(ConfigError, match=r"export to onnx needs PyTorch 2.7 or newer, this is 2.6.0"):
            export(nn.Linear(3, 2), torch.ones(2, 3), tmp_path, ["onnx"])
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.0"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"export to onnx needs onnx and onnxscript; pip install 'actprune\[export\]'"):
        export(nn.Linear(3, 2), torch.ones(2, 3), tmp_path, ["onnx"])
