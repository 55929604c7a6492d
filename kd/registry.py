"""Things that a person picks by name: one generic registry, and the ways to write a choice down.

A choice is written ``name``, ``name(key=value, ...)`` with Python literals as values, or
``path/to/file.py:function`` for a person's own code.
"""

import ast
import difflib
import hashlib
import inspect
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kd.errors import UserError

T = TypeVar("T")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or nothing where none is near.

    Example:
        >>> suggestion("resnet19", ["resnet18", "vgg16"])
        "; did you mean 'resnet18'?"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1) or [one for one in known if name and one.startswith(name)]
    return f"; did you mean {near[0]!r}?" if near else ""


class Registry(Mapping[str, T]):
    """A mapping from names to things of one kind; the choices of a flag.

    Args:
        kind: What one entry is, in the singular, as messages say it (``"loss"``).

    Example:
        >>> shapes = Registry[type]("shape")
        >>> shapes.register("list")(list) is list and shapes["list"] is list
        True
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters a thing under ``name``; a name twice is a ``ValueError``."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"two {self.kind}s are called {name!r}")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        """Return the entry of that name; an unknown one is a ``UserError`` that lists the choices."""
        try:
            return self._entries[name]
        except KeyError:
            choices = ", ".join(self._entries)
            hint = suggestion(name, self._entries)
            raise UserError(f"there is no {self.kind} {name!r}{hint} (there are: {choices})") from None

    def __contains__(self, name: object) -> bool:
        """Say whether the name is known; no error where it is not."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order of their entry."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._entries)


def parse_choice(text: str) -> tuple[str, dict[str, Any]]:
    """Take a written choice apart.

    Args:
        text: ``name`` or ``name(key=value, ...)``; the values are Python literals, or bare words for strings.

    Returns:
        The name, and the hyperparameters given with it.

    Raises:
        UserError: If the parentheses hold anything but ``key=literal`` pairs.

    Example:
        >>> parse_choice("convnet(widths=[8, 16])")
        ('convnet', {'widths': [8, 16]})
    """
    match = re.fullmatch(r"\s*([^()\s]+)\s*(?:\((.*)\))?\s*", text, flags=re.DOTALL)
    if match is None:
        raise UserError(f"{text!r} is not of the form name or name(key=value, ...)")
    name, arguments = match.groups()
    if not arguments:
        return name, {}
    # A word with dots, such as the name of a layer, is one word here.
    arguments = re.sub(r"(?<=[=,\[])(\s*)(\w+(?:\.\w+)+)(?=\s*[,\])]|\s*$)", _quoted, arguments)
    problem = UserError(f"{text!r}: in the parentheses stand key=value pairs, such as {name}(size=8)")
    try:
        call = ast.parse(f"_({arguments})", mode="eval").body
        if (
            not isinstance(call, ast.Call)
            or not isinstance(call.func, ast.Name)
            or call.args
            or any(keyword.arg is None for keyword in call.keywords)
        ):
            raise problem
        return name, {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise problem from None


def _quoted(match: re.Match[str]) -> str:
    """Put a word with dots into quotes, unless it is a number."""
    try:
        float(match[2])
    except ValueError:
        return f"{match[1]}'{match[2]}'"
    return match[0]


class Call(NamedTuple):
    """A value that is itself written as ``name(value, ...)``, such as the schedule ``linear(8, 2)``."""

    name: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        """Write it down again."""
        return f"{self.name}({', '.join(map(str, self.arguments))})"


def parse_value(text: str) -> Any:  # noqa: ANN401 (whatever literal stands there)
    """Read a value: a Python literal, a bare word for a string, or ``name(value, ...)`` as a :class:`Call`.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> parse_value("0.9"), parse_value("warmup(0.9, 20)")
        (0.9, Call(name='warmup', arguments=(0.9, 20)))
    """
    try:
        return _literal(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is no value") from None


def _literal(node: ast.expr) -> Any:  # noqa: ANN401 (whatever literal stands there)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return Call(node.func.id, tuple(ast.literal_eval(argument) for argument in node.args))
    if isinstance(node, ast.List | ast.Tuple):
        elements = [_literal(element) for element in node.elts]
        return elements if isinstance(node, ast.List) else tuple(elements)
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def check_hyperparameters(function: Callable[..., object], given: Mapping[str, Any], *, choice: str) -> None:
    """Refuse hyperparameters that a function does not take, naming the ones that it does.

    Args:
        function: The class or function that the hyperparameters are meant for.
        given: The hyperparameters.
        choice: The choice as the person wrote it, for the message.

    Raises:
        UserError: If a name is unknown.
    """
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in given:
        if name not in parameters:
            known = ", ".join(parameters) or "none"
            raise UserError(
                f"{choice!r}: there is no hyperparameter {name!r}{suggestion(name, parameters)} (it takes: {known})"
            )


def is_own_code(name: str) -> bool:
    """Say whether a name points to a person's own code, ``path/to/file.py:function``.

    Example:
        >>> is_own_code("my_losses.py:cosine"), is_own_code("kl")
        (True, False)
    """
    return bool(re.search(r"\.py:[^/:]+$", name))


_OWN_MODULES: dict[Path, types.ModuleType] = {}


def call_own_code(name: str, function: Callable[..., Any], **arguments: object) -> Any:  # noqa: ANN401
    """Call a person's function, and say in words where it fails.

    Args:
        name: How the person named it.
        function: What :func:`load_own_code` returned.
        arguments: By keyword.

    Raises:
        UserError: If it raises anything.
    """
    try:
        return function(**arguments)
    except Exception as error:
        file = Path(getattr(getattr(function, "__code__", None), "co_filename", ""))
        raise UserError(f"{name!r}: {_what_it_raised(error, file)}") from error


def _what_it_raised(error: Exception, file: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f" at line {line} of {file}" if line is not None else ""
    return f"it raised {type(error).__name__}{where}: {error}"


def load_own_code(name: str) -> Callable[..., Any]:
    """Run a person's file and return the function that they named.

    Args:
        name: ``path/to/file.py:function``; the path is relative to the working directory.

    Raises:
        UserError: If the file, or the function in it, is not there, or the file raises anything.
    """
    path, _, attribute = name.rpartition(":")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"{name!r}: there is no file {file}")
    module = _OWN_MODULES.get(file)
    if module is None:
        # Classes look their module up by its name.
        module = types.ModuleType(f"own_{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}")
        module.__file__ = str(file)
        sys.modules[module.__name__] = module
        try:
            exec(compile(file.read_bytes(), str(file), "exec"), vars(module))  # noqa: S102 (the person asked for it)
        except Exception as error:
            del sys.modules[module.__name__]
            raise UserError(f"{name!r}: {_what_it_raised(error, file)}") from error
        _OWN_MODULES[file] = module
    found = getattr(module, attribute, None)
    if not callable(found):
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{file} has no function {attribute!r}{suggestion(attribute, defined)}")
    function: Callable[..., Any] = found
    return function
