"""Run directories as Hydra and the command line leave them."""

import json

import pytest


@pytest.fixture
def make_run():
    """Write one run directory; keys given replace the summary's, None leaves a key out."""

    def make(path, criterion, seed, accuracy, *, overrides=(), hydra=True, choices=None, **keys):
        path.mkdir(parents=True, exist_ok=True)
        pruned = criterion != "none"
        summary = {
            "params_before": 20000,
            "params_after": 8000 - seed if pruned else 20000,
            "macs_before": 1_000_000,
            "macs_after": 500_000 + 10 * seed if pruned else 1_000_000,
            "test_accuracy": accuracy,
            "val_accuracy": accuracy + 0.01,
            "seed": seed,
            "criterion": criterion,
            "seconds": 50.0 + seed,
            "versions": {"torch": "2.14"},
            "commit": "abc",
            "data": "digits",
            "model": "resnet8",
            "budget": {"params": 0.4, "macs": None} if pruned else None,
        }
        summary.update(keys)
        summary = {key: value for key, value in summary.items() if value is not None}
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        if hydra:
            make_job(path, [f"pruner={criterion}", f"seed={seed}", *overrides], choices)
        return path

    return make


def make_job(path, overrides, choices=None):
    """Write what Hydra writes when a job starts."""
    folder = path / ".hydra"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides), encoding="utf-8")
    if choices is not None:
        lines = "".join(f"      {key}: {value}\n" for key, value in choices.items())
        text = "hydra:\n  run:\n    dir: ${now:%Y}\n  runtime:\n    choices:\n" + lines
        (folder / "hydra.yaml").write_text(text, encoding="utf-8")


@pytest.fixture(name="make_job")
def make_job_fixture():
    return make_job
