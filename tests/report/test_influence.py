import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from actprune.pruning import RANDOM, GroupInfluence, Influence, Removal, agreement
from actprune.report import draw_influence, influence_tables, write_influence
from actprune.report.influence import TABLES, WHOLE, distribution, middle_share
from actprune.report.influence_plots import PICTURES, curves, curves_by_group, heat_map, matrix

SHARES = (0.25, 0.5, 0.75)


def removals(generator, names):
    found = []
    for name in names:
        for end in ("random",) if name == RANDOM else ("lowest", "highest"):
            for share in SHARES:
                found.append(Removal(name, end, share, 3, float(generator.uniform(1, 2)), float(generator.uniform(0.2, 0.8))))
    return found


def made(n_groups=5, names=("entropy", "rms"), size=8):
    generator = np.random.default_rng(0)
    names = (*names, RANDOM)
    groups = []
    for i in range(n_groups):
        own = names[1:] if i == 1 and len(names) > 1 else names  # one group that the first criterion cannot score
        scores = {name: generator.normal(size=size).tolist() for name in own}
        units, loss = [0, 2, 4, 5], generator.normal(size=4).tolist()
        groups.append(
            GroupInfluence(
                f"block{i}.conv",
                size,
                100 + i,
                1000 + i,
                scores,
                units,
                loss,
                [0.0] * 4,
                removals(generator, own),
                [loss, loss],
                70,
            )
        )
    return Influence(1000, 20_000, 0.5, 0.8, 30, 40, names, groups, removals(generator, names))


def printed(influence):
    console = Console(width=100, file=io.StringIO())
    console.print(influence_tables(influence, agreement(influence)))
    return console.file.getvalue()


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_console_says_what_was_measured_in_100_columns():
    influence = made()
    text = printed(influence)
    assert max(map(len, text.splitlines())) <= 100
    assert "5 groups · 1,000 parameters · 20,000 MACs · loss 0.5000, accuracy 80.00 % on 40 samples" in text
    (line,) = (line for line in text.splitlines() if line.strip().startswith("block0.conv"))
    drawn = next(r for r in influence.groups[0].removals if r.criterion == RANDOM and r.share == 0.5)
    assert f"{100 * (drawn.accuracy - 0.8):+.2f}" in line
    assert "10.0 %" in line


def compared(scores, accuracies):
    """What the row of a group and that of the network, of two alike, say of the criteria: random, worst, best, by."""
    kept = [Removal(name, "lowest", 0.5, 2, 1.0, accuracy) for name, accuracy in accuracies.items()]
    kept.append(Removal(RANDOM, "random", 0.5, 2, 1.0, 0.6))
    groups = [
        GroupInfluence(name, 4, 1, 1, {**own, RANDOM: [3, 1, 2, 4]}, [0, 1, 2], [0.1] * 3, [0] * 3, kept)
        for name, own in zip(("g1", "g2"), scores, strict=True)
    ]
    text = printed(Influence(100, 100, 0.5, 0.8, 30, 40, (*accuracies, RANDOM), groups, kept))
    (group, whole) = (next(line for line in text.splitlines() if name in line) for name in ("g1", WHOLE))
    return group.split()[9:], whole.split()[2:]


UP, FLAT = [1, 2, 3, 4], [1, 1, 1, 1]


def test_the_best_criterion_stands_beside_its_figure():
    scores = {"rms": UP, "taylor": UP}
    group, whole = compared([scores, scores], {"rms": 0.7, "taylor": 0.75})
    assert group == whole == ["-20.00", "-10.00", "-5.00", "taylor"]


def test_equally_good_criteria_are_counted():
    scores = {"a_criterion_with_a_long_name": UP, "taylor": UP, "bad": UP}
    group, _ = compared([scores, scores], {"a_criterion_with_a_long_name": 0.75, "taylor": 0.75, "bad": 0.5})
    assert group == ["-20.00", "-30.00", "-5.00", "a_criterion_wi…", "+1"]


def test_what_ranks_nothing_does_not_compete():
    """Constant in a group, or without a score in one: its removals are drawn, or are fewer."""
    accuracies = {"flat": 0.79, "some": 0.78, "rms": 0.7, "none": 0.8}
    scores = [{"flat": FLAT, "some": UP, "rms": UP}, {"flat": FLAT, "rms": UP}]
    group, whole = compared(scores, accuracies)
    assert group == ["-20.00", "-10.00", "-2.00", "some"]
    assert whole == ["-20.00", "-10.00", "-10.00", "rms"]
    group, whole = compared([{"flat": FLAT}, {"flat": FLAT}], {"flat": 0.79})
    assert group == whole == ["-20.00"]


def test_many_criteria_and_groups_fit():
    names = [f"criterion_with_a_name_{i}" for i in range(24)]
    text = printed(made(40, names))
    assert max(map(len, text.splitlines())) <= 100
    assert "… 16 more" in text
    assert "block11.conv" in text
    assert "block12.conv" not in text
    for i, name in enumerate(names):
        assert f"{i + 2} {name}"[:19] + "…" in text


def test_how_much_is_noise_stands_below_the_effects():
    influence = made()
    text = " ".join(printed(influence).split())
    assert "on 70 samples" in text
    assert "measured on two halves of the samples, agrees at +1.00: who knew it exactly would reach about +1.00 here" in text


def test_what_scores_no_group_is_named():
    influence = made()
    assert "Without anything to go by" not in printed(influence)
    text = " ".join(printed(replace(influence, criteria=(*influence.criteria, "batch_norm_scale"))).split())
    assert "Without anything to go by in any group: batch_norm_scale." in text


