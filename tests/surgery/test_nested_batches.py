"""Encoders that pack padded batches: what was cut runs there as it does with gradients."""

import pytest
import torch
from torch import nn

import actprune


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.embed, self.head = nn.Linear(5, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding):
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("keeps", [0.7, 0.4])
def test_padded_batches_without_gradients(keeps, tmp_path):
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(3, 6, 5)
    padding = torch.arange(6) >= torch.tensor([[6], [4], [2]])
    assert model.encoder.use_nested_tensor
    budget = actprune.Budget(params=keeps)
    actprune.prune(model, {"x": x, "padding": padding}, criterion=actprune.criteria.Random(), budget=budget)
    with_gradients = model(x, padding)
    with torch.no_grad():
        assert torch.allclose(model(x, padding), with_gradients, atol=1e-6)
    again = actprune.load_pruned(Padded(), actprune.save_pruned(model, tmp_path / "pruned")).eval()
    with torch.inference_mode():
        assert torch.allclose(again(x, padding), with_gradients, atol=1e-6)
