"""Train, prune and report: ``python run.py pruner=entropy``; ``python run.py --help`` lists the choices."""

from pathlib import Path

from actprune.cli import main

if __name__ == "__main__":
    main(Path(__file__).parent / "conf")
