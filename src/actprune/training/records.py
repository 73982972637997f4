"""One surgery record for a module of which several parts were pruned, each with a record of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from actprune.core.record import SurgeryRecord

Value = TypeVar("Value")


def merged(records: Mapping[str, SurgeryRecord]) -> SurgeryRecord:
    """The record of the whole, with which a fresh one takes the pruned shape.

    Args:
        records: dotted name of a part in the whole (empty: the whole itself) -> its record.
    """
    whole = SurgeryRecord()
    for path, record in records.items():
        whole.removed |= _under(path, record.removed)
        whole.shapes |= _under(path, record.shapes)
        whole.attributes |= _under(path, record.attributes)
        whole.biases += list(_under(path, dict.fromkeys(record.biases)))
        whole.widths |= _under(path, record.widths)
        whole.steps += [{**step, "groups": _under(path, step["groups"])} for step in record.steps]
    return whole


def _under(path: str, named: Mapping[str, Value]) -> dict[str, Value]:
    return {".".join(filter(None, (path, name))): value for name, value in named.items()}
