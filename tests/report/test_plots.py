import threading

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from actprune.core.errors import ConfigError
from actprune.report.plots import BARS_PER_COLUMN, params_vs_accuracy, widths

PARAMS = (20000, 20000, 20000, 14000, 14000, 9000, 9000, 9000)
ACCURACY = (0.3, 0.8, 0.95, 0.90, 0.94, 0.88, 0.93, 0.94)
STEP = (0, 0, 0, 1, 1, 2, 2, 2)
HISTORY = [
    {"epoch": i, "params": p, "val_accuracy": a, "step": s}
    for i, (p, a, s) in enumerate(zip(PARAMS, ACCURACY, STEP, strict=True))
]


def lines(axes):
    """Labelled artists: label -> (x, y)."""
    return {line.get_label(): line.get_data() for line in axes.get_lines() if not line.get_label().startswith("_")}


def check_png(path, least=(400, 300), most=(4000, 4000)):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(path)
    height, width = pixels.shape[:2]
    assert least[0] <= width <= most[0]
    assert least[1] <= height <= most[1]
    assert 0.5 < pixels[..., :3].mean() < 0.999  # mostly paper, but not blank
    assert list(path.parent.iterdir()) == [path]  # nothing half-written beside it


def test_history_marks_steps_start_and_end(tmp_path):
    figure = params_vs_accuracy(HISTORY, tmp_path / "a.png", test_accuracy=0.925)
    check_png(tmp_path / "a.png")
    (axes,) = figure.axes
    artists = lines(axes)
    assert len(axes.get_lines()) == 6  # the path and five kinds of marks
    np.testing.assert_array_equal(artists["epoch, validation"][0], PARAMS)
    np.testing.assert_allclose(artists["epoch, validation"][1], 100 * np.array(ACCURACY))
    np.testing.assert_allclose(artists["first epoch after a pruning step"], [[14000, 9000], [90, 88]])
    np.testing.assert_allclose(artists["last epoch before pruning, validation 95.0 %"], [[20000], [95]])
    np.testing.assert_allclose(artists["last epoch, validation 94.0 %"], [[9000], [94]])
    np.testing.assert_allclose(artists["final network, test 92.5 %"], [[9000], [92.5]])
    assert axes.get_xlabel() == "parameters left"
    assert axes.get_ylabel() == "accuracy, %"
    assert axes.get_title(loc="left") == "20k → 9k parameters (45 % left), 2 pruning steps"
    assert axes.get_xscale() == "linear"


def test_early_epochs_far_below_are_cut_off_and_counted(tmp_path):
    (axes,) = params_vs_accuracy(HISTORY, tmp_path / "a.png").axes
    low, high = axes.get_ylim()
    assert 80 < low < 88
    assert 95 < high < 100
    assert [text.get_text() for text in axes.texts] == ["↓ 2 early epochs below the axis, from 30.0 %"]


def test_nothing_is_said_about_early_epochs_where_all_are_visible(tmp_path):
    (axes,) = params_vs_accuracy(HISTORY[2:], tmp_path / "a.png").axes
    assert len(axes.texts) == 0


def test_ticks_are_readable_and_the_top_axis_shows_shares(tmp_path):
    figure = params_vs_accuracy(HISTORY, tmp_path / "a.png")
    (axes,) = figure.axes
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert "10k" in labels
    assert len(set(labels)) == len(labels)
    (top,) = axes.child_axes
    np.testing.assert_allclose(top.get_xlim(), np.array(axes.get_xlim()) / 200)


