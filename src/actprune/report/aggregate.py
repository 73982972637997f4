"""Many runs to few rows: mean and spread over seeds, and the difference to the unpruned baseline.

Spread is the sample standard deviation, ``s = sqrt(sum (x_i - mean)^2 / (n - 1))``, over seeds; it does not exist for
one seed. The difference to the baseline is taken seed by seed (a seed fixes split and initialisation, so pairs share
most of their noise) over the seeds that both have, and then averaged. A seed that ran twice is averaged first and
counts once. Runs are averaged only when they agree in everything but the seed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from actprune.report.runs import BASELINE, Run

_PRUNING = ("pruner", "criterion", "budget", "selection", "schedule", "compensation")  # no effect without pruning


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (ddof 1) of ``n`` values."""

    mean: float
    std: float | None
    """None for fewer than two values."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True, order=True)
class Section:
    """What runs must share to be compared with each other at all."""

    data: str
    model: str
    params_before: int
    macs_before: int


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed."""

    section: Section
    criterion: str
    budget: str
    """Share that should be left, e.g. ``params=0.4``; empty for the baseline and where unknown."""
    config: tuple[str, ...]
    """Other settings that were overridden."""
    seeds: tuple[int, ...]
    points: tuple[tuple[float, float], ...]
    """Per seed: parameters left, test accuracy."""
    params: Spread
    """Parameters left."""
    macs: Spread
    """Multiply-adds left, one sample."""
    accuracy: Spread
    """Test accuracy, share in [0, 1]."""
    val_accuracy: Spread | None
    """Validation accuracy, share in [0, 1]; None unless every run has it."""
    seconds: Spread | None
    """Wall time; None unless every run has it."""
    difference: Spread | None = None
    """Test accuracy minus the baseline's, seed by seed; None for the baseline and without a common seed."""

    @property
    def is_baseline(self) -> bool:
        """Whether these runs were never pruned."""
        return self.criterion == BASELINE

    @property
    def label(self) -> str:
        """Criterion and config, without the budget."""
        return " ".join((self.criterion, *self.config))


def aggregate(runs: Iterable[Run]) -> tuple[list[Row], list[str]]:
    """Average runs over seeds.

    Returns:
        The rows, by section, config and budget, baseline first and then the most accurate first; and notes on
        everything that makes the rows less comparable than they look: missing seeds, no baseline, several commits.
    """
    sections: dict[Section, dict[tuple[str, str, tuple[str, ...]], list[Run]]] = defaultdict(lambda: defaultdict(list))
    runs = list(runs)
    for run in runs:
        section = Section(run.data, run.model, run.params_before, run.macs_before)
        baseline = run.criterion == BASELINE
        budget = "" if baseline else run.budget
        config = _of_training(run.overrides) if baseline else run.overrides
        sections[section][run.criterion, budget, config].append(run)

    rows: list[Row] = []
    notes: list[str] = []
    for section in sorted(sections):
        twice = [
            f"{_name(key)}: seed {seed} was run more than once; its runs are averaged and count as one"
            for key, members in sections[section].items()
            for seed in sorted({run.seed for run in members})
            if sum(run.seed == seed for run in members) > 1
        ]
        here = [_row(section, *key, members) for key, members in sections[section].items()]
        here = [_with_difference(row, here) for row in here]
        here.sort(key=lambda row: (not row.is_baseline, row.config, row.budget, -row.accuracy.mean))
        rows += here
        where = f"{describe(section)}: " if len(sections) > 1 else ""
        notes += [where + note for note in [*_missing_seeds(here), *twice, *_missing_baselines(here)]]
    return rows, notes + _mixed(runs)


def describe(section: Section) -> str:
    """Name data and model, as far as they are known."""
    return " · ".join(part for part in (section.data, section.model) if part) or "runs"


def _row(section: Section, criterion: str, budget: str, config: tuple[str, ...], runs: Sequence[Run]) -> Row:
    seeds = sorted({run.seed for run in runs})
    by_seed = [[run for run in runs if run.seed == seed] for seed in seeds]

    def per_seed(name: str) -> list[float]:
        return [fmean(getattr(run, name) for run in same) for same in by_seed]

    def optional(name: str) -> Spread | None:
        return None if any(getattr(run, name) is None for run in runs) else Spread.of(per_seed(name))

    return Row(
        section=section,
        criterion=criterion,
        budget=budget,
        config=config,
        seeds=tuple(seeds),
        points=tuple(zip(per_seed("params_after"), per_seed("test_accuracy"), strict=True)),
        params=Spread.of(per_seed("params_after")),
        macs=Spread.of(per_seed("macs_after")),
        accuracy=Spread.of(per_seed("test_accuracy")),
        val_accuracy=optional("val_accuracy"),
        seconds=optional("seconds"),
    )


def _of_training(config: Iterable[str]) -> tuple[str, ...]:
    """Keep the overrides that still matter when nothing is pruned."""
    return tuple(o for o in config if not set(_PRUNING) & set(o.lstrip("+~").split("=", 1)[0].split(".")))


def _baseline(row: Row, rows: Iterable[Row]) -> Row | None:
    return next((b for b in rows if b.is_baseline and b.config == _of_training(row.config)), None)


def _with_difference(row: Row, rows: Sequence[Row]) -> Row:
    baseline = _baseline(row, rows)
    if row.is_baseline or baseline is None:
        return row
    reference = dict(zip(baseline.seeds, (accuracy for _, accuracy in baseline.points), strict=True))
    pairs = [accuracy - reference[seed] for seed, (_, accuracy) in zip(row.seeds, row.points, strict=True) if seed in reference]
    return replace(row, difference=Spread.of(pairs) if pairs else None)


def _name(key: tuple[str, str, tuple[str, ...]]) -> str:
    criterion, budget, config = key
    return " ".join(part for part in (criterion, budget, *config) if part)


def _missing_seeds(rows: Sequence[Row]) -> list[str]:
    every = sorted({seed for row in rows for seed in row.seeds})
    notes = []
    for row in rows:
        missing = [seed for seed in every if seed not in row.seeds]
        if missing:
            name = _name((row.criterion, row.budget, row.config))
            notes.append(f"{name}: {_seeds(missing)} missing, has {_seeds(row.seeds)}")
    return notes


def _missing_baselines(rows: Sequence[Row]) -> list[str]:
    if not any(row.is_baseline for row in rows):
        return [f"no baseline to compare with (run pruner={BASELINE} with the same seeds)"]
    notes = []
    for row in rows:
        if row.is_baseline or row.difference is not None:
            continue
        name = _name((row.criterion, row.budget, row.config))
        if _baseline(row, rows) is None:
            notes.append(f"{name}: no baseline with the same training settings (run pruner={BASELINE} with them)")
        else:
            notes.append(f"{name}: has no seed in common with its baseline, so there is no difference to it")
    return notes


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _mixed(runs: Sequence[Run]) -> list[str]:
    """Say when the code that made the runs was not the same."""
    notes = []
    commits = sorted({run.commit[:12] or "unknown" for run in runs})
    if len(commits) > 1:
        notes.append(f"the runs come from {len(commits)} commits: {', '.join(commits)}")
    versions = {run.versions for run in runs}
    if len(versions) > 1:
        notes.append(f"the runs come from {len(versions)} sets of library versions")
    return notes
