import json

import pytest

from actprune.report.runs import read_runs


def test_reads_every_key(tmp_path, make_run):
    make_run(tmp_path / "0", "entropy", 3, 0.9)
    (run,), problems = read_runs(tmp_path)
    assert problems == []
    assert (run.criterion, run.seed, run.data, run.model) == ("entropy", 3, "digits", "resnet8")
    assert (run.params_before, run.params_after, run.macs_before, run.macs_after) == (20000, 7997, 1_000_000, 500_030)
    assert (run.test_accuracy, run.val_accuracy, run.seconds) == (0.9, pytest.approx(0.91), 53.0)
    assert run.budget == "params=0.4"
    assert run.overrides == ()  # criterion and seed have keys of their own
    assert run.path == tmp_path / "0"


def test_the_root_itself_is_a_run(tmp_path, make_run):
    make_run(tmp_path / "run", "entropy", 1, 0.9)
    runs, _ = read_runs(tmp_path / "run")
    assert len(runs) == 1


def test_order_is_that_of_the_jobs_and_hidden_and_wandb_folders_are_left_out(tmp_path, make_run):
    for job in (0, 2, 10):
        make_run(tmp_path / str(job), "entropy", job, 0.9)
    make_run(tmp_path / "0" / "wandb" / "run", "entropy", 7, 0.9)
    make_run(tmp_path / ".trash" / "5", "entropy", 5, 0.9)
    runs, problems = read_runs(tmp_path)
    assert [run.seed for run in runs] == [0, 2, 10]
    assert problems == []


def test_a_job_without_a_summary_is_a_problem_that_says_what_was_asked(tmp_path, make_job):
    make_job(tmp_path / "4", ["pruner=random", "seed=2"])
    runs, (problem,) = read_runs(tmp_path)
    assert runs == []
    assert problem.path == tmp_path / "4"
    assert problem.reason == "no summary.json: the job failed or is still running"
    assert problem.overrides == ("pruner=random", "seed=2")


@pytest.mark.parametrize(
    ("task", "file", "reason"),
    [
        ("analyze", "analysis.json", "a group influence analysis (task=analyze), with groups.csv, units.csv, removals.csv"),
        ("capacity", "capacity.json", "capacities of networks (task=capacity), with networks.csv and layers.csv: it has"),
        ("plan", "groups.svg", "a plan (task=plan): nothing was pruned"),
        ("analyze", "groups.csv", "no summary.json: the job failed or is still running"),
    ],
)
def test_jobs_of_other_tasks_are_told_from_failed_ones(tmp_path, make_job, task, file, reason):
    make_job(tmp_path / "0", [f"task={task}"])
    (tmp_path / "0" / file).write_text("{}")
    runs, (problem,) = read_runs(tmp_path)
    assert runs == []
    assert problem.reason.startswith(reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"params', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1, 2]", "holds a list"),
        ('{"seed": 1}', "lacks params_before, params_after, macs_before, macs_after, test_accuracy, criterion"),
    ],
)
def test_an_unreadable_summary_is_a_problem(tmp_path, make_job, text, reason):
    make_job(tmp_path, ["seed=1"])
    (tmp_path / "summary.json").write_text(text, encoding="utf-8")
    runs, (problem,) = read_runs(tmp_path)
    assert runs == []
    assert reason in problem.reason
    assert "summary.json" in problem.reason
    assert problem.overrides == ("seed=1",)


def test_bytes_that_are_no_text_are_a_problem(tmp_path):
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe\x00")
    _, (problem,) = read_runs(tmp_path)
    assert "not valid JSON" in problem.reason


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("test_accuracy", float("nan"), "test_accuracy=nan in summary.json is not a finite number"),
        ("test_accuracy", 86.6, r"test_accuracy=86.6 in summary.json is outside [0, 1]"),
        ("test_accuracy", "0.9", "test_accuracy='0.9' in summary.json is not a finite number"),
        ("val_accuracy", -0.1, "val_accuracy=-0.1 in summary.json is outside [0, 1]"),
        ("params_after", 0, "params_after=0 in summary.json is outside [1, inf]"),
        ("macs_before", 10.5, "macs_before=10.5 in summary.json is not a whole number"),
        ("seed", True, "seed=True in summary.json is not a finite number"),
    ],
)
def test_an_impossible_value_is_a_problem(tmp_path, make_run, key, value, reason):
    make_run(tmp_path, "entropy", 1, 0.9)
    file = tmp_path / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    _, (problem,) = read_runs(tmp_path)
    assert problem.reason == reason


@pytest.mark.parametrize("text", ["pruner: entropy", "- [unclosed", "\t- a"])
def test_unreadable_overrides_are_a_problem(tmp_path, make_run, text):
    make_run(tmp_path, "entropy", 1, 0.9)
    (tmp_path / ".hydra" / "overrides.yaml").write_text(text)
    runs, problems = read_runs(tmp_path)
    assert runs == []
    assert len(problems) == 1


def test_an_unreadable_hydra_config_is_a_problem(tmp_path, make_run):
    make_run(tmp_path, "entropy", 1, 0.9)
    (tmp_path / ".hydra" / "hydra.yaml").write_text("hydra: {}")
    _, (problem,) = read_runs(tmp_path)
    assert problem.reason == ".hydra/hydra.yaml lacks hydra.runtime.choices"


def test_data_and_model_come_from_hydra_where_the_summary_lacks_them(tmp_path, make_run):
    make_run(tmp_path, "entropy", 1, 0.9, data=None, model=None, choices={"data": "mnist", "model": "mlp"})
    (run,), _ = read_runs(tmp_path)
    assert (run.data, run.model) == ("mnist", "mlp")


def test_overrides_that_change_the_numbers_are_kept(tmp_path, make_run):
    asked = ["schedule=one_shot", "+optimizer.lr=0.1", "logger=csv", "logger.wandb.project=x", "hydra/launcher=joblib"]
    make_run(tmp_path, "entropy", 1, 0.9, overrides=[*asked, "pruner.budget.params=0.4", "pruner.criterion.bins=8"])
    (run,), _ = read_runs(tmp_path)
    assert run.overrides == ("+optimizer.lr=0.1", "pruner.criterion.bins=8", "schedule=one_shot")


def test_a_run_that_was_interrupted_is_the_run_that_was_not(tmp_path, make_run):
    make_run(tmp_path / "0", "entropy", 1, 0.9, overrides=["trainer.max_epochs=9"])
    later = ["resume='/runs/1'", "ckpt_path=last.ckpt", "export=[onnx]", "optimize=test_accuracy"]
    make_run(tmp_path / "1", "entropy", 2, 0.9, overrides=["trainer.max_epochs=9", *later])
    make_run(tmp_path / "2", "entropy", 3, 0.9, overrides=["+trainer.max_epochs=12", *later, "trainer.max_epochs=9"])
    runs, _ = read_runs(tmp_path)
    assert [run.overrides for run in runs] == [("trainer.max_epochs=9",)] * 3


def test_an_overridden_budget_stays_visible_where_the_summary_lacks_it(tmp_path, make_run):
    make_run(tmp_path, "entropy", 1, 0.9, overrides=["pruner.budget.params=0.3"], budget=None)
    (run,), _ = read_runs(tmp_path)
    assert (run.budget, run.overrides) == ("", ("pruner.budget.params=0.3",))
