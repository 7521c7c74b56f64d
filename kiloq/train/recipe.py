"""Recipes: TOML text and `--set` flags -> one frozen dataclass, which is the schema.

Knows no field by name, but that entries of a list which have a `name` differ in it.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from kiloq.errors import ConfigError

from .ranges import Range

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def load_recipe(kind: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML recipe; `overrides` are "a.b=value" strings whose values are TOML, or plain text where that fails."""
    return parse_config(kind, read_table(path, overrides))


def read_table(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe as it is written, before anything is checked."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {path} is not valid TOML: {error}.") from error
    for override in overrides:
        _apply(table, override)
    return table


def parse_config(kind: type[Config], table: Mapping[str, object], where: str = "") -> Config:
    """Check a table against a dataclass: unknown, missing and wrongly typed keys are errors that name the key."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            raise ConfigError(f"{where}{key} is not a setting.{_nearest(key, list(fields))}")
    values: dict[str, object] = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], f"{where}{name}")
            if values[name] in ("", ()) and _is_needed(field):
                raise ConfigError(f"{where}{name} is empty; it must be set.")
        elif _is_needed(field):
            raise ConfigError(f"{where}{name} is missing; set it in the recipe or with --set.")
    return kind(**values)


def _is_needed(field: "dataclasses.Field[object]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def to_toml(config: object) -> str:
    """The recipe that `load_recipe` reads back to an equal configuration."""
    return "\n".join(_lines(config, "")) + "\n"


def _apply(table: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {override} is not of the form a.b=value.")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, last = path.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {parent} is not a table that holds settings.")
    table[last] = value


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else f" Known here: {', '.join(known)}."


def _convert(hint: Any, value: object, where: str) -> object:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return _convert(inner, value, where)
    if origin is Annotated:
        plain, *ranges = typing.get_args(hint)
        return _within(_convert(plain, value, where), [one for one in ranges if isinstance(one, Range)], where)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if not any(value == choice and type(value) is type(choice) for choice in choices):  # 1 is equal to true
            raise ConfigError(f"{where} is {value!r}; it is one of {', '.join(map(str, choices))}.")
        return value
    if origin is tuple:
        return _sequence(hint, value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}; it must be a table of settings.")
        return parse_config(hint, value, f"{where}.")  # type: ignore[arg-type]  # a type, not an instance
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < math.inf:
            raise ConfigError(f"{where} is {value}; it must be a finite number.")
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} is {value!r}; it must be of type {hint.__name__}.")
    return value


def _within(value: object, ranges: Sequence[Range], where: str) -> object:
    for one in ranges:
        if not isinstance(value, int | float) or not one.holds(value):
            raise ConfigError(f"{where} is {value}; it must be {one}.")
    return value


def _sequence(hint: Any, value: object, where: str) -> object:
    if not isinstance(value, list):
        raise ConfigError(f"{where} is {value!r}; it must be a list.")
    names = [item["name"] for item in value if isinstance(item, dict) and isinstance(item.get("name"), str)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{where} has {len(twice)} entries of the name {twice[0]!r}; each needs its own.")
    inner = typing.get_args(hint)
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        raise ConfigError(f"{where} has {len(value)} entries; it needs {len(kinds)}.")
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _lines(config: Any, prefix: str) -> list[str]:
    plain, tables = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        if value is None:
            continue
        if dataclasses.is_dataclass(value):
            tables += ["", f"[{name}]", *_lines(value, f"{name}.")]
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for item in value:
                tables += ["", f"[[{name}]]", *_lines(item, f"{name}.")]
        else:
            plain.append(f"{field.name} = {_literal(value)}")
    return plain + tables


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are JSON's
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)
