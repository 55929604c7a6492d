"""The house plan: an import may only point to a lower floor, and rooms of one floor do not import each other."""

import ast
from pathlib import Path

# From the ground up. The first three are the plan's ground floor, in the order in which they stand on each other.
PLAN = (
    {"errors"},
    {"registry", "randomness", "settings", "pixels"},
    {"sources"},
    {"losses", "models", "data"},
    {"training", "preflight"},
    {"pipeline", "report", "shipping"},
    # The search runs experiments, and reports on them.
    {"sweep"},
    {"cli"},
)
FLOORS = {room: floor for floor, rooms in enumerate(PLAN) for room in rooms}


def _imported_rooms(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("kd.")}


def test_imports_point_to_lower_floors(repository: Path) -> None:
    files = [
        file for file in (repository / "kd").rglob("*.py") if file.parent != repository / "kd" or file.stem in FLOORS
    ]
    assert len(files) > 20
    for file in files:
        room = file.relative_to(repository / "kd").parts[0].removesuffix(".py")
        for other in _imported_rooms(file) - {room}:
            assert FLOORS[other] < FLOORS[room], f"{file} imports kd.{other}"


def test_every_room_has_its_floor(repository: Path) -> None:
    rooms = {
        path.stem for path in (repository / "kd").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__", "__main__"} == set(FLOORS)
