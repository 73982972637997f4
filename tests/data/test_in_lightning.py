"""The data modules inside Hydra, Lightning's trainer and loader processes."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import LightningModule, Trainer

from actprune.data.digits import Digits
from paths import CONF


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.seen = {"train": 0, "val": 0, "test": 0}

    def _loss(self, batch, name):
        x, y = batch
        self.seen[name] += len(y)
        return torch.nn.functional.cross_entropy(self.layer(x.flatten(1)), y)

    def training_step(self, batch):
        return self._loss(batch, "train")

    def validation_step(self, batch):
        self._loss(batch, "val")

    def test_step(self, batch):
        self._loss(batch, "test")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_trainer_sees_every_image_once(tmp_path):
    model, data = Linear(), Digits()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    assert model.seen == {"train": 1078, "val": 269, "test": 450}


def test_loader_processes_give_the_same_batches():
    ours, theirs = (list(Digits(num_workers=n, batch_size=100).val_dataloader()) for n in (0, 1))
    assert len(ours) == len(theirs) == 3
    for (x, y), (other_x, other_y) in zip(ours, theirs, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=["+data=imagefolder", "+model=mlp", *overrides])


def test_number_of_class_folders_reaches_the_model(tmp_path, folders):
    folders(tmp_path, {"ant": 4, "bee": 4, "cat": 4})
    config = composed(f"data.root={tmp_path}", "data.image_size=16")
    data, model = instantiate(config.data), instantiate(config.model)
    x, _ = next(iter(data.train_dataloader()))
    assert data.num_classes == 3
    assert model(x).shape == (len(x), 3)


def test_number_of_classes_can_be_stated(tmp_path, folders):
    folders(tmp_path, {"ant": 4, "bee": 4, "cat": 4})
    config = composed(f"data.root={tmp_path}", "data.num_classes=3")
    assert instantiate(config.data).num_classes == 3
    with pytest.raises(Exception, match="num_classes=5 but .* has 3 class folders"):
        instantiate(composed(f"data.root={tmp_path}", "data.num_classes=5").data)


def test_root_of_an_imagefolder_is_mandatory():
    with pytest.raises(Exception, match=r"Missing mandatory value: data\.root"):
        instantiate(composed().data)
