"""Checks of the settings of policies, estimators and presets: frozen dataclasses, each with an `_error` to raise."""

import dataclasses
import numbers
from collections.abc import Iterable
from math import inf, isfinite
from typing import Any

from ..types import KVLockError


def number(owner: Any, *names: str, optional: bool = False, **limits: Any) -> None:
    """Convert these fields to numbers within the limits of `within`; None passes if `optional`."""
    for name in names:
        value = getattr(owner, name)
        if (given := within(value, **limits)) is None and not (value is None and optional):
            reject(owner, name, expected(**limits), _example(**limits))
        object.__setattr__(owner, name, given)


def check_number(name: str, value: Any, error: type[KVLockError], hint: str = "", **limits: Any) -> Any:
    """Return an argument as a number within the limits of `within`, or raise this error."""
    if (given := within(value, **limits)) is None:
        raise error(f"{name}={value!r}; expected {expected(**limits)}, e.g. {name}={_example(**limits)!r}.{hint}")
    return given


def within(
    x: Any, above: float = -inf, at_least: float = -inf, at_most: float = inf, below: float = inf, whole: bool = False
) -> float | None:
    """Return a value as a float, or an int if `whole`; None if it is no finite number within the limits."""
    try:
        given = float(x) if isinstance(x, numbers.Real) and not isinstance(x, bool) else inf
    except OverflowError:
        return None
    if not (isfinite(given) and above < given < below and at_least <= given <= at_most):
        return None
    return given if not whole else int(x) if isinstance(x, numbers.Integral) else None


def expected(*, whole: bool = False, **limits: float) -> str:
    """The limits of `within` in words."""
    signs = {"above": ">", "at_least": ">=", "at_most": "<=", "below": "<"}
    bounds = [f"{sign} {limits[name]:g}" for name, sign in signs.items() if name in limits]
    return f"a {'whole' if whole else 'finite'} number {' and '.join(bounds)}".strip()


def _example(**limits: Any) -> float:
    """A number within the limits."""
    tried = (1, 2, 10) if limits.get("whole") else (1.0, 2.0, 0.5, 10.0)
    return next((n for n in tried if within(n, **limits) is not None), limits.get("at_least", limits.get("at_most", 1)))


def pair(owner: Any, name: str, *, at_least: float = -inf, at_most: float = inf, rising: bool = True) -> None:
    """Convert field `name` to two floats within [at_least, at_most], the lower first if `rising`."""
    value = getattr(owner, name)
    given = [within(v, at_least=at_least, at_most=at_most) for v in value] if isinstance(value, tuple | list) else []
    if len(given) != 2 or None in given or (rising and given[0] > given[1]):  # type: ignore[operator]
        order = ", the lower first," if rising else ""
        reject(owner, name, f"two finite numbers{order} within [{at_least:g}, {at_most:g}]", (0.0, 1.0))
    object.__setattr__(owner, name, tuple(given))


def levels(owner: Any, name: str) -> None:
    """Convert field `name`, one number > 0 or several, to a tuple of floats."""
    value = getattr(owner, name)
    given = tuple(within(v, above=0.0) for v in (value if isinstance(value, tuple | list) else (value,)))
    if None in given:
        reject(owner, name, "finite numbers > 0", (1.0, 0.3))
    object.__setattr__(owner, name, given)


def as_patch(patch: Any, error: type[KVLockError]) -> tuple[int, int, int]:
    """Return latents per token along (time, height, width), three whole numbers >= 1, or raise this error."""
    sizes: list[Any] = [within(p, at_least=1, whole=True) for p in patch] if isinstance(patch, Iterable) else []
    if len(sizes) != 3 or None in sizes:
        raise error(f"patch={patch!r}; expected latents per token along (time, height, width), e.g. patch=(1, 2, 2).")
    return sizes[0], sizes[1], sizes[2]


def flag(owner: Any, *names: str, optional: bool = False) -> None:
    """Check that these fields are True or False; None passes if `optional`."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, bool) and not (value is None and optional):
            reject(owner, name, "True or False", True)


def reject(owner: Any, name: str, wanted: str, example: Any) -> None:
    """Raise the owner's error for field `name`; the message shows a value that works, its default or `example`."""
    default = next(f.default for f in dataclasses.fields(owner) if f.name == name)
    shown = example if default in (dataclasses.MISSING, None, ()) else default
    first = dataclasses.fields(owner)[0].name
    inner = f"{first}, " if first in ("policy", "estimator") else ""
    call = f"{type(owner).__name__}({inner}{name}="
    raise owner._error(f"{call}{getattr(owner, name)!r}): expected {wanted}. This works: {call}{shown!r})")


def check_seed(seed: Any, error: type[KVLockError], plus: int = 0) -> int:
    """A seed, and `plus` more, modulo 2**64. Raises this error for all but whole numbers in [0, 2**64), also for -1."""
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or not 0 <= int(seed) < 2**64:
        raise error(f"seed={seed!r}; expected a whole number in [0, 2**64), e.g. seed=0. By chance: seed=torch.seed().")
    return (int(seed) + plus) % 2**64
