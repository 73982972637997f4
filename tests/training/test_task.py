from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from actprune.core.errors import ConfigError
from actprune.training import ClassificationTask
from foreign import CLASSES, loader, network


def task(**options):
    return ClassificationTask(network(), partial(SGD, lr=0.05), CLASSES, **options)


def test_epoch_metrics_are_over_all_samples(trainer):
    """Uneven last batch: the mean is over samples, not over batches; computed anew without Lightning."""
    module, data = task(), loader(42, 1, batch_size=16)
    fitted = trainer(max_epochs=1)
    (result,) = fitted.validate(module, data, verbose=False)
    images, targets = data.dataset.tensors
    with torch.no_grad():
        logits = module.eval()(images).double()
    assert result["val/accuracy"] == pytest.approx(float((logits.argmax(1) == targets).double().mean()), abs=1e-6)
    assert result["val/loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), abs=1e-5)


def test_learns_and_names_its_metrics(trainer):
    module = task(scheduler=partial(StepLR, step_size=2, gamma=0.1))
    fitted = trainer(max_epochs=4)
    fitted.fit(module, loader(), loader(32, 1))
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(fitted.callback_metrics)
    assert fitted.callback_metrics["val/accuracy"] > 0.9
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**2)
    (tested,) = fitted.test(module, loader(32, 1), verbose=False)
    assert set(tested) == {"test/loss", "test/accuracy"}


def test_plateau_follows_the_validation_loss(trainer):
    module = task(scheduler=partial(ReduceLROnPlateau, patience=0, threshold=10.0, factor=0.5))
    fitted = trainer(max_epochs=3)
    fitted.fit(module, loader(), loader(32, 1))
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**3)  # no epoch beats the threshold


def test_label_smoothing_is_for_training_only():
    plain, smooth = task(), task(label_smoothing=0.3)
    smooth.load_state_dict(plain.state_dict())
    for module in (plain, smooth):
        module.eval()
        module.log = module.log_dict = lambda *args, **kwargs: None
    batch = loader().dataset[:8]
    expected = F.cross_entropy(plain(batch[0]), batch[1], label_smoothing=0.3)
    assert torch.allclose(smooth.training_step(batch, 0), expected)
    assert not torch.allclose(plain.training_step(batch, 0), expected)


def test_predict_takes_images_or_pairs(trainer):
    module = task()
    (pairs,) = trainer(max_epochs=1).predict(module, loader(8, 1))
    images = loader(8, 1).dataset.tensors[0]
    assert torch.allclose(pairs, module.eval().predict_step(images, 0))
    assert pairs.shape == (8, CLASSES)


def test_checkpoints_are_plain(trainer, tmp_path):
    module = task()
    fitted = trainer(max_epochs=1)
    fitted.fit(module, loader(), loader(32, 1))
    fitted.save_checkpoint(tmp_path / "plain.ckpt")
    assert "hyper_parameters" not in torch.load(tmp_path / "plain.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("classes", "smoothing", "match"), [(1, 0.0, "num_classes=1 must be at least 2"), (3, 1.0, "label_smoothing=1.0")]
)
def test_arguments_are_checked(classes, smoothing, match):
    with pytest.raises(ConfigError, match=match):
        ClassificationTask(network(), SGD, classes, label_smoothing=smoothing)
