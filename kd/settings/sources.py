"""Where the settings' values come from, and which source wins; the one place that decides it.

Defaults in code < ``commandline_args.txt`` < ``--config`` YAML < command line. Every source is turned into flags and
read by the same parser on top of the ones before it, so that all share spelling, types and errors, and an error names
its source.
"""

import contextlib
import io
import json
import re
import reprlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import tyro
import yaml

from kd.errors import UserError
from kd.registry import suggestion
from kd.settings.schema import Settings, check_ranges, setting_fields

DESCRIPTION = (
    "Train a teacher, train a student on the labels alone, distill the teacher into the student, and compare. "
    "--distill, --no-distill, --distill true and --distill false all mean what they say, and so for every switch. "
    "Flags are also read from commandline_args.txt and from --config files; the command line wins."
)

COMMAND_LINE = "on the command line"
AUTO = "auto"
CONFIG_FILE = "config.yaml"

_FIELDS = {one.name: one for _, one in setting_fields()}
_SWITCHES = frozenset(name for name, one in _FIELDS.items() if one.type is bool)
_SOURCES = frozenset(one.name for section, one in setting_fields() if section == "sources")
_TRUTH = {"true": "True", "false": "False"}
# A flag that may stand by itself, and what it and its contrary then mean.
_ALONE = {"resume": {"true": AUTO, "false": "None"}}

# A few lines of YAML can unfold to more than fits into memory.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 3
_CONTAINERS = (list, dict, set, tuple)

# What the parser says of a value, and what a person is told.
_PLAIN_WORDS = (
    (r"Error parsing (--\w+): invalid literal for int\(\) .*?: ('.*?')", r"\1 is a whole number, not \2"),
    (r"Error parsing (--\w+): could not convert string to float: ('.*?')", r"\1 is a number, not \2"),
    (
        r"Error parsing (--\w+): no type matching (?:\{None\}\|)?(\S+) could be .*? \[('.*?')\]\. Got.*?(?=Arg)",
        r"\1 is \2, not \3 ",
    ),
    (r"(--\w+) is INT\|\{auto\}, not", r"\1 is a whole number or auto, not"),
)

# What the first generation of this tool did without a flag for it; its JSON file goes on meaning what it meant.
_FIRST_GENERATION = (
    *("--optimizer", "sgd", "--schedule", "constant", "--weight_decay", "0", "--augment", "rotate"),
    *("--loss", "mse=1", "--teacher_pretrained"),
)


@dataclass(frozen=True)
class _Flags:
    """Some flags of one source (a line, a key): the words, and where they stand, for the messages."""

    words: tuple[str, ...]
    origin: str
    remark: str | None = None


class Resolved(NamedTuple):
    """What all sources together say.

    Args:
        settings: The settings.
        remarks: What a person should know (how an old file was understood).
        origins: Where each setting was given, for the messages; those that nobody gave are not in it.
    """

    settings: Settings
    remarks: list[str]
    origins: dict[str, str]


def resolve(
    arguments: Sequence[str], *, prog: str = "experiment.py", values: Mapping[str, Mapping[str, Any]] | None = None
) -> Resolved:
    """Read all sources and let the later ones win.

    Args:
        arguments: The command line, without the program's name.
        prog: The program's name, for ``--help``.
        values: Further settings by their name, under where they come from, as if each were a ``--config`` file after
            those on the command line.

    Raises:
        UserError: If a source is missing or says something that is not understood.
        SystemExit: After ``--help``.
    """
    if set(arguments) & {"-h", "--help"}:
        _parse(["--help"], Settings(), prog=prog)
    command_line = _Flags(tuple(arguments), COMMAND_LINE)
    first = _apply([command_line], Settings(), prog=prog)
    named = first.sources
    given = _normalize(command_line)[1]
    text_file = _args_file(named.args_file, is_asked_for="args_file" in given)
    settings = Settings()
    remarks: list[str] = []
    origins: dict[str, str] = {}
    resumed = _resumed(first.phases.resume)
    configs = [*map(_yaml_file, map(Path, named.config))]
    configs += [_as_flags(some, origin=origin) for origin, some in (values or {}).items()]
    for source in (text_file, *resumed, *configs, [command_line]):
        entries = list(source)
        settings = _apply(entries, settings, prog=prog)
        remarks += [entry.remark for entry in entries if entry.remark]
        origins |= {name: entry.origin for entry in entries for name in _normalize(entry)[1]}
    return Resolved(settings, remarks, origins)


def with_origin(message: str, origins: Mapping[str, str]) -> str:
    """Add to a message where the first flag that it names was given, unless that was on the command line."""
    for name in re.findall(r"--(\w+)", message):
        origin = origins.get(name, COMMAND_LINE)
        if origin != COMMAND_LINE:
            return f"{message}\n  (--{name} was given in {origin})"
    return message


