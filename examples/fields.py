"""Typed values for frozen dataclasses, from JSON or from `section.key=value` on a command line.

One rule for both: the annotation of a field decides what a value may be. No field is ever created by a typing mistake:
an unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from examples.errors import UserError

T = TypeVar("T")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def dataclass_from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build `cls` from a mapping such as `json.load` gives; missing keys keep their defaults."""
    if not isinstance(values, Mapping):
        raise UserError(f"{path or cls.__name__}: must be a table of keys and values; got {values!r}")
    hints = _hints(cls)
    built = {}
    for key, value in values.items():
        name = _join(path, str(key))
        _check_key(str(key), hints, path)
        built[key] = _convert(value, hints[key], name)
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name not in built
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{_join(path, missing[0])}: is missing and has no default")
    return cls(**built)


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON-able inverse of `dataclass_from_dict` (tuples become lists when written as JSON)."""
    return dataclasses.asdict(config)


def replace_values(config: T, assignments: Iterable[str]) -> T:
    """Apply `section.key=value` strings to a nested frozen dataclass; returns a new one, all checks run again.

    Values: numbers (1e-3, 4_096), true/false, none, bare text, and comma-separated lists for tuple fields. Setting a key
    inside an optional section that is none (`model.yarn.factor=4`) switches that section on with its defaults.
    All assignments of one section take effect together, so their order does not matter to its checks.
    """
    tree: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"override: must be section.key=value; got {assignment!r}")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"{key.strip()}: one override sets the whole section, another a key in it")
        if isinstance(node.get(parts[-1]), dict):
            raise UserError(f"{key.strip()}: one override sets the whole section, another a key in it")
        node[parts[-1]] = value.strip()
    return _replace(config, tree, "")


def _replace(config: Any, tree: Mapping[str, Any], path: str) -> Any:
    if not tree:
        return config
    hints = _hints(type(config))
    changes = {}
    for key, value in tree.items():
        name = _join(path, key)
        _check_key(key, hints, path)
        if isinstance(value, Mapping):
            current = getattr(config, key)
            section = _section(hints[key])
            if section is None:
                raise UserError(f"{name}: is a value, not a section; got a key in it: {next(iter(value))!r}")
            changes[key] = _replace(section() if current is None else current, value, name)
        else:
            changes[key] = _parse(value, hints[key], name)
    return dataclasses.replace(config, **changes)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _check_key(key: str, hints: Mapping[str, Any], path: str) -> None:
    if key in hints:
        return
    near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
    advice = f"did you mean {_join(path, near[0])!r}?" if near else f"valid keys: {', '.join(hints)}"
    raise UserError(f"{_join(path, key)}: there is no such key; {advice}")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _options(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _section(kind: Any) -> type | None:
    return next((k for k in _options(kind) if dataclasses.is_dataclass(k)), None)


def _describe(kind: Any) -> str:
    """A type in the user's words."""
    words = []
    for option in _options(kind):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if option is type(None):
            words.append("none")
        elif origin is typing.Literal:
            words.append(" or ".join(map(str, args)))
        elif origin is tuple:
            inner = "values" if len(args) != 2 or args[1] is not ... else f"{_describe(args[0])} values"
            words.append(f"a comma-separated list of {inner}")
        else:
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            words.append(names.get(option, f"a section {getattr(option, '__name__', option)}"))
    return " or ".join(words)


def _fail(name: str, kind: Any, value: object) -> typing.NoReturn:
    raise UserError(f"{name}: must be {_describe(kind)}; got {value!r}")


def _parse(text: str, kind: Any, name: str) -> Any:
    """A command-line string as a value of the annotated type."""
    # None first: a list refuses the word outright.
    for option in sorted(_options(kind), key=lambda option: option is not type(None)):
        try:
            return _parse_one(text, option, name)
        except ValueError:
            continue
    _fail(name, kind, text)


def _parse_one(text: str, kind: Any, name: str) -> Any:
    lower = text.lower()
    if kind is type(None):
        if lower in ("none", "null", ""):
            return None
    elif kind is bool:
        if lower in _TRUE + _FALSE:
            return lower in _TRUE
    elif kind is int:
        try:
            return int(text.replace("_", ""))
        except ValueError:
            number = float(text)  # 1e6 is a fine way to write a token count
            if number.is_integer():
                return int(number)
    elif kind is float:
        return float(text.replace("_", ""))
    elif kind is str:
        if lower not in ("none", "null"):
            return text
    elif typing.get_origin(kind) is typing.Literal:
        if text in typing.get_args(kind):
            return text
    elif typing.get_origin(kind) is tuple:
        items = [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]
        return _tuple(items, kind, name, _parse)
    raise ValueError


def _convert(value: Any, kind: Any, name: str) -> Any:
    """A JSON value as a value of the annotated type."""
    for option in _options(kind):
        origin = typing.get_origin(option)
        if dataclasses.is_dataclass(option):
            if isinstance(value, option):
                return value
            if isinstance(value, Mapping):
                return dataclass_from_dict(option, value, name)
        elif option is type(None):
            if value is None:
                return None
        elif origin is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif origin is tuple:
            if isinstance(value, list | tuple):
                return _tuple(value, option, name, _convert)
        elif option is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        elif type(value) is option:
            return value
    _fail(name, kind, value)


def _tuple(items: Any, kind: Any, name: str, convert: Any) -> tuple[Any, ...]:
    args = typing.get_args(kind)
    if len(args) == 2 and args[1] is ...:
        args = (args[0],) * len(items)
    if len(items) != len(args):
        raise UserError(f"{name}: must have {len(args)} values; got {len(items)}")
    return tuple(
        convert(item, arg, f"{name}[{i}]") for i, (item, arg) in enumerate(zip(items, args, strict=True))
    )