def test_a_wide_range_is_logarithmic(tmp_path):
    rows = [{**row, "params": 20000 // (1 + 10 * row["step"])} for row in HISTORY]
    figure = params_vs_accuracy(rows, tmp_path / "a.png")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert {"1k", "2k", "5k", "10k", "20k"} <= set(labels)
    (top,) = axes.child_axes
    assert [tick.get_text() for tick in top.get_xticklabels()] == ["5", "10", "20", "50", "100"]


def test_a_history_that_begins_after_a_step_keeps_the_original_size(tmp_path):
    figure = params_vs_accuracy(HISTORY[3:], tmp_path / "a.png", params_before=20000)
    (axes,) = figure.axes
    assert axes.get_title(loc="left").startswith("20k → 9k parameters (45 % left)")
    assert not any(label.startswith("last epoch before pruning") for label in lines(axes))


def test_an_unpruned_run_is_drawn_over_its_epochs(tmp_path):
    rows = [{**row, "params": 20000, "step": 0} for row in HISTORY]
    figure = params_vs_accuracy(rows, tmp_path / "a.png", test_accuracy=0.9)
    check_png(tmp_path / "a.png")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "epoch"
    assert axes.get_title(loc="left") == "20k parameters in every epoch, no pruning step"
    np.testing.assert_array_equal(lines(axes)["epoch, validation"][0], range(8))


def test_steps_that_were_taken_back_are_told_of(tmp_path):
    rows = [*HISTORY, {**HISTORY[-1], "params": 20000, "step": 0}]
    (axes,) = params_vs_accuracy(rows, tmp_path / "a.png").axes
    assert axes.get_title(loc="left") == "20k parameters, every pruning step was taken back"


def test_epochs_without_validation_are_left_out(tmp_path):
    rows = [HISTORY[2], {**HISTORY[3], "val_accuracy": None}, {**HISTORY[4], "val_accuracy": float("nan")}, HISTORY[5]]
    (axes,) = params_vs_accuracy(rows, tmp_path / "a.png").axes
    assert len(lines(axes)["epoch, validation"][0]) == 2
    assert len(lines(axes)["first epoch after a pruning step"][0]) == 1


@pytest.mark.parametrize("rows", [HISTORY[:1], HISTORY[3:4]])
def test_one_epoch_is_enough(tmp_path, rows):
    params_vs_accuracy(rows, tmp_path / "a.png", test_accuracy=rows[0]["val_accuracy"])
    check_png(tmp_path / "a.png")


@pytest.mark.parametrize("rows", [[], [{**HISTORY[0], "val_accuracy": None}]])
def test_a_history_without_validation_raises(tmp_path, rows):
    with pytest.raises(ConfigError, match="0 epochs with a validation accuracy"):
        params_vs_accuracy(rows, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "columns"), [(1, 1), (10, 1), (36, 1), (37, 2), (62, 2), (73, 3), (200, 3)])
def test_widths_shows_every_group_and_adapts(tmp_path, number, columns):
    rows = [(f"group{i}", 16 + i, 8 + i) for i in range(number)]
    figure = widths(rows, tmp_path / "w.png")
    check_png(tmp_path / "w.png", least=(800, 200))
    panels = figure.axes
    assert len(panels) == columns
    drawn = []
    for axes in panels:
        before, after = axes.containers
        names = [tick.get_text() for tick in axes.get_yticklabels()]
        drawn += zip(names, [b.get_width() for b in before], [b.get_width() for b in after], strict=True)
        assert [text.get_text() for text in axes.texts] == [
            f"{a:.0f} / {b:.0f}" for _, b, a in drawn[-len(names) :]
        ]  # "after / before" at the end of each bar
        bottom, top = axes.get_ylim()
        assert bottom > top  # the first group on top
    assert drawn == rows
    height = figure.get_size_inches()[1]
    assert height >= 0.2 * min(number, BARS_PER_COLUMN) / columns
    assert f"{sum(r[2] for r in rows):,} of {sum(r[1] for r in rows):,} left" in figure.get_suptitle()


def test_names_with_dollar_signs_are_no_mathematics(tmp_path):
    figure = widths([(r"a$\frac$b", 4, 2)], tmp_path / "w.png")
    assert figure.axes[0].get_yticklabels()[0].get_text() == r"a\$\frac\$b"


def test_widths_of_no_group_raises(tmp_path):
    with pytest.raises(ConfigError, match="0 groups to draw"):
        widths([], tmp_path / "w.png")


def test_pictures_leave_no_global_state(tmp_path):
    before = dict(mpl.rcParams)
    params_vs_accuracy(HISTORY, tmp_path / "a.png")
    assert dict(mpl.rcParams) == before
    errors = []

    def draw():
        try:
            widths([("a", 4, 2)], tmp_path / "thread.png")
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=draw)  # pyplot would warn outside the main thread
    thread.start()
    thread.join()
    assert errors == []


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "w.png"
    widths([("a", 4, 2)], path)
    old = path.read_bytes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path: path.write_bytes(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        widths([("a", 4, 1)], path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
