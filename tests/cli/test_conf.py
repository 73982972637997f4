"""Every file under conf/ is what it says, and every experiment runs."""

import json

import pytest
from omegaconf import OmegaConf
from PIL import Image

from actprune.cli import wandb
from actprune.cli.build import build, check, resolved
from actprune.cli.job import assemble, run_job
from actprune.core.views import Criterion
from actprune.training import PruningCallback
from paths import CONF

pytestmark = pytest.mark.usefixtures("no_pictures")

WHOLE = {"experiment", "debug", "hydra", "paths", "logger", "callbacks", "trainer"}
FILES = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in WHOLE and not path.stem.startswith("_")
)
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
LARGE = {"cifar100_resnet110_rademacher", "cifar10_vgg16", "imagefolder_resnet18"}
FITTING = {
    "lenet5": ["data.image_size=28"],
    "vgg16_bn": ["data.image_size=32"],
    "torchvision": ["data.in_channels=3", "data.image_size=32"],
}


def folder_of_images(root, size=32):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            for i in range(12):
                path = root / split / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                shade = (i * 5, 200, 30) if label == "cat" else (30, i * 5, 200)
                Image.new("RGB", (size, size), shade).save(path)
    return root


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_file_instantiates(group, name, config, tmp_path):
    overrides = [f"{group}={name}", *(FITTING.get(name, []) if group == "model" else [])]
    if name == "imagefolder":
        overrides += [f"data.root={folder_of_images(tmp_path / 'images')}"]
    node = resolved(config(*overrides))[group]
    if name == "none":
        assert node is None
        return
    made = build(node, group)
    assert callable(made) if node.get("_partial_") else type(made).__module__.startswith(("actprune.", "torch"))
    if group == "pruner":
        assert isinstance(made, PruningCallback)
        assert isinstance(made.criterion, Criterion)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "logger").glob("*.yaml")))
def test_every_logger_is_built(name, fast):
    parts = assemble(resolved(fast(f"logger={name}")))
    wandb.finish()
    expected = {"none": 0, "csv": 1, "wandb": 1, "many": 2, "tensorboard": 2}
    assert len(parts.trainer.loggers) == expected[name]


@pytest.mark.parametrize("name", ["cpu", "gpu", "ddp"])
def test_every_trainer_composes(name, config):
    node = resolved(config(f"trainer={name}")).trainer
    assert node._target_ == "lightning.Trainer"
    assert node.devices == (2 if name == "ddp" else 1)
    assert sorted(path.stem for path in (CONF / "trainer").glob("*.yaml")) == ["cpu", "ddp", "gpu"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name, config, tmp_path):
    """With its own data; the classes of everything in it take the arguments."""
    node = resolved(config(f"experiment={name}", *(["data.root=images"] if name.startswith("imagefolder") else [])))
    for key in ("data", "model", "module", "pruner", "optimizer", "scheduler", "trainer"):
        check(node[key], key)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in EXPERIMENTS])
def test_every_experiment_runs_fast(name, fast, tmp_path):
    """With its own data where they are here, with the digits in the same shape where they would be downloaded."""
    overrides = [f"experiment={name}", "trainer=cpu", "data.batch_size=8"]
    if name.startswith("imagefolder"):
        overrides += [f"data.root={folder_of_images(tmp_path / 'images')}"]
    elif not name.startswith("digits"):
        channels = 1 if name.startswith("mnist") else 3
        overrides += ["data=digits", f"data.in_channels={channels}", "data.image_size=32"]
    score = run_job(fast(*overrides))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert score == summary["val_accuracy"]
    ((unit, share),) = summary["budget"].items()
    assert summary[f"{unit}_after"] <= share * summary[f"{unit}_before"]


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "debug").glob("*.yaml")))
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_every_debug_mode_runs(name, config, tmp_path):
    limits = ["trainer.max_epochs=2"] if name == "overfit" else []
    run_job(config(f"debug={name}", *limits))
    assert (tmp_path / "out" / "summary.json").exists()


def test_every_criterion_has_a_file():
    """Adding a criterion is one .py and one .yaml."""
    from actprune import criteria

    classes = {
        name for name in criteria.__all__
        if isinstance(getattr(criteria, name), type) and issubclass(getattr(criteria, name), Criterion)
    }  # fmt: skip
    files = [name for group, name in FILES if group == "pruner" and name != "none"]
    nodes = [OmegaConf.load(CONF / "pruner" / f"{name}.yaml") for name in files]
    used = {node.criterion._target_.rpartition(".")[2] for node in nodes if "criterion" in node}
    assert used == classes


BY_THRESHOLD = {"zero_units", "serene"}
"""Not driven by the budget; their runs are below."""


@pytest.mark.parametrize("name", [n for group, n in FILES if group == "pruner" and n not in BY_THRESHOLD | {"none"}])
def test_every_criterion_prunes_the_default_network(name, fast, tmp_path):
    run_job(fast(f"pruner={name}", "budget.params=0.3"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["params_after"] <= 0.3 * summary["params_before"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["pruner=zero_units", "optimizer=prox_adamw", "optimizer.lam=0.01", "budget.params=0.2"],
        ["pruner=serene", "pruner.decay=0.1", "pruner.sensitivity=lower_bound", "pruner.tolerance=0.5", "budget.params=0.2"],
    ],
)
def test_training_decides_what_leaves_and_the_budget_is_a_limit(overrides, fast, tmp_path):
    run_job(fast(*overrides))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0.2 <= summary["params_left"] < 1
    assert summary["stopped"]["reason"] == "threshold"
    assert summary["criterion"] == "zerounits"  # outside of Hydra's own job
