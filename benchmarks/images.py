"""Images for the benchmarks: read from folders of JPEG files, and kept as tensors where the network is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from finetuning import augmented
from PIL import Image
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def files(folder: Path) -> list[tuple[Path, int]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return [(file, label) for label, path in enumerate(classes) for file in sorted(path.glob("*.jpg"))]


def decode(entries: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in entries])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return x.contiguous(), torch.tensor([label for _, label in entries])


def sample(entries: list[tuple[Path, int]], n: int | None, seed: int) -> list[tuple[Path, int]]:
    if n is None or n >= len(entries):
        return entries
    return [entries[i] for i in torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))[:n].tolist()]


class Batches:
    """Batches of tensors that already are where the network is; one iteration is an epoch.

    With a seed: a new order every epoch, no incomplete batch, and augmented as ``finetuning.augmented`` does.
    Without: in the order given and as they are.
    """

    def __init__(self, x: Tensor, y: Tensor, batch: int, seed: int | None = None, **how: float) -> None:
        self.x, self.y, self.batch, self.how = x, y, batch, how
        self.generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)

    def __len__(self) -> int:
        return len(self.y) // self.batch if self.generator is not None else -(-len(self.y) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.generator is None:
            yield from zip(self.x.split(self.batch), self.y.split(self.batch), strict=True)
            return
        order = torch.randperm(len(self.y), generator=self.generator, device=self.x.device)
        for rows in order[: len(self) * self.batch].split(self.batch):
            yield augmented(self.x[rows], self.generator, **self.how), self.y[rows]
