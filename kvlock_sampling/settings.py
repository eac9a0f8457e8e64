"""What a lock's arguments come to: a preset's advice where nothing was given, and defaults where there is none."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from . import options
from .attention import reachable_modules
from .policy import Clamped, Policy, as_policy
from .presets import Preset, load_policy
from .run import advised_estimator, check_threshold, default_threshold, first_given, method_of
from .types import RunError, Scalar
from .variance import Estimator


class Judgement(NamedTuple):
    """How a lock judges: what measures, what decides, and on which scale. advice: the preset it came from, if any."""

    policy: Policy
    estimator: Estimator
    threshold: Any
    rescale: bool
    cfg_floor: float
    advice: Preset | None


def judgement(
    model: Any,
    policy: Any,
    *,
    estimator: Any,
    threshold: Any,
    rescale: bool | None,
    cfg_floor: Any,
    locks: bool,
) -> Judgement:
    """What was given, else what a preset advises, else the defaults. locks: there is a source to lock to.

    Raises:
        PolicyError, EstimatorError: what cannot be meant.
    """
    chosen: Policy = load_policy(policy) if isinstance(policy, (str, os.PathLike)) else as_policy(policy)
    if policy == "default" and not locks:
        chosen = Clamped(chosen, lock=(0.0, 0.0))  # nobody asked for a lock
    advice = chosen if isinstance(chosen, Preset) else None
    advised = (advice.threshold, advice.rescale, advice.cfg_floor) if advice else (None, None, None)
    options.check_estimator(estimator)
    measures = (estimator or advised_estimator(advice)).bound(reachable_modules(model))
    limit = first_given(threshold, advised[0], default_threshold(measures))
    check_threshold(limit)
    floor = first_given(cfg_floor, advised[2], 1.0)
    options.check_floor(floor)
    return Judgement(chosen, measures, limit, bool(first_given(rescale, advised[1], False)), floor, advice)


def noise_levels(sigma: tuple[float, float], model: Any) -> tuple[float, float]:
    """An evaluation's noise level in the model's own form, and on the clock: the same in variance-exploding form.

    Raises:
        RunError: it is not one, or negative, or not finite.
    """
    low, high = sigma
    if not (low >= 0 and math.isfinite(high)):
        raise RunError(f"sigma is {low if low == high else (low, high)}; expected a noise level >= 0, finite.")
    if high - low > 1e-4 * high:
        raise RunError(f"sigma runs from {low} to {high} within one call; a lock needs one noise level per call.")
    to_ve = method_of(model, "to_ve")
    return high, high if to_ve is None else float(to_ve(high))


def requested_scale(extra_args: Mapping[str, Any], name: str, default: Any) -> Scalar:
    """The guidance scale the caller asked for: given, or the default of a model that does its own guidance.

    Raises:
        RunError: it is no finite number, and no tensor.
    """
    requested = extra_args.get(name, default)
    if not isinstance(requested, (int, float, Tensor)) or isinstance(requested, bool):
        raise RunError(f"{name}={requested!r}; expected a number, or a tensor of one number per clip.")
    if isinstance(requested, (int, float)) and not math.isfinite(requested):
        raise RunError(f"{name}={requested}; expected a finite number.")
    return requested
