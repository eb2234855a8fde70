"""The order of the rooms: an import points down or sideways, as CONTRIBUTING.md has it."""

import ast
from pathlib import Path

import hf_transcoders


ROOT = Path(hf_transcoders.__file__).parent

# Lower rooms know nothing of higher ones. Rooms of one floor know each other only where that is said.
LAYERS = [
    {"errors"},
    {"text", "version"},
    {"files", "fingerprint"},
    {"ops", "formats"},
    {"models", "lm"},
    {"dictionaries"},
    {"data", "tasks"},
    {"features"},
    {"evaluation"},
    {"reports"},
    {"tracking", "hub", "circuits"},
    {"studies", "training"},
    {"testing"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}
# `push_to_hub` is a method of models in transformers; only inside it do models look up, and graphs to the side.
# The norms of a language model are needed to convert what was trained behind them.
ALLOWED = {("models", "hub"), ("models", "lm"), ("circuits", "hub"), ("hub", "tracking"), ("tasks", "data")}


def imports():
    """(file, importing room, imported room) for every import of one room by another, those inside functions too."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            targets = []
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    base = package[: len(package) - (node.level - 1)]
                    module = (*base, *(node.module or "").split(".")) if node.module else base
                    targets = [module] if module else [(alias.name,) for alias in node.names]
                elif (node.module or "").split(".")[0] == "hf_transcoders":
                    targets = [tuple(node.module.split(".")[1:])]
            for target in targets:
                if target and target[0] in FLOOR and parts[0] in FLOOR and target[0] != parts[0]:
                    yield path.relative_to(ROOT), parts[0], target[0]


def test_every_room_has_a_floor():
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= FLOOR.keys()


def test_imports_point_down():
    found = list(imports())
    assert len(found) > 50
    wrong = [
        f"{path}: {room} imports {other}"
        for path, room, other in found
        if FLOOR[other] >= FLOOR[room] and (room, other) not in ALLOWED
    ]
    assert not wrong, "\n".join(wrong)
