"""Estimators of how uncertain the model is about its clean prediction. One file each; all behind init/step."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from ..types import EstimatorError
from .base import Estimator, masked_mean
from .renoise import RenoiseVariance
from .trajectory import TrajectoryVariance

ESTIMATORS: dict[str, type[Estimator]] = {e.__name__: e for e in (TrajectoryVariance, RenoiseVariance)}


def make_estimator(settings: dict[str, Any]) -> Estimator:
    """An estimator from plain data, e.g. {"type": "TrajectoryVariance", "window": 10}; span 0 and window 0 mean none.

    Raises:
        EstimatorError: unknown type or key; the message names the nearest known one.
    """
    settings = dict(settings)
    name = settings.pop("type", None)
    if name not in ESTIMATORS:
        raise EstimatorError(
            f"unknown estimator type {name!r}; expected one of {', '.join(ESTIMATORS)}.{_nearest(name, ESTIMATORS)}"
        )
    kind = ESTIMATORS[name]
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise EstimatorError(f"{name} has no setting {key!r}; it has {', '.join(known)}.{_nearest(key, known)}")
    limits = {k: None for k in ("window", "span") if settings.get(k) == 0}  # TOML has no null
    return kind(**{**settings, **limits})


def _nearest(word: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


__all__ = ["ESTIMATORS", "Estimator", "RenoiseVariance", "TrajectoryVariance", "make_estimator", "masked_mean"]
