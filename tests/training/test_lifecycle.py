"""The lifecycle matrix says 0 everywhere: some lines here, all of them in `make test-all`."""

import importlib.util

import pytest

from paths import ROOT


@pytest.fixture
def matrix(capsys):
    """Run the benchmark with arguments: its exit status and what it prints."""
    spec = importlib.util.spec_from_file_location("lifecycle", ROOT / "benchmarks" / "lifecycle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: (module.main(list(arguments)), capsys.readouterr().out)


def test_some_lines(matrix):
    """Checkpoints at both moments of an epoch; LBFGS keeps the list of its parameters, NAdam float32 beside float64."""
    code, out = matrix("--optimizers", "LBFGS", "NAdam", "--precisions", "64-true")
    assert out.splitlines()[-1] == "12 cells: 12 exact, 0 not offered, 0 failed", out
    assert code == 0


@pytest.mark.slow
def test_all_of_one_process(matrix):
    code, out = matrix()
    assert out.splitlines()[-1] == "408 cells: 396 exact, 12 not offered, 0 failed", out
    assert code == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fork"])
def test_two_processes(strategy, matrix):
    code, out = matrix("--strategies", strategy, "--optimizers", "SGD", "AdamW", "--precisions", "32-true", "bf16-mixed")
    assert out.splitlines()[-1] == "24 cells: 24 exact, 0 not offered, 0 failed", out
    assert code == 0
