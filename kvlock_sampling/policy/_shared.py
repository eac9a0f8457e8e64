"""What several policies share: checks of settings, the clock, and one guidance scale per clip."""

import dataclasses
import math
import numbers
from math import inf, isfinite, nan
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..types import Observation, PolicyError

Range: TypeAlias = tuple[float, float]


def number(
    policy: Any, name: str, *, above: float = -inf, at_least: float = -inf, at_most: float = inf, optional: bool = False
) -> None:
    """Convert field `name` to a float `above` and within [at_least, at_most]; None passes if `optional`."""
    value = getattr(policy, name)
    if value is None and optional:
        return
    given = _finite(value)
    if given is None or not (given > above and at_least <= given <= at_most):
        limits = [f"> {above:g}"] * (above > -inf) + [f">= {at_least:g}"] * (at_least > -inf)
        limits += [f"<= {at_most:g}"] * (at_most < inf)
        reject(policy, name, f"a finite number {' and '.join(limits)}".strip(), max(1.0, at_least))
    object.__setattr__(policy, name, given)


def pair(policy: Any, name: str, *, at_least: float = -inf, at_most: float = inf, rising: bool = True) -> None:
    """Convert field `name` to two floats within [at_least, at_most], the lower first if `rising`."""
    value = getattr(policy, name)
    given = tuple(map(_finite, value)) if isinstance(value, tuple | list) else ()
    inside = all(v is not None and at_least <= v <= at_most for v in given)
    if len(given) != 2 or not inside or (rising and given[0] > given[1]):  # type: ignore[operator]
        order = ", the lower first," if rising else ""
        reject(policy, name, f"two finite numbers{order} within [{at_least:g}, {at_most:g}]", (0.0, 1.0))
    object.__setattr__(policy, name, given)


def reject(policy: Any, name: str, expected: str, example: Any) -> None:
    """Raise PolicyError for field `name`; the message shows a value that works, its default or `example`."""
    default = next(f.default for f in dataclasses.fields(policy) if f.name == name)
    shown = example if default is dataclasses.MISSING or default is None else default
    call = f"{type(policy).__name__}({'policy, ' if hasattr(policy, 'policy') else ''}{name}="
    raise PolicyError(f"{call}{getattr(policy, name)!r}): expected {expected}. This works: {call}{shown!r})")


def _finite(value: Any) -> float | None:
    try:
        given = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else nan
    except OverflowError:
        return None
    return given if isfinite(given) else None


def elapsed(previous: float | None, sigma: float) -> float:
    """Time since `previous` on the clock -log(sigma) of every policy, >= 0; 0 at the first step."""
    return 0.0 if previous is None else max(0.0, math.log(previous / sigma))


def worst(value: Tensor) -> Tensor:
    """The largest value of each clip, (batch, tokens) -> (batch,), because guidance has one scale per clip."""
    return value.amax(dim=tuple(range(1, value.ndim))) if value.ndim > 1 else value


def between(limits: Range, fraction: Tensor) -> Tensor:
    """limits[0] at fraction 0, limits[1] at fraction 1, never outside; `limits` may fall. Keeps shape and dtype."""
    low, high = limits
    return (low + (high - low) * fraction).clamp(min(limits), max(limits))


def scaled_cfg(obs: Observation, limits: Range, fraction: Tensor | float) -> Tensor | None:
    """The requested guidance scale times `between(limits, fraction)`, (batch,); None for limits (1, 1)."""
    if limits == (1.0, 1.0):
        return None
    requested = obs.requested_cfg_scale
    fraction = torch.as_tensor(fraction, device=requested.device)
    return requested * between(limits, worst(fraction)).to(requested.dtype)
