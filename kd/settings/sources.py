"""The sources of the settings' values: the command line, files of flags, YAML files. :func:`resolve` merges them.

Each source is read into a mapping from names to raw values with their origins; the merged mapping is validated once.
"""

import difflib
import json
import re
import reprlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError

from kd.errors import UserError
from kd.files import write_text
from kd.settings.help import print_help
from kd.settings.schema import PUBLISHED, Settings, field_type, setting_fields
from kd.settings.yaml_files import read_text, read_yaml

COMMAND_LINE = "on the command line"
CONFIG_FILE = "config.yaml"

_SECTION_OF = {declared.name: section for section, declared in setting_fields()}
_BARE = {declared.name: declared.metadata["bare"] for _, declared in setting_fields()}
_SWITCHES = frozenset(name for name in _SECTION_OF if field_type(name) is bool)
_SEVERAL = frozenset(declared.name for _, declared in setting_fields() if isinstance(declared.default, tuple))
_RENAMED = {
    declared.metadata["formerly"]: declared.name for _, declared in setting_fields() if declared.metadata["formerly"]
}
_KNOWN_AS = {other: declared.name for _, declared in setting_fields() for other in declared.metadata["known_as"]}
_PATHS = tuple(declared.name for _, declared in setting_fields() if declared.metadata["is_path"])
_ALIKE = 0.75
"""Similarity of two names, from 0 to 1, from which one may be a misspelling of the other."""
_SOURCES = frozenset(name for name, section in _SECTION_OF.items() if section == "sources")

# A few lines of YAML can unfold to more than fits into memory.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 3
_CONTAINERS = (list, dict, set, tuple)

# What the first generation of this program did without a flag for it.
_FIRST_GENERATION = {
    "optimizer": "sgd",
    "schedule": "constant",
    "weight_decay": 0,
    "augment": "rotate",
    "loss": ["mse=1"],
    "teacher_pretrained": PUBLISHED,
}

# pydantic's types of errors, in words that follow "must be".
_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text",
    "literal_error": "{expected}",
    "finite_number": "finite",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
}
_KINDS = ("_type", "_unicode", "literal_error")

_ADAPTER = TypeAdapter(Settings)


class Given(NamedTuple):
    """A raw value and where it was given, such as ``config.yaml, key 'loss'``."""

    value: Any
    origin: str


Values = dict[str, Given]


class Resolved(NamedTuple):
    """The result of merging all sources.

    Args:
        settings: The settings.
        remarks: Notes for the user, such as how an old file was interpreted.
        origins: Where each setting was given, for messages; defaults are left out.
    """

    settings: Settings
    remarks: list[str]
    origins: dict[str, str]


def resolve(
    arguments: Sequence[str],
    *,
    prog: str = "experiment.py",
    values: Mapping[str, Mapping[str, Any]] | None = None,
    reads_flags_file: bool = True,
) -> Resolved:
    """Read and merge all sources: defaults < file of flags < resumed experiment < YAML files < command line.

    Args:
        arguments: The command line, without the program's name.
        prog: The program's name, for ``--help``.
        values: Further settings by name, under their origin, as if each were a ``--config`` file after those on the
            command line.
        reads_flags_file: Whether to read the file of flags.

    Raises:
        UserError: If a source is missing or can't be read, or a name or value in it is not legal.
        SystemExit: After ``--help``.
    """
    if set(arguments) & {"-h", "--help"}:
        print_help(prog)
        raise SystemExit(0)
    remarks = list[str]()
    command_line = _read_flags(arguments, origin=COMMAND_LINE, remarks=remarks)
    named = _validate({name: given for name, given in command_line.items() if name in (*_SOURCES, "resume")})
    flags_file = Values()
    if reads_flags_file:
        flags_file, notes = _read_flags_file(named.sources.args_file, is_required="args_file" in command_line)
        remarks += notes
    configs = [_read_mapping(read_yaml(Path(file)), origin=file) for file in named.sources.config]
    configs += [_read_mapping(mapping, origin=origin) for origin, mapping in (values or {}).items()]
    merged: Values = {}
    for source in (flags_file, _read_resumed(named.phases.resume), *configs):
        for name in sorted(source.keys() & _SOURCES):
            raise _error(f"--{name}: can only be given on the command line", source[name].origin)
        merged |= source
    merged |= command_line
    return Resolved(_validate(merged), remarks, {name: given.origin for name, given in merged.items()})


def with_origin(message: str, origins: Mapping[str, str]) -> str:
    """Add where the first flag named in a message was given, unless on the command line."""
    for name in re.findall(r"--(\w+)", message):
        origin = origins.get(name, COMMAND_LINE)
        if origin != COMMAND_LINE:
            return f"{message}\n  (--{name} was given in {origin})"
    return message


