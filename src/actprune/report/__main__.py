"""``python -m actprune.report DIR``: compare the runs in a directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from actprune.core.errors import ActPruneError
from actprune.report.compare import compare


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print.

    Returns:
        The exit status: 0, or 1 with one message on stderr when nothing can be compared or written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m actprune.report",
        description="Compare the runs in a directory (e.g. a Hydra sweep): mean and spread over seeds per criterion, "
        "as a table, comparison.csv, comparison.md and comparison.png.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="tree of run directories, each with summary.json")
    parser.add_argument("--out", type=Path, default=None, help="where to write (default: DIR)")
    options = parser.parse_args(arguments)
    try:
        result = compare(options.directory, options.out)
    except (ActPruneError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # a pipe has no width of its own, and 80 columns would fold the table
    Console(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False).print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
