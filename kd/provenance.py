"""Provenance: everything that a run's result depends on, recorded as plain values, and how two runs differ in it.

A provenance is a mapping of sections: ``settings`` (those that affect the run's phase), ``data`` (counts and content
hashes of the images), ``teacher`` (hashes of weights), ``code`` (hashes of the user's Python files) and ``environment``
(versions and hardware). Results are resumed, reused and compared only if all sections but the environment are equal.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any, NamedTuple

from kd.settings import Settings

Provenance = dict[str, dict[str, Any]]

DECISIVE = ("settings", "data", "teacher", "code")
"""The sections in which two runs must agree to be comparable."""

ENVIRONMENT = "environment"
UNKNOWN = "not recorded"
SECTIONS = ("data", "teacher", "code", ENVIRONMENT, "settings")

_PACKAGES = ("torch", "torchvision", "pytorch-lightning")
_OWN_FILE = re.compile(r"([^\s'\"*]+\.py):\w")
_FOLDER = re.compile(r"(?:transformers/|timm/local-dir:)([^\s'\"(,]+)")
_DIGITS = 16


class Difference(NamedTuple):
    """An entry in which an earlier provenance differs from another one."""

    section: str
    name: str
    earlier: Any
    now: Any

    def __str__(self) -> str:
        """Return it in words, such as ``--learning_rate 0.001 (now 0.01)``."""
        flag = "--" if self.section == "settings" and self.name in _defaults() else ""
        return f"{flag}{self.name}{' ' if flag else ': '}{as_text(self.earlier)} (now {as_text(self.now)})"


def differences(
    earlier: Mapping[str, Any], now: Mapping[str, Any], sections: Iterable[str] = DECISIVE
) -> list[Difference]:
    """Return how an earlier provenance differs from another one.

    Sections that ``now`` lacks are not compared. A setting that an earlier version didn't have had its default.
    """
    found = []
    for section in sections:
        if section not in now:
            continue
        before, after = earlier.get(section) or {}, now[section]
        defaults = _defaults() if section == "settings" else {}
        # Settings that were removed since have no effect; an image folder or a file of code that is missing has.
        names = after if section == "settings" else sorted(before.keys() | after.keys())
        for name in names:
            old, new = (values.get(name, defaults.get(name, UNKNOWN)) for values in (before, after))
            # As text: 1 (one batch) and 1.0 (all of them) differ.
            if json.dumps(old) != json.dumps(new):
                found.append(Difference(section, name, old, new))
    return found


def as_text(value: object) -> str:
    """Return a recorded value in words."""
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def environment(hardware: str) -> dict[str, str]:
    """Return the versions of Python, kd and the libraries that compute results, and the hardware."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    # Imported here, as the package imports this module.
    from kd import __version__

    return {"kd": __version__, "python": platform.python_version(), **versions, "hardware": hardware}


def code_digests(texts: Iterable[str]) -> dict[str, str]:
    """Return the hashes of the files that define the user's networks and losses.

    These are Python files such as ``my_losses.py``, what they import from beside them, and the configurations of
    networks in folders. Files are named by their paths within the folder that holds all of them, so that a moved folder
    is the same.

    Args:
        texts: Values of settings, in which files occur as ``path/to/file.py:function``, and folders as
            ``transformers/FOLDER`` and ``timm/local-dir:FOLDER``.
    """
    texts = list(texts)
    files = {Path(path).expanduser().absolute() for text in texts for path in _OWN_FILE.findall(text)}
    folders = {Path(path).expanduser().absolute() for text in texts for path in _FOLDER.findall(text)}
    found = {folder / "config.json" for folder in folders if (folder / "config.json").is_file()}
    for file in files:
        finder = ModuleFinder(path=[str(file.parent)], excludes=["kd"])
        finder.run_script(str(file))
        modules: Iterable[Any] = finder.modules.values()
        found |= {Path(module.__file__) for module in modules if module.__file__}
    root = os.path.commonpath([path.parent for path in found]) if found else ""
    return {
        path.relative_to(root).as_posix(): hashlib.blake2b(path.read_bytes(), digest_size=_DIGITS // 2).hexdigest()
        for path in sorted(found)
    }


def without_folders(architecture: str) -> str:
    """Return a network as it is written, with the names of its files and folders alone, wherever they lie."""
    for pattern in (_OWN_FILE, _FOLDER):
        architecture = pattern.sub(lambda found: found[0].replace(found[1], Path(found[1]).name), architecture)
    return architecture


def _defaults() -> dict[str, Any]:
    return Settings().flat()
