import csv
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from actprune.report.aggregate import aggregate
from actprune.report.runs import Problem, read_runs
from actprune.report.tables import MAX_GROUPS, before_after, comparison, write_csv, write_markdown

SUMMARY = {
    "params_before": 19978,
    "params_after": 7985,
    "macs_before": 1_254_400,
    "macs_after": 612_345,
    "val_accuracy_before": 0.9811,
    "val_accuracy": 0.985,
    "test_accuracy": 0.9806,
    "criterion": "entropy",
    "seed": 1,
}
ACCURACY = {"entropy": (0.91, 0.95, 0.90), "random": (0.85, 0.80, 0.84), "none": (0.97, 0.96, 0.99)}


def show(renderable, width=100):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


def line_with(lines, word):
    (line,) = [line for line in lines if line.split()[: len(word.split())] == word.split()]
    return line.split()


@pytest.fixture
def rows(tmp_path, make_run):
    for criterion, values in ACCURACY.items():
        for seed, accuracy in enumerate(values):
            make_run(tmp_path / f"{criterion}{seed}", criterion, seed, accuracy)
    rows, notes = aggregate(read_runs(tmp_path)[0])
    assert notes == []
    return rows


def test_before_after_values():
    lines = show(before_after(SUMMARY, [("conv1", 16, 9), ("layer1.0.conv1", 32, 8)]))
    assert line_with(lines, "parameters") == ["parameters", "19,978", "7,985", "-60.0", "%"]
    assert line_with(lines, "MACs") == ["MACs", "per", "sample", "1,254,400", "612,345", "-51.2", "%"]
    assert line_with(lines, "validation")[2:] == ["98.11", "%", "98.50", "%", "+0.39", "points"]
    assert line_with(lines, "test")[2:] == ["-", "98.06", "%", "-"]
    assert line_with(lines, "layer1.0.conv1")[1:5] == ["32", "8", "25", "%"]
    assert line_with(lines, "total")[1:5] == ["48", "17", "35", "%"]
    assert "criterion entropy" in lines[0]


def test_before_after_without_accuracies_and_groups():
    counts = {key: SUMMARY[key] for key in ("params_before", "params_after", "macs_before", "macs_after")}
    lines = show(before_after(counts, []))
    assert not any("accuracy" in line or "total" in line for line in lines)


@pytest.mark.parametrize("number", [MAX_GROUPS, MAX_GROUPS + 1, 300])
def test_many_groups_are_elided_and_still_counted(number):
    widths = [(f"group{i}", 10 + i, 5 + i) for i in range(number)]
    lines = show(before_after(SUMMARY, widths))
    names = [line.split()[0] for line in lines if line.strip().startswith("group") and not line.endswith("left")]
    shown = [name for name in names if name != "group"]
    assert len(shown) == MAX_GROUPS
    assert shown[0] == "group0"
    assert shown[-1] == f"group{number - 1}"
    assert line_with(lines, "total")[1] == f"{sum(before for _, before, _ in widths):,}"
    elided = [line.split() for line in lines if "more groups" in line]
    if number == MAX_GROUPS:
        assert elided == []
    else:
        left_out = [row for row in widths if row[0] not in shown]
        before, after = sum(row[1] for row in left_out), sum(row[2] for row in left_out)
        assert [line[:6] for line in elided] == [["…", str(number - MAX_GROUPS), "more", "groups", f"{before:,}", f"{after:,}"]]


def test_long_names_still_fit():
    show(before_after(SUMMARY, [("backbone." * 20 + "conv[weird]", 1_000_000, 999_999)]))


def test_comparison_values(rows):
    lines = show(comparison(rows))
    entropy, none = np.array(ACCURACY["entropy"]), np.array(ACCURACY["none"])
    assert line_with(lines, "entropy") == [
        *("entropy", "params=0.4", "7,999", "40.0", "%", "50.0", "%"),
        *(f"{100 * entropy.mean():.2f}", "±", f"{100 * entropy.std(ddof=1):.2f}"),
        *(f"{100 * (entropy - none).mean():+.2f}", "±", f"{100 * (entropy - none).std(ddof=1):.2f}", "3"),
    ]
    assert line_with(lines, "none")[1:6] == ["20,000", "100.0", "%", "100.0", "%"]
    assert any("sample standard deviation" in line and "ddof 1" in line for line in lines)


