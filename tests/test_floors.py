"""The floors of the house: a room imports only from lower floors, rooms on one floor never from each other."""

import ast

import pytest

from paths import ROOT

PACKAGE = ROOT / "src" / "actprune"
FLOORS = [
    {"core"},
    {"statistics", "graph", "schedule", "data", "models"},
    {"criteria", "compensation", "surgery", "sparsity", "capacity"},
    {"pruning"},
    {"training"},
    {"report"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
LONGEST = 350


def imported_rooms(source, here):
    """Rooms of actprune that a module's source imports, wherever in the file; ``here`` is the module's own path."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [".".join(("actprune", *here.parts[: len(here.parts) - node.level], node.module or ""))]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "actprune" else [node.module]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("actprune.") and name.count(".") >= 1}
    return rooms


def test_every_room_has_a_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("module", [m for m in MODULES if len(m.parts) > 1], ids=str)
def test_imports_go_down(module):
    room = module.parts[0]
    for other in imported_rooms((PACKAGE / module).read_text(), module) & set(FLOOR) - {room}:
        assert FLOOR[other] < FLOOR[room], f"{module} imports {other}, which is not below {room}"


def test_the_check_sees_every_kind_of_import():
    source = "import actprune.cli.main\nfrom actprune import report\nfrom actprune.data.base import x\nfrom ..graph import y"
    assert imported_rooms(source, (PACKAGE / "core" / "a.py").relative_to(PACKAGE)) == {
        "cli",
        "report",
        "data",
        "graph",
    }


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_files_hold_one_idea(module):
    lines = (PACKAGE / module).read_text().splitlines()
    assert len(lines) <= LONGEST
    assert ast.get_docstring(ast.parse("\n".join(lines))), "a module begins with what it is about"


MAKE = {
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] != "models"], ids=str)
def test_new_tensors_are_told_where_to_be(path):
    """PyTorch's default device is for what users write; models are made where they say."""
    made = [
        node
        for node in ast.walk(ast.parse((PACKAGE / path).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch"
    ]
    silent = [node for node in made if node.func.attr in MAKE and "device" not in {keyword.arg for keyword in node.keywords}]
    assert not silent, [f"line {node.lineno}: {ast.unparse(node)}" for node in silent]
