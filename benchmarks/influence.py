"""What the groups of a CIFAR ResNet contribute, and which criterion sees it: the figures of docs/analysis.md.

    python benchmarks/influence.py --data DIR --weights DIR --out FOLDER [--depth 20] [--images 5000] [--observed 1000]

DIR of data holds train/CLASS/*.jpg and test/CLASS/*.jpg (CIFAR-10, JPEG copy); DIR of weights holds resnetDEPTH-jpeg.th, which
was trained on the training images. Criteria observe training images, effects are measured on test images. FOLDER gets the
tables, the pictures and analysis.json; finished groups are kept there, and a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from pathlib import Path

import torch
from images import decode, files, sample
from provenance import commit
from rich.console import Console

import actprune
from actprune import criteria
from actprune.core.files import atomic_path
from actprune.models.resnet import CifarResNet
from actprune.pruning import EFFECT, Removals, agreement
from actprune.report import draw_influence, influence_tables, write_influence
from compensation import BATCH

CRITERIA = {
    "entropy": criteria.Entropy(),
    "entropy_unit_range": criteria.Entropy(range="unit"),
    "state_entropy": criteria.StateEntropy(),
    "label_information": criteria.LabelInformation(),
    "rademacher": criteria.Rademacher(),
    "rademacher_64_signs": criteria.Rademacher(estimate="monte_carlo"),
    "rademacher_positions": criteria.Rademacher(pool="positions"),
    "rademacher_layer": criteria.Rademacher(function_class="layer"),
    "rademacher_threshold": criteria.Rademacher(function_class="threshold"),
    "zero_rate": criteria.ZeroRate(),
    "mean_activation": criteria.MeanActivation(),
    "rms": criteria.RMS(),
    "variance": criteria.Variance(),
    "hrank": criteria.HRank(),
    "flap": criteria.FLAP(),
    "wanda": criteria.Wanda(),
    "reconstruction": criteria.Reconstruction(),
    "taylor": criteria.Taylor(),
    "sensitivity": criteria.Sensitivity(),
    "sensitivity_lower_bound": criteria.Sensitivity("lower_bound"),
    "magnitude": criteria.Magnitude(),
    "fpgm": criteria.FPGM(),
    "batch_norm_scale": criteria.BatchNormScale(),
    "random": criteria.Random(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--images", type=int, default=5000, help="test images on which units alone are measured")
    parser.add_argument("--samples", type=int, default=1000, help="of these, on which shares are measured")
    parser.add_argument("--observed", type=int, default=1000, help="training images that criteria observe")
    parser.add_argument("--units", type=int, default=16, help="units per group that are replaced alone")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25], help="of a group, replaced together")
    parser.add_argument("--positions", default=None, help="of each unit in an image that criteria see: auto, or a number; all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    model = CifarResNet(args.depth, weights=str(args.weights / f"resnet{args.depth}-jpeg.th")).eval()
    ox, oy = decode(sample(files(args.data / "train"), args.observed, args.seed))
    mx, my = decode(sample(files(args.data / "test"), args.images, args.seed))
    influence = actprune.analyze(
        model,
        ox[:1],
        list(zip(ox.split(BATCH), oy.split(BATCH), strict=True)),
        list(zip(mx.split(BATCH), my.split(BATCH), strict=True)),
        criteria=CRITERIA,
        removals=Removals(args.shares, n_units=args.units, seed=args.seed, samples=args.samples),
        positions=int(args.positions) if (args.positions or "").isdecimal() else args.positions,
        folder=args.out / "pieces",
        progress=lambda done, total, name: print(f"{time.monotonic() - began:7.0f} s  {done}/{total} {name}", flush=True),
    )
    agreed = agreement(influence, args.seed)
    write_influence(influence, agreed, args.out)
    draw_influence(influence, agreed, args.out)
    Console(width=100).print(influence_tables(influence, agreed))
    row = list(agreed.names).index(EFFECT)
    result = {
        "settings": {key: str(value) for key, value in vars(args).items()},
        "loss": influence.loss,
        "accuracy": influence.accuracy,
        "effect": dict(zip(agreed.names, agreed.mean[row], strict=True)),
        "measured": [influence.n_measured, influence.groups[0].n_alone],
        "halves": agreed.halves,
        "ceiling": agreed.ceiling,
        "versions": {name: importlib.metadata.version(name) for name in ("actprune", "torch")},
        "python": platform.python_version(),
        "commit": commit(),
        "seconds": round(influence.seconds_before + time.monotonic() - began),
    }
    with atomic_path(args.out / "analysis.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
