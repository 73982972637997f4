import csv
import subprocess
import sys

import pytest

from actprune.core.errors import ConfigError
from actprune.report.__main__ import main
from actprune.report.compare import compare

FILES = {"comparison.csv", "comparison.md", "comparison.png"}


@pytest.fixture
def tree(tmp_path, make_run, make_job):
    """A sweep of three criteria and two seeds in which one job failed and one summary is broken."""
    root = tmp_path / "multirun"
    job = 0
    for criterion in ("entropy", "random", "none"):
        for seed in (1, 2):
            make_run(root / str(job), criterion, seed, 0.9 + 0.01 * seed)
            job += 1
    (root / "3" / "summary.json").write_text('{"params_before": 2')
    make_job(root / "6", ["pruner=magnitude", "seed=1"])
    (root / "multirun.yaml").write_text("x: 1")
    return root


def test_writes_three_files_beside_the_runs(tree):
    result = compare(tree)
    assert {path.name for path in tree.iterdir()} >= FILES
    assert result.n_runs == 5
    assert [row.criterion for row in result.rows] == ["none", "entropy", "random"]
    assert [(str(problem.path), problem.overrides) for problem in result.problems] == [
        ("3", ("pruner=random", "seed=2")),
        ("6", ("pruner=magnitude", "seed=1")),
    ]
    assert result.notes == ("random params=0.4: seed 2 missing, has seed 1",)
    with result.csv.open(newline="") as file:
        assert [line["criterion"] for line in csv.DictReader(file)] == ["none", "entropy", "random"]
    text = result.markdown.read_text(encoding="utf-8")
    assert "magnitude" in text
    assert "not valid JSON" in text


def test_a_second_time_gives_the_same(tree):
    first = compare(tree)
    text = first.markdown.read_text(encoding="utf-8")
    assert compare(tree) == first
    assert first.markdown.read_text(encoding="utf-8") == text


def test_out_is_made_and_the_tree_stays_clean(tree, tmp_path):
    before = sorted(tree.rglob("*"))
    compare(tree, tmp_path / "new" / "out")
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == FILES
    assert sorted(tree.rglob("*")) == before


def test_no_summary_at_all_raises(tmp_path):
    with pytest.raises(ConfigError, match=r"no summary.json under .*, at least 1 is needed"):
        compare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_failed_jobs_raise_and_are_named(tmp_path, make_job):
    make_job(tmp_path / "0", ["seed=1"])
    make_job(tmp_path / "1", ["seed=2"])
    with pytest.raises(ConfigError, match=r"(?s)0 of 2 runs .* 0: no summary.json.* 1: no summary.json"):
        compare(tmp_path)


def test_a_directory_that_is_none_raises(tmp_path):
    with pytest.raises(ConfigError, match="nowhere is not a directory"):
        compare(tmp_path / "nowhere")


def test_command_prints_the_table_in_100_columns(tree, capsys):
    assert main([str(tree)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "5 runs, 2 not compared" in out
    assert "not compared: 6 (pruner=magnitude seed=1)" in out
    assert "note: random params=0.4: seed 2 missing" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("arguments", [["missing"], ["."]])
def test_command_fails_with_one_message(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_command_fails_where_it_cannot_write(tree, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(tree), "--out", str(tmp_path / "file" / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_as_a_module(tree):
    command = [sys.executable, "-W", "error", "-m", "actprune.report", str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tree / "comparison.png").exists()
