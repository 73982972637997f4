"""Attachment, judged by LightningModules that other people wrote: the examples of Lightning and its tutorials.

    git clone https://github.com/Lightning-AI/pytorch-lightning; git clone https://github.com/Lightning-AI/tutorials
    python benchmarks/attachment.py --lightning pytorch-lightning --tutorials tutorials

Classes and functions are taken from the files as they are (`pytorch_lightning` read as `lightning.pytorch`), sizes are made
small, data are random. Each module is trained and pruned to half of its parameters in two steps, with shuffled batches; then it
is resumed in a fresh module from the epochs before, between and after the steps. The column "resumed" is the largest difference
of any weight from the run that was not cut off: 0 is what is asked for. Where it is not 0, "unpruned" is the same without the
pruning callback: what a module keeps out of its checkpoints, a schedule of its own say, is lost either way.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import io
import logging
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader

from actprune import Budget
from actprune.criteria import Entropy
from actprune.schedule import Schedule
from actprune.training import PruningCallback, RandomState

EPOCHS = (1, 2, 4)
NETS = torchvision.models.resnet


class Case(NamedTuple):
    """A module, and what it is fed."""

    path: str
    make: Callable[[dict[str, Any]], Any]
    """From what the file defines to the module."""
    rows: Callable[[], list[Any]]
    modules: list[str] | None = None
    given: dict[str, Any] = {}
    """Names that the file takes from its surroundings."""
    plain: bool = True
    """Whether its checkpoints load with ``weights_only=True``; torch's doing, pruning or not."""


def images(channels, size, classes=10, n=24):
    return lambda: [(torch.randn(channels, size, size), i % classes) for i in range(n)]


def views(n_views, size=32, label=True):
    return lambda: [(tuple(torch.randn(3, size, size) for _ in range(n_views)), i % 10) for i in range(8)]


def numbers(size, n=8):
    return lambda: [(torch.randint(256, (1, size, size)), 0) for _ in range(n)]


def reversed_digits():
    digits = torch.randint(10, (24, 16))
    return list(zip(digits, digits.flip(1), strict=True))


def sets():
    return [(torch.randn(10, 20), torch.zeros(1), i % 10) for i in range(24)]


def small_backbone(**_):
    return NETS.ResNet(NETS.Bottleneck, [1, 1, 1, 1], width_per_group=16)


def transfer(names):
    names["get_torchvision_model"] = lambda *_, **__: small_backbone()
    return names["TransferLearningModel"]()


def segmentation(names):
    names["KITTI"] = lambda *_, **__: None
    made = names["SegModel"]("nowhere", features_start=8)
    made.learning_rate = 1e-3  # the example forgets it
    return made


def adversarial(names):
    """With a validation, which the example does not have."""

    class Validated(names["GAN"]):
        def validation_step(self, batch, batch_idx):
            noise = torch.randn(len(batch[0]), self.hparams.latent_dim)
            self.log("fooled", self.discriminator(self(noise)).mean())

        def on_train_epoch_end(self):
            pass

    return Validated()


def cifar(kind, **options):
    def make(names):
        names["act_fn_by_name"] = {"relu": nn.ReLU}
        names["resnet_blocks_by_name"] = {name: names[name] for name in ("ResNetBlock", "PreActResNetBlock")}
        names["model_dict"] = {name: names[name] for name in ("GoogleNet", "ResNet", "DenseNet")}
        settings = {"num_classes": 10, "act_fn_name": "relu", **options}
        return names["CIFARModule"](kind, settings, "Adam", {"lr": 1e-3, "weight_decay": 1e-4})

    return make


def sequence(kind, **options):
    settings = {"model_dim": 32, "num_heads": 4, "num_layers": 2, "dropout": 0.1, "lr": 5e-4, "warmup": 5, "max_iters": 30}
    return lambda names: names[kind](**{**settings, **options})


def barlow(names):
    encoder = NETS.ResNet(NETS.BasicBlock, [1, 1, 1, 1], width_per_group=64)
    encoder.fc = nn.Identity()
    return names["BarlowTwins"](encoder, 512, 8, 4, warmup_epochs=1, z_dim=32)


