"""Rules by operator family; importing this package fills the table."""

from actprune.graph.rules import (
    contraction,
    indexed,
    norm,
    parts,
    pointwise,
    recurrent,
    reduce,
    regions,
    shape,
    spatial,
    transforms,
    view,
)
from actprune.graph.rules.registry import RULES, bind, rule

__all__ = [
    "RULES",
    "bind",
    "contraction",
    "indexed",
    "norm",
    "parts",
    "pointwise",
    "recurrent",
    "reduce",
    "regions",
    "rule",
    "shape",
    "spatial",
    "transforms",
    "view",
]