def write_config(settings: Settings, path: Path) -> None:
    """Write the resolved settings as a YAML file that ``--config`` reads again, from any working directory."""
    values = settings.flat()
    for name in _PATHS:
        given = values[name]
        values[name] = list(map(_absolute, given)) if isinstance(given, list) else _absolute(given)
    # Without a folder of the data set, tables are relative to the working directory.
    if values["data_dir"] is None:
        values |= {name: _absolute(values[name]) for name in ("train_data", "val_data", "test_data")}
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _absolute(value: Any) -> Any:  # noqa: ANN401 (a setting)
    """Return the absolute path of a file or folder that is there; any other value as it is."""
    if not isinstance(value, str) or not Path(value).expanduser().exists():
        return value
    return str(Path(value).expanduser().absolute())


def _error(message: str, origin: str) -> UserError:
    return UserError(message if origin == COMMAND_LINE else f"{message}\n  (in {origin})")


def _validate(values: Values) -> Settings:
    """Convert and check raw values; defaults fill the rest."""
    nested: dict[str, dict[str, Any]] = {}
    for name, given in values.items():
        nested.setdefault(_SECTION_OF[name], {})[name] = given.value
    try:
        return _ADAPTER.validate_python(nested)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
    name = str(errors[0]["loc"][1])
    errors = [error for error in errors if error["loc"][1] == name and error["input"] is errors[0]["input"]]
    # A union reports an error for each member; a number out of range fails the others by its type.
    errors = [error for error in errors if not error["type"].endswith(_KINDS)] or errors
    words = dict.fromkeys(_in_words(error["type"], error.get("ctx", {})) for error in errors)
    if "a number" in words:
        words.pop("a whole number", None)
    value = errors[0]["input"]
    shown = value if isinstance(value, str) and len(value) < _SHORT.maxstring else _SHORT.repr(value)
    message = f"--{name} {shown}: must be {' or '.join(words)}"
    raise UserError(with_origin(message, {name: values[name].origin}))


def _in_words(error_type: str, context: Mapping[str, Any]) -> str:
    """Return what a value must be, from the type of pydantic's error and its context, such as the bound."""
    bounds = {key: f"{bound:g}" if isinstance(bound, float) else bound for key, bound in context.items()}
    return _WORDS[error_type].format(**bounds).replace("'", "")


def _plain(name: str, value: object) -> object:
    """Return a raw value with None and a switched flag's true and false resolved."""
    word = str(value).lower() if isinstance(value, str | bool) else None
    if _BARE[name] is not None and word in ("true", "false"):
        return _BARE[name] if word == "true" else None
    return None if word == "none" and type(None) in getattr(field_type(name), "__args__", ()) else value


def _read_flags(words: Sequence[str], *, origin: str, remarks: list[str] | None = None) -> Values:
    """Read flags: ``--name value``, ``--name=value``, ``--name a b c``, ``--switch``, ``--no-switch``.

    A flag given twice is an error, or if there is a list of ``remarks``, the last one wins and is added to it.
    """
    values: Values = {}
    rest = list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not _is_flag(flag):
            raise _error(f"{flag}{equals}{value}: expected a flag such as --distill here", origin)
        name, negated = _setting_of(flag, origin=origin)
        if name in values and remarks is None:
            raise _error(f"--{name}: given twice; keep one of them", origin)
        if name in values and remarks is not None:
            remarks.append(f"note: --{name} is given twice: the last one counts")
        given = [value] if equals else []
        while rest and not _is_flag(rest[0]):
            given.append(rest.pop(0))
        if negated and given:
            raise _error(f"{flag}: takes no value; write --{name} true or --{name} false", origin)
        can_stand_alone = name in _SWITCHES or _BARE[name] is not None
        if can_stand_alone and not given:
            given = ["false" if negated else "true"]
        if name not in _SEVERAL and len(given) != 1:
            problem = "needs a value" if not given else f"takes one value, not {len(given)}"
            raise _error(f"{' '.join([flag, *given])}: {problem}", origin)
        values[name] = Given(given if name in _SEVERAL else _plain(name, given[0]), origin)
    return values


def _is_flag(word: str) -> bool:
    return bool(re.match(r"--?[A-Za-z]", word))


def _setting_of(flag: str, *, origin: str) -> tuple[str, bool]:
    """Return the name of a flag's setting, and whether the flag is ``--no-name``."""
    name = _RENAMED.get(flag.removeprefix("--"), flag.removeprefix("--"))
    if name in _SECTION_OF:
        return name, False
    positive = name.removeprefix("no-")
    if positive in _SWITCHES or _BARE.get(positive) is not None:
        return positive, True
    hint = _hint(flag.lstrip("-").replace("-", "_"), "--")
    raise _error(f"{flag}: unknown flag{hint or '; --help lists all flags'}", origin)