def prototypes(names):
    names["get_convnet"] = lambda output_size: torchvision.models.DenseNet(8, (2, 2), 16, 2, num_classes=output_size)
    names["split_batch"] = lambda x, y: (*x.chunk(2), *y.chunk(2))
    return names["ProtoNet"](16, 1e-3)


VIT = {"embed_dim": 32, "hidden_dim": 64, "num_heads": 4, "num_layers": 2, "patch_size": 8, "num_channels": 3,
       "num_patches": 16, "num_classes": 10, "dropout": 0.2}  # fmt: skip
PL, UVA, MORE = "lightning:examples/pytorch", "tutorials:course_UvA-DL", "tutorials:lightning_examples"
DIGIT = {"train_set": numbers(28, 1)(), "device": torch.device("cpu")}
CASES = {
    "autoencoder": Case(f"{PL}/basics/autoencoder.py", lambda n: n["LitAutoEncoder"](), images(1, 28)),
    "autoencoder, encoder": Case(f"{PL}/basics/autoencoder.py", lambda n: n["LitAutoEncoder"](), images(1, 28), ["encoder"]),
    "classifier": Case(f"{PL}/basics/backbone_image_classifier.py", lambda n: n["LitClassifier"](), images(1, 28)),
    "transfer learning": Case(f"{PL}/domain_templates/computer_vision_fine_tuning.py", transfer, images(3, 32, 2)),
    "GAN, both": Case(
        f"{PL}/domain_templates/generative_adversarial_net.py", adversarial, images(1, 28), ["generator", "discriminator"]
    ),
    "GAN, generator": Case(f"{PL}/domain_templates/generative_adversarial_net.py", adversarial, images(1, 28), ["generator"]),
    "U-Net": Case(
        f"{PL}/domain_templates/semantic_segmentation.py",
        segmentation,
        lambda: [(torch.randn(3, 32, 32), torch.randint(19, (32, 32))) for _ in range(8)],
    ),
    "GoogleNet": Case(f"{UVA}/04-inception-resnet-densenet/notebook.py", cifar("GoogleNet"), images(3, 32)),
    "ResNet": Case(
        f"{UVA}/04-inception-resnet-densenet/notebook.py", cifar("ResNet", c_hidden=[8, 16], num_blocks=[1, 1]), images(3, 32)
    ),
    "pre-activation ResNet": Case(
        f"{UVA}/04-inception-resnet-densenet/notebook.py",
        cifar("ResNet", c_hidden=[8, 16], num_blocks=[1, 1], block_name="PreActResNetBlock"),
        images(3, 32),
    ),
    "DenseNet": Case(
        f"{UVA}/04-inception-resnet-densenet/notebook.py",
        cifar("DenseNet", num_layers=[2, 2], bn_size=2, growth_rate=8),
        images(3, 32),
    ),
    "transformer, own scheduler": Case(
        f"{UVA}/05-transformers-and-MH-attention/MHAttention.py",
        sequence("ReversePredictor", input_dim=10, num_classes=10),
        reversed_digits,
        plain=False,
    ),
    "set transformer, own scheduler": Case(
        f"{UVA}/05-transformers-and-MH-attention/MHAttention.py",
        sequence("AnomalyPredictor", input_dim=20, num_classes=1, input_dropout=0.1),
        sets,
        plain=False,
    ),
    "deep autoencoder": Case(
        f"{UVA}/08-deep-autoencoders/notebook.py", lambda n: n["Autoencoder"](8, 16), images(3, 32), plain=False
    ),
    "normalizing flow": Case(
        f"{UVA}/09-normalizing-flows/NF.py", lambda n: n["create_simple_flow"](use_vardeq=False), numbers(28), given=DIGIT
    ),
    "PixelCNN": Case(
        f"{UVA}/10-autoregressive-image-modeling/notebook.py", lambda n: n["PixelCNN"](1, 16), numbers(28), given=DIGIT
    ),
    "ViT": Case(
        f"{UVA}/11-vision-transformer/VT.py",
        lambda n: n["ViT"](VIT, 3e-4),
        images(3, 32),
        given={"train_loader": [(torch.zeros(2, 3, 32, 32),)]},
    ),
    "prototypical network": Case(f"{UVA}/12-meta-learning/notebook.py", prototypes, images(3, 32, 3)),
    "SimCLR": Case(f"{UVA}/13-contrastive-learning/SimCLR.py", lambda n: n["SimCLR"](16, 1e-3, 0.1, 1e-4), views(2)),
    "Barlow twins": Case(f"{MORE}/barlow-twins/barlow_twins.py", barlow, views(3)),
    "Barlow twins, encoder": Case(f"{MORE}/barlow-twins/barlow_twins.py", barlow, views(3), ["encoder"]),
    "ResNet, one cycle": Case(
        f"{MORE}/cifar10-baseline/baseline.py", lambda n: n["LitResnet"](), images(3, 32, n=16), given={"BATCH_SIZE": 512}
    ),
}


