"""Rows as a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

from actprune.core.files import atomic_path


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, whole or not at all; columns are all keys in order of first use, None and what a row lacks are empty.

    Raises:
        OSError: the folder cannot be written; an older file is intact.
    """
    names = dict.fromkeys(key for row in rows for key in row)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(names))
        writer.writeheader()
        writer.writerows(rows)
