from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from actprune.core.errors import ConfigError
from actprune.report.aggregate import aggregate
from actprune.report.figure import COLOURS, MARKERS
from actprune.report.runs import Run
from actprune.report.sweep import sweep

ACCURACY = {"entropy": (0.91, 0.95, 0.90), "random": (0.85, 0.80, 0.84), "none": (0.97, 0.96, 0.99)}


def rows(shares=(0.4,), criteria=tuple(ACCURACY), seeds=3, **keys):
    runs = []
    for criterion in criteria:
        for share in shares if criterion != "none" else (1.0,):
            for seed in range(seeds):
                runs.append(
                    Run(
                        path=Path("x"),
                        criterion=criterion,
                        seed=seed,
                        params_before=100_000,
                        params_after=int(100_000 * share),
                        macs_before=10,
                        macs_after=5,
                        test_accuracy=ACCURACY[criterion][seed],
                        budget=f"params={share}",
                        **keys,
                    )
                )
    return aggregate(runs)[0]


def means(axes):
    """Error bars: label -> (mean line, bar segments or None)."""
    found = {}
    for container in axes.containers:
        line, _, bars = container.lines
        found[container.get_label()] = (line, bars[0].get_segments() if bars else None)
    return found


def dots(axes):
    return [line for line in axes.get_lines() if line.get_alpha() == 0.4]


def test_criteria_of_one_size_stand_side_by_side(tmp_path):
    figure = sweep(rows(), tmp_path / "s.png")
    (axes,) = figure.axes
    drawn = means(axes)
    assert set(drawn) == {"entropy", "random"}
    for place, criterion in enumerate(("entropy", "random")):  # best first
        line, bars = drawn[criterion]
        values = 100 * np.array(ACCURACY[criterion])
        np.testing.assert_allclose(line.get_data(orig=False), [[place], [values.mean()]])
        np.testing.assert_allclose(bars[0][:, 1], [values.mean() - values.std(ddof=1), values.mean() + values.std(ddof=1)])
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert names == ["entropy\n40,000 (40.0 %)", "random\n40,000 (40.0 %)"]
    assert axes.get_xlabel() == "parameters left"
    assert axes.get_ylabel() == "test accuracy, %"
    seeds = {tuple(np.round(line.get_ydata(), 6)) for line in dots(axes)}
    assert seeds == {tuple(100 * np.array(ACCURACY[c])) for c in ("entropy", "random")}


def test_the_baseline_is_a_line_with_a_band(tmp_path):
    (axes,) = sweep(rows(), tmp_path / "s.png").axes
    values = 100 * np.array(ACCURACY["none"])
    line = next(line for line in axes.get_lines() if line.get_label() == "none (unpruned)")
    np.testing.assert_allclose(line.get_ydata(), values.mean())
    (band,) = axes.patches
    low, high = band.get_extents().transformed(axes.transData.inverted()).intervaly
    np.testing.assert_allclose([low, high], [values.mean() - values.std(ddof=1), values.mean() + values.std(ddof=1)])


@pytest.mark.parametrize(("shares", "scale"), [((0.2, 0.4, 0.6), "linear"), ((0.02, 0.1, 0.5), "log")])
def test_budgets_are_joined_by_a_line(tmp_path, shares, scale):
    (axes,) = sweep(rows(shares), tmp_path / "s.png").axes
    assert axes.get_xscale() == scale
    width = axes.transAxes.transform((1, 0))[0] - axes.transAxes.transform((0, 0))[0]
    for line, bars in means(axes).values():
        x, y = line.get_data(orig=False)
        true = np.array([100_000 * share for share in shares])
        np.testing.assert_allclose(np.diff(y), 0, atol=1e-9)
        moved = axes.transData.transform([(v, 90) for v in x])[:, 0] - axes.transData.transform([(v, 90) for v in true])[:, 0]
        assert np.all(np.abs(moved) < 0.02 * width)  # beside each other, yet where they belong
        assert np.all(np.abs(moved) > 0)
        assert len(bars) == 3
    assert len(dots(axes)) == 2
    assert all(len(line.get_xdata()) == 9 for line in dots(axes))


