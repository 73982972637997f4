"""Bad input: one clear message, before any work is done."""

import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf.errors import OmegaConfBaseException

from actprune.cli.arguments import check_arguments
from actprune.cli.build import build, check, resolved
from actprune.cli.job import run_job
from actprune.core.errors import ActPruneError, BudgetError, ConfigError, DataError, ExportError, ObservationError
from actprune.training import ClassificationTask
from paths import CONF

COMPOSITION = {
    "unknown choice": (["pruner=entropi"], "Could not find 'pruner/entropi'(.|\n)*entropy"),
    "unknown group": (["prunner=entropy"], "Could not override 'prunner'"),
    "unknown key": (["trainer.max_epoch=3"], "Could not override 'trainer.max_epoch'"),
    "unknown key in a criterion": (["pruner.criterion.bin=3"], "Could not override 'pruner.criterion.bin'"),
    "type of seed": (["seed=abc"], "seed"),
    "unknown task": (["task=prun"], "Error merging override task=prun"),
}

JOBS = {
    "budget above 1": (["budget.params=1.5"], ConfigError, r"pruner.budget: .*params=1.5 must be a share left"),
    "budget 0": (["budget.params=0"], ConfigError, "must be a share left"),
    "budget twice": (["budget.macs=0.5"], ConfigError, "exactly one of params, macs and units"),
    "budget as text": (["budget.params=half"], ConfigError, "pruner.budget.params='half' must be float or null"),
    "budget out of reach": (["budget.params=0.001"], BudgetError, "budget"),
    "epochs as text": (["trainer.max_epochs=few"], ConfigError, "trainer.max_epochs='few' must be int or null"),
    "no number of epochs": (["trainer.max_epochs=null"], ConfigError, "max_epochs=null, and scheduler and pruner go by the"),
    "callbacks elsewhere": (["++trainer.callbacks=[]"], ConfigError, "trainer.callbacks: callbacks of a run are those of"),
    "too few epochs": (["trainer.max_epochs=1"], ConfigError, "max_epochs=1"),
    "added key": (["+pruner.criterion.bin=3"], ConfigError, "pruner.criterion.bin: .* did you mean bins"),
    "key of nobody": (["+data.colour=red"], ConfigError, "data.colour: .* has no such argument"),
    "curve": (["schedule.curve=square"], ConfigError, "curve='square' is not known; choose one of one_shot"),
    "no target": (["model._target_=actprune.models.nothing.Here"], ConfigError, "cannot be imported"),
    "missing data": (
        ["data=cifar10", "data.download=false", "paths.data_dir=nowhere"], DataError, "nowhere"),
    "missing root": (["data=imagefolder"], ConfigError, "data.root has no value"),
    "dangling": (["model.widths=${nowhere}"], ConfigError, "nowhere"),
    "no validation": (["trainer.limit_val_batches=0"], ConfigError, "observes activations in validation"),
    "seed": (["seed=-1"], ConfigError, "seed=-1 must be at least 0"),
    "large seed": (["seed=4294967296"], ConfigError, r"seed=4294967296 must be at least 0 and below 2\^32"),
    "budget of nothing": (["+budget.flops=0.5"], ConfigError, "nothing counts flops; it takes params, macs, units"),
    "budget of what": (["budget=0.5"], ConfigError, "budget=0.5 must say of what: budget.params=0.5 or budget.macs=0.5 or"),
    "number for a list": (["model.widths=32"], ConfigError, r"model.widths=32 must be a list, e.g. model.widths=\[32\]"),
    "learning rate": (["optimizer.lr=-1"], ConfigError, "optimizer: ValueError: Invalid learning rate: -1; check"),
    "rate as text": (["optimizer.lr=fast"], ConfigError, "optimizer.lr='fast' must be float"),
    "nothing may leave": (["pruner.selection.max_ratio=0"], BudgetError, "than what max_ratio=0 leaves; raise max_ratio"),
    "other classes": (["module.num_classes=3"], ConfigError, r"num_classes=3 needs logits of shape \(16, 3\), the"),
    "more classes": (
        ["model.num_classes=3", "module.num_classes=3"], ConfigError, "num_classes=3 but the data have other classes"),
    "no test": (["trainer.limit_test_batches=0"], ConfigError, "trainer.limit_test_batches=0 must be above 0"),
    "no epoch to validate": (
        ["trainer.check_val_every_n_epoch=0"], ConfigError, "trainer.check_val_every_n_epoch=0 must be at least 1"),
    "no batch norm": (["pruner=batch_norm_scale", "model=mlp"], ObservationError, "BatchNormScale scores none of 2 groups"),
    "processes": (["trainer.devices=100000"], ConfigError, "would start 100000 processes, this machine has .* at most"),
    "processes of ddp": (
        ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices='100000'"], ConfigError, "start 100000 processes"),
    "name to ignore": (["pruner.selection.ignore=head"], ConfigError, r"pruner.selection.ignore='head' must be a list"),
    "nothing to ignore": (["pruner.selection.ignore=[haed]"], ConfigError, "selection ignore='haed' matches no module"),
    "judged by": (["optimize=accuracy"], ConfigError, "optimize=accuracy must be one of val_accuracy"),
    "plan without training": (["task=plan", "pruner=serene"], ConfigError, "task=plan trains nothing, and pruner=serene"),
    "plan of nothing": (["task=plan", "pruner=none"], ConfigError, "nothing to plan"),
    "online without login": (
        ["logger=wandb", "logger.wandb.offline=false"], ConfigError, "logger.wandb: offline=false needs a login"),
    "max_ratio": (["pruner.selection.max_ratio=1.0"], ConfigError, "pruner.selection: .*max_ratio=1.0"),
    "weights that training passes over": (["weights=a.pt"], ConfigError, "weights=a.pt is what.* give model.weights="),
    "weights that a plan passes over": (["task=plan", "weights=a.pt"], ConfigError, "task=plan would pass it over"),
    "checkpoint": (["ckpt_path=nowhere.ckpt"], ConfigError, "ckpt_path=nowhere.ckpt does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPOSITION)
def test_hydra_refuses(case, config):
    overrides, match = COMPOSITION[case]
    with pytest.raises((ConfigCompositionException, OmegaConfBaseException), match=match):
        config(*overrides)


@pytest.mark.parametrize("case", JOBS)
def test_job_refuses(case, fast, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides, error, match = JOBS[case]
    with pytest.raises(error, match=match) as caught:
        run_job(fast(*overrides))
    assert isinstance(caught.value, ActPruneError)
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert not (tmp_path / "out" / "summary.json").exists()


def test_failure_in_training_leaves_checkpoint_and_record(fast, tmp_path, monkeypatch):
    """Training breaks in the third epoch: what was good before is still on disk, and nothing claims success."""
    step = ClassificationTask.training_step

    def breaks(self, batch, batch_idx):
        if self.current_epoch == 2:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", breaks)
    with pytest.raises(RuntimeError, match="power cut"):
        run_job(fast())
    assert (tmp_path / "out" / "checkpoints" / "last.ckpt").exists()
    assert '"steps"' in (tmp_path / "out" / "surgery_record.json").read_text()
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["logger=null"], "logger=null is no choice; choose one of csv, many, none"),
        (["pruner=_base"], "pruner=_base is no choice; choose one of batch_norm_scale, entropy"),
        (["pruner=", "seed=1"], "pruner= is no choice; choose one of batch_norm_scale, entropy"),
        (["hydra.run.dir='file/${seed}'"], r"nothing can be written to file/\$.seed.: .*file is no folder, or read-only"),
        (["-m", "hydra.sweep.dir=file"], "nothing can be written to file"),
    ],
)
def test_what_hydra_would_not_explain(arguments, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=match):
        check_arguments(arguments, CONF)
    check_arguments([*arguments, "--help"], CONF)
    check_arguments(["-m", "pruner=none,random", "ckpt_path=null", "hydra.run.dir=${now:%H}/a"], CONF)


def test_folders_that_hydra_fills_in_are_not_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    check_arguments(["hydra.run.dir=file${seed}"], CONF)
    monkeypatch.setattr("os.access", lambda *_: False)  # started where nothing can be written
    check_arguments(["hydra.run.dir=${oc.env:HOME}/a"], CONF)


def test_weights_and_biases_that_does_not_start(fast, monkeypatch):
    import wandb

    def fails(*_):
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr("actprune.training.MetricsCSV.log_hyperparams", fails)
    with pytest.raises(ConfigError, match="does not start .CommError: no route to host.; logger.wandb.offline=true keeps"):
        run_job(fast())


def test_weights_alone_are_nothing_to_go_on_from(fast, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    with pytest.raises(ConfigError, match="weights.ckpt is no whole checkpoint with optimizer state; weights alone are"):
        run_job(fast(f"ckpt_path={tmp_path / 'weights.ckpt'}"))


def test_an_export_that_fails_says_that_training_is_kept(fast, tmp_path, monkeypatch):
    def fails(*_):
        raise ExportError("no such operator")

    monkeypatch.setattr("actprune.cli.job.export", fails)
    with pytest.raises(
        ExportError, match=r"no such operator; what was trained is kept: resume=.*out export=\[\] goes on without"
    ):
        run_job(fast("export=[state_dict]", "pruner=none"))
    assert (tmp_path / "out" / "checkpoints" / "last.ckpt").exists()


def test_types_are_taken_from_signatures(config):
    cases = {
        "trainer.log_every_n_steps=1.5": "log_every_n_steps=1.5 must be int",
        "model.blocks=true": "model.blocks=True must be int",
        "data.augment=3": "data.augment=3 must be bool",
        "optimizer.lr=fast": "optimizer.lr='fast' must be float",  # or a tensor, which no setting is
    }
    for override, match in cases.items():
        node = resolved(config(override))
        key = override.split(".")[0]
        with pytest.raises(ConfigError, match=match):
            check(node[key], key)


def test_errors_of_other_libraries_name_the_key(config):
    node = resolved(config("trainer.accelerator=abacus")).trainer
    with pytest.raises(ConfigError, match=r"trainer \(lightning.Trainer\): .*abacus"):
        build(node, "trainer")
