"""The settings as text for people: ``--help`` and the table of the documentation."""

import argparse
import dataclasses
import types
import typing
from typing import Any

from kd.settings.schema import Settings, field_type, setting_fields

_DESCRIPTION = """Train a teacher, train a student on the labels alone, distill the teacher into a student, and compare.
Flags are also read from commandline_args.txt and from --config files; the command line wins.
Each switch can be written --distill, --no-distill, --distill true or --distill false."""


def print_help(prog: str) -> None:
    """Print all flags by section, with their defaults."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--flag VALUE ...]",
        description=_DESCRIPTION,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26),
    )
    defaults = Settings()
    groups = {
        section.name: parser.add_argument_group(
            section.name.capitalize(), str(getattr(defaults, section.name).__doc__).replace("``", "'")
        )
        for section in dataclasses.fields(Settings)
    }
    for section, declared in setting_fields():
        default = "" if declared.default is False else _shown_default(declared)
        words = declared.metadata["help"] + (f" (default: {default})" if default else "")
        words = words.replace("%", "%%")
        if field_type(declared.name) is bool:
            groups[section].add_argument(f"--{declared.name}", action="store_true", help=words)
        else:
            # Only for its brackets and dots: the flags are parsed by kd.settings.sources.
            nargs = "?" if declared.metadata["bare"] else "+" if isinstance(declared.default, tuple) else None
            groups[section].add_argument(f"--{declared.name}", metavar=_metavar(declared), nargs=nargs, help=words)
    parser.print_help()


def markdown_table() -> str:
    """Return all settings as a Markdown table."""
    lines = ["| flag | default | description |", "|---|---|---|"]
    section_before = None
    for section, declared in setting_fields():
        if section != section_before:
            lines.append(f"| **{section}** | | |")
            section_before = section
        default = _shown_default(declared)
        description = declared.metadata["help"].replace("|", "\\|")
        lines.append(f"| `--{declared.name}` | {f'`{default}`' if default else ''} | {description} |")
    return "\n".join(lines)


def _shown_default(declared: "dataclasses.Field[Any]") -> str:
    default = declared.default
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return "" if default is None else str(default)


def _metavar(declared: "dataclasses.Field[Any]") -> str:
    """Return the kinds of a setting's values, such as ``INT|auto``."""
    kinds: list[str] = []
    pending = [field_type(declared.name)]
    while pending:
        kind = pending.pop(0)
        if typing.get_origin(kind) is typing.Literal:
            kinds += typing.get_args(kind)
        elif typing.get_args(kind):
            pending += typing.get_args(kind)
        elif kind not in (types.NoneType, Ellipsis):
            kinds.append("TEXT" if kind is str else kind.__name__.upper())
    return "|".join(kinds)