def write_config(settings: Settings, path: Path) -> None:
    """Write the resolved settings as a YAML file that is a legal ``--config`` again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(yaml.safe_dump(settings.flat(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    beside.replace(path)


def _apply(entries: Sequence[_Flags], settings: Settings, *, prog: str) -> Settings:
    """Read one source on top of the settings so far: all of it at once, or bit by bit to find what is wrong in it."""
    normalized = [_normalize(entry) for entry in entries]
    for entry, (_, names) in zip(entries, normalized, strict=True):
        if entry.origin != COMMAND_LINE and names & _SOURCES:
            raise UserError(f"{entry.origin}: --{min(names & _SOURCES)} can only stand on the command line")
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            parsed = _parse(list(chain.from_iterable(words for words, _ in normalized)), settings, prog=prog)
    except SystemExit:
        if len(entries) > 1:
            for entry in entries:
                _apply([entry], settings, prog=prog)
        raise UserError(f"{entries[0].origin}: {_plain(output.getvalue())}") from None
    for entry, (_, names) in zip(entries, normalized, strict=True):
        check_ranges(parsed, names, origin=entry.origin)
    return parsed


def _parse(words: Sequence[str], settings: Settings, *, prog: str) -> Settings:
    return tyro.cli(
        Settings,
        args=list(words),
        default=settings,
        prog=prog,
        description=DESCRIPTION,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )


def _normalize(source: _Flags) -> tuple[list[str], frozenset[str]]:
    """Spell flags in the parser's one way (``--name value``, switches with True or False), and refuse unknown names."""
    words: list[str] = []
    names: set[str] = set()
    rest = list(source.words)
    while rest:
        word = rest.pop(0)
        if not re.match(r"--?[A-Za-z]", word):
            words.append(word)
            continue
        given, equals, value = word.partition("=")
        name, negated = _setting_of(given, origin=source.origin)
        if name in names:
            raise UserError(f"{source.origin}: --{name} is given twice")
        names.add(name)
        if equals:
            rest.insert(0, value)
        words.append(f"--{name}")
        has_truth = bool(rest) and rest[0].lower() in _TRUTH
        if negated and (equals or has_truth):
            raise UserError(f"{source.origin}: {given} takes no value; say --{name} true or --{name} false")
        if name in _ALONE:
            stands_alone = not rest or bool(re.match(r"--?[A-Za-z]", rest[0]))
            value = "false" if negated else "true" if stands_alone else rest.pop(0)
            words.append(_ALONE[name].get(value.lower(), value))
        elif name in _SWITCHES:
            if equals and not has_truth:
                raise UserError(f"{source.origin}: --{name} is true or false, not {value!r}")
            words.append("False" if negated else _TRUTH[rest.pop(0).lower()] if has_truth else "True")
        elif equals:
            words.append(rest.pop(0))
    return words, frozenset(names)


def _setting_of(flag: str, *, origin: str) -> tuple[str, bool]:
    """Return the setting that a flag is about, and whether it is switched off by ``--no-``."""
    name = flag.removeprefix("--")
    if name in _FIELDS:
        return name, False
    if name.removeprefix("no-") in _SWITCHES | _ALONE.keys():
        return name.removeprefix("no-"), True
    spelled = "--" + flag.lstrip("-").replace("-", "_")
    hint = suggestion(spelled, [f"--{known}" for known in _FIELDS])
    raise UserError(f"{origin}: there is no flag {flag}{hint} (--help lists them all)")


def _plain(output: str) -> str:
    """Return the parser's message without its box (drawn in ASCII where need be) and its pointer to --help."""
    # The first line is the box's title.
    lines = re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines()[1:]
    rules = r"[╭╰].*|[│\s]*[─-]*[│\s]*"
    kept = [line.strip("│ ") for line in lines if not re.fullmatch(rules, line)]
    text = re.sub(r"\s*For full helptext,.*$", "", " ".join(kept))
    text = re.sub(
        r"Error parsing (--\w+): invalid literal for int\(\) .*?: ('.*?')", r"\1 is a whole number, not \2", text
    )
    for parsers_words, plain_words in _PLAIN_WORDS:
        text = re.sub(parsers_words, plain_words, text)
    return re.sub(r"\s*Argument helptext:\s*", "\n  ", text).strip()


def _args_file(path: str, *, is_asked_for: bool) -> Iterator[_Flags]:
    """Read the text file of flags; only the default one may be missing."""
    file = Path(path).expanduser()
    if not file.is_file():
        if is_asked_for:
            raise UserError(f"{COMMAND_LINE}: --args_file {path}: there is no such file")
        return
    text = _read_text(file)
    if text.lstrip().startswith("{"):
        yield from _first_generation(file, text)
        return
    seen: dict[str, int] = {}
    for number, words in _logical_lines(file, text):
        flags = _Flags(words, f"{file}, line {number}")
        for name in _normalize(flags)[1]:
            if name in seen:
                raise UserError(f"{flags.origin}: --{name} stands in line {seen[name]} already")
            seen[name] = number
        yield flags


