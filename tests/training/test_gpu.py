"""On a GPU: the same as on the CPU."""

import copy

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import actprune
from actprune import Budget, Schedule, Selection
from actprune.compensation import LeastSquares
from actprune.criteria import Entropy, Magnitude, Variance
from actprune.training import PruningCallback, RandomState
from foreign import OneNetwork, dataset, network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_library_cuts_and_refits_as_on_the_cpu():
    torch.manual_seed(0)
    net, x = network().eval(), torch.randn(64, 3, 8, 8)
    outputs = []
    for device in ("cpu", "cuda"):
        model, data = copy.deepcopy(net).to(device).double(), x.to(device).double()
        batches = data.split(16)
        actprune.prune(model, data[:2], batches, criterion=Variance(), budget=Budget(params=0.5), compensation=LeastSquares())
        outputs.append(model(data).cpu())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-7, atol=1e-9)


def fit(folder, precision, checkpoint=None):
    seed_everything(0, verbose=False)
    module = OneNetwork()
    pruning = PruningCallback(Entropy(bins=16), Budget(params=0.4), Schedule("linear", start=1, interval=2, steps=2))
    saved = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    loaders = (torch.utils.data.DataLoader(dataset(96, seed), 16, shuffle=not seed) for seed in (0, 1))
    trainer = Trainer(accelerator="gpu", devices=1, precision=precision, max_epochs=6, logger=False,
                      callbacks=[pruning, RandomState(), saved], enable_progress_bar=False, enable_model_summary=False,
                      default_root_dir=folder)  # fmt: skip
    trainer.fit(module, *loaders, ckpt_path=checkpoint)
    return module, pruning


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_prunes_and_resumes(precision, tmp_path):
    whole, pruning = fit(tmp_path, precision)
    (pruner,) = pruning.pruners.values()
    assert pruner.params <= 0.4 * pruner.params_before
    for epoch in (1, 2, 4):
        again, _ = fit(tmp_path, precision, tmp_path / f"epoch={epoch}.ckpt")
        for name, value in again.state_dict().items():
            torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-3, atol=1e-3, msg=f"{name}, epoch {epoch}")


def test_a_network_is_traced_and_cut_where_it_lies():
    torch.manual_seed(0)
    model, x = network().cuda().eval(), torch.randn(2, 3, 8, 8, device="cuda")
    actprune.prune(model, x, criterion=Magnitude(), budget=Budget(params=0.5), selection=Selection(scope="uniform"))
    assert all(tensor.is_cuda for tensor in model.state_dict().values() if tensor.dim())
    assert model(x).isfinite().all()
