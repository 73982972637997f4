"""The command line: configuration, one job, its output folder."""

from actprune.cli.main import main

__all__ = ["main"]