def test_only_the_baseline():
    text = printed(made(3, ()))
    assert "random" in text


def test_tables_hold_every_number(tmp_path):
    influence = made()
    agreed = agreement(influence)
    paths = write_influence(influence, agreed, tmp_path)
    assert [path.name for path in paths] == list(TABLES)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(TABLES)
    groups, units, removed, pairs = map(read, paths)
    assert [row["group"] for row in groups] == [*(g.name for g in influence.groups), WHOLE]
    group = influence.groups[2]
    assert float(groups[2]["rms_median"]) == pytest.approx(np.median(group.scores["rms"]))
    assert float(groups[2]["rms_q3"]) == pytest.approx(np.quantile(group.scores["rms"], 0.75))
    assert float(groups[2]["unit_loss_mean"]) == pytest.approx(np.mean(group.unit_loss))
    one = group.removals[0]
    assert float(groups[2][f"{one.criterion}_{one.end}_{one.share:g}_accuracy"]) == one.accuracy
    assert groups[1]["entropy_median"] == ""
    assert len(units) == 5 * 8
    assert [row["loss_rise"] != "" for row in units[:8]] == [True, False, True, False, True, True, False, False]
    assert float(units[2]["rms"]) == influence.groups[0].scores["rms"][2]
    assert len(removed) == sum(len(g.removals) for g in influence.groups) + len(influence.whole)
    assert float(removed[-1]["loss"]) == influence.whole[-1].loss
    assert len(pairs) == 4 * 4
    row = next(row for row in pairs if (row["one"], row["other"]) == ("effect", "rms"))
    place = list(agreed.names).index("rms")
    assert float(row["spearman"]) == agreed.mean[0][place]
    assert int(row["groups"]) == 5
    assert float(row["group block3.conv"]) == agreed.by_group["block3.conv"][0][place]


def test_distribution():
    assert distribution([4, 1, 2, 3, 10]) == {"min": 1, "q1": 2, "median": 3, "q3": 4, "max": 10, "mean": 4}


def test_the_share_nearest_to_a_half():
    assert middle_share(made()) == 0.5


@pytest.mark.parametrize(("n_groups", "names"), [(5, ("entropy", "rms")), (1, ()), (13, [f"criterion{i}" for i in range(20)])])
def test_pictures(tmp_path, n_groups, names):
    influence = made(n_groups, names)
    paths = draw_influence(influence, agreement(influence), tmp_path)
    assert [path.name for path in paths] == list(PICTURES)
    for path in paths:
        height, width = imread(path).shape[:2]
        assert min(height, width) > 200
        assert max(height, width) < 3500


def test_curves_begin_at_the_whole_network_and_show_every_share(tmp_path):
    influence = made()
    left, right = curves(influence, tmp_path / "a.png").axes[:2]
    for axes, end in ((left, "lowest"), (right, "highest")):
        lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
        assert set(lines) == {"entropy", "rms", RANDOM}
        for name, points in lines.items():
            wanted = "random" if name == RANDOM else end
            of = {r.share: r.accuracy for r in influence.whole if r.criterion == name and r.end == wanted}
            np.testing.assert_allclose(points, [(0, 80), *((100 * s, 100 * of[s]) for s in SHARES)])


def test_the_legend_begins_with_what_keeps_most(tmp_path):
    influence = made(5, [f"criterion{i}" for i in range(6)])
    (legend,) = curves(influence, tmp_path / "a.png").legends
    kept = [
        np.mean([r.accuracy for r in influence.whole if r.criterion == t.get_text() and r.end != "highest"])
        for t in legend.texts
    ]
    assert len(kept) == 7
    assert kept == sorted(kept, reverse=True)


def test_a_panel_per_group(tmp_path):
    influence = made(5)
    panels = curves_by_group(influence, tmp_path / "a.png").axes
    assert [axes.get_title(loc="left") for axes in panels[:5]] == [f"block{i}.conv (8)" for i in range(5)]
    labelled = [axes.xaxis.get_major_ticks()[0].label1.get_visible() for axes in panels[:5]]
    assert labelled == [False, True, True, True, True]  # where no panel is below


def test_heat_map_shows_means_and_correlations(tmp_path):
    influence = made()
    agreed = agreement(influence)
    left, right = heat_map(influence, agreed, tmp_path / "a.png").axes[:2]
    shown = left.images[0].get_array()
    means = np.array([np.mean(g.scores["rms"]) for g in influence.groups])
    np.testing.assert_allclose(shown[:, 1], (means - means.min()) / np.ptp(means))
    assert shown.mask[1, 0]
    assert right.images[0].get_array()[3, 1] == agreed.by_group["block3.conv"][0][2]


def test_matrix_is_the_agreement(tmp_path):
    agreed = agreement(made())
    axes = matrix(agreed, tmp_path / "a.png").axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), agreed.mean)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(agreed.names)
    assert "5 groups" in axes.get_title(loc="left")
    figure = matrix(agreement(made(1, ())), tmp_path / "b.png")
    box = figure.axes[0]._left_title.get_window_extent(figure.canvas.get_renderer())
    assert box.x1 <= figure.bbox.width


def test_brackets_in_a_name_are_no_markup():
    plain = printed(made(3, ["mine_b_"]))
    assert "mine_b_" in plain
    assert printed(made(3, ["mine[b]"])).count("mine[b]") == plain.count("mine_b_")
