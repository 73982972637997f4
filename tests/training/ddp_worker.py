"""One run of test_ddp: trains and prunes by the settings in a JSON argument, and saves what every process ends with."""

import json
import sys
from pathlib import Path

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from actprune.core.budget import Budget
from actprune.core.record import record_of
from actprune.criteria import RMS, Magnitude
from actprune.schedule import Schedule
from actprune.training import PruningCallback, SpawnedDDP
from foreign import OwnForward, dataset


class Net(OwnForward):
    """Plain SGD without batch norm, so that half a batch on each of two processes is one whole batch."""

    whole = 0

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.Identity()
        self.unused = torch.nn.Linear(2, 2)

    def configure_optimizers(self):
        return torch.optim.SGD([p for n, p in self.named_parameters() if "unused" not in n], lr=0.05, momentum=0.9)

    def train_dataloader(self):
        return self.part(dataset(96))

    def val_dataloader(self):
        return self.part(dataset(32, 1))

    def part(self, data):
        """Sample r, r + R, ...: the batches of all R processes together are those of one; Lightning's own sampler shuffles."""
        ranks = self.trainer.world_size
        sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=16 // ranks, sampler=sampler)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        left = sum(p.numel() for p in self.parameters())
        self.log("quality", float(left >= self.whole), sync_dist=True)


def main():
    settings = json.loads(sys.argv[1])
    folder = Path(sys.argv[2])
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    module = Net()
    if not settings.get("unused", False):
        del module.unused
    module.whole = settings.get("needed", 0)
    options = {"monitor": "quality", "mode": "max", "max_metric_drop": 0.1} if module.whole else {}
    criterion = Magnitude() if settings.get("magnitude") else RMS()
    pruning = PruningCallback(criterion, Budget(params=0.5), Schedule("linear", start=0, interval=2, steps=2), **options)
    callbacks = [pruning, *([EMAWeightAveraging(decay=0.5)] if settings.get("ema") else [])]
    if settings.get("save"):
        callbacks.append(ModelCheckpoint(folder / "all", "{epoch}", save_top_k=-1, enable_version_counter=False))
    devices, kind = settings["devices"], settings.get("strategy", "ddp")
    extra = settings.get("ddp", {})
    several = DDPStrategy(**extra) if kind == "ddp" else SpawnedDDP(kind, **extra)
    strategy = "auto" if devices == 1 else several
    trainer = Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_epochs=6, logger=False, callbacks=callbacks,
                      enable_checkpointing=bool(settings.get("save")), enable_progress_bar=False, enable_model_summary=False,
                      accumulate_grad_batches=settings.get("accumulate", 1), default_root_dir=folder,
                      use_distributed_sampler=False)  # fmt: skip
    trainer.fit(module, ckpt_path=settings.get("resume"))
    rank = trainer.global_rank
    content = {
        "state": module.state_dict(),
        "record": record_of(module).to_dict(),
        "history": pruning.history,
        "events": [(event["epoch"], bool(event.get("went_back"))) for event in pruning.events],
        "stopped": pruning.stopped,
    }
    torch.save(content, folder / f"{settings['name']}-{rank}.pt")


if __name__ == "__main__":
    main()
