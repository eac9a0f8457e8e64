"""Settings are checked once, when a policy is made, and the error shows a setting that works."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, TypeAlias

from ..types import PolicyError

Range: TypeAlias = tuple[float, float]


def number(
    policy: Any,
    name: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    optional: bool = False,
) -> None:
    """Makes field `name` a float, strictly `above` and within [at_least, at_most]; None passes where `optional`."""
    value = getattr(policy, name)
    if value is None and optional:
        return
    given = _finite(value)
    if given is None or not (given > above and at_least <= given <= at_most):
        limits = [f"> {above:g}"] * (above > -math.inf) + [f">= {at_least:g}"] * (at_least > -math.inf)
        limits += [f"<= {at_most:g}"] * (at_most < math.inf)
        reject(policy, name, " ".join(["a finite number", " and ".join(limits)]).strip(), max(1.0, at_least))
    object.__setattr__(policy, name, given)


def count(policy: Any, name: str, *, optional: bool = False) -> None:
    """Checks that field `name` is a whole number >= 1; None passes where `optional`."""
    value = getattr(policy, name)
    if not (value is None and optional) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        reject(policy, name, "a whole number >= 1", 20)


def flag(policy: Any, name: str) -> None:
    """Checks that field `name` is True or False."""
    if not isinstance(getattr(policy, name), bool):
        reject(policy, name, "True or False", True)


def pair(
    policy: Any,
    name: str,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    rising: bool = True,
    optional: bool = False,
) -> None:
    """Makes field `name` a tuple of two floats within [at_least, at_most], low before high where `rising`."""
    value = getattr(policy, name)
    if value is None and optional:
        return
    given = tuple(map(_finite, value)) if isinstance(value, tuple | list) else ()
    inside = all(v is not None and at_least <= v <= at_most for v in given)
    if len(given) != 2 or not inside or (rising and given[0] > given[1]):  # type: ignore[operator]
        within = f" within [{at_least:g}, {at_most:g}]" if max(abs(at_least), abs(at_most)) < math.inf else ""
        within = within or (f", each >= {at_least:g}" if at_least > -math.inf else "")
        reject(policy, name, f"two finite numbers{', the lower first' if rising else ''}{within}", (0.0, 1.0))
    object.__setattr__(policy, name, given)


def reject(policy: Any, name: str, expected: str, example: Any) -> None:
    """Raises PolicyError for field `name`; its default, where there is one, is the example that works."""
    default = next(f.default for f in dataclasses.fields(policy) if f.name == name)
    shown = example if default is dataclasses.MISSING or default is None else default
    kind = type(policy).__name__
    inner = "policy, " if hasattr(policy, "policy") else ""
    raise PolicyError(
        f"{kind}({inner}{name}={getattr(policy, name)!r}): expected {expected}. "
        f"This works: {kind}({inner}{name}={shown!r})"
    )


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        return None
    return float(value)