def _resumed(path: str | None) -> Iterator[Iterable[_Flags]]:
    """Read the settings of the experiment whose folder, or anything in it, is to be resumed."""
    if path in (None, AUTO):
        return
    start = Path(str(path)).expanduser().absolute()
    if not start.exists():
        raise UserError(f"{COMMAND_LINE}: --resume {path}: there is no such folder")
    for folder in (start, *start.parents):
        # Each training of an experiment has such a file, too.
        if (folder / CONFIG_FILE).is_file() and not folder.name.startswith("version_"):
            yield _yaml_file(folder / CONFIG_FILE)
            place = ("--default_root_dir", str(folder.parent), "--name", folder.name)
            yield [_Flags(place, f"{COMMAND_LINE}, --resume {path}")]
            return
    raise UserError(f"{COMMAND_LINE}: --resume {path}: this is no experiment: there is no {CONFIG_FILE} there")


def _logical_lines(file: Path, text: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Split a file of flags into lines; one that does not begin with a flag goes on where the one above it ended."""
    pending: list[str] = []
    start = 1
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
        if pending and words and words[0].startswith("-"):
            yield start, tuple(pending)
            pending = []
        if words and not pending:
            start = number
        pending += words
    if pending:
        yield start, tuple(pending)


def _first_generation(file: Path, text: str) -> Iterator[_Flags]:
    """Read the JSON object that the first generation of this tool wrote, and the recipe that it had no keys for."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: it begins like a JSON object, and is none: {error}") from None
    remark = f"{file} has the first generation's form; its recipe comes with it: {' '.join(_FIRST_GENERATION)}"
    yield _Flags(_FIRST_GENERATION, str(file), remark)
    if "gpus" in values:
        gpus = values.pop("gpus")
        try:
            # A list says which; the comma at its end tells [1] from 1, which says how many.
            devices = (
                ",".join([*(str(int(one)) for one in gpus), ""]) if isinstance(gpus, list) else str(int(gpus or 0))
            )
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"{file}, key 'gpus': this is a number, or a list of such, not {_SHORT.repr(gpus)}"
            ) from None
        on_cpu = not gpus
        yield _Flags(("--accelerator", "cpu") if on_cpu else ("--devices", devices), f"{file}, key 'gpus'")
    yield from _as_flags(values, origin=str(file))


def read_yaml(file: Path) -> dict[Any, Any]:
    """Read a file of ``name: value`` lines, as it stands there.

    Raises:
        UserError: If there is none, or it holds something else.
    """
    try:
        values = yaml.safe_load(_read_text(file.expanduser()))
    except Exception as error:  # noqa: BLE001 (of a date or a number that is none it raises anything)
        raise UserError(f"{file}: this is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{file}: a file of settings holds 'name: value' lines, and this is a {type(values).__name__}")
    return values or {}


def _yaml_file(file: Path) -> Iterator[_Flags]:
    yield from _as_flags(read_yaml(file), origin=str(file))


def _as_flags(values: Mapping[Any, object], *, origin: str) -> Iterator[_Flags]:
    """Turn a mapping into flags, so that the one parser reads it."""
    for key, value in values.items():
        where = f"{origin}, key {_SHORT.repr(key)}"
        if not isinstance(key, str) or key not in _FIELDS:
            raise UserError(
                f"{where}: there is no such setting{suggestion(key, _FIELDS) if isinstance(key, str) else ''}"
            )
        if isinstance(value, _CONTAINERS) and not (_holds_several(key) and isinstance(value, list | dict)):
            raise UserError(f"{where}: one value stands here, not {_SHORT.repr(value)}")
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            if isinstance(item, _CONTAINERS):
                raise UserError(f"{where}: a list of single values stands here, and in it is {_SHORT.repr(item)}")
        words = [f"{name}={weight}" for name, weight in value.items()] if isinstance(value, dict) else None
        if words is None:
            items = value if isinstance(value, list) else [value]
            # None of several is no value at all.
            words = [_word(item) for item in items if not (item is None and _holds_several(key))]
        if key in _SWITCHES and words[0] not in _TRUTH.values():
            raise UserError(f"{where}: this is true or false, not {_SHORT.repr(value)}")
        yield _Flags((f"--{key}", *words), where)


def _holds_several(key: str) -> bool:
    return str(_FIELDS[key].type).startswith("tuple")


def _word(value: object) -> str:
    return {"true": "True", "false": "False"}.get(str(value).lower(), str(value))


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: this file can't be read: {error}") from None
