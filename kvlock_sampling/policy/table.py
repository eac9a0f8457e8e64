"""Built-in policies as plain tables and back: `{"type": "Linear", "gain": 1.0}`. Data only, never code."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ..types import PolicyError
from .base import Policy
from .constant import Constant
from .linear import Linear
from .lock_above import LockAbove
from .pid import PID
from .sigmoid import Sigmoid
from .threshold import Threshold
from .wrappers import Clamped, Smoothed, Windowed

TYPES: dict[str, type[Policy]] = {
    kind.__name__: kind for kind in (Constant, Linear, Threshold, Sigmoid, PID, Windowed, LockAbove, Smoothed, Clamped)
}


def from_table(table: Any, where: str = "policy") -> Policy:
    """A policy from a table with its class under "type" and its fields; a field that is a policy is again a table.

    where: the path of keys to this table, for errors.
    Raises PolicyError for an unknown type or key, naming the nearest known one, and for settings out of range.
    """
    if not isinstance(table, Mapping):
        raise PolicyError(f'{where} = {table!r}: expected a table, e.g.\n  [{where.split()[-1]}]\n  type = "Linear"')
    kind = TYPES.get(str(table.get("type")))
    if kind is None:
        raise PolicyError(f"{where}.type = {table.get('type')!r} is not a policy; {nearest(table.get('type'), TYPES)}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    settings: dict[str, Any] = {}
    for key, value in table.items():
        if key == "type":
            continue
        if key not in names:
            raise PolicyError(f"{where}.{key} is not a setting of {kind.__name__}; {nearest(key, names)}")
        settings[key] = from_table(value, f"{where}.{key}") if key == "policy" else value
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in settings]
    if missing:
        raise PolicyError(f"{where}: {kind.__name__} needs {' and '.join(missing)}; known keys: {', '.join(names)}")
    try:
        return kind(**settings)
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None


def to_table(policy: Policy) -> dict[str, Any]:
    """The table of a built-in policy, with every setting that is not None. Raises PolicyError for any other policy."""
    if TYPES.get(type(policy).__name__) is not type(policy):
        raise PolicyError(
            f"{policy!r} cannot be written as a file: it is code, and preset files hold only settings of "
            f"{', '.join(TYPES)}.\n  Keep it as a Python file, as the examples in policies/recipes are."
        )
    table: dict[str, Any] = {"type": type(policy).__name__}
    for field in dataclasses.fields(policy):  # type: ignore[arg-type]
        value = getattr(policy, field.name)
        if isinstance(value, Policy):
            table[field.name] = to_table(value)
        elif hasattr(value, "_asdict"):
            table[field.name] = value._asdict()
        elif value is not None:
            table[field.name] = value
    return table


def nearest(given: Any, known: Iterable[str]) -> str:
    """The end of an error message: the closest of `known` to what was given, and all of them."""
    known = list(known)
    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(given).lower(), folded, n=1, cutoff=0.5)
    return f"{f'did you mean {folded[close[0]]!r}? Known' if close else 'known'}: {', '.join(known) or 'none'}"
