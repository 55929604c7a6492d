"""Reading YAML files of settings: words stay words, and a key given twice is an error."""

import re
from pathlib import Path
from typing import Any

import yaml

from kd.errors import UserError


class _Int(int):
    """A whole number that remembers how it was written: the name ``0123``."""

    text: str


class _Float(float):
    """A number that remembers how it was written: the name ``3.10``."""

    text: str


class _Loader(yaml.SafeLoader):
    """Reads plain words as YAML 1.2 does: ``off``, ``no`` and ``yes`` are text, as ``true`` and ``false`` are not."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in the base class)
        first: [
            (tag, re.compile("^(?:true|True|TRUE|false|False|FALSE)$") if tag.endswith(":bool") else pattern)
            for tag, pattern in resolvers
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        """Return a mapping; a key given twice is an error."""
        # Merged mappings (<<) may be overridden.
        keys = [(key.value, key.start_mark.line + 1) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        lines: dict[Any, int] = {}
        for key, line in keys:
            if isinstance(key, str) and key in lines:
                raise UserError(f"key {key!r}: given twice, in lines {lines[key]} and {line}; keep one of them")
            if isinstance(key, str):
                lines[key] = line
        return super().construct_mapping(node, deep=deep)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    # Not octal.
    value = _Int(text, 10) if re.fullmatch(r"[+-]?\d+", text) else _Int(loader.construct_yaml_int(node))
    value.text = text
    return value


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    value = _Float(loader.construct_yaml_float(node))
    value.text = str(node.value)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def read_yaml(file: Path) -> dict[Any, Any]:
    """Read a YAML file of ``name: value`` lines, without checking names or values.

    Raises:
        UserError: If the file is missing, gives a key twice, or holds something else.
    """
    try:
        # A safe loader.
        values = yaml.load(read_text(file.expanduser()), _Loader)  # noqa: S506
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(file.expanduser())) else f"{file}: {text}") from None
    except Exception as error:  # noqa: BLE001 (malformed dates and numbers raise anything)
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{file}: must hold 'name: value' lines, not a {type(values).__name__}")
    return values or {}


def read_text(file: Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Raises:
        UserError: If it can't be read.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read: {error}") from None
