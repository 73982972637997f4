import logging
import warnings
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from actprune.cli import schema
from actprune.cli.job import run_job
from actprune.core.errors import ConfigError
from actprune.data.digits import Digits
from paths import CONF
from processes import run_py

SMALL = ("debug=fast", "data.batch_size=16", "trainer.num_sanity_val_steps=1")


@pytest.fixture
def config(tmp_path):
    """Compose the configuration as the command line would; the output folder is the test's own."""
    schema.register()

    def make(*overrides):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", [f"paths.output_dir={tmp_path / 'out'}", *overrides])

    yield make
    GlobalHydra.instance().clear()


@pytest.fixture
def searching_config(tmp_path):
    """As in a job: Hydra still knows its search path, on which the criteria are looked up."""
    schema.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: compose("config", [f"paths.output_dir={tmp_path / 'out'}", *overrides])


@pytest.fixture
def fast(config):
    """The same with a few batches and one pruning step."""
    return lambda *overrides: config(*SMALL, *overrides)


@pytest.fixture
def observed_by(monkeypatch):
    """Run a job up to where a function gets its data, its third argument: the images in them."""

    def run(function, config):
        def spy(model, example, data, *rest, **settings):
            seen.extend(data)
            raise ConfigError("seen")

        seen = []
        monkeypatch.setattr(function, spy)
        with pytest.raises(ConfigError, match="^seen$"):
            run_job(config)
        return torch.cat([images for images, _ in seen])

    return run


@pytest.fixture
def training_images():
    """The digits to train on, as they are."""
    images, _ = zip(*Digits(augment=False)._split("train"), strict=True)
    return torch.stack(images)


@pytest.fixture
def no_pictures(monkeypatch):
    """Jobs draw no pictures; test_job looks at them."""
    monkeypatch.setattr("actprune.cli.output._draw", lambda folder, summary: [])


@pytest.fixture
def command(tmp_path):
    """Run run.py in a process of its own, in an empty folder."""
    return partial(run_py, folder=tmp_path, COLUMNS="200")


@pytest.fixture(autouse=True)
def _leave_no_settings():
    level = logging.getLogger("lightning.pytorch").level
    with warnings.catch_warnings():
        yield
    logging.getLogger("lightning.pytorch").setLevel(level)