def test_a_single_criterion_is_drawn_at_its_size(tmp_path):
    (axes,) = sweep(rows((0.2, 0.6), criteria=("entropy",)), tmp_path / "s.png").axes
    np.testing.assert_allclose(means(axes)["entropy"][0].get_xdata(orig=False), [20_000, 60_000])


def test_one_seed_has_no_error_bar_and_no_band(tmp_path):
    (axes,) = sweep(rows(seeds=1), tmp_path / "s.png").axes
    assert all(bars is None for _, bars in means(axes).values())
    assert len(axes.patches) == 0
    assert axes.get_title(loc="left").endswith("1 seed")


def test_only_the_baseline(tmp_path):
    (axes,) = sweep(rows(criteria=("none",)), tmp_path / "s.png").axes
    assert len(axes.containers) == 0
    low, high = axes.get_xlim()
    assert low < 100_000 < high


def test_data_and_models_get_a_panel_each_and_keep_their_colours(tmp_path):
    here = rows(criteria=("entropy", "random"), data="a", model="m")
    there = rows(criteria=("random",), data="b", model="m")
    more = rows(criteria=("entropy",), data="c", model="m")
    figure = sweep(here + there + more, tmp_path / "s.png")
    assert [axes.get_title(loc="left").split(" · ")[0] for axes in figure.axes] == ["a", "b", "c"]
    colours = [{label: line.get_color() for label, (line, _) in means(axes).items()} for axes in figure.axes]
    assert colours[0]["random"] == colours[1]["random"] != colours[0]["entropy"] == colours[2]["entropy"]
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == ["entropy", "random"]


def test_every_criterion_has_its_own_look(tmp_path):
    criteria = [f"criterion{i:02d}" for i in range(20)]
    runs = [Run(Path("x"), c, 0, 100, 40, 10, 5, 0.9) for c in criteria]
    figure = sweep(aggregate(runs)[0], tmp_path / "s.png")
    looks = {(line.get_color(), line.get_marker()) for line, _ in means(figure.axes[0]).values()}
    assert len(looks) == 20
    assert np.gcd(len(COLOURS), len(MARKERS)) == 1  # or they would repeat together


def test_baselines_of_different_training_differ(tmp_path):
    two = rows(criteria=("none",)) + rows(criteria=("none",), overrides=("optimizer.lr=1",))
    (axes,) = sweep(two, tmp_path / "s.png").axes
    styles = {line.get_label(): line.get_linestyle() for line in axes.get_lines()}
    assert styles["none (unpruned)"] != styles["none optimizer.lr=1 (unpruned)"]


def test_the_file_is_a_png_of_sensible_size(tmp_path):
    sweep(rows((0.2, 0.4)), tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    height, width = imread(tmp_path / "s.png").shape[:2]
    assert (width, height) == (1184, 736)


def test_no_row_raises(tmp_path):
    with pytest.raises(ConfigError, match="0 rows to draw"):
        sweep([], tmp_path / "s.png")


def test_long_names_are_not_cut_off(tmp_path):
    long = {"overrides": ("data.root=/a/" + "very/" * 30,), "model": "a_model_" * 7}
    figure = sweep([*rows(), *rows(data="mnist", **long)], tmp_path / "sweep.png")
    renderer = figure.canvas.get_renderer()
    boxes = [legend.get_window_extent(renderer) for legend in figure.legends]
    boxes += [axes._left_title.get_window_extent(renderer) for axes in figure.axes]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)


def test_many_baselines_can_be_told_apart(tmp_path):
    many = [row for k in range(6) for row in rows(criteria=("none",), overrides=(f"optimizer.lr={k}",))]
    lines = sweep(many, tmp_path / "sweep.png").axes[0].get_lines()
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 6
