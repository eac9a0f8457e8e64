"""Nested frozen dataclasses as TOML tables and back: `{"type": "Linear", "gain": 1.0}`. Data only, never code.

A table names its class under "type"; the other keys are the fields of the class. A field that holds such an object is
again a table. TOML has no null, so None is the text "none".
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from ..types import KVLockError, PolicyError


def read_toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML text; `where` names it in the PolicyError for text that is not TOML."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for a whole number of thousands of digits
        raise PolicyError(f"{where} is not valid TOML: {error}") from None


def from_table(table: Any, registry: Mapping[str, type], where: str, depth: int = 0) -> Any:
    """Make an object of the class in `registry` that `table` names; `where` is the path of keys to it, for errors."""
    if not isinstance(table, Mapping):
        raise PolicyError(f'{where} = {table!r}: expected a table, e.g. {{ type = "{next(iter(registry))}" }}')
    if depth > 16:  # a mistake, and Python's own recursion has a limit
        raise PolicyError(f"{where}: more than 16 tables inside one another")
    if (kind := registry.get(str(table.get("type")))) is None:
        raise PolicyError(f"{where}.type = {table.get('type')!r} is not known; {nearest(table.get('type'), registry)}")
    fields = _fields(kind)
    settings: dict[str, Any] = {}
    for key, value in table.items():
        if key != "type" and key not in fields:
            raise PolicyError(f"{where}.{key} is not a setting of {kind.__name__}; {nearest(key, fields)}")
        if key in ("policy", "estimator"):
            settings[key] = from_table(value, registry, f"{where}.{key}", depth + 1)
        elif key != "type":
            settings[key] = None if value == "none" else tuple(value) if isinstance(value, list) else value
    if missing := [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in settings]:
        raise PolicyError(f"{where}: {kind.__name__} needs {' and '.join(missing)}; known: {', '.join(fields)}")
    try:
        return kind(**settings)
    except (KVLockError, TypeError, ValueError, ArithmeticError) as error:
        raise PolicyError(f"{where}: {error}") from None


def to_table(value: Any, registry: Mapping[str, type]) -> dict[str, Any]:
    """Return the table of an object, with all its settings: `from_table(to_table(x, r), r, "") == x`."""
    kind = type(value)
    if registry.get(kind.__name__) is not kind:
        raise PolicyError(f"{value!r} cannot be written as a file: it is code. Files hold {', '.join(registry)}.")
    table: dict[str, Any] = {"type": kind.__name__}
    for name, field in _fields(kind).items():
        setting = getattr(value, name)
        if name in ("policy", "estimator"):
            table[name] = to_table(setting, registry)
        elif setting is not None or field.default is not None:
            table[name] = "none" if setting is None else setting
    return table


def nearest(given: Any, known: Iterable[str]) -> str:
    """The end of an error message: the closest of `known` to what was given, and all of them."""
    known = list(known)
    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(given).lower(), folded, n=1, cutoff=0.5)
    return f"{f'did you mean {folded[close[0]]!r}? Known' if close else 'known'}: {', '.join(known) or 'none'}"


def write_toml(table: Mapping[str, Any], name: str = "") -> str:
    """Return a table as TOML text: first its values, then a section for every table in it."""
    sections = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    values = [f"{_key(key)} = {_text(value)}\n" for key, value in table.items() if key not in sections]
    head = "".join([f"[{name}]\n"] * bool(name) + values)
    parts = [write_toml(value, f"{name}.{key}" if name else key) for key, value in sections.items()]
    return "\n".join([head] * bool(head) + parts)


def _fields(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """The settings of a class by name, without those that only Python can give (repr=False)."""
    return {field.name: field for field in dataclasses.fields(kind) if field.repr}


def _key(key: str) -> str:
    return key if key.isidentifier() and key.isascii() else _text(key)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, float):
        return repr(float(value))  # numpy's floats have a repr of their own
    value = "none" if value is None else value
    if isinstance(value, str | int):  # JSON writes text, whole numbers, true and false as TOML does, except for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise PolicyError(f"{value!r} cannot be written as TOML; expected a number, text, True or False, or lists of them")
