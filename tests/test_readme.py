"""README.md is true: its blocks run and print what it says, its choices, files and links exist, and it stays short."""

import os
import re
import shlex
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

from paths import CONF, ROOT

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
SMALL = ("debug=fast", "data.batch_size=16", "trainer.num_sanity_val_steps=1")
INTERPRETERS = ("python", ".venv/bin/python")


class Block(NamedTuple):
    """One fenced block."""

    language: str
    source: str
    line: int
    """Number of the line, from 1, after the opening fence."""


def blocks(text=TEXT):
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        found.append(Block(match[1], match[2], text.count("\n", 0, match.start()) + 2))
    return found


def execute(block, path, namespace):
    """Line numbers of a traceback are those of the page."""
    exec(compile("\n" * (block.line - 1) + block.source, str(path), "exec"), namespace)


def criterion_file():
    """The block that is a whole file, and the yaml that makes it a choice."""
    return next(b for b in blocks() if "(Criterion)" in b.source), next(b for b in blocks() if b.language == "yaml")


def run(arguments, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_small(arguments, folder, *more):
    """Run run.py on a few batches; a sweep over numbers takes the first of them."""
    shortened = [re.sub(r"^(\w+=\d+)(,\d+)+$", r"\1", argument) for argument in arguments]
    return run([str(ROOT / "run.py"), *shortened, *more, *SMALL], folder)


def masked(text):
    """Lines with runs of spaces made equal, and numbers beside shares: accuracies differ a little between machines."""
    return [re.sub(r"\s+", " ", re.sub(r"\d+", "#", line) if "%" in line else line).strip() for line in text.splitlines()]


def printed_as_shown(shown, printed):
    """Whether the lines shown appear in this order, next to each other except where the README has ``...``."""
    lines, at, gap = masked(printed), 0, True
    for line in masked(shown):
        if line == "...":
            gap = True
            continue
        places = [i for i in range(at, len(lines)) if lines[i] == line][: None if gap else 1]
        if not places or (not gap and places[0] != at):
            return False
        at, gap = places[0] + 1, False
    return True


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("a 1%\nb", True),
        ("a 1%\n...\nc 3", True),
        ("a 1%\nc 3", False),
        ("b\na 1%", False),
        ("d", False),
        ("a 1%\n...\na 1%", False),
        ("c 4", False),
    ],
)
def test_printed_as_shown_can_fail(shown, expected):
    assert printed_as_shown(shown, "noise\na 22%\nb\nc 3\n") is expected


def test_python_blocks_run_and_print_what_is_shown(capsys):
    """In order and in one namespace, as a reader would paste them."""
    namespace = {"__name__": "readme"}
    n_shown = 0
    found = blocks()
    for block, following in zip_longest(found, found[1:]):
        if block.language != "python":
            continue
        execute(block, README, namespace)
        printed = capsys.readouterr().out
        if following is not None and following.language == "text" and "src/" not in following.source:
            n_shown += 1
            assert printed_as_shown(following.source, printed), f"README line {following.line}, printed:\n{printed}"
    assert n_shown == 2
    assert Path("pruned.pt").exists()
    rows = namespace["pruning"].history
    assert rows[-1]["params"] <= 0.2 * rows[0]["params"]
    assert rows[-1]["accuracy"] > 0.9


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_python_blocks_of_the_pages_run(path):
    text = path.read_text(encoding="utf-8")
    namespace = {"__name__": path.stem}
    for block in blocks(text):
        if block.language == "python":
            execute(block, path, namespace)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_choice_of_pruner_is_described():
    page = (ROOT / "docs" / "criteria.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `(\w+)`", page, re.M))
    assert described == {name for group, name in choices() if group == "pruner"} - {"none"}


def test_attaching_takes_twelve_lines():
    (attach,) = (block for block in blocks() if "PruningCallback(" in block.source)
    assert len([line for line in attach.source.splitlines() if line]) == 12


def test_bash_blocks_do_what_they_say(tmp_path):
    """Commands run in order in one folder; installing and make are checked for what they name."""
    commands = [line.split("  #")[0] for b in blocks() if b.language == "bash" for line in b.source.splitlines()]
    commands = [part.strip() for line in commands if not line.startswith("#") for part in line.split("&&")]
    assert any("-m actprune.report" in command for command in commands)
    for command in commands:
        first, *rest = shlex.split(command)
        if first == "make":
            (target,) = rest
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), command
        elif first in INTERPRETERS and rest[:2] == ["-m", "venv"]:
            assert rest[2] == INTERPRETERS[1].split("/")[0]
        elif first in INTERPRETERS and rest[:3] == ["-m", "pip", "install"]:
            assert rest[3:] == ["-e", "."]
            assert (ROOT / "pyproject.toml").exists()
        elif first in INTERPRETERS and rest[0] == "run.py":
            run_small(rest[1:], tmp_path)
        elif first in INTERPRETERS and rest[:2] == ["-m", "actprune.report"]:
            table = run(rest, tmp_path)
            assert "vs. none" in table
            assert (tmp_path / rest[2] / "comparison.png").exists()
        else:
            pytest.fail(f"nobody checks the command {command!r}")
    left = {path.name for path in next(path.parent for path in (tmp_path / "runs").glob("20*/*/summary.json")).iterdir()}
    promised = re.search(r"leaves in its folder[^:]*:(.*?)\n\n", TEXT, re.S)[1]
    assert set(re.findall(r"`([^`]+)`", promised)) <= left


def test_criterion_of_a_user_becomes_a_choice(tmp_path):
    """The file lies beside run.py (here: on the path), the yaml in a folder of choices."""
    source, choice = criterion_file()
    (tmp_path / "variation.py").write_text(source.source)
    (tmp_path / "conf" / "pruner").mkdir(parents=True)
    (tmp_path / "conf" / "pruner" / "variation.yaml").write_text(choice.source)
    run_small(["pruner=variation", f"hydra.searchpath=[file://{tmp_path / 'conf'}]"], tmp_path)
    assert len(choice.source.splitlines()) == 3
    (summary,) = tmp_path.glob("runs/*/*/summary.json")
    assert '"criterion": "variation"' in summary.read_text()


def choices():
    """(group, choice) of every row of the table; two groups share a row, a semicolon parts their choices."""
    for first, second in re.findall(r"^\| (`.*?`) \| (.*) \|$", TEXT, re.M):
        groups = re.findall(r"`(\w+)`", first)
        lists = second.split("; ")
        assert len(lists) >= len(groups), first
        for group, names in zip(groups, lists, strict=False):
            names = re.sub(r"\([^)]*\)", "", re.sub(r"\[[^]]*\]\([^)]*\)", "", names))
            yield from ((group, name) for name in re.findall(r"`(\w+)`", names))


def test_table_of_choices_is_complete():
    listed = set(choices())
    files = {(p.parent.name, p.stem) for p in CONF.glob("*/*.yaml") if not p.stem.startswith("_")}
    files -= {pair for pair in files if pair[0] in ("callbacks", "hydra", "paths")}
    assert listed == files


def test_links_and_folders_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    (tree,) = (block.source for block in blocks() if block.language == "text" and "src/" in block.source)
    named = [path for line in tree.splitlines() for path in re.split(r" {2,}", line)[0].split(", ")]
    assert [path for path in links + named if not (ROOT / path).exists()] == []
    rooms = {f"src/actprune/{p.name}/" for p in (ROOT / "src" / "actprune").iterdir() if (p / "__init__.py").exists()}
    assert rooms <= set(named)


def test_stays_short():
    assert len(TEXT.splitlines()) <= 240
