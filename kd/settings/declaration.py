"""How a setting is declared: its type says which values are legal, :func:`setting` takes the facts about it."""

import contextlib
import dataclasses
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

Phase = Literal["teacher", "baseline", "distilled"]
"""A phase that trains a network. Assistants count as ``distilled``."""

NOTHING: frozenset[Phase] = frozenset()
TEACHER: frozenset[Phase] = frozenset({"teacher"})
BASELINE: frozenset[Phase] = frozenset({"baseline"})
DISTILLED: frozenset[Phase] = frozenset({"distilled"})
STUDENT: frozenset[Phase] = frozenset({"baseline", "distilled"})
ALL: frozenset[Phase] = TEACHER | STUDENT

INT64_MAX = 2**63 - 1


def _read_number(value: object) -> object:
    """Convert text to a number; YAML reads 1e-3 as text."""
    if isinstance(value, str):
        for convert in (int, float):
            with contextlib.suppress(ValueError):
                return convert(value)
    return value


def _read_switch(value: object) -> object:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _read_text(value: object) -> object:
    """Convert a number, a date or a truth value of a YAML file to text."""
    if isinstance(value, bool):
        return str(value).lower()
    # A number in a YAML file remembers how it was written.
    return str(getattr(value, "text", value)) if isinstance(value, int | float | date) else value


NUMBER = BeforeValidator(_read_number)
TEXT = BeforeValidator(_read_text)

Text = Annotated[str, Field(strict=True), TEXT]
Switch = Annotated[bool, Field(strict=True), BeforeValidator(_read_switch)]
Natural = Annotated[int, Field(strict=True, ge=0, le=INT64_MAX), NUMBER]
Count = Annotated[int, Field(strict=True, ge=1, le=INT64_MAX), NUMBER]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), NUMBER]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), NUMBER]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False), NUMBER]
Fraction = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False), NUMBER]
Part = Annotated[float, Field(strict=True, gt=0, lt=1, allow_inf_nan=False), NUMBER]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False), NUMBER]
Batches = Annotated[int, Field(strict=True, gt=0, le=INT64_MAX), NUMBER] | Positive


def setting(
    default: Any,  # noqa: ANN401
    help_text: str,
    affects: frozenset[Phase],
    *,
    searchable: bool = False,
    per_machine: bool = False,
    not_for_streams: str | None = None,
    streams_allow: tuple[str, ...] = (),
    bare: str | None = None,
    formerly: str | None = None,
    known_as: tuple[str, ...] = (),
    is_path: bool = False,
) -> Any:  # noqa: ANN401 (a field has the type of its annotation)
    """Declare a setting with everything that the program needs to know about it.

    Args:
        default: The value if no source gives one.
        help_text: One line for ``--help`` and the documentation.
        affects: The phases whose results depend on it; runs are compared and resumed only if these settings are equal.
        searchable: Whether a sweep may search it.
        per_machine: Whether it may differ between the workers of one sweep.
        not_for_streams: Why a data set streamed from shards can't have it; ``None``: it can.
        streams_allow: Values besides the default that such a data set can have nevertheless.
        bare: The value of the flag without a value; ``None``: a value is required (switches are then ``true``).
        formerly: The name that it had in earlier versions, whose files are still read.
        known_as: What other tools call it, for the message on an unknown flag.
        is_path: Whether it may be the path of a file or folder, which is then recorded as an absolute one.
    """
    facts = {
        "help": help_text,
        "affects": affects,
        "searchable": searchable,
        "per_machine": per_machine,
        "not_for_streams": not_for_streams,
        "streams_allow": streams_allow,
        "bare": bare,
        "formerly": formerly,
        "known_as": known_as,
        "is_path": is_path,
    }
    return dataclasses.field(default=default, metadata=facts)
