"""Architectural layers: packages import only packages of lower layers."""

import ast
from pathlib import Path

# From the bottom up; packages of the same layer don't import each other.
LAYERS = (
    {"errors", "files"},
    {"registry", "randomness", "console", "pixels", "exported", "metrics", "tables"},
    {"settings"},
    {"losses", "models", "data", "provenance"},
    {"teachers"},
    {"training", "preflight", "report"},
    {"pipeline", "deploy"},
    {"sweep"},
    {"api"},
    {"cli"},
)
LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}


def _imported_packages(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("kd.")}


def test_imports_point_to_lower_layers(repository: Path) -> None:
    files = [
        file for file in (repository / "kd").rglob("*.py") if file.parent != repository / "kd" or file.stem in LAYER_OF
    ]
    assert len(files) > 20
    for file in files:
        package = file.relative_to(repository / "kd").parts[0].removesuffix(".py")
        for imported in _imported_packages(file) - {package, "__version__"}:
            assert LAYER_OF[imported] < LAYER_OF[package], f"{file} imports kd.{imported}"


def test_every_package_has_a_layer(repository: Path) -> None:
    packages = {
        path.stem for path in (repository / "kd").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert packages - {"__init__", "__main__"} == set(LAYER_OF)
