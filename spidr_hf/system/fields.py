"""Documented fields of a configuration: their values from TOML or the command line, checked, and back to TOML."""

import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from typing import Any

import tomlkit

from .errors import ConfigError

_LARGEST = 1 << 63  # of whole numbers, in TOML and in tensors


def option(default: Any, doc: str, check: Callable[[Any], bool] | None = None, allowed: str = "") -> Any:
    """A documented field. `check` tells whether a value is possible; `allowed` says in words what it tests."""
    metadata = {"doc": doc, "check": check, "allowed": allowed}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def one_of(choices: Sequence[str]) -> dict[str, Any]:
    """The check of a field that is one of these words."""
    return {"check": lambda value: value in choices, "allowed": "one of " + ", ".join(map(repr, choices))}


POSITIVE: dict[str, Any] = {"check": lambda value: value > 0, "allowed": "positive"}


NOT_NEGATIVE: dict[str, Any] = {"check": lambda value: value >= 0, "allowed": "at least 0"}


SHARE: dict[str, Any] = {"check": lambda value: 0 <= value <= 1, "allowed": "in [0, 1]"}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields in which two `PretrainingConfig.to_dict` differ: name -> (old value, new value)."""
    changed: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed |= differences(before, after, f"{prefix}{name}.")
        elif before != after:
            changed[prefix + name] = (before, after)
    return changed


def dump_toml(sections: Mapping[str, Any]) -> str:
    """Nested tables of strings, numbers, booleans and lists as TOML; None is left out."""
    return tomlkit.dumps(_without_none(sections))


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in table.items() if value is not None}
    return {key: _without_none(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def toml_value(value: Any) -> str:
    """A bool, number, string, list or table as TOML has it."""
    return tomlkit.item(value).as_string()


def hint(name: Any, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all."""
    nearest = get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(known)}."


def make_section(cls: type, section: str, values: Mapping[str, Any]) -> Any:
    """
    A dataclass from the values of a config's section.

    Raises `ValueError` that names the field which is unknown, of another type than its annotation, or out of bounds.
    """
    known = {f.name: f for f in fields(cls)}
    types_ = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        full = f"{section}.{name}"
        if name not in known:
            raise ConfigError(f"Unknown field `{full}`.{hint(name, tuple(known))}")
        value = convert_value(full, types_[name], value)
        check = known[name].metadata["check"]
        if check is not None and value is not None and not check(value):
            raise ConfigError(f"`{full}` must be {known[name].metadata['allowed']}, got {value!r}.")
        checked[name] = value
    return cls(**checked)


def convert_value(name: str, kind: Any, value: Any) -> Any:
    """The value in the field's type; strings from the command line are read as that type."""
    arguments = typing.get_args(kind)
    optional = isinstance(kind, types.UnionType) and type(None) in arguments
    if optional:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        # Of `str | list[str]`, what is a list or spells one is a list.
        spelled = parsed(value) if isinstance(value, str) and value.startswith("[") else value
        kind = next((k for k in kinds if typing.get_origin(k) is list and isinstance(spelled, list)), kinds[0])
    if kind is str:
        if isinstance(value, str):
            return value
        raise ConfigError(f"`{name}` must be a string, got {value!r}.")
    value = parsed(value)
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
        raise ConfigError(f"`{name}` must be true or false, got {value!r}.")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, int) and abs(value) >= _LARGEST:  # which neither floats nor messages can hold
        raise ConfigError(f"`{name}` must be a number below 2**63.")
    if kind is int:
        if number and abs(value) < _LARGEST and float(value).is_integer():
            return int(value)
        raise ConfigError(f"`{name}` must be an integer, got {value!r}.")
    if kind is float:
        if number and math.isfinite(value):
            return value
        raise ConfigError(f"`{name}` must be a number, got {value!r}.")
    origin = typing.get_origin(kind)
    if origin is list:
        if isinstance(value, (list, tuple)):
            return [convert_value(name, typing.get_args(kind)[0], item) for item in value]
        raise ConfigError(f"`{name}` must be a list, for example `[...]`, got {value!r}.")
    if isinstance(value, Mapping):
        return dict(value)
    raise ConfigError(f"`{name}` must be a table, got {value!r}.")


def parsed(value: Any) -> Any:
    """A string as the TOML value that it spells, where it does."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def section_dict(section: Any) -> dict[str, Any]:
    """Fields and values of a section, without those that are None."""
    values = {f.name: getattr(section, f.name) for f in fields(section)}
    return {name: value for name, value in values.items() if value is not None}


__all__ = [
    "NOT_NEGATIVE",
    "POSITIVE",
    "SHARE",
    "convert_value",
    "differences",
    "dump_toml",
    "hint",
    "make_section",
    "one_of",
    "option",
    "parsed",
    "section_dict",
    "toml_value",
]