def defined(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Imports, classes and functions of a file; what does not run (data sets to be downloaded) is left out."""
    module = types.ModuleType(f"public_{path.stem}")
    sys.modules[module.__name__] = module
    names = vars(module)
    names.update(given)
    lines = path.read_text(encoding="utf-8").replace("pytorch_lightning", "lightning.pytorch").splitlines()
    code = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)
    for node in ast.parse(code).body:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)):
            with contextlib.suppress(Exception):
                exec(compile(ast.Module([node], []), str(path), "exec"), names)
    return names


def fit(case, module, folder, checkpoint=None, pruned=True):
    seed_everything(1, verbose=False)
    schedule = Schedule("linear", start=1, interval=2, steps=2)
    pruning = PruningCallback(Entropy(bins=16), Budget(params=0.5), schedule, modules=case.modules)
    callbacks = [pruning, RandomState()] if pruned else [RandomState()]
    if checkpoint is None:
        callbacks.append(ModelCheckpoint(folder, "{epoch}", save_top_k=-1))
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=6, callbacks=callbacks, enable_checkpointing=checkpoint is None,
                      logger=DummyLogger(), enable_progress_bar=False, enable_model_summary=False,
                      default_root_dir=folder)  # fmt: skip
    torch.manual_seed(0)
    rows = case.rows()
    torch.manual_seed(1)
    loaders = DataLoader(rows, 4, shuffle=True), DataLoader(rows, 4)
    trainer.fit(module, *loaders, ckpt_path=checkpoint, weights_only=None if case.plain else False)
    return pruning


def judge(case, names, pruned=True):
    """Parameters before and after, and the largest difference of a resumed run."""
    seed_everything(0, verbose=False)
    start = case.make(names)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        whole = copy.deepcopy(start)
        pruning = fit(case, whole, Path(folder), pruned=pruned)
        for epoch in EPOCHS:
            again = copy.deepcopy(start)
            fit(case, again, Path(folder), Path(folder) / f"epoch={epoch}.ckpt", pruned)
            ours, theirs = again.state_dict(), whole.state_dict()
            if any(value.shape != theirs[name].shape for name, value in ours.items()):
                worst = float("inf")
            else:
                worst = max(
                    worst, *(float((v.double() - theirs[n].double()).abs().max()) for n, v in ours.items() if v.numel())
                )
    pruners = pruning.pruners.values() if pruned else ()
    return sum(p.params_before for p in pruners), sum(p.params for p in pruners), worst


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lightning", type=Path, help="checkout of Lightning-AI/pytorch-lightning")
    parser.add_argument("--tutorials", type=Path, help="checkout of Lightning-AI/tutorials")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    if arguments.lightning is None or arguments.tutorials is None:
        print("nothing to judge: give --lightning and --tutorials, two checkouts (see --help)")
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    failed = 0
    print(f"{'module':32}{'before':>12}{'after':>12}{'resumed':>10}{'unpruned':>10}")
    for name in arguments.only:
        case = CASES[name]
        root, _, path = case.path.partition(":")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                names = defined(getattr(arguments, root) / path, case.given)
                before, after, worst = judge(case, names)
                shown = [worst] if worst == 0.0 else [worst, judge(case, names, pruned=False)[2]]
            print(f"{name:32}{before:12,}{after:12,}" + "".join(f"{x:>10.1g}" for x in shown), flush=True)
        except Exception as error:
            failed += 1
            print(f"{name:32}  {type(error).__name__}: {error}".splitlines()[0][:160], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
