"""LightningModules as other people write them: none of them knows of actprune."""

import torch
from lightning import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

CLASSES = 4


def dataset(n: int = 96, seed: int = 0) -> TensorDataset:
    """Images whose class is the quadrant that is bright: learnt within a few epochs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 8, 8, generator=generator) * 0.3
    targets = torch.arange(n) % CLASSES
    for image, target in zip(images, targets.tolist(), strict=True):
        row, column = 4 * (target // 2), 4 * (target % 2)
        image[:, row : row + 4, column : column + 4] += 1
    return TensorDataset(images, targets)


def loader(n: int = 96, seed: int = 0, batch_size: int = 16) -> DataLoader:
    return DataLoader(dataset(n, seed), batch_size=batch_size)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


class Adam(LightningModule):
    """Adam with a scheduler, as most have it."""

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)]


class OwnForward(Adam):
    """Layers of its own and a forward."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.save_hyperparameters()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 16, 3, padding=1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.conv2(F.max_pool2d(x, 2)))
        return self.fc(x.amax((2, 3)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))


class OneNetwork(Adam):
    """Wraps one network and calls it directly."""

    def __init__(self):
        super().__init__()
        self.model = network()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.model(x), y))


class SeveralParts(Adam):
    """Calls its parts one after the other in the step; keeps a list and metrics; a dict as batch."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU())
        self.head = nn.Linear(16, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.losses = []

    def step(self, batch):
        logits = self.head(F.relu(self.encoder(batch["image"])).amax((2, 3)))
        return logits, F.cross_entropy(logits, batch["label"])

    def training_step(self, batch, batch_idx):
        return self.step(batch)[1]

    def validation_step(self, batch, batch_idx):
        logits, loss = self.step(batch)
        self.losses.append(loss)
        self.accuracy(logits, batch["label"])
        self.log("val_acc", self.accuracy)
        return loss

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.losses).mean())
        self.losses.clear()

    @staticmethod
    def loader(n: int = 96, seed: int = 0) -> DataLoader:
        images, labels = dataset(n, seed).tensors
        rows = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
        return DataLoader(rows, batch_size=16)
