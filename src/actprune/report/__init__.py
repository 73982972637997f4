"""What a run and a sweep leave behind for people: tables, pictures, and the comparison of many runs."""

from actprune.report.aggregate import Row, Section, Spread, aggregate
from actprune.report.capacity import CAPACITY_TABLES, Measured, capacity_tables, layer_rows, network_row, write_capacity
from actprune.report.compare import Comparison, compare
from actprune.report.influence import influence_tables, write_influence
from actprune.report.influence_plots import draw_influence
from actprune.report.plots import params_vs_accuracy, widths
from actprune.report.runs import Problem, Run, read_runs
from actprune.report.structure import structure
from actprune.report.sweep import sweep
from actprune.report.tables import before_after, comparison, write_csv, write_markdown

__all__ = [
    "CAPACITY_TABLES",
    "Comparison",
    "Measured",
    "Problem",
    "Row",
    "Run",
    "Section",
    "Spread",
    "aggregate",
    "before_after",
    "capacity_tables",
    "compare",
    "comparison",
    "draw_influence",
    "influence_tables",
    "layer_rows",
    "network_row",
    "params_vs_accuracy",
    "read_runs",
    "structure",
    "sweep",
    "widths",
    "write_capacity",
    "write_csv",
    "write_influence",
    "write_markdown",
]