def test_comparison_lists_what_was_left_out(rows):
    problems = [Problem(Path("3"), "no summary.json", ("seed=1",))]
    text = " ".join(" ".join(show(comparison(rows, problems, ["random: [seed] 2 missing"]))).split())
    assert "not compared: 3 (seed=1): no summary.json" in text
    assert "note: random: [seed] 2 missing" in text  # square brackets are no markup


def test_csv_holds_every_number_in_full(rows, tmp_path):
    write_csv(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        table = {line["criterion"]: line for line in csv.DictReader(file)}
    assert list(table) == ["none", "entropy", "random"]
    none = np.array(ACCURACY["none"])
    for criterion, line in table.items():
        values = np.array(ACCURACY[criterion])
        assert float(line["test_accuracy_mean"]) == pytest.approx(values.mean(), abs=1e-15)
        assert float(line["test_accuracy_std"]) == pytest.approx(values.std(ddof=1), rel=1e-12)
        assert float(line["val_accuracy_mean"]) == pytest.approx((values + 0.01).mean(), abs=1e-15)
        assert (line["n"], line["seeds"]) == ("3", "0 1 2")
        if criterion != "none":
            assert float(line["difference_mean"]) == pytest.approx((values - none).mean(), abs=1e-15)
            assert float(line["difference_std"]) == pytest.approx((values - none).std(ddof=1), rel=1e-12)
            assert float(line["params_left"]) == pytest.approx(7999 / 20000)
            assert float(line["macs_after_mean"]) == pytest.approx(500_010)
    assert table["none"]["difference_mean"] == ""
    assert table["none"]["difference_n"] == "0"


def test_markdown_has_the_same_cells_and_escapes_pipes(rows, tmp_path):
    problems = [Problem(Path("3"), "no summary.json")]
    write_markdown(rows, tmp_path / "table.md", problems, ["a note"], picture="comparison.png")
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1
    entropy = np.array(ACCURACY["entropy"])
    cell = f"| {100 * entropy.mean():.2f} ± {100 * entropy.std(ddof=1):.2f} |"
    assert cell in next(line for line in table if "entropy" in line)
    assert "![parameters left against test accuracy](comparison.png)" in text
    assert "- a note" in text
    assert "- 3: no summary.json" in text


def test_a_pipe_in_a_setting_does_not_break_markdown(tmp_path, make_run):
    make_run(tmp_path / "0", "entropy", 1, 0.9, overrides=["data.name=a|b"])
    rows, _ = aggregate(read_runs(tmp_path)[0])
    write_markdown(rows, tmp_path / "table.md")
    assert "data.name=a\\|b" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "![" not in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_sections_have_a_table_each(tmp_path, make_run):
    make_run(tmp_path / "0", "entropy", 1, 0.9)
    make_run(tmp_path / "1", "entropy", 1, 0.5, data="mnist")
    rows, _ = aggregate(read_runs(tmp_path)[0])
    lines = show(comparison(rows))
    titles = [line.strip() for line in lines if "resnet8" in line]
    assert [title.split(" · ")[0] for title in titles] == ["digits", "mnist"]
    assert sum(line.split()[:1] == ["entropy"] for line in lines) == 2


def test_a_long_config_stands_below_its_criterion_and_numbers_stay_whole(tmp_path, make_run):
    config = ["optimizer.weight_decay=0.0005", "schedule=one_shot", "trainer.max_epochs=200"]
    for seed in (1, 2):
        for i, criterion in enumerate(("entropy_with_a_long_name", "none")):
            make_run(tmp_path / f"{seed}{i}", criterion, seed, 0.9, overrides=config, params_before=123_456_789)
    rows, _ = aggregate(read_runs(tmp_path)[0])
    lines = show(comparison(rows))
    assert sum("90.00 ± 0.00" in line for line in lines) == 2
    assert sum("schedule=one_shot" in line for line in lines) == 1  # has no effect on the baseline


def test_brackets_in_a_setting_are_no_markup(tmp_path, make_run):
    make_run(tmp_path / "0", "mine[b]", 1, 0.9, overrides=["model.of=[a,b]", "x.y=[/]"])
    text = "".join("\n".join(show(comparison(aggregate(read_runs(tmp_path)[0])[0]))).split())
    assert all(part in text for part in ("mine[b]", "model.of=[a,b]", "x.y=[/]"))
