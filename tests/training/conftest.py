import logging

import pytest
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import Logger

from actprune.core.budget import Budget
from actprune.core.errors import ConfigError
from actprune.criteria import Entropy
from actprune.training import PruningCallback
from foreign import loader


class ListLogger(Logger):
    """Keeps every call."""

    name = "list"
    version = ""

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.fixture
def list_logger():
    return ListLogger()


@pytest.fixture
def pruning():
    """A pruning callback with small settings; keyword arguments go to its constructor."""

    def make(**options):
        options.setdefault("criterion", Entropy(bins=16))
        options.setdefault("budget", Budget(params=0.4))
        return PruningCallback(**options)

    return make


@pytest.fixture
def refused(pruning, trainer):
    """A module is refused before it is trained, with a message that matches."""

    def check(module, match, **options):
        with pytest.raises(ConfigError, match=match):
            trainer(pruning(**options)).fit(module, loader(), loader(32, 1))
        assert not module.trainer.global_step

    return check


@pytest.fixture
def trainer(tmp_path):
    """A silent trainer on one CPU; keyword arguments go to its constructor."""

    def make(*callbacks, **options):
        options = {"max_epochs": 6, "logger": False, "enable_checkpointing": False, **options}
        return Trainer(
            accelerator="cpu",
            devices=options.pop("devices", 1),
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **options,
        )

    return make


@pytest.fixture(autouse=True)
def _seeded():
    seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