def _hint(name: str, prefix: str = "") -> str:
    """Return a suggestion for an unknown name: by what other tools call a setting, or else by its spelling."""
    if name in _KNOWN_AS:
        return f"; here it is {prefix}{_KNOWN_AS[name]}"
    known = [f"{prefix}{each}" for each in difflib.get_close_matches(name, _SECTION_OF, n=1, cutoff=_ALIKE)]
    return f"; did you mean {known[0]!r}?" if known else ""


def _read_flags_file(path: str, *, is_required: bool) -> tuple[Values, list[str]]:
    """Read a text file of flags, or the JSON object of the first generation; return its values and remarks."""
    file = Path(path).expanduser()
    if not file.is_file():
        if is_required:
            raise UserError(f"--args_file {path}: no such file")
        return {}, []
    text = read_text(file)
    if text.lstrip().startswith("{"):
        remark = (
            f"{file}: read as a file of the first generation; its recipe is added: "
            f"{', '.join(f'{name}={value}' for name, value in _FIRST_GENERATION.items())}"
        )
        return _read_first_generation(file, text), [remark]
    values: Values = {}
    for number, words in _logical_lines(file, text):
        line = _read_flags(words, origin=f"{file}, line {number}")
        for name in sorted(line.keys() & values.keys()):
            raise _error(f"--{name}: given twice, also in {values[name].origin}; keep one of them", line[name].origin)
        values |= line
    return values, []


def _logical_lines(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield lines of words with their numbers; a line that doesn't begin with a flag continues the one above it."""
    pending: list[str] = []
    start = 1
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            words = _split(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
        if pending and words and words[0].startswith("-"):
            yield start, pending
            pending = []
        if words and not pending:
            start = number
        pending = pending + words
    if pending:
        yield start, pending


def _split(line: str) -> list[str]:
    """Split a line into words, with quotes as in a shell; backslashes are kept, as in the paths of Windows.

    A comment begins with a # at the beginning of a word.
    """
    quote = ""
    for index, letter in enumerate(line):
        if quote or letter in "\"'":
            quote = "" if letter == quote else quote or letter
        elif letter == "#" and (not index or line[index - 1].isspace()):
            line = line[:index]
            break
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    return list(lexer)


def _read_first_generation(file: Path, text: str) -> Values:
    """Read the JSON object that the first generation of this program wrote, and the recipe that it had no keys for."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON, though it begins like an object: {error}") from None
    recipe = {name: Given(value, str(file)) for name, value in _FIRST_GENERATION.items()}
    hardware: Values = {}
    if "gpus" in values:
        gpus, origin = values.pop("gpus"), f"{file}, key 'gpus'"
        try:
            # A list names devices; its trailing comma tells [1], the second one, from 1, how many.
            devices = "".join(f"{int(gpu)}," for gpu in gpus) if isinstance(gpus, list) else str(int(gpus or 0))
        except (TypeError, ValueError, OverflowError):
            raise _error(f"gpus {_SHORT.repr(gpus)}: must be a number, or a list of numbers", origin) from None
        hardware = {"devices": Given(devices, origin)} if gpus else {"accelerator": Given("cpu", origin)}
    return recipe | hardware | _read_mapping(values, origin=str(file))


def _read_resumed(path: str | None) -> Values:
    """Read the settings of the experiment in ``--resume FOLDER``; any folder or file in it will do."""
    if path in (None, _BARE["resume"]):
        return {}
    start = Path(str(path)).expanduser().absolute()
    if not start.exists():
        raise UserError(f"--resume {path}: no such folder")
    for folder in (start, *start.parents):
        # Each run in an experiment has such a file, too.
        if (folder / CONFIG_FILE).is_file() and not folder.name.startswith("version_"):
            place = {"default_root_dir": str(folder.parent), "name": folder.name}
            settings = _read_mapping(read_yaml(folder / CONFIG_FILE), origin=str(folder / CONFIG_FILE))
            return settings | {name: Given(value, f"--resume {path}") for name, value in place.items()}
    raise UserError(f"--resume {path}: not an experiment's folder, as it has no {CONFIG_FILE}")


def _read_mapping(mapping: Mapping[Any, object], *, origin: str) -> Values:
    """Read settings by name, as in YAML; several values are a list, a mapping of terms to weights, or one value."""
    values: Values = {}
    for given, value in mapping.items():
        key = _RENAMED.get(given, given) if isinstance(given, str) else given
        where = f"{origin}, key {_SHORT.repr(given)}"
        if not isinstance(key, str) or key not in _SECTION_OF:
            hint = _hint(key) if isinstance(key, str) else ""
            raise _error(f"{_SHORT.repr(key)}: unknown setting{hint or '; --help lists all settings'}", where)
        if key not in _SEVERAL:
            values[key] = Given(_plain(key, value), where)
            continue
        items: list[object] = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            items = [item if isinstance(item, _CONTAINERS) else f"{term}={item}" for term, item in value.items()]
        values[key] = Given([item for item in items if item is not None], where)
    return values
